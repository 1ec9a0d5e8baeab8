// Who does what: units of work, dealt to thread blocks in the kernel from the lengths.
//
// A unit is one split, or a group of them, of one kv head of one sequence, for one tile of rows. An
// empty sequence has one unit, which writes its zeros. Which keys a split has depends on its
// sequence alone; which thread block gets it depends on all, and does not matter to the result.
#pragma once

#include "decode/config.cuh"
#include "decode/params.h"
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
  const int first_split = first / params.split_keys;
  const int end_split = (length + params.split_keys - 1) / params.split_keys;
  return {length, first, first_split, max_int(end_split - first_split, 0)};
}

struct Unit {
  int batch;
  int kv_head;
  int row_tile;
  int place;  // of the unit among those of the sequence
  SequenceSplits sequence;
};

// Units of one kv head and one tile of rows.
__device__ __forceinline__ int places_of(const DecodeParams& params, const SequenceSplits& s) {
  return (s.splits + params.unit_splits - 1) / params.unit_splits;
}
__device__ __forceinline__ int units_of(const DecodeParams& params, const SequenceSplits& s) {
  return max_int(places_of(params, s), 1) * params.kv_heads * params.row_tiles;
}

// Sequences that share an entry of the plan.
template <typename Config>
__device__ __forceinline__ int sequences_per_entry(const DecodeParams& params) {
  return (params.batch + Config::kPlanEntries - 1) / Config::kPlanEntries;
}

// Writes where each entry's units end; returns their total. All threads call it.
template <typename Config>
__device__ __forceinline__ int make_plan(const DecodeParams& params, int* ends) {
  const int each = sequences_per_entry<Config>(params);
  const int entries = (params.batch + each - 1) / each;
  for (int i = threadIdx.x; i < entries; i += Config::kThreads) {
    int units = 0;
    for (int b = i * each; b < min_int((i + 1) * each, params.batch); ++b) {
      units += units_of(params, sequence_splits(params, b));
    }
    ends[i] = units;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int start = 0; start < entries; start += 32) {
      int sum = start + lane < entries ? ends[start + lane] : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_sync(0xffffffffu, sum, lane - step & 31);
        if (lane >= step) sum += lower;
      }
      if (start + lane < entries) ends[start + lane] = before + sum;
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
  }
  __syncthreads();
  return ends[entries - 1];
}

// Units of a sequence are ordered by split, then head, then row tile: neighbours read the same
// memory at about the same time.
template <typename Config>
__device__ __forceinline__ Unit find_unit(const DecodeParams& params, const int* ends, int index) {
  const int each = sequences_per_entry<Config>(params);
  int low = 0;
  int high = (params.batch + each - 1) / each - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > index) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  int rest = index - (low == 0 ? 0 : ends[low - 1]);
  Unit unit;
  unit.batch = low * each;
  unit.sequence = sequence_splits(params, unit.batch);
  for (int units; rest >= (units = units_of(params, unit.sequence));) {
    rest -= units;
    ++unit.batch;
    unit.sequence = sequence_splits(params, unit.batch);
  }
  const int row_tiles = params.row_tiles;
  unit.row_tile = rest % row_tiles;
  rest /= row_tiles;
  unit.kv_head = rest % params.kv_heads;
  unit.place = rest / params.kv_heads;
  return unit;
}

}  // namespace jax_flash::decode
