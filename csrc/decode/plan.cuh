// Who does what: the splits of all sequences in a row, cut into a piece for each thread block, in the
// kernel from the lengths.
//
// The order is sequence, kv head, tile of rows, split. A piece is a whole number of units: splits,
// or groups of them if the longest piece is then no longer. An empty sequence has one split, which
// writes its zeros. Which keys a split has depends on its sequence alone; which thread block gets
// it depends on all, and does not matter to the result.
#pragma once

#include "decode/params.h"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"

namespace jax_flash::decode {

// The part of one sequence's work that does not depend on its neighbours.
struct SequenceSplits {
  int length;
  int first_key;    // that its first query sees
  int first_split;  // that has a key
  int splits;       // that have keys; 0 for an empty sequence
};

__device__ __forceinline__ SequenceSplits sequence_splits(const DecodeParams& params, int batch) {
  const int length = min_int(max_int(params.lengths[batch], 0), params.room);
  int first = 0;
  if (params.window_left != kUnbounded) {
    first = min_int(max_int(length - params.tokens - params.window_left, 0), length);
  }
  const int first_split = params.split_divisor.divide(first);
  // Not length + split_keys - 1, which may be beyond 31 bits.
  const int end_split = length == 0 ? 0 : params.split_divisor.divide(length - 1) + 1;
  return {length, first, first_split, max_int(end_split - first_split, 0)};
}

// Units of one kv head and one tile of rows.
__device__ __forceinline__ int units_of(const SequenceSplits& sequence, int unit_splits) {
  const int splits = sequence.splits;
  return max_int(unit_splits == 1 ? splits : (splits + kGroupSplits - 1) / kGroupSplits, 1);
}

// How units are dealt.
struct Plan {
  int unit_splits;  // 1 or kGroupSplits
  int each;         // units of a thread block
  int longer;       // thread blocks, the first ones, that have one more

  __device__ __forceinline__ int first_unit(int block) const {
    return block * each + min_int(block, longer);
  }
  __device__ __forceinline__ int block_of(int unit) const {
    const int of_longer = longer * (each + 1);
    return unit < of_longer ? unit / (each + 1) : longer + (unit - of_longer) / each;
  }
};

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// The plan, and in `before` the units of all sequences before `batch`. By a whole warp.
__device__ __forceinline__ Plan make_plan(const DecodeParams& params, int batch, int& before) {
  int splits = 0;
  int groups = 0;
  int splits_before = 0;
  int groups_before = 0;
#pragma unroll 4
  for (int b = lane_id(); b < params.batch; b += 32) {
    const SequenceSplits sequence = sequence_splits(params, b);
    const int its_splits = units_of(sequence, 1);
    const int its_groups = units_of(sequence, kGroupSplits);
    splits += its_splits;
    groups += its_groups;
    splits_before += b < batch ? its_splits : 0;
    groups_before += b < batch ? its_groups : 0;
  }
  const int heads = params.kv_heads * params.row_tiles;
  splits = heads * warp_sum(splits);
  groups = heads * warp_sum(groups);
  const int blocks = static_cast<int>(params.grid_divisor.divisor);
  const bool by_groups = params.whole_groups != 0 ||
                         kGroupSplits * params.grid_divisor.divide(groups + blocks - 1) <=
                             params.grid_divisor.divide(splits + blocks - 1);
  before = heads * warp_sum(by_groups ? groups_before : splits_before);
  const int units = by_groups ? groups : splits;
  const int each = params.grid_divisor.divide(units);
  return {by_groups ? kGroupSplits : 1, each, units - each * blocks};
}

// A split of one kv head of one sequence, for one tile of rows, and where its thread block stands.
struct Place {
  int batch;
  int kv_head;
  int row_tile;
  int split;  // of those that have keys
  SequenceSplits sequence;
  int unit_splits;
  int units;  // that the thread block still has, this one's included
  int done;   // splits that it has had
};

// The first split of a thread block; without any if `units` is 0. By a whole warp.
__device__ __forceinline__ Place first_place(const DecodeParams& params, int block) {
  int before;
  const Plan plan = make_plan(params, 0, before);
  Place place{};
  const int first = plan.first_unit(block);
  place.unit_splits = plan.unit_splits;
  place.units = plan.first_unit(block + 1) - first;
  if (place.units == 0) return place;
  const int heads = params.kv_heads * params.row_tiles;
  const int lane = lane_id();
  int rest = first;  // units from this batch of sequences on
  for (int start = 0;; start += 32) {
    const int b = start + lane;
    const int units =
        b < params.batch ? heads * units_of(sequence_splits(params, b), plan.unit_splits) : 0;
    int sum = units;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int lower = __shfl_sync(0xffffffffu, sum, lane - step & 31);
      if (lane >= step) sum += lower;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, sum > rest);
    if (beyond != 0) {
      const int found = __ffs(beyond) - 1;
      place.batch = start + found;
      rest -= __shfl_sync(0xffffffffu, sum - units, found);
      break;
    }
    rest -= __shfl_sync(0xffffffffu, sum, 31);
  }
  place.sequence = sequence_splits(params, place.batch);
  const int units = units_of(place.sequence, plan.unit_splits);
  const int head = rest / units;
  place.split = (rest - head * units) * plan.unit_splits;
  place.kv_head = head / params.row_tiles;
  place.row_tile = head - place.kv_head * params.row_tiles;
  return place;
}

// The thread block's next split; without any if `units` is 0. It has other queries if `split` is 0.
__device__ __forceinline__ Place next_place(const DecodeParams& params, const Place& place) {
  Place next = place;
  ++next.done;
  ++next.split;
  const bool ends = next.split >= next.sequence.splits;
  if (ends || next.unit_splits == 1 || next.split % kGroupSplits == 0) --next.units;
  if (!ends || next.units == 0) return next;
  next.split = 0;
  if (++next.row_tile < params.row_tiles) return next;
  next.row_tile = 0;
  if (++next.kv_head < params.kv_heads) return next;
  next.kv_head = 0;
  next.sequence = sequence_splits(params, ++next.batch);
  return next;
}

}  // namespace jax_flash::decode
