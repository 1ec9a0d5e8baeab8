// The sum of splits: by the cluster that did them, or by a second kernel.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/parts.cuh"
#include "decode/plan.cuh"
#include "ptx/cluster.cuh"
#include "ptx/griddepcontrol.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"

namespace jax_flash::decode {

// What another lane has. By a whole warp.
__device__ __forceinline__ RowPart part_of_lane(const RowPart& part, int lane) {
  const auto of = [&](float value) { return __shfl_sync(0xffffffffu, value, lane); };
  return {of(part.maximum), of(part.sum),
          make_float4(of(part.out.x), of(part.out.y), of(part.out.z), of(part.out.w))};
}

// Adds up the parts that the thread blocks of a cluster have of their head tile, in the order in
// which the second kernel would. Eight lanes have four columns of a row, each lane a group of
// splits.
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

// The sum of the splits of a row, which 1 << bits lanes share, for the first of them; `first_unit`
// is the row's first unit in the plan. Waits for the kernel that does the splits. By a whole warp.
template <typename Load>
__device__ __forceinline__ RowPart add_up_groups(const Plan& plan, Load load, int bits, int splits,
                                                 int first_unit) {
  const int lanes = 1 << bits;
  const int lane = lane_id() & lanes - 1;
  // The split from which on each of the group's that begins at `split` is a part, up to there one
  // thread block has added them up.
  const auto cut_behind = [&](int split) {
    const int unit = first_unit + (plan.unit_splits == 1 ? split : split / kGroupSplits);
    return (plan.first_unit(plan.piece_of(unit) + 1) - first_unit) * plan.unit_splits;
  };
  const int most = static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(splits)));
  int split = lane * kGroupSplits;
  int cut = split < splits ? cut_behind(split) : 0;
  ptx::griddepcontrol_wait();
  RowPart total = RowPart::empty();
#pragma unroll 1
  for (int before = 0; before < most; before += lanes * kGroupSplits) {
    const int end = min_int(split + kGroupSplits, splits);
    RowPart part[kGroupSplits];
#pragma unroll
    for (int i = 0; i < kGroupSplits; ++i) part[i] = RowPart::empty();
    if (split < splits) {
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
    for (int other = 0; other < lanes && before + other * kGroupSplits < most; ++other) {
      const RowPart next = part_of_lane(group, lane_id() - lane + other);
      const int its_split = before + other * kGroupSplits;
      if (its_split == 0) {
        total = next;
      } else if (its_split < splits) {
        total.add(next);
      }
    }
    split += lanes * kGroupSplits;
    if (split < splits) cut = cut_behind(split);
  }
  return total;
}

// Adds up the parts of each row, in their order: a thread has four columns of a row, or 2 to 8
// neighbouring lanes have them, each a group of splits at a time, where all of these run at once.
template <CacheType kCache>
__global__ void __launch_bounds__(128)
    decode_combine_kernel(const __grid_constant__ DecodeParams params) {
  const int pieces = params.head_dim_v / 4;
  const int rows = params.tokens * params.group;
  const int bits = params.combine_bits;
  const int64_t index = int64_t{blockIdx.x} * 128 + threadIdx.x >> bits;
  const int piece = static_cast<int>(index % pieces);
  const int64_t heads_and_rows = index / pieces;
  const bool exists = heads_and_rows < int64_t{params.batch} * params.kv_heads * rows;
  const int row = static_cast<int>(heads_and_rows % rows);
  const int kv_head = static_cast<int>(heads_and_rows / rows % params.kv_heads);
  const int batch = static_cast<int>(heads_and_rows / rows / params.kv_heads);

  // Which pieces have what of the row: the plan again.
  const int first_batch =
      static_cast<int>((int64_t{blockIdx.x} * 128 >> bits) / pieces / rows / params.kv_heads);
  const Plan plan = make_plan(params);
  const BandUnits before = count_units(params, first_batch);
  int splits = 0;
  int first_unit = 0;
  int piece_of_work = 0;
  int piece_end = 0;  // the split of this row that begins the next piece
  if (exists) {
    int bands = plan.unit_splits == 1 ? before.splits : before.groups;
    for (int b = first_batch; b < batch; ++b) {
      bands += units_of(sequence_splits(params, b), plan.unit_splits);
    }
    const SequenceSplits sequence = sequence_splits(params, batch);
    const int band =
        params.crew_divisor.divide(kv_head * params.row_tiles + row / params.tile_rows);
    first_unit = bands * bands_of(params) + band * units_of(sequence, plan.unit_splits);
    splits = sequence.splits;
    piece_of_work = plan.piece_of(first_unit);
    piece_end = (plan.first_unit(piece_of_work + 1) - first_unit) * plan.unit_splits;
    // One thread block had all of it, and has stored the result.
    if (splits <= kGroupSplits && piece_end >= splits) splits = 0;
  }
  const int64_t place = partial_row(params, batch, kv_head, 0, row);
  const auto load = [&](int split) -> RowPart {
    const int64_t at = place + int64_t{split} * rows;
    const float2 state = params.partial_state[at];
    return {
        state.x, state.y,
        *reinterpret_cast<const float4*>(params.partial_out + at * params.head_dim_v + 4 * piece)};
  };
  if (bits > 0) {
    const RowPart sum = add_up_groups(plan, load, bits, splits, first_unit);
    const bool writes = splits > 0 && (lane_id() & (1 << bits) - 1) == 0;
    if (writes) finish<kCache>(params, batch, kv_head, row, piece, sum);
    return;
  }
  // Every thread, also one without a row: this kernel must not end before the other has.
  ptx::griddepcontrol_wait();
  if (splits == 0) return;

  RowPart total = RowPart::empty();
  RowPart group = RowPart::empty();
  constexpr int kParts = 8;
#pragma unroll 1
  for (int split = 0, last = 0; split < splits;) {
    // All loads are on their way before the first is needed. Past the last part again the last
    // one, which then does not count.
    RowPart part[kParts];
    int first[kParts];  // split of a part
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      first[i] = split;
      if (split < splits) last = split;
      part[i] = load(last);
      if (split % kGroupSplits != 0) {
        ++split;
      } else {
        while (piece_end <= split) {
          ++piece_of_work;
          piece_end = (plan.first_unit(piece_of_work + 1) - first_unit) * plan.unit_splits;
        }
        split = min_int(split + kGroupSplits, piece_end);
      }
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (first[i] >= splits) continue;
      if (first[i] % kGroupSplits != 0) {
        group.add(part[i]);
        continue;
      }
      if (first[i] == kGroupSplits) total = group;
      if (first[i] > kGroupSplits) total.add(group);
      group = part[i];
    }
  }
  if (splits > kGroupSplits) {
    total.add(group);
    group = total;
  }
  finish<kCache>(params, batch, kv_head, row, piece, group);
}

}  // namespace jax_flash::decode
