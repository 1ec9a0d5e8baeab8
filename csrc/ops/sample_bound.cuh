// A bound from below for the k-th largest of the keys that the threads of a block hold: near enough
// for a list of candidates, by a histogram of 256 equal bins between the least and the largest.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/sample_shared.cuh"

namespace jax_flash::ops {

// More keys than k that may reach the bound, unless they are equal.
__device__ __forceinline__ int bound_slack(int k) { return 8 + k / 8; }

// The first warp finds the bin, from above, in which the `rest`-th element lies.
__device__ __forceinline__ void find_tally(int rest) {
  SampleShared& shared = sample_shared();
  constexpr int kOfLane = kTallies / kWarp;
  const int lane = threadIdx.x;
  const int first = (kWarp - 1 - lane) * kOfLane;
  int counts[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(&shared.tallies[first + i]);
    counts[i] = four.x;
    counts[i + 1] = four.y;
    counts[i + 2] = four.z;
    counts[i + 3] = four.w;
  }
  int own = 0;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) own += counts[i];
  int through = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_sync(0xffffffffu, through, max(lane - step, 0));
    if (lane >= step) through += before;
  }
  const unsigned reached = __ballot_sync(0xffffffffu, through >= rest);
  if (reached == 0) {
    if (lane == 0) shared.tally_bin = -1;
  } else if (lane == __ffs(reached) - 1) {
    int above = through - own;
    int bin = first + kOfLane - 1;
    int count = 0;
#pragma unroll
    for (int i = kOfLane - 1; i >= 0; --i) {
      if (above < rest) {
        bin = first + i;
        count = counts[i];
        above += count;
      }
    }
    shared.tally_bin = bin;
    shared.tally_count = count;
    shared.tally_rest = rest - (above - count);
  }
}

// At least k of the block's keys reach the result, and at most bound_slack(k) more unless they are
// equal; 1 if there are fewer than k keys. Zeros are no keys.
template <int kKeys>
__device__ __forceinline__ uint32_t lower_bound(const uint32_t (&keys)[kKeys], int k) {
  SampleShared& shared = sample_shared();
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  uint32_t low = ~0u;
  uint32_t high = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (keys[i] != 0) low = min(low, keys[i]);
    high = max(high, keys[i]);
  }
  low = __reduce_min_sync(0xffffffffu, low);
  high = __reduce_max_sync(0xffffffffu, high);
  if (lane == 0) {
    shared.lowest[warp] = low;
    shared.highest[warp] = high;
  }
  // Orders the extremes before their reads, and zeros before additions.
  __syncthreads();
  low = __reduce_min_sync(0xffffffffu, shared.lowest[lane % kSampleWarps]);
  high = __reduce_max_sync(0xffffffffu, shared.highest[lane % kSampleWarps]);
  int rest = k;
#pragma unroll 1
  while (true) {
    const int shift = max(24 - __clz(high - low), 0);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (keys[i] >= low && keys[i] <= high) {
        atomicAdd(&shared.tallies[(keys[i] - low) >> shift], 1);
      }
    }
    // Orders additions before reads.
    __syncthreads();
    if (warp == 0) find_tally(rest);
    // Orders the result before its reads, and reads of tallies before new zeros.
    __syncthreads();
    if (threadIdx.x < kTallies) shared.tallies[threadIdx.x] = 0;
    const int bin = shared.tally_bin;
    if (bin < 0) return 1;
    low += static_cast<uint32_t>(bin) << shift;
    rest = shared.tally_rest;
    if (shift == 0 || shared.tally_count - rest <= bound_slack(k)) return low;
    high = low + min(high - low, (1u << shift) - 1);
    // Orders zeros before additions, and the result's reads before the next one.
    __syncthreads();
  }
}

}  // namespace jax_flash::ops
