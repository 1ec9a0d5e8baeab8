// The sum of splits: by the cluster that did them, by the thread block that is done last or, of
// many rows, by a kernel of its own.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/parts.cuh"
#include "decode/plan.cuh"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/reduction.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"

namespace jax_flash::decode {

// What another lane has. By a whole warp.
__device__ __forceinline__ RowPart part_of_lane(const RowPart& part, int lane) {
  const auto of = [&](float value) { return __shfl_sync(0xffffffffu, value, lane); };
  return {of(part.maximum), of(part.sum),
          make_float4(of(part.out.x), of(part.out.y), of(part.out.z), of(part.out.w))};
}

// Adds up the parts that the thread blocks of a cluster have of their head tile, in the order of
// `add_up_splits`. Eight lanes have four columns of a row, each lane a group of splits.
template <typename Config>
__device__ __forceinline__ void add_up_cluster(const DecodeParams& params, uint32_t shared) {
  constexpr int kLanes = kClusterSplits / kGroupSplits;
  constexpr int kItems = Config::kThreads / kLanes;
  ptx::cluster_arrive();
  const int bits = params.cluster_bits;
  const int tile = static_cast<int>(blockIdx.x) >> bits;
  const int rank = static_cast<int>(blockIdx.x) - (tile << bits);
  const int kv_head = params.row_tile_divisor.divide(tile);
  const int first = (tile - kv_head * params.row_tiles) * Config::kRows;
  const int rows = min_int(Config::kRows, params.tokens * params.group - first);
  const int splits = max_int(sequence_splits(params, 0).splits, 1);
  const int lane = lane_id() % kLanes;
  const int first_split = lane * kGroupSplits;
  uint32_t parts[kGroupSplits];
#pragma unroll
  for (int i = 0; i < kGroupSplits; ++i) {
    // Past the last one again the last one, which then does not count.
    const int split = min_int(first_split + i, splits - 1);
    const int slot = split >> bits;
    parts[i] = ptx::mapa(shared + Config::kSharedBytes + slot * rows * Config::kRecordBytes,
                         split - (slot << bits));
  }
  ptx::cluster_wait();
  constexpr int kPieces = Config::kWidth / 4;
#pragma unroll 1
  for (int item0 = rank * kItems; item0 < rows * kPieces; item0 += kItems << bits) {
    const int item = item0 + static_cast<int>(threadIdx.x) / kLanes;
    const int row = min_int(item / kPieces, rows - 1);
    const int piece = item % kPieces;
    RowPart part[kGroupSplits];
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i) part[i] = RowPart::empty();
    if (first_split < splits) {
#pragma unroll
      for (int i = 0; i < kGroupSplits; ++i) {
        const uint32_t record = parts[i] + row * Config::kRecordBytes;
        const float2 state = ptx::ld_cluster_v2(record);
        part[i] = {state.x, state.y, ptx::ld_cluster_v4(record + 16 + 16 * piece)};
      }
    }
    RowPart total = part[0];
#pragma unroll
    for (int i = 1; i < kGroupSplits; ++i) {
      if (first_split + i < splits) total.add(part[i]);
    }
    const RowPart group = total;
#pragma unroll 1
    for (int other = 1; other * kGroupSplits < splits; ++other) {
      total.add(part_of_lane(group, lane_id() - lane + other));
    }
    if (lane == 0 && item < rows * kPieces && 4 * piece < params.head_dim_v) {
      finish<Config::kCache>(params, 0, kv_head, first + row, piece, total);
    }
  }
  // Nobody's shared memory goes before all have read it.
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}

// Adds the parts `first`, first + step, ... below `end` of some rows to their totals, one after
// another. Of kBatch of them all loads are on their way before the first is needed.
template <int kBatch, int kRows, typename Load>
__device__ __forceinline__ void add_parts(RowPart (&total)[kRows], int first, int end, int step,
                                          Load load) {
#pragma unroll 1
  for (int before = first; before < end; before += kBatch * step) {
    RowPart part[kRows][kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        part[r][i] = RowPart::empty();
        if (before + i * step < end) part[r][i] = load(before + i * step, r);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (before + i * step < end) total[r].add(part[r][i]);
      }
    }
  }
}

// Where the parts of some rows of a kv head are.
template <typename Config>
struct StoredParts {
  const DecodeParams& params;
  int batch;
  int kv_head;
  int first_row;
  // Computed when they are needed, not kept in registers while tiles are attended to.
  int split_rows = static_cast<int>(ptx::fresh_address(params.tokens * params.group));
  int width = static_cast<int>(ptx::fresh_address(params.head_dim_v));
  int64_t first_place = partial_row(params, batch, kv_head, 0, first_row);

  __device__ __forceinline__ int64_t place_of(int split, int row) const {
    return first_place + row + int64_t{split} * split_rows;
  }
  // Four columns.
  __device__ __forceinline__ RowPart load(int split, int row, int column) const {
    const int64_t place = place_of(split, row);
    const float2 state = params.partial_state[place];
    const float* const out = params.partial_out + place * width + column;
    return {state.x, state.y, *reinterpret_cast<const float4*>(out)};
  }
  __device__ __forceinline__ void store(int split, int row, int piece, const RowPart& part) const {
    float* const out = params.partial_out + place_of(split, row) * width + 4 * piece;
    *reinterpret_cast<float4*>(out) = part.out;
  }
  __device__ __forceinline__ void store_state(int split, int row, const RowPart& part) const {
    params.partial_state[place_of(split, row)] = make_float2(part.maximum, part.sum);
  }
  __device__ __forceinline__ void finish_piece(int row, int piece, const RowPart& sum) const {
    finish<Config::kCache>(params, batch, kv_head, first_row + row, piece, sum);
  }
};

// The splits of a head tile that a thread block has just left.
template <typename Config>
struct LeftTile {
  // Neighbouring lanes have four columns each of a row.
  static constexpr int kLanesOfRow = Config::kWidth / 4;
  static constexpr int kRowStep = Config::kThreads / kLanesOfRow;
  // Where there are registers for it.
  static constexpr int kRowsAtOnce =
      Config::kHolds && !Config::kQuantised ? Config::kRows / kRowStep : 1;

  const DecodeParams& params;
  const Place& place;  // its last split
  const Plan& plan;
  StoredParts<Config> parts{params, place.batch, place.kv_head, place.row_tile * Config::kRows};
  int thread = static_cast<int>(ptx::fresh_address(threadIdx.x));
  int block = static_cast<int>(ptx::fresh_address(blockIdx.x));
  int rows = min_int(Config::kRows, parts.split_rows - parts.first_row);
  int splits = place.sequence.splits;
  int groups = (splits + kGroupSplits - 1) / kGroupSplits;
  int piece = params.crew_divisor.divide(block);
  // The tile's first unit in the plan.
  int first_unit = plan.first_unit(piece + 1) - place.units -
                   (plan.unit_splits == 1 ? place.split : place.split / kGroupSplits);
  // The thread block has had the splits from this one to place.split.
  int from = max_int(place.split - place.done, 0);

  // The counter of what begins with `unit` and which several thread blocks have. It is that of the
  // one that begins it, which does not begin another one that it leaves to others.
  __device__ __forceinline__ uint32_t* counter(uint32_t* counters, int unit) const {
    const int crew = static_cast<int>(params.crew_divisor.divisor);
    return counters + block - (piece - plan.piece_of(unit)) * crew;
  }

  // Calls `body(Rows)` for all rows, some of each thread at a time. By all threads.
  struct Rows {
    int row[kRowsAtOnce];  // one that there is
    int piece;             // the four columns of them that the thread has
    bool exists[kRowsAtOnce];
  };
  template <typename F>
  __device__ __forceinline__ void for_some_rows(F body) const {
    const int piece = thread % kLanesOfRow;
    const bool has_columns = 4 * piece < parts.width;
#pragma unroll 1
    for (int row0 = 0; row0 < rows; row0 += kRowsAtOnce * kRowStep) {
      Rows some;
      some.piece = has_columns ? piece : 0;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int row = row0 + r * kRowStep + thread / kLanesOfRow;
        some.row[r] = min_int(row, rows - 1);
        some.exists[r] = has_columns && row < rows;
      }
      body(some);
    }
  }
  // Parts of them: `first`, then those from `next` on below `end`, `step` apart.
  __device__ __forceinline__ void sum(const Rows& some, int first, int next, int end, int step,
                                      RowPart (&total)[kRowsAtOnce]) const {
    const auto load = [&](int split, int r) {
      return parts.load(split, some.row[r], 4 * some.piece);
    };
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) total[r] = load(first, r);
    add_parts<Config::kBatchedParts>(total, next, end, step, load);
  }
};

// Adds up a group of splits that several thread blocks have had, if this is the last of them; the
// sum is the result, or goes to the place of the group's first split. Whether it has. All threads
// have stored their parts, behind a barrier.
template <typename Config>
__device__ __forceinline__ bool add_up_group(const DecodeParams& params,
                                             const LeftTile<Config>& tile, int group) {
  const int first = group * kGroupSplits;
  const int end = min_int(first + kGroupSplits, tile.splits);
  const int unit = tile.first_unit + first;  // each split is one
  bool is_last = false;
  if (tile.thread == 0) {
    const auto others = static_cast<uint32_t>(tile.plan.piece_of(tile.first_unit + end - 1) -
                                              tile.plan.piece_of(unit));
    // Zero again after the last one, for the next launch.
    is_last = ptx::atom_inc(tile.counter(params.counters + gridDim.x, unit), others) == others;
  }
  if (__syncthreads_count(is_last) == 0) return false;
  // The split from which on each is a part; up to there one thread block has added them up.
  const int cut = tile.plan.cut_behind(unit) - tile.first_unit;
  tile.for_some_rows([&](const auto& some) {
    constexpr int kRowsAtOnce = LeftTile<Config>::kRowsAtOnce;
    RowPart total[kRowsAtOnce];
    tile.sum(some, first, cut, end, 1, total);
    if (tile.groups > 1) __syncthreads();  // all threads of a row have its states
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (!some.exists[r]) continue;
      if (tile.groups == 1) {
        tile.parts.finish_piece(some.row[r], some.piece, total[r]);
        continue;
      }
      tile.parts.store(first, some.row[r], some.piece, total[r]);
      if (some.piece == 0) tile.parts.store_state(first, some.row[r], total[r]);
    }
  });
  return true;
}

// Adds up the splits of the head tile that the thread block has just left: a group that others have
// had some of, if they are done; and the groups, if all are done. `place`: its last split. Behind a
// barrier of all threads, which have stored their parts.
template <typename Config>
__device__ __forceinline__ void add_up_splits(const DecodeParams& params, const Place& place,
                                              const Plan& plan) {
  const bool alone = place.has_had_all();
  // Stored as the result.
  if (alone && (Config::kHolds || place.sequence.splits <= kGroupSplits)) return;
  const LeftTile<Config> tile{params, place, plan};
  if (!alone) {
    const int end = place.split + 1;
    const int first_whole = (tile.from + kGroupSplits - 1) / kGroupSplits;
    const int end_whole = end >= tile.splits ? tile.groups : end / kGroupSplits;
    int done = max_int(end_whole - first_whole, 0);
    // The first group may be cut before the thread block's splits, and the last one behind them.
    const bool cut_before = tile.from % kGroupSplits != 0;
    const bool cut_behind =
        end_whole >= first_whole && end < tile.splits && end % kGroupSplits != 0;
#pragma unroll 1
    for (int i = cut_before ? 0 : 1; i < (cut_behind ? 2 : 1); ++i) {
      const int group = i == 0 ? tile.from / kGroupSplits : end_whole;
      done += add_up_group(params, tile, group) ? 1 : 0;
    }
    if (tile.groups == 1 || done == 0) return;
    __syncthreads();  // sums of groups are stored
    bool is_last = false;
    if (tile.thread == 0) {
      uint32_t* const counter = tile.counter(params.counters, tile.first_unit);
      const auto before = static_cast<int>(ptx::atom_add(counter, static_cast<uint32_t>(done)));
      is_last = before + done == tile.groups;
      if (is_last) *counter = 0;  // for the next launch
    }
    if (__syncthreads_count(is_last) == 0) return;
  }
  // The group from which on each is a part; up to there one thread block has added them up.
  int cut = 1;
  if (Config::kHolds) {
    const int units = plan.cut_behind(tile.first_unit) - tile.first_unit;
    cut = max_int(plan.unit_splits == 1 ? units / kGroupSplits : units, 1);
  }
  tile.for_some_rows([&](const auto& some) {
    constexpr int kRowsAtOnce = LeftTile<Config>::kRowsAtOnce;
    RowPart total[kRowsAtOnce];
    tile.sum(some, 0, cut * kGroupSplits, tile.splits, kGroupSplits, total);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (some.exists[r]) tile.parts.finish_piece(some.row[r], some.piece, total[r]);
    }
  });
}

// Adds up the splits of many rows, which the thread block that is done last would do for long while
// all others are idle: each thread block here has a few rows of a head tile.
inline constexpr int kSumThreads = 128;
inline constexpr int kSumRows = 4;

template <typename Config>
__global__ void __launch_bounds__(kSumThreads)
    decode_sum_kernel(const __grid_constant__ DecodeParams params) {
  static_assert(Config::kRows % kSumRows == 0);
  ptx::griddepcontrol_wait();
  const int blocks = params.tile_rows / kSumRows;          // of a head tile
  const int tile = static_cast<int>(blockIdx.x) / blocks;  // of all sequences
  const int batch = tile / params.head_tiles;
  const int head_tile = tile - batch * params.head_tiles;
  const int kv_head = params.row_tile_divisor.divide(head_tile);
  const int first_row = (head_tile - kv_head * params.row_tiles) * params.tile_rows +
                        (static_cast<int>(blockIdx.x) - tile * blocks) * kSumRows;
  const int rows = min_int(kSumRows, params.tokens * params.group - first_row);
  if (rows <= 0) return;
  const SequenceSplits sequence = sequence_splits(params, batch);
  const int splits = sequence.splits;
  Chunk chunk;
  const Plan plan = make_plan(params, chunk);
  const BandUnits before = count_units(params, batch, chunk);
  const int units = units_of(sequence, plan.unit_splits);
  const int first_unit =
      (plan.unit_splits == 1 ? before.splits : before.groups) * bands_of(params) +
      params.crew_divisor.divide(head_tile) * units;
  const bool alone = plan.piece_of(first_unit) == plan.piece_of(first_unit + units - 1);
  if (alone && splits <= kGroupSplits) return;  // stored as the result
  const StoredParts<Config> parts{params, batch, kv_head, first_row};
  const int pieces = params.head_dim_v / 4;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < rows * pieces; item += kSumThreads) {
    const int row = item / pieces;
    const int piece = item - row * pieces;
    RowPart total = RowPart::empty();
#pragma unroll 1
    for (int first = 0; first < splits; first += kGroupSplits) {
      const int end = min_int(first + kGroupSplits, splits);
      // The split from which on each is a part, as in add_up_group.
      int cut = end;
      if (!alone && plan.unit_splits == 1) cut = plan.cut_behind(first_unit + first) - first_unit;
      const auto load = [&](int split, int) { return parts.load(split, row, 4 * piece); };
      RowPart group[1] = {load(first, 0)};
      add_parts<Config::kBatchedParts>(group, cut, end, 1, load);
      if (first == 0) {
        total = group[0];
      } else {
        total.add(group[0]);
      }
    }
    parts.finish_piece(row, piece, total);
  }
}

}  // namespace jax_flash::decode
