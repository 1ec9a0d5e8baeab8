// Attention of a few new tokens to long caches, keys split among thread blocks (flash-decoding; Dao
// et al. 2023), with mma.sync and cp.async, for sm_80 and later.
//
// All query heads of a kv head and all tokens are rows of one product, so that keys and values are
// read once. The kernel waits for memory: docs/design/decode.md has the limits and the schedule.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/plan.cuh"
#include "decode/warp.cuh"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/shared.cuh"

namespace jax_flash::decode {

// The end of a row: 1 / sum and lse, its sink counted. Base 2 in, natural logarithm out.
struct RowResult {
  float factor;
  float lse;
};

__device__ __forceinline__ RowResult finish_row(const DecodeParams& params, int batch, int head,
                                                float maximum, float sum) {
  if (sum == 0.0f) return {0.0f, kMinusInfinity};
  constexpr float kLog2e = SoftmaxScale::kLog2e;
  float factor = 1.0f;
  if (params.sinks != nullptr) {
    const float sink = params.sinks[int64_t{batch} * params.sink_stride + head] * kLog2e;
    const float larger = fmaxf(maximum, sink);
    factor = ptx::ex2_approx_ftz(maximum - larger);
    sum = sum * factor + ptx::ex2_approx_ftz(sink - larger);
    maximum = larger;
  }
  return {__fdividef(factor, sum), fmaf(maximum, 1.0f / kLog2e, logf(sum))};
}

template <typename Element>
__device__ __forceinline__ uint2 pack(float4 values) {
  return make_uint2(ptx::cvt_rn_x2<Element>(values.x, values.y),
                    ptx::cvt_rn_x2<Element>(values.z, values.w));
}

// Four neighbouring columns of a row.
template <CacheType kCache>
__device__ __forceinline__ void store_out(const DecodeParams& params, int batch, int token,
                                          int head, int column, float4 values, float factor) {
  Element16* const target =
      static_cast<Element16*>(params.out) +
      ((int64_t{batch} * params.tokens + token) * params.heads + head) * params.head_dim_v + column;
  const float4 finished =
      make_float4(values.x * factor, values.y * factor, values.z * factor, values.w * factor);
  bool bf16 = kCache == CacheType::kBf16;
  if constexpr (kCache == CacheType::kE4m3 || kCache == CacheType::kInt8) {
    bf16 = params.query_bf16 != 0;
  }
  *reinterpret_cast<uint2*>(target) = bf16 ? pack<__nv_bfloat16>(finished) : pack<__half>(finished);
}

// Four columns of a row, not normalised, relative to the row's maximum; and the row's sum.
struct RowPart {
  float maximum;
  float sum;
  float4 out;

  static __device__ __forceinline__ RowPart empty() {
    return {kMinusInfinity, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
  }

  // Every addition of parts goes through here: what is added in one order has the same bits,
  // whoever does it.
  __device__ __forceinline__ void add(const RowPart& other) {
    const float larger = fmaxf(maximum, other.maximum);
    // Without any key so far: exponents are -inf, not -inf + inf.
    const float shift = larger == kMinusInfinity ? 0.0f : larger;
    const float mine = ptx::ex2_approx_ftz(maximum - shift);
    const float theirs = ptx::ex2_approx_ftz(other.maximum - shift);
    maximum = larger;
    sum = fmaf(theirs, other.sum, sum * mine);
    out.x = fmaf(theirs, other.out.x, out.x * mine);
    out.y = fmaf(theirs, other.out.y, out.y * mine);
    out.z = fmaf(theirs, other.out.z, out.z * mine);
    out.w = fmaf(theirs, other.out.w, out.w * mine);
  }
};

// Where a row of a unit's partial result is.
__device__ __forceinline__ int64_t partial_row(const DecodeParams& params, int batch, int kv_head,
                                               int place, int row) {
  const int64_t unit = (int64_t{batch} * params.kv_heads + kv_head) * params.splits + place;
  return unit * params.tokens * params.group + row;
}

// What a team walks over, and the part of it that this warp copies.
template <typename Config>
struct Walk {
  using Layout = typename Config::Layout;
  static constexpr int kLanes = ChunkLanes<Config::kPairs, 32>::kLanes;
  static constexpr int kRowsPerPass = 32 / kLanes;
  static constexpr int kStep = Config::kKeys * Config::kTeams;

  int batch;
  int kv_head;
  int first;  // key of the team's first tile
  int end;    // of the split's keys
  uint32_t stages;
  int next_row;  // of the cache, for the tile that is copied next: that of lane's key

  __device__ __forceinline__ int tiles() const {
    return first < end ? (end - first + kStep - 1) / kStep : 0;
  }
  __device__ __forceinline__ int key(int tile) const { return first + tile * kStep; }
  __device__ __forceinline__ uint32_t stage(int tile) const {
    return stages + tile % Config::kStages * Config::kStageBytes;
  }

  // First of the keys of a tile that this warp copies.
  __device__ __forceinline__ int copied_key(int tile) const { return key(tile) + copied_row(); }
  __device__ __forceinline__ int copied_row() const {
    return static_cast<int>(threadIdx.x) / 32 % Config::kTeamWarps * Config::kCopyRows;
  }

  // Looks up the row of the cache of each key to copy, well before the copy.
  __device__ __forceinline__ void look_up(const DecodeParams& params, int tile) {
    const int key = copied_key(tile) + lane_id() % Config::kCopyRows;
    next_row = 0;
    if (key >= end) return;
    if (params.page_table == nullptr) {
      next_row = batch * params.room + key;
      return;
    }
    const int slot = params.page_divisor.divide(key);
    const int page = params.page_table[int64_t{batch} * params.max_pages + slot];
    next_row = min_int(max_int(page, 0), params.pages - 1) * params.page_size + key -
               slot * params.page_size;
  }

  // Copies this warp's rows of a tile that was looked up. Keys at and after `end` and columns
  // beyond the widths become zeros: padding may hold anything, and 0 * NaN would reach the output.
  __device__ __forceinline__ void copy(const DecodeParams& params, int tile) const {
    const int chunk0 = lane_id() % kLanes;
    const int keys = end - copied_key(tile);
    const uint32_t target = stage(tile);
    using Stored = typename Config::Stored;
    const Stored* const key = static_cast<const Stored*>(params.key);
    const Stored* const value = static_cast<const Stored*>(params.value);
#pragma unroll Config::kCopyUnroll
    for (int pass = 0; pass < Config::kCopyRows; pass += kRowsPerPass) {
      const int row = pass + lane_id() / kLanes;
      const int64_t source =
          int64_t{__shfl_sync(0xffffffffu, next_row, row)} * params.kv_heads + kv_head;
      const bool exists = row < keys;
#pragma unroll
      for (int i = 0; i < Layout::kChunks; i += kLanes) {
        const int column = Config::kChunkElements * (chunk0 + i);
        const uint32_t place = target + Layout::offset(copied_row() + row, chunk0 + i);
        ptx::cp_async_16(place, key + source * params.head_dim + column,
                         exists && column < params.head_dim ? 16 : 0);
        ptx::cp_async_16(place + Config::kTileBytes, value + source * params.head_dim_v + column,
                         exists && column < params.head_dim_v ? 16 : 0);
      }
    }
  }
};

// A barrier of the team.
template <typename Config>
__device__ __forceinline__ void sync_team() {
  if constexpr (Config::kTeamWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <typename Config>
__device__ __forceinline__ RowPositions row_positions(const DecodeParams& params, const Unit& unit,
                                                      int warp_row, int end) {
  const int first_row = unit.row_tile * Config::kRows;
  const int last_row = min_int(first_row + Config::kRows, params.tokens * params.group) - 1;
  const int shift = unit.sequence.length - params.tokens;
  const int lowest = shift + params.group_divisor.divide(first_row);
  const int highest = shift + params.group_divisor.divide(last_row);
  const int first = params.window_left == kUnbounded ? 0 : highest - params.window_left;
  return {shift, warp_row, {first, min_int(end, lowest + 1)}};
}

// Walks over this team's tiles of a split.
template <typename Config>
__device__ __forceinline__ void attend(const DecodeParams& params, const Unit& kept, int split,
                                       DecodeWarp<Config>& warp, uint32_t tiles) {
  const Unit unit = kept;
  constexpr int kStages = Config::kStages;
  const SequenceSplits& sequence = unit.sequence;
  const int team = static_cast<int>(threadIdx.x) / 32 / Config::kTeamWarps;
  const int warp_row =
      unit.row_tile * Config::kRows + static_cast<int>(threadIdx.x) / 32 % Config::kTeamWarps * 16;
  const int start = (sequence.first_split + split) * params.split_keys;
  Walk<Config> walk;
  walk.batch = unit.batch;
  walk.kv_head = unit.kv_head;
  walk.first = max_int(start, sequence.first_key / kSplitUnit * kSplitUnit) + team * Config::kKeys;
  walk.end = min_int(start + params.split_keys, sequence.length);
  walk.stages = tiles + team * Config::kTeamBytes;
  const int count = walk.tiles();

  // A tile is a cp.async group, empty past the last one.
  walk.look_up(params, 0);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) walk.copy(params, i);
    ptx::cp_async_commit_group();
    walk.look_up(params, i + 1);
  }
  warp.init();
  warp.load_queries(params, unit.batch, unit.kv_head, warp_row);
  const RowPositions rows = row_positions<Config>(params, unit, warp_row, walk.end);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    ptx::cp_async_wait_group<kStages - 2>();
    // Orders this tile's copies by all threads before the reads below, and all reads of the
    // previous tile before the copies that now overwrite it.
    sync_team<Config>();
    if (i + kStages - 1 < count) walk.copy(params, i + kStages - 1);
    ptx::cp_async_commit_group();
    walk.look_up(params, i + kStages);
    warp.attend(params, rows, walk.stage(i), walk.key(i), walk.end);
  }
  ptx::cp_async_wait_group<0>();
}

// Leaves a team's outputs where its tiles were: [teams * rows][width] f32, and the states of its
// rows.
template <typename Config>
__device__ __forceinline__ void share(const DecodeWarp<Config>& warp, uint32_t shared) {
  const int first = static_cast<int>(threadIdx.x) / 32 * 16 + fragment_row();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(warp.sum[h]);
    const int row = first + 8 * h;
    if (fragment_column() == 0) {
      ptx::st_shared_v2(shared + Config::kStateOffset + 8 * row, warp.maximum[h], sum);
    }
    const uint32_t target = shared + Config::kTileOffset + 4 * row * Config::kWidth;
#pragma unroll
    for (int j = 0; j < DecodeWarp<Config>::kOutTiles; j += 2) {
      const auto& left = warp.out[j];
      const auto& right = warp.out[j + 1];
      if constexpr (Config::kQuantised) {
        // Even columns are left, odd ones right.
        const uint32_t four = target + 32 * j + 8 * fragment_column();
        const float factor = warp.value_factor;
        ptx::st_shared_v2(four, left[2 * h] * factor, right[2 * h] * factor);
        ptx::st_shared_v2(four + 8, left[2 * h + 1] * factor, right[2 * h + 1] * factor);
      } else {
        const uint32_t two = target + 32 * j + 4 * fragment_column();
        ptx::st_shared_v2(two, left[2 * h], left[2 * h + 1]);
        ptx::st_shared_v2(two + 32, right[2 * h], right[2 * h + 1]);
      }
    }
  }
}

// Writes a row's columns of `out` and its lse.
template <CacheType kCache>
__device__ __forceinline__ void finish(const DecodeParams& params, int batch, int kv_head, int row,
                                       int piece, const RowPart& part) {
  const int token = params.group_divisor.divide(row);
  const int head = kv_head * params.group + row - token * params.group;
  const RowResult result = finish_row(params, batch, head, part.maximum, part.sum);
  store_out<kCache>(params, batch, token, head, 4 * piece, part.out, result.factor);
  if (piece == 0) {
    params.lse[(int64_t{batch} * params.heads + head) * params.tokens + token] = result.lse;
  }
}

// Adds up the teams' outputs, in their order, to what the unit has so far, and stores that: as the
// result if this was all of the sequence, else as a partial one, which the unit's next split, if
// there is one, reads again.
template <typename Config>
__device__ __forceinline__ void store(const DecodeParams& params, const Unit& kept, int split,
                                      uint32_t shared) {
  const Unit unit = kept;
  const int first = unit.row_tile * Config::kRows;
  const int rows = min_int(Config::kRows, params.tokens * params.group - first);
  const int pieces = params.head_dim_v / 4;
  const bool begins = split % params.unit_splits == 0;
  const bool ends_alone =
      unit.sequence.splits <= params.unit_splits && split + 1 >= unit.sequence.splits;
  // The row's state is read by all its threads and written by one: to another place.
  const uint32_t before = shared + Config::kGroupOffset + split % 2 * 8 * Config::kRows;
  const uint32_t after = shared + Config::kGroupOffset + (split + 1) % 2 * 8 * Config::kRows;
  constexpr int kLanesOfRow = Config::kWidth / 4;  // a power of two
  for (int i = threadIdx.x; i < rows * kLanesOfRow; i += Config::kThreads) {
    const int row = i / kLanesOfRow;
    const int piece = i % kLanesOfRow;
    if (piece >= pieces) continue;
    const int64_t at = partial_row(params, unit.batch, unit.kv_head, unit.place, first + row);
    float4* const partial =
        reinterpret_cast<float4*>(params.partial_out + at * params.head_dim_v + 4 * piece);
    RowPart group = RowPart::empty();
    if (!begins) {
      group = {ptx::ld_shared_f32(before + 8 * row), ptx::ld_shared_f32(before + 8 * row + 4),
               *partial};
    }
    RowPart part = RowPart::empty();
#pragma unroll
    for (int team = 0; team < Config::kTeams; ++team) {
      const int place = team * Config::kRows + row;
      const uint32_t state = shared + Config::kStateOffset + 8 * place;
      const uint4 words = ptx::ld_shared_v4(shared + Config::kTileOffset +
                                            4 * (place * Config::kWidth + 4 * piece));
      part.add({ptx::ld_shared_f32(state), ptx::ld_shared_f32(state + 4),
                make_float4(__uint_as_float(words.x), __uint_as_float(words.y),
                            __uint_as_float(words.z), __uint_as_float(words.w))});
    }
    if (params.unit_splits > 1) {
      group.add(part);
    } else {
      group = part;
    }
    if (ends_alone) {
      // As the sum over groups that the other kernel makes.
      RowPart inner = RowPart::empty();
      if (params.unit_splits == 1) {
        inner.add(group);
        group = inner;
      }
      RowPart total = RowPart::empty();
      total.add(group);
      finish<Config::kCache>(params, unit.batch, unit.kv_head, first + row, piece, total);
      continue;
    }
    *partial = group.out;
    if (piece == 0) {
      ptx::st_shared_v2(after + 8 * row, group.maximum, group.sum);
      params.partial_state[at] = make_float2(group.maximum, group.sum);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    decode_split_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  int* const ends = reinterpret_cast<int*>(memory);
  Unit& kept = *reinterpret_cast<Unit*>(memory + Config::kUnitOffset);
  static_assert(sizeof(kept) <= Config::kStateOffset - Config::kUnitOffset);
  const uint32_t shared = ptx::shared_address(memory);
  // The sum's thread blocks take what room is left, and wait there.
  ptx::griddepcontrol_launch_dependents();
  const int units = make_plan<Config>(params, ends);
  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit = find_unit<Config>(params, ends, index);
    // What is needed now and then waits in shared memory; registers hold the accumulators.
    if (threadIdx.x == 0) kept = unit;
    __syncthreads();
    const int first = unit.place * params.unit_splits;
    const int end = max_int(min_int(first + params.unit_splits, unit.sequence.splits), first + 1);
#pragma unroll 1
    for (int split = first; split < end; ++split) {
      DecodeWarp<Config> warp;
      attend<Config>(params, kept, split, warp, shared + Config::kTileOffset);
      __syncthreads();  // no warp reads tiles any more
      share<Config>(warp, shared);
      __syncthreads();
      store<Config>(params, kept, split, shared);
      __syncthreads();  // before the next tiles, and the next unit
    }
  }
}

// Adds up the units of each row, in their order: a thread has four columns of a row.
template <CacheType kCache>
__global__ void __launch_bounds__(128)
    decode_combine_kernel(const __grid_constant__ DecodeParams params) {
  const int pieces = params.head_dim_v / 4;
  const int rows = params.tokens * params.group;
  const int64_t index = int64_t{blockIdx.x} * 128 + threadIdx.x;
  const int piece = static_cast<int>(index % pieces);
  const int64_t heads_and_rows = index / pieces;
  const bool exists = heads_and_rows < int64_t{params.batch} * params.kv_heads * rows;
  const int row = static_cast<int>(heads_and_rows % rows);
  const int kv_head = static_cast<int>(heads_and_rows / rows % params.kv_heads);
  const int batch = static_cast<int>(heads_and_rows / rows / params.kv_heads);
  const int places = exists ? places_of(params, sequence_splits(params, batch)) : 0;
  // Every thread, also one without a row: this kernel must not end before the other has.
  ptx::griddepcontrol_wait();
  if (places <= 1) return;

  const int64_t first = partial_row(params, batch, kv_head, 0, row);
  RowPart total = RowPart::empty();
#pragma unroll 1
  for (int start = 0; start < places; start += kGroupSplits) {
    // All loads are on their way before the first is needed. Past the last part again the last
    // one, which then does not count.
    RowPart part[kGroupSplits];
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i) {
      const int64_t at = first + int64_t{min_int(start + i, places - 1)} * rows;
      const float2 state = params.partial_state[at];
      part[i] = {state.x, state.y,
                 *reinterpret_cast<const float4*>(params.partial_out + at * params.head_dim_v +
                                                  4 * piece)};
    }
    RowPart group = RowPart::empty();
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i) {
      if (start + i >= places) continue;
      if (params.unit_splits > 1) {
        total.add(part[i]);
      } else {
        group.add(part[i]);
      }
    }
    if (params.unit_splits == 1) total.add(group);
  }
  finish<kCache>(params, batch, kv_head, row, piece, total);
}

}  // namespace jax_flash::decode
