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

// Four neighbouring columns of a row.
template <typename Element>
__device__ __forceinline__ void store_out(const DecodeParams& params, int batch, int token,
                                          int head, int column, float4 values, float factor) {
  Element16* const target =
      static_cast<Element16*>(params.out) +
      ((int64_t{batch} * params.tokens + token) * params.heads + head) * params.head_dim_v + column;
  *reinterpret_cast<uint2*>(target) =
      make_uint2(ptx::cvt_rn_x2<Element>(values.x * factor, values.y * factor),
                 ptx::cvt_rn_x2<Element>(values.z * factor, values.w * factor));
}

// Where a row of a split's partial result is.
__device__ __forceinline__ int64_t partial_row(const DecodeParams& params, int batch, int kv_head,
                                               int split, int row) {
  const int64_t place = (int64_t{batch} * params.kv_heads + kv_head) * params.splits + split;
  return place * params.tokens * params.group + row;
}

// What a team walks over, and the part of it that this warp copies.
template <typename Config>
struct Walk {
  using Layout = typename Config::Layout;
  static constexpr int kLanes = ChunkLanes<Config::kWidth, 32>::kLanes;
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
    const Element16* const key = static_cast<const Element16*>(params.key);
    const Element16* const value = static_cast<const Element16*>(params.value);
#pragma unroll Config::kCopyUnroll
    for (int pass = 0; pass < Config::kCopyRows; pass += kRowsPerPass) {
      const int row = pass + lane_id() / kLanes;
      const int64_t source =
          int64_t{__shfl_sync(0xffffffffu, next_row, row)} * params.kv_heads + kv_head;
      const bool exists = row < keys;
#pragma unroll
      for (int i = 0; i < Layout::kChunks; i += kLanes) {
        const int column = 8 * (chunk0 + i);
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
__device__ __forceinline__ void attend(const DecodeParams& params, const Unit& unit,
                                       DecodeWarp<Config>& warp, uint32_t tiles, int warp_row) {
  constexpr int kStages = Config::kStages;
  const SequenceSplits& sequence = unit.sequence;
  const int team = static_cast<int>(threadIdx.x) / 32 / Config::kTeamWarps;
  const int start = (sequence.first_split + unit.split) * params.split_keys;
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
    const uint32_t target =
        shared + Config::kTileOffset + 4 * (row * Config::kWidth + fragment_column());
#pragma unroll
    for (int j = 0; j < DecodeWarp<Config>::kOutTiles; ++j) {
      ptx::st_shared_v2(target + 32 * j, warp.out[j][2 * h], warp.out[j][2 * h + 1]);
    }
  }
}

// Adds up the teams' outputs, in their order, and stores them: finished if the sequence has one
// split, else as the partial result of this one.
template <typename Config>
__device__ __forceinline__ void store(const DecodeParams& params, const Unit& kept,
                                      uint32_t shared) {
  const Unit unit = kept;
  constexpr int kTeams = Config::kTeams;
  const int first = unit.row_tile * Config::kRows;
  const int rows = min_int(Config::kRows, params.tokens * params.group - first);
  const int pieces = params.head_dim_v / 4;
  constexpr int kLanesOfRow = Config::kWidth / 4;  // a power of two
  for (int i = threadIdx.x; i < rows * kLanesOfRow; i += Config::kThreads) {
    const int row = i / kLanesOfRow;
    const int piece = i % kLanesOfRow;
    if (piece >= pieces) continue;
    float maximum[kTeams];
    float largest = kMinusInfinity;
#pragma unroll
    for (int team = 0; team < kTeams; ++team) {
      const uint32_t state = shared + Config::kStateOffset + 8 * (team * Config::kRows + row);
      maximum[team] = ptx::ld_shared_f32(state);
      largest = fmaxf(largest, maximum[team]);
    }
    const float shift = largest == kMinusInfinity ? 0.0f : largest;
    float sum = 0.0f;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int team = 0; team < kTeams; ++team) {
      const int place = team * Config::kRows + row;
      const float weight = ptx::ex2_approx_ftz(maximum[team] - shift);
      sum = fmaf(weight, ptx::ld_shared_f32(shared + Config::kStateOffset + 8 * place + 4), sum);
      const uint4 words = ptx::ld_shared_v4(shared + Config::kTileOffset +
                                            4 * (place * Config::kWidth + 4 * piece));
      total.x = fmaf(weight, __uint_as_float(words.x), total.x);
      total.y = fmaf(weight, __uint_as_float(words.y), total.y);
      total.z = fmaf(weight, __uint_as_float(words.z), total.z);
      total.w = fmaf(weight, __uint_as_float(words.w), total.w);
    }

    const int packed = first + row;
    if (unit.sequence.splits > 1) {
      const int64_t at = partial_row(params, unit.batch, unit.kv_head, unit.split, packed);
      *reinterpret_cast<float4*>(params.partial_out + at * params.head_dim_v + 4 * piece) = total;
      if (piece == 0) params.partial_state[at] = make_float2(largest, sum);
      continue;
    }
    const int token = params.group_divisor.divide(packed);
    const int head = unit.kv_head * params.group + packed - token * params.group;
    const RowResult result = finish_row(params, unit.batch, head, largest, sum);
    store_out<typename Config::Element>(params, unit.batch, token, head, 4 * piece, total,
                                        result.factor);
    if (piece == 0) {
      params.lse[(int64_t{unit.batch} * params.heads + head) * params.tokens + token] = result.lse;
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
  const int units = make_plan<Config>(params, ends);
  for (int index = blockIdx.x; index < units; index += gridDim.x) {
    const Unit unit = find_unit<Config>(params, ends, index);
    // What is needed again at the end waits in shared memory; registers hold the accumulators.
    if (threadIdx.x == 0) kept = unit;
    const int team_warp = static_cast<int>(threadIdx.x) / 32 % Config::kTeamWarps;
    DecodeWarp<Config> warp;
    attend<Config>(params, unit, warp, shared + Config::kTileOffset,
                   unit.row_tile * Config::kRows + 16 * team_warp);
    __syncthreads();  // no warp reads tiles any more
    share<Config>(warp, shared);
    __syncthreads();
    store<Config>(params, kept, shared);
    __syncthreads();  // before the next tiles
  }
}

// Adds up the splits of each row, in their order: a thread has four columns of a row.
template <typename Element>
__global__ void __launch_bounds__(128)
    decode_combine_kernel(const __grid_constant__ DecodeParams params) {
  constexpr int kAtOnce = 8;  // so many loads are on their way before the first is needed
  const int pieces = params.head_dim_v / 4;
  const int rows = params.tokens * params.group;
  const int64_t index = int64_t{blockIdx.x} * 128 + threadIdx.x;
  const int piece = static_cast<int>(index % pieces);
  const int64_t place = index / pieces;
  if (place >= int64_t{params.batch} * params.kv_heads * rows) return;
  const int row = static_cast<int>(place % rows);
  const int kv_head = static_cast<int>(place / rows % params.kv_heads);
  const int batch = static_cast<int>(place / rows / params.kv_heads);
  const int splits = sequence_splits(params, batch).splits;
  if (splits <= 1) return;

  const int64_t first = partial_row(params, batch, kv_head, 0, row);
  float maximum = kMinusInfinity;
  float sum = 0.0f;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int start = 0; start < splits; start += kAtOnce) {
    float2 state[kAtOnce];
    float4 part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      // Past the last one again the last one, which then does not count.
      const int64_t at = first + int64_t{min_int(start + i, splits - 1)} * rows;
      state[i] = params.partial_state[at];
      part[i] =
          *reinterpret_cast<const float4*>(params.partial_out + at * params.head_dim_v + 4 * piece);
    }
    float largest = maximum;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (start + i >= splits) state[i] = make_float2(kMinusInfinity, 0.0f);
      largest = fmaxf(largest, state[i].x);
    }
    const float shift = largest == kMinusInfinity ? 0.0f : largest;
    const float factor = ptx::ex2_approx_ftz(maximum - shift);
    maximum = largest;
    sum *= factor;
    total = make_float4(total.x * factor, total.y * factor, total.z * factor, total.w * factor);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = ptx::ex2_approx_ftz(state[i].x - shift);
      if (start + i >= splits) continue;
      sum = fmaf(weight, state[i].y, sum);
      total.x = fmaf(weight, part[i].x, total.x);
      total.y = fmaf(weight, part[i].y, total.y);
      total.z = fmaf(weight, part[i].z, total.z);
      total.w = fmaf(weight, part[i].w, total.w);
    }
  }
  const int token = params.group_divisor.divide(row);
  const int head = kv_head * params.group + row - token * params.group;
  const RowResult result = finish_row(params, batch, head, maximum, sum);
  store_out<Element>(params, batch, token, head, 4 * piece, total, result.factor);
  if (piece == 0) {
    params.lse[(int64_t{batch} * params.heads + head) * params.tokens + token] = result.lse;
  }
}

}  // namespace jax_flash::decode
