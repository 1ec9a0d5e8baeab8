// The sum of splits: by the cluster that did them, or by the thread block that is done last.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/parts.cuh"
#include "decode/plan.cuh"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
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
  const int pieces = params.head_dim_v / 4;
  const int splits = max_int(sequence_splits(params, 0).splits, 1);
  const int lane = lane_id() % kLanes;
  const int first_split = lane * kGroupSplits;
  uint32_t parts[kGroupSplits];
  const float inverse = 1.0f / static_cast<float>(splits);
#pragma unroll
  for (int i = 0; i < kGroupSplits; ++i) {
    // Past the last one again the last one, which then does not count.
    const int split = min_int(first_split + i, splits - 1);
    // Which thread block has it: the quotient's distance from the next integer is at least half of
    // `inverse`, far more than its error.
    const int dividend = (split + 1 << bits) - 1;
    const int owner = static_cast<int>((static_cast<float>(dividend) + 0.5f) * inverse);
    const int slot = split - (splits * owner >> bits);
    parts[i] = ptx::mapa(shared + Config::kSharedBytes + slot * rows * Config::kRecordBytes, owner);
  }
  ptx::cluster_wait();
#pragma unroll 1
  for (int item0 = rank * kItems; item0 < rows * pieces; item0 += kItems << bits) {
    const int item = item0 + static_cast<int>(threadIdx.x) / kLanes;
    const int row = min_int(item / pieces, rows - 1);
    const int piece = item % pieces;
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
    if (lane == 0 && item < rows * pieces) {
      finish<Config::kCache>(params, 0, kv_head, first + row, piece, total);
    }
  }
  // Nobody's shared memory goes before all have read it.
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}

// The sum of the splits of a row, which 1 << bits neighbouring lanes share, for the first of them:
// each lane has a group of splits at a time. `first_unit` is the row's first unit in the plan. By a
// whole warp, whose rows have the same splits.
template <typename Load>
__device__ __forceinline__ RowPart add_up_groups(const Plan& plan, Load load, int bits, int splits,
                                                 int first_unit) {
  const int lanes = 1 << bits;
  const int lane = lane_id() & lanes - 1;
  RowPart total = RowPart::empty();
#pragma unroll 1
  for (int before = 0; before < splits; before += lanes * kGroupSplits) {
    const int split = before + lane * kGroupSplits;
    const int end = min_int(split + kGroupSplits, splits);
    // The split from which on each of the group is a part; up to there one thread block has added
    // them up.
    int cut = end;
    RowPart part[kGroupSplits];
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i) part[i] = RowPart::empty();
    if (split < splits) {
      const int unit = first_unit + (plan.unit_splits == 1 ? split : split / kGroupSplits);
      cut = (plan.first_unit(plan.piece_of(unit) + 1) - first_unit) * plan.unit_splits;
      // All loads are on their way before the first is needed.
      part[0] = load(split);
#pragma unroll
      for (int i = 1; i < kGroupSplits; ++i) {
        if (cut + i - 1 < end) part[i] = load(cut + i - 1);
      }
    }
    RowPart group = part[0];
#pragma unroll
    for (int i = 1; i < kGroupSplits; ++i) {
      if (cut + i - 1 < end) group.add(part[i]);
    }
#pragma unroll 1
    for (int other = 0; other < lanes && before + other * kGroupSplits < splits; ++other) {
      const RowPart next = part_of_lane(group, lane_id() - lane + other);
      if (before + other == 0) {
        total = next;
      } else {
        total.add(next);
      }
    }
  }
  return total;
}

// The same where every group is one part: a plan of whole groups, and a lane for a row.
template <typename Load>
__device__ __forceinline__ RowPart add_up_whole_groups(Load load, int splits) {
  constexpr int kBatch = 8;
  RowPart total = RowPart::empty();
#pragma unroll 1
  for (int before = 0; before < splits; before += kBatch * kGroupSplits) {
    // All loads are on their way before the first is needed.
    RowPart group[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      group[i] = RowPart::empty();
      if (before + i * kGroupSplits < splits) group[i] = load(before + i * kGroupSplits);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (before + i == 0) {
        total = group[0];
      } else if (before + i * kGroupSplits < splits) {
        total.add(group[i]);
      }
    }
  }
  return total;
}

// Adds up the splits of the head tile that the thread block has just left, if others have had some
// of them and are done, or if it has had them all and they are several groups. `place`: its last
// one. Behind a barrier of all threads, which have stored their parts.
template <typename Config>
__device__ __forceinline__ void add_up_splits(const DecodeParams& params, const Place& place,
                                              const Plan& plan) {
  const int splits = place.sequence.splits;
  const bool alone = place.has_had_all();
  if (alone && splits <= kGroupSplits) return;  // stored as the result
  // What follows is computed here, not kept in registers while tiles are attended to.
  const int thread = static_cast<int>(ptx::fresh_address(threadIdx.x));
  const int block = static_cast<int>(ptx::fresh_address(blockIdx.x));
  const int split_rows = static_cast<int>(ptx::fresh_address(params.tokens * params.group));
  const int width = static_cast<int>(ptx::fresh_address(params.head_dim_v));
  const int piece = params.crew_divisor.divide(block);
  const int unit = plan.first_unit(piece + 1) - place.units;
  const int first_unit = unit - (plan.unit_splits == 1 ? place.split : place.split / kGroupSplits);
  if (!alone) {
    bool is_last = false;
    if (thread == 0) {
      // The head tile's counter is that of the thread block that begins it, which does not begin
      // another one that it leaves to others.
      const int first_piece = plan.piece_of(first_unit);
      const int last_unit = first_unit + units_of(place.sequence, plan.unit_splits) - 1;
      const int others = plan.piece_of(last_unit) - first_piece;
      const int crew = static_cast<int>(params.crew_divisor.divisor);
      uint32_t* const counter = params.counters + block - (piece - first_piece) * crew;
      // Zero again after the last one, for the next launch.
      is_last = ptx::atom_inc(counter, others) == static_cast<uint32_t>(others);
    }
    if (__syncthreads_count(is_last) == 0) return;
  }
  const int first = place.row_tile * Config::kRows;
  const int pieces = width / 4;
  const int items = min_int(Config::kRows, split_rows - first) * pieces;
  const int groups = (splits + kGroupSplits - 1) / kGroupSplits;
  int bits = 0;
  while (bits < 3 && groups > 1 << bits && items << bits + 1 <= Config::kThreads) ++bits;
  const int64_t first_place = partial_row(params, place.batch, place.kv_head, 0, first);
#pragma unroll 1
  for (int item0 = 0; item0 < items; item0 += Config::kThreads >> bits) {
    const int index = item0 + (thread >> bits);
    const int item = min_int(index, items - 1);
    const int row = item / pieces;
    const int its_piece = item - row * pieces;
    const auto load = [&](int split) -> RowPart {
      const int64_t at = first_place + row + int64_t{split} * split_rows;
      const float2 state = params.partial_state[at];
      return {state.x, state.y,
              *reinterpret_cast<const float4*>(params.partial_out + at * width + 4 * its_piece)};
    };
    const RowPart sum = bits == 0 && plan.unit_splits > 1
                            ? add_up_whole_groups(load, splits)
                            : add_up_groups(plan, load, bits, splits, first_unit);
    if (index < items && (lane_id() & (1 << bits) - 1) == 0) {
      finish<Config::kCache>(params, place.batch, place.kv_head, first + row, its_piece, sum);
    }
  }
}

}  // namespace jax_flash::decode
