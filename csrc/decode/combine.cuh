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
      const auto of_other = [&](float value) {
        return __shfl_sync(0xffffffffu, value, lane_id() - lane + other);
      };
      total.add({of_other(group.maximum), of_other(group.sum),
                 make_float4(of_other(group.out.x), of_other(group.out.y), of_other(group.out.z),
                             of_other(group.out.w))});
    }
    if (lane == 0 && item < rows * pieces) {
      finish<Config::kCache>(params, 0, kv_head, first + row, piece, total);
    }
  }
  // Nobody's shared memory goes before all have read it.
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}

// Adds up the parts of each row, in their order: a thread has four columns of a row.
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

  // Which pieces have what of the row: the plan again.
  const int first_batch =
      static_cast<int>(int64_t{blockIdx.x} * 128 / pieces / rows / params.kv_heads);
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
  // Every thread, also one without a row: this kernel must not end before the other has.
  ptx::griddepcontrol_wait();
  if (splits == 0) return;

  const int64_t place = partial_row(params, batch, kv_head, 0, row);
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
      const int64_t at = place + int64_t{last} * rows;
      const float2 state = params.partial_state[at];
      part[i] = {state.x, state.y,
                 *reinterpret_cast<const float4*>(params.partial_out + at * params.head_dim_v +
                                                  4 * piece)};
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
