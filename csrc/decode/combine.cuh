// The sum of splits: by the cluster that did them, by the thread block that is done last or, of
// many rows, by a kernel of its own.
#pragma once

#include <bit>
#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/parts.cuh"
#include "decode/plan.cuh"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/mbarrier.cuh"
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

// Where the parts of a head tile are that a cluster's thread blocks add up. Each has every
// (1 << cluster_bits)-th piece of all rows, of all splits, behind a barrier that counts their
// bytes: they are sent there as the splits are done, and nobody reads from another's memory.
template <typename Config>
struct ClusterParts {
  static constexpr int kPieces = Config::kWidth / 4;

  uint32_t barrier;
  int bits;
  int row_pieces;  // of a thread block
  int pieces;
  int splits;  // that have room

  static __device__ __forceinline__ ClusterParts of(const DecodeParams& params, uint32_t shared,
                                                    int rows) {
    const int row_pieces = kPieces >> params.cluster_bits;
    return {shared + Config::kSharedBytes, params.cluster_bits, row_pieces, rows * row_pieces,
            params.splits};
  }
  __device__ __forceinline__ uint32_t out(int split, int piece) const {
    return 16 + 16 * (split * pieces + piece);
  }
  __device__ __forceinline__ uint32_t state(int split, int piece) const {
    return 16 + 16 * pieces * splits + 8 * (split * pieces + piece);
  }
  __device__ __forceinline__ void send(int split, int row, int piece, const RowPart& part) const {
    const int its_piece = row * row_pieces + (piece >> bits);
    const uint32_t there = ptx::mapa(barrier, piece - (piece >> bits << bits));
    ptx::st_async_v4(there + out(split, its_piece), part.out, there);
    ptx::st_async_v2(there + state(split, its_piece), make_float2(part.maximum, part.sum), there);
  }
  __device__ __forceinline__ RowPart load(int split, int piece) const {
    const uint4 words = ptx::ld_shared_v4(barrier + out(split, piece));
    const uint32_t its_state = barrier + state(split, piece);
    return {ptx::ld_shared_f32(its_state), ptx::ld_shared_f32(its_state + 4),
            make_float4(__uint_as_float(words.x), __uint_as_float(words.y),
                        __uint_as_float(words.z), __uint_as_float(words.w))};
  }
};

// Prepares the barrier for what others send; they may after `cluster_wait`.
template <typename Config>
__device__ __forceinline__ void begin_cluster(uint32_t shared) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared + Config::kSharedBytes, 1);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  ptx::cluster_arrive_relaxed();
}

// Adds up this thread block's pieces of the cluster's head tile, in the order of `add_up_splits`.
// Eight lanes have a piece, each lane a group of splits.
template <typename Config>
__device__ __forceinline__ void add_up_cluster(const DecodeParams& params, uint32_t shared) {
  constexpr int kLanes = kClusterSplits / kGroupSplits;
  constexpr int kItems = Config::kThreads / kLanes;
  constexpr unsigned kPieces = ClusterParts<Config>::kPieces;
  const int bits = params.cluster_bits;
  const int tile = static_cast<int>(blockIdx.x) >> bits;
  const int rank = static_cast<int>(blockIdx.x) - (tile << bits);
  const int kv_head = params.row_tile_divisor.divide(tile);
  const int first_row = (tile - kv_head * params.row_tiles) * Config::kRows;
  const int rows = min_int(Config::kRows, params.tokens * params.group - first_row);
  const int splits = max_int(sequence_splits(params, 0).splits, 1);
  const auto parts = ClusterParts<Config>::of(params, shared, rows);
  const int lane = lane_id() % kLanes;
  const int first_split = lane * kGroupSplits;
  if (threadIdx.x == 0) {
    // What is already here counts, too.
    const int pieces = max_int((params.head_dim_v / 4 - rank - 1 >> bits) + 1, 0);  // of a row
    ptx::mbarrier_arrive_expect_tx(parts.barrier, Config::kPieceBytes * splits * rows * pieces);
  }
  ptx::mbarrier_wait_cluster(parts.barrier, 0);
#pragma unroll 1
  for (int item0 = 0; item0 < parts.pieces; item0 += kItems) {
    const int item = item0 + static_cast<int>(threadIdx.x) / kLanes;
    const int its_item = min_int(item, parts.pieces - 1);
    RowPart part[kGroupSplits];
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i) {
      // Past the last one again the last one, which then does not count.
      part[i] = parts.load(min_int(first_split + i, splits - 1), its_item);
    }
    RowPart total = part[0];
#pragma unroll
    for (int i = 1; i < kGroupSplits; ++i) total.add_if(part[i], first_split + i < splits);
    const RowPart group = total;
#pragma unroll 1
    for (int other = 1; other * kGroupSplits < splits; ++other) {
      total.add(part_of_lane(group, lane_id() - lane + other));
    }
    const int row = its_item >> std::countr_zero(kPieces) - bits;
    const int piece = (its_item - row * parts.row_pieces << bits) + rank;
    if (lane == 0 && item < parts.pieces && 4 * piece < params.head_dim_v) {
      finish<Config::kCache>(params, 0, kv_head, first_row + row, piece, total);
    }
  }
}

// Four columns of a row, of all splits of a head tile.
struct ColumnParts {
  const float2* states;
  const float* outs;
  int split_rows;
  int split_floats;
  int most;  // splits that have a place

  __device__ __forceinline__ RowPart load(int split) const {
    split = min_int(split, most - 1);
    const float2 state = states[split * split_rows];
    return {state.x, state.y, *reinterpret_cast<const float4*>(outs + split * split_floats)};
  }
};

// Adds parts to `sum`, one after another: eight, `step` splits apart, from `first` on, of which
// those count for which `counts(i)`. If `begins`, the sum becomes the first part. Of kBatch of them
// all loads are on their way before the first is needed, and no addition hangs on a branch: then
// exponentials do not wait for the sums before them.
template <int kBatch, typename Counts>
__device__ __forceinline__ void add_parts(RowPart& sum, const ColumnParts& parts, int first,
                                          int step, bool begins, Counts counts) {
#pragma unroll
  for (int before = 0; before < kGroupSplits; before += kBatch) {
    RowPart part[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) part[i] = parts.load(first + (before + i) * step);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      sum.add_if(part[i], counts(before + i));
      if (before + i == 0) sum.become_if(part[i], begins);
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

  __device__ __forceinline__ ColumnParts at(int row, int piece) const {
    const int64_t place = first_place + row;
    return {params.partial_state + place, params.partial_out + place * width + 4 * piece,
            split_rows, split_rows * width, params.splits};
  }
  __device__ __forceinline__ void store(int split, int row, int piece, const RowPart& part) const {
    const int64_t place = first_place + row + int64_t{split} * split_rows;
    *reinterpret_cast<float4*>(params.partial_out + place * width + 4 * piece) = part.out;
    if (piece == 0) params.partial_state[place] = make_float2(part.maximum, part.sum);
  }
  __device__ __forceinline__ void finish_piece(int row, int piece, const RowPart& sum) const {
    finish<Config::kCache>(params, batch, kv_head, first_row + row, piece, sum);
  }
};

// The splits of a head tile that a thread block has just left.
template <typename Config>
struct LeftTile {
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

  // Counts what this thread block has done of all of the tile. Whether nothing is missing; the
  // counter is zero again then, for the next launch. By all threads, which have stored their parts,
  // behind a barrier.
  __device__ __forceinline__ bool count(int done, int all) const {
    bool is_last = false;
    if (thread == 0) {
      uint32_t* const counts = counter(params.counters, first_unit);
      is_last = static_cast<int>(ptx::atom_add(counts, static_cast<uint32_t>(done))) + done == all;
      if (is_last) *counts = 0;
    }
    return __syncthreads_count(is_last) != 0;
  }

  // Where the first thread block of the tile has added up the first groups, how many these are.
  __device__ __forceinline__ int first_groups() const {
    if (!Config::kHolds) return 1;
    const int units = plan.cut_behind(first_unit) - first_unit;
    return max_int(plan.unit_splits == 1 ? units / kGroupSplits : units, 1);
  }

  // Which of 32 splits from `start` on, the first one of a group, have left a part: a bit for each.
  // That of a group's first split has all that one thread block did of it from there on. By a whole
  // warp.
  __device__ __forceinline__ uint32_t stored_parts(int start) const {
    const int split = start + lane_id();
    const int within = split % kGroupSplits;
    const int group = split / kGroupSplits;
    bool stored = split < splits;
    if (within == 0) {
      stored = stored && (split == 0 || group >= first_groups());
    } else {
      stored = stored && plan.unit_splits == 1 &&
               split >= plan.cut_behind(first_unit + split - within) - first_unit;
    }
    return __ballot_sync(0xffffffffu, stored);
  }

  // Calls `body(row, piece, exists)` for four columns of each row; of those that do not exist for
  // others instead. By all threads.
  template <typename F>
  __device__ __forceinline__ void for_each_piece(F body) const {
    constexpr int kLanesOfRow = Config::kWidth / 4;
    constexpr int kRowStep = Config::kThreads / kLanesOfRow;
    const int its_piece = thread % kLanesOfRow;
    const bool has_columns = 4 * its_piece < parts.width;
#pragma unroll 1
    for (int row0 = 0; row0 < rows; row0 += kRowStep) {
      const int row = row0 + thread / kLanesOfRow;
      body(min_int(row, rows - 1), has_columns ? its_piece : 0, has_columns && row < rows);
    }
  }
};

// So many splits of a head tile are added up by one thread block after one count.
inline constexpr int kCountedOnce = 32;

// Adds up a head tile of up to kCountedOnce splits, whose parts are all there.
template <typename Config>
__device__ __forceinline__ void add_up_tile(const LeftTile<Config>& tile) {
  const uint32_t stored = tile.stored_parts(0);
  tile.for_each_piece([&](int row, int piece, bool exists) {
    const ColumnParts parts = tile.parts.at(row, piece);
    RowPart total = RowPart::empty();
#pragma unroll 1
    for (int group = 0; group < tile.groups; ++group) {
      const uint32_t its = stored >> kGroupSplits * group;
      const auto counts = [&](int i) { return (its >> i & 1) != 0; };
      RowPart sum = RowPart::empty();
      add_parts<Config::kBatchedParts>(sum, parts, kGroupSplits * group, 1, true, counts);
      total.add_if(sum, counts(0));
      total.become_if(sum, group == 0);
    }
    if (exists) tile.parts.finish_piece(row, piece, total);
  });
}

// Adds up the groups of a head tile, whose sums are all there.
template <typename Config>
__device__ __forceinline__ void add_up_groups(const LeftTile<Config>& tile) {
  const int first_groups = tile.first_groups();
  tile.for_each_piece([&](int row, int piece, bool exists) {
    const ColumnParts parts = tile.parts.at(row, piece);
    RowPart total = RowPart::empty();
#pragma unroll 1
    for (int group = 0; group < tile.groups; group += kGroupSplits) {
      add_parts<Config::kBatchedParts>(
          total, parts, kGroupSplits * group, kGroupSplits, group == 0,
          [&](int i) { return group + i >= first_groups && group + i < tile.groups; });
    }
    if (exists) tile.parts.finish_piece(row, piece, total);
  });
}

// Adds up a group of splits that several thread blocks have had, if this is the last of them; the
// sum goes to the place of the group's first split. Whether it has. All threads have stored their
// parts, behind a barrier.
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
  const uint32_t stored = tile.stored_parts(first);
  tile.for_each_piece([&](int row, int piece, bool exists) {
    RowPart total = RowPart::empty();
    add_parts<Config::kBatchedParts>(total, tile.parts.at(row, piece), first, 1, true,
                                     [&](int i) { return (stored >> i & 1) != 0; });
    __syncthreads();  // all threads of the row have its states
    if (exists) tile.parts.store(first, row, piece, total);
  });
  return true;
}

// Adds up the splits of the head tile that the thread block has just left. Few, if all are done;
// else a group that others have had some of, if they are done, and the groups, if all are done.
// `place`: its last split. Behind a barrier of all threads, which have stored their parts.
template <typename Config>
__device__ __forceinline__ void add_up_splits(const DecodeParams& params, const Place& place,
                                              const Plan& plan) {
  const bool alone = place.has_had_all();
  // Stored as the result.
  if (alone && (Config::kHolds || place.sequence.splits <= kGroupSplits)) return;
  const LeftTile<Config> tile{params, place, plan};
  const int end = place.split + 1;
  if (tile.splits <= kCountedOnce) {
    if (!alone && !tile.count(end - tile.from, tile.splits)) return;
    if (alone || plan.unit_splits != 1) {
      add_up_groups(tile);
    } else {
      add_up_tile(tile);
    }
    return;
  }
  if (!alone) {
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
    if (done == 0) return;
    __syncthreads();  // sums of groups are stored
    if (!tile.count(done, tile.groups)) return;
  }
  add_up_groups(tile);
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
    const ColumnParts columns = parts.at(row, piece);
    RowPart total = RowPart::empty();
    if (alone || plan.unit_splits != 1) {
#pragma unroll 1
      for (int first = 0; first < splits; first += kGroupSplits * kGroupSplits) {
        add_parts<Config::kBatchedParts>(total, columns, first, kGroupSplits, first == 0,
                                         [&](int i) { return first + kGroupSplits * i < splits; });
      }
    } else {
#pragma unroll 1
      for (int first = 0; first < splits; first += kGroupSplits) {
        const int end = min_int(first + kGroupSplits, splits);
        // The split from which on each is a part, as in stored_parts.
        const int cut = plan.cut_behind(first_unit + first) - first_unit;
        RowPart group = RowPart::empty();
        add_parts<Config::kBatchedParts>(group, columns, first, 1, true, [&](int i) {
          return first + i >= cut && first + i < end;
        });
        total.add_if(group, first > 0);
        total.become_if(group, first == 0);
      }
    }
    parts.finish_piece(row, piece, total);
  }
}

}  // namespace jax_flash::decode
