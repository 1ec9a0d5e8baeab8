// Attention of a few new tokens to long caches, keys split among thread blocks (flash-decoding; Dao
// et al. 2023), with mma.sync and cp.async, for sm_80 and later.
//
// All query heads of a kv head and all tokens are rows of one product, so that keys and values are
// read once. The kernel waits for memory: docs/design/decode.md has the limits and the schedule.
#pragma once

#include <cstdint>
#include <type_traits>

#include "decode/columns.cuh"
#include "decode/combine.cuh"
#include "decode/config.cuh"
#include "decode/f32.cuh"
#include "decode/params.h"
#include "decode/parts.cuh"
#include "decode/plan.cuh"
#include "decode/warp.cuh"
#include "decode/warpgroup.cuh"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"

namespace jax_flash::decode {

template <typename Config>
using RowsOfWarp =
    std::conditional_t<Config::kWarpgroup, DecodeWarpgroup<Config>, DecodeWarp<Config>>;
template <typename Config>
using WarpOf = std::conditional_t<
    Config::kF32, DecodeF32<Config>,
    std::conditional_t<Config::kColumns, DecodeColumns<Config>, RowsOfWarp<Config>>>;

// Whether clusters add up the splits. Asked for where it is needed: no register keeps it.
template <typename Config>
__device__ __forceinline__ bool is_clustered(const DecodeParams& params) {
  return Config::kClusters && ptx::fresh_address(params.cluster_bits) > 0;
}

// The team of this thread's warp.
template <typename Config>
__device__ __forceinline__ int team_of_thread() {
  return Config::kTeams == 1 ? 0 : static_cast<int>(threadIdx.x) / 32 / Config::kTeamWarps;
}

// Keys of a split from a team's first tile on.
template <typename Config>
__device__ __forceinline__ KeyInterval team_keys(const DecodeParams& params, const Place& place) {
  const SequenceSplits& sequence = place.sequence;
  const int team = team_of_thread<Config>();
  const int start = (sequence.first_split + place.split) * params.split_keys;
  return {
      max_int(start, sequence.first_key / kSplitUnit * kSplitUnit) + team * Config::kKeys,
      // Not start + split_keys, which may be beyond 31 bits.
      sequence.length - start < params.split_keys ? sequence.length : start + params.split_keys};
}

// Copies a team's tiles of one split after the other to its stages, in turn, and the part of them
// that this warp copies.
template <typename Config>
struct TileCopies {
  using Layout = typename Config::Layout;
  static constexpr int kLanes = ChunkLanes<Config::kPairs, 32>::kLanes;
  static constexpr int kRowsPerPass = 32 / kLanes;
  static_assert(Layout::kChunks % kLanes == 0);

  // Where this lane's first chunk of the caches' first rows is, if there are registers to keep it.
  uint64_t key;
  uint64_t value;
  uint32_t next_stage;  // bytes from the team's first one
  // The tile that is copied next, which was looked up. The first two where copies go on to the next
  // split: else they follow from what comes after it.
  int keys;     // that it has, and those behind it of its split; none: there is no tile
  int kv_head;  // of theirs
  int page;     // of lane's key; without a page table a sequence is one page
  int slot;     // of the key in the page
  // What comes after it.
  KeyInterval coming;  // keys of the split
  int batch;
  int coming_head;

  static __device__ __forceinline__ uint64_t first_chunk(const void* cache) {
    return reinterpret_cast<uint64_t>(cache) + lane_id() % kLanes * 16;
  }

  __device__ __forceinline__ void init(const DecodeParams& params) {
    key = first_chunk(params.key);
    value = first_chunk(params.value);
    next_stage = 0;
  }

  __device__ __forceinline__ void enter(const DecodeParams& params, const Place& place) {
    coming = team_keys<Config>(params, place);
    batch = place.batch;
    coming_head = place.kv_head;
  }

  // First of the rows of a tile that this warp copies.
  static __device__ __forceinline__ int copied_row() {
    return static_cast<int>(threadIdx.x) / 32 % Config::kTeamWarps * Config::kCopyRows;
  }

  // Looks up the row of the cache of each key of the next tile, well before it is copied. Where
  // tiles are copied ahead, also that of a later split, `place` being the one that was entered
  // last.
  __device__ __forceinline__ void look_up(const DecodeParams& params, Place* place) {
    if constexpr (Config::kAhead) {
      while (coming.first >= coming.end && place->units > 0) {
        const Place next = next_place(params, *place);
        __syncwarp();
        if (lane_id() == 0) *place = next;
        __syncwarp();
        if (next.units > 0) enter(params, next);
      }
    }
    if constexpr (Config::kAhead) {
      keys = coming.end - coming.first;
      kv_head = coming_head;
    }
    page = batch;
    slot = 0;
    const int offset = copied_row() + lane_id() % Config::kCopyRows;
    const int key = coming.first + offset;
    coming.first += Config::kKeys * Config::kTeams;
    if (offset >= looked_up_keys()) return;
    slot = key;
    if (params.page_table == nullptr) return;
    const int entry = params.page_divisor.divide(key);
    slot = key - entry * params.page_size;
    // Not looked at before the copy, when it is here.
    page = params.page_table[int64_t{batch} * params.max_pages + entry];
  }

  // The row of the caches of lane's key.
  __device__ __forceinline__ int cache_row(const DecodeParams& params) const {
    return min_int(max_int(page, 0), params.pages - 1) * params.page_rows + slot;
  }

  // Copies this warp's rows of the tile that was looked up, as a cp.async group, which is empty if
  // there is none. Keys beyond the split and columns beyond the widths become zeros: padding may
  // hold anything, and 0 * NaN would reach the output.
  __device__ __forceinline__ void copy(const DecodeParams& params, uint32_t stages) {
    if (looked_up_keys() > 0) {
      copy_rows(params, stages + next_stage);
      next_stage += Config::kStageBytes;
      if (next_stage == Config::kTeamBytes) next_stage = 0;
    }
    ptx::cp_async_commit_group();
  }

 private:
  __device__ __forceinline__ int looked_up_keys() const {
    return Config::kAhead ? keys : coming.end - coming.first + Config::kKeys * Config::kTeams;
  }

  __device__ __forceinline__ void copy_rows(const DecodeParams& params, uint32_t target) const {
    const int its_row = cache_row(params);
    // Its first chunks of 16 bytes; the caches have no more than 32 bits can count.
    const uint32_t head =
        static_cast<uint32_t>(its_row) * params.kv_heads + (Config::kAhead ? kv_head : coming_head);
    constexpr int kChunk = Config::kChunkElements;
    const uint32_t its_key = head * (params.head_dim / kChunk);
    const uint32_t its_value = head * (params.head_dim_v / kChunk);
    const int chunk0 = lane_id() % kLanes;
    const int row0 = lane_id() / kLanes;
    const int column = kChunk * chunk0;
    const int its_keys = looked_up_keys() - copied_row() - row0;
    const uint64_t first_key = Config::kKeepsSources ? key : first_chunk(params.key);
    const uint64_t first_value = Config::kKeepsSources ? value : first_chunk(params.value);
    const uint32_t place0 = target + Layout::offset(copied_row() + row0, chunk0);
#pragma unroll Config::kCopyUnroll
    for (int pass = 0; pass < Config::kCopyRows; pass += kRowsPerPass) {
      const uint32_t key_chunk = __shfl_sync(0xffffffffu, its_key, pass + row0);
      const uint32_t value_chunk = __shfl_sync(0xffffffffu, its_value, pass + row0);
      const bool exists = pass < its_keys;
      const uint64_t key_source = first_key + uint64_t{key_chunk} * 16;
      const uint64_t value_source = first_value + uint64_t{value_chunk} * 16;
      // Bits of `pass` and of this lane's first row are apart, so their phases are, too.
      const uint32_t place = (place0 ^ Layout::phase(pass) << 4) + pass * Layout::kPitch;
      // Rows of more than 32 chunks: those 512 bytes on, whose phase is the same.
#pragma unroll
      for (int more = 0; more < Layout::kChunks; more += kLanes) {
        const int its_column = column + kChunk * more;
        ptx::cp_async_16(place + 16 * more, reinterpret_cast<const void*>(key_source + 16 * more),
                         exists && its_column < params.head_dim ? 16 : 0);
        ptx::cp_async_16(place + Config::kTileBytes + 16 * more,
                         reinterpret_cast<const void*>(value_source + 16 * more),
                         exists && its_column < params.head_dim_v ? 16 : 0);
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
__device__ __forceinline__ RowPositions row_positions(const DecodeParams& params,
                                                      const Place& place, int end) {
  const int first_row = place.row_tile * Config::kRows;
  const int last_row = min_int(first_row + Config::kRows, params.tokens * params.group) - 1;
  const int shift = place.sequence.length - params.tokens;
  const int lowest = shift + params.group_divisor.divide(first_row);
  const int highest = shift + params.group_divisor.divide(last_row);
  const int first = params.window_left == kUnbounded ? 0 : highest - params.window_left;
  return {place, shift, {first, min_int(end, lowest + 1)}};
}

template <typename Config>
__device__ __forceinline__ void load_queries(const DecodeParams& params, const Place& place,
                                             uint32_t shared, WarpOf<Config>& warp) {
  const int row = first_row<Config>(place);
  if constexpr (Config::kWarpgroup) {
    warp.load_queries(params, place.batch, place.kv_head, row, shared + Config::kQueryOffset);
  } else {
    warp.load_queries(params, place.batch, place.kv_head, row);
  }
}

// Walks over this team's tiles of a split, copying later ones. `stage`: of the next tile, in bytes
// from `stages`.
template <typename Config>
__device__ __forceinline__ void attend(const DecodeParams& params, const Place& place,
                                       TileCopies<Config>& copies, Place* copied_place,
                                       uint32_t stages, uint32_t& stage, WarpOf<Config>& warp) {
  KeyInterval keys = team_keys<Config>(params, place);
  const RowPositions rows = row_positions<Config>(params, place, keys.end);
#pragma unroll 1
  for (; keys.first < keys.end; keys.first += Config::kKeys * Config::kTeams) {
    ptx::cp_async_wait_group<Config::kStages - 2>();
    if constexpr (Config::kWarpgroup) ptx::fence_proxy_async_shared();
    // Orders this tile's copies by all threads before the reads below, and all reads of the
    // previous tile before the copies that now overwrite it.
    sync_team<Config>();
    copies.copy(params, stages);
    copies.look_up(params, copied_place);
    if constexpr (Config::kWarpgroup) {
      const uint32_t queries = stages - Config::kTileOffset + Config::kQueryOffset;
      warp.attend(params, rows, queries, stages + stage, keys.first, keys.end);
    } else {
      warp.attend(params, rows, stages + stage, keys.first, keys.end);
    }
    stage += Config::kStageBytes;
    if (stage == Config::kTeamBytes) stage = 0;
  }
}

// Leaves a team's outputs at `outputs`, [rows][width] f32, and the states of its rows.
template <typename Config>
__device__ __forceinline__ void share(const WarpOf<Config>& warp, int rows, uint32_t shared,
                                      uint32_t outputs) {
  const int index = static_cast<int>(ptx::fresh_address(threadIdx.x)) / 32;
  const int team = index / Config::kTeamWarps;
  if (lane_id() == 0 && index % Config::kTeamWarps == 0) {
    ptx::st_shared(shared + Config::kOutputsOffset + 4 * team, outputs);
  }
  const uint32_t states = shared + Config::kStateOffset + 8 * team * Config::kRows;
  warp.share(rows, index % Config::kTeamWarps * 16, states, outputs);
}

// What a thread has of a group's sum and of that of the groups before it, where these are kept in
// registers: each part that is written costs the reads of the memory ten times its bytes.
template <typename Config>
struct Held {
  static constexpr int kRows =
      Config::kHolds ? Config::kRows * Config::kWidth / 4 / Config::kThreads : 1;

  RowPart group[kRows];
  RowPart before[kRows];
};

// Adds up the teams' outputs, in their order, to what the thread block has of the group so far, and
// stores that: as the result if this was all of the sequence, else as a partial one. If the thread
// block does the group's next split, too, that reads it again, or finds it in `held`.
template <typename Config>
__device__ __forceinline__ void store(const DecodeParams& params, const Place& place,
                                      const Place& next, uint32_t shared, Held<Config>& held) {
  const int first = place.row_tile * Config::kRows;
  const int rows = min_int(Config::kRows, params.tokens * params.group - first);
  const bool clustered = is_clustered<Config>(params);
  const GroupEnd end = GroupEnd::of(place, next);
  const bool begins = clustered || end.begins;
  // The row's state is read by all its threads and written by one: to another place.
  const uint32_t before = shared + Config::kGroupOffset + place.done % 2 * 8 * Config::kRows;
  const uint32_t after = shared + Config::kGroupOffset + (place.done + 1) % 2 * 8 * Config::kRows;
  constexpr int kLanesOfRow = Config::kWidth / 4;  // a power of two
  constexpr int kRowStep = Config::kThreads / kLanesOfRow;
  constexpr int kMost = Config::kRows / kRowStep;
  constexpr int kBatch = Config::kHolds           ? kMost
                         : !Config::kQueriesEarly ? 1
                         : kMost < 4              ? kMost
                                                  : 4;
  const int thread = static_cast<int>(ptx::fresh_address(threadIdx.x));
  const int piece = thread % kLanesOfRow;
  if (4 * piece >= params.head_dim_v) return;
  float value_factor = 1.0f;
  if constexpr (Config::kQuantised) {
    value_factor = kUnit<Config::kCache> *
                   scale_of(params.v_scale, place.batch * params.v_scale_stride + place.kv_head);
  }
  const auto partial_of = [&](int64_t place_row) {
    return params.partial_out + place_row * params.head_dim_v + 4 * piece;
  };
  const auto store_part = [&](int slot, int row, const RowPart& part) {
    const int64_t place_row = partial_row(params, place.batch, place.kv_head, slot, first + row);
    *reinterpret_cast<float4*>(partial_of(place_row)) = part.out;
    if (piece == 0) params.partial_state[place_row] = make_float2(part.maximum, part.sum);
  };
#pragma unroll 1
  for (int row0 = thread / kLanesOfRow; row0 < rows; row0 += kBatch * kRowStep) {
    // All loads are on their way before the first is needed.
    float4 sums[kBatch];
    if (!Config::kHolds && !begins) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = row0 + i * kRowStep;
        if (row < rows) {
          sums[i] = *reinterpret_cast<const float4*>(
              partial_of(partial_row(params, place.batch, place.kv_head, end.slot, first + row)));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = row0 + i * kRowStep;
      if (row >= rows) break;
      RowPart part = RowPart::empty();
#pragma unroll
      for (int team = 0; team < Config::kTeams; ++team) {
        const uint32_t state = shared + Config::kStateOffset + 8 * (team * Config::kRows + row);
        const uint32_t outputs =
            __float_as_uint(ptx::ld_shared_f32(shared + Config::kOutputsOffset + 4 * team));
        const uint4 words = ptx::ld_shared_v4(outputs + output_offset<Config>(row, 4 * piece));
        part.add({ptx::ld_shared_f32(state), ptx::ld_shared_f32(state + 4),
                  make_float4(__uint_as_float(words.x), __uint_as_float(words.y),
                              __uint_as_float(words.z), __uint_as_float(words.w))});
      }
      if constexpr (Config::kQuantised) part.multiply(value_factor);
      RowPart group = part;
      if constexpr (Config::kHolds) {
        if (!begins) {
          group = held.group[i];
          group.add(part);
        }
        held.group[i] = group;
        if (end.holds && !clustered) continue;
      } else if (!begins) {
        group = {ptx::ld_shared_f32(before + 8 * row), ptx::ld_shared_f32(before + 8 * row + 4),
                 sums[i]};
        group.add(part);
      }
      if (clustered) {
        ClusterParts<Config>::of(params, shared, rows).send(place.split, row, piece, part);
        continue;
      }
      int slot = end.slot;
      bool is_result = end.ends_alone;
      if constexpr (Config::kHolds) {
        const bool has_before = place.done >= place.split && place.split >= kGroupSplits;
        if (end.is_whole) {
          // The groups so far become one part.
          if (has_before) {
            RowPart total = held.before[i];
            total.add(group);
            group = total;
          }
          held.before[i] = group;
          is_result = place.split + 1 >= place.sequence.splits;
          if (!is_result && next.units > 0) continue;
          slot = 0;
        } else if (has_before) {
          store_part(0, row, held.before[i]);
        }
      }
      if (is_result) {
        finish<Config::kCache>(params, place.batch, place.kv_head, first + row, piece, group);
      } else {
        if (!Config::kHolds && piece == 0) {
          ptx::st_shared_v2(after + 8 * row, group.maximum, group.sum);
        }
        store_part(slot, row, group);
      }
    }
  }
}

// Does all splits of this thread block.
template <typename Config>
__device__ __forceinline__ void do_splits(const DecodeParams& params, unsigned char* memory) {
  static_assert(sizeof(Place) <= Config::kPlaceBytes);
  const uint32_t shared = ptx::shared_address(memory);
  // What is needed now and then waits in shared memory; registers hold the accumulators. Every warp
  // has its own: the place of the split that it works on, of the next one, and of its copies.
  // An address is computed anew, which costs less than registers through the tiles of a split.
  const auto place_at = [&](int i) {
    const int index = static_cast<int>(ptx::fresh_address(threadIdx.x)) / 32;
    return reinterpret_cast<Place*>(memory + (3 * index + i) * Config::kPlaceBytes);
  };
  const auto keep = [&](int i, const Place& place) {
    if (lane_id() == 0) *place_at(i) = place;
    __syncwarp();
  };
  const uint32_t stages =
      shared + Config::kTileOffset + team_of_thread<Config>() * Config::kTeamBytes;
  WarpOf<Config> warp;
  Held<Config> held;
  TileCopies<Config> copies;
  copies.init(params);
  const auto begin_copies = [&] {
    copies.look_up(params, place_at(2));
#pragma unroll 1
    for (int i = 0; i < Config::kStages - 1; ++i) {
      copies.copy(params, stages);
      copies.look_up(params, place_at(2));
    }
  };
  {
    Place place;
    if (is_clustered<Config>(params)) {
      place = cluster_place(params, blockIdx.x);
    } else {
      Chunk chunk;
      const Plan plan = make_plan(params, chunk);
      if (threadIdx.x == 0) plan.keep(shared + Config::kPlanOffset);
      place = first_place(params, plan, chunk, blockIdx.x);
    }
    if (place.units == 0) {
      if (is_clustered<Config>(params)) ptx::cluster_wait();
      return;
    }
    keep(0, place);
    keep(2, place);
    copies.enter(params, place);
    begin_copies();
    load_queries<Config>(params, place, shared, warp);
    if (is_clustered<Config>(params)) ptx::cluster_wait();
  }
  uint32_t stage = 0;
  if constexpr (Config::kWarpgroup) warp.hold_nothing();
#pragma unroll 1
  while (true) {
    warp.init();
    attend<Config>(params, *place_at(0), copies, place_at(2), stages, stage, warp);
    const Place& now = *place_at(0);
    const Place& next = *place_at(1);
    if constexpr (!Config::kWarpgroup) {
      sync_team<Config>();  // no warp of the team reads tiles any more
      const int rows = params.tokens * params.group - now.row_tile * Config::kRows;
      share<Config>(warp, rows, shared, stages + (Config::kAhead ? copies.next_stage : 0));
    }
    keep(1, next_place(params, now));
    const auto load_other_queries = [&] {
      if (next.units > 0 && next.split == 0) {
        load_queries<Config>(params, next, shared, warp);
      }
    };
    // On their way meanwhile, where there are registers for them.
    if constexpr (Config::kQueriesEarly) load_other_queries();
    if constexpr (Config::kWarpgroup) {
      warp.store(params, GroupEnd::of(now, next), now, first_row<Config>(now));
    } else {
      __syncthreads();
      store<Config>(params, now, next, shared, held);
    }
    __syncthreads();  // before the next outputs, and copies to where these were
    if constexpr (Config::kSumsInLaunch) {
      if (!is_clustered<Config>(params) && (next.units == 0 || next.split == 0)) {
        add_up_splits<Config>(params, now, Plan::kept(shared + Config::kPlanOffset));
      }
    }
    if constexpr (!Config::kQueriesEarly) load_other_queries();
    if (next.units == 0) return;
    __syncwarp();  // all lanes have read what comes now
    keep(0, next);
    if constexpr (!Config::kAhead) {
      copies.enter(params, now);
      begin_copies();
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    decode_split_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  if (is_clustered<Config>(params)) begin_cluster<Config>(ptx::shared_address(memory));
  do_splits<Config>(params, memory);
  if (is_clustered<Config>(params)) add_up_cluster<Config>(params, ptx::shared_address(memory));
}

}  // namespace jax_flash::decode
