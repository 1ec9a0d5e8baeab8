// Selections and draws among all elements of a row, by histograms of keys and by sums over
// contiguous parts of the row. Sums are of integers, so no order of addition changes them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/sample_row.cuh"

namespace jax_flash::ops {

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Vectors [first, end) of the row that a warp has to itself.
struct Part {
  int first;
  int end;

  template <typename T>
  static __device__ __forceinline__ Part of(const LogitRow<T>& row, int warp) {
    const int size = (row.vectors() + kSampleWarps - 1) / kSampleWarps;
    return {warp * size, min((warp + 1) * size, row.vectors())};
  }
};

// The sum of measure(index, key) over the row; `sums` keeps those of each warp's part.
template <typename T, typename Measure>
__device__ __forceinline__ unsigned long long sum_parts(const LogitRow<T>& row,
                                                        const Measure& measure) {
  SampleShared& shared = sample_shared();
  const Part part = Part::of(row, threadIdx.x / kWarp);
  unsigned long long sum = 0;
#pragma unroll 1
  for (int v = part.first + static_cast<int>(threadIdx.x) % kWarp; v < part.end; v += kWarp) {
    row.visit(v, [&](int index, uint32_t key) { sum += measure(index, key); });
  }
  sum = warp_sum(sum);
  // The last sums have been read by everybody.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = sum;
  // Orders the sums before their reads.
  __syncthreads();
  unsigned long long total = 0;
#pragma unroll 1
  for (int i = 0; i < kSampleWarps; ++i) total += shared.sums[i];
  return total;
}

// After sum_parts of the same measure: the index at which the running sum first exceeds `target`,
// which is less than the total.
template <typename T, typename Measure>
__device__ __forceinline__ int find(const LogitRow<T>& row, const Measure& measure,
                                    unsigned long long target) {
  SampleShared& shared = sample_shared();
  int owner = 0;
#pragma unroll 1
  while (owner < kSampleWarps - 1 && target >= shared.sums[owner]) {
    target -= shared.sums[owner];
    ++owner;
  }
  const int lane = threadIdx.x % kWarp;
  if (static_cast<int>(threadIdx.x) / kWarp == owner) {
    const Part part = Part::of(row, owner);
#pragma unroll 1
    for (int first = part.first; first < part.end; first += kWarp) {
      const int vector = first + lane;
      unsigned long long sum = 0;
      if (vector < part.end) {
        row.visit(vector, [&](int index, uint32_t key) { sum += measure(index, key); });
      }
      unsigned long long end = sum;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned long long before = __shfl_sync(0xffffffffu, end, max(lane - step, 0));
        if (lane >= step) end += before;
      }
      if (target >= end - sum && target < end) {
        unsigned long long left = target - (end - sum);
        int result = -1;
        row.visit(vector, [&](int index, uint32_t key) {
          const unsigned long long m = measure(index, key);
          if (result < 0 && left < m) result = index;
          left -= m;
        });
        shared.found = result;
      }
      const unsigned long long whole = __shfl_sync(0xffffffffu, end, kWarp - 1);
      if (target < whole) break;
      target -= whole;
    }
  }
  // Orders the result before its reads.
  __syncthreads();
  return shared.found;
}

// Keeps the shortest beginning, in the order of the keys, whose measure is at least `limit` > 0;
// everything if there is not so much. `measure` is that of one element with a key.
template <typename T, typename Keeps, typename Measure>
__device__ __forceinline__ Cut select(const LogitRow<T>& row, const Keeps& keeps,
                                      const Measure& measure, unsigned long long limit) {
  SampleShared& shared = sample_shared();
  uint32_t prefix = 0;
  unsigned long long rest = limit;
#pragma unroll 1
  for (int round = 0; round < 3; ++round) {
    // Digits of 11, 11 and 10 bits.
    const int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
    const uint32_t digits = round == 2 ? kBins / 2 : kBins;
    for (int i = threadIdx.x; i < kBins; i += kSampleThreads) shared.bins[i] = 0;
    // Orders zeros before additions.
    __syncthreads();
    row.visit_all([&](int index, uint32_t key) {
      if (!keeps(index, key) || (uint64_t{key} >> shift) / digits != prefix) return;
      atomicAdd(&shared.bins[(key >> shift) % digits], measure(key));
    });
    // Orders additions before reads.
    __syncthreads();
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    constexpr int kBinsOfWarp = kBins / kSampleWarps;
    unsigned long long part = 0;
#pragma unroll
    for (int i = lane; i < kBinsOfWarp; i += kWarp) part += shared.bins[warp * kBinsOfWarp + i];
    part = warp_sum(part);
    if (lane == 0) shared.sums[warp] = part;
    // Orders the sums before their reads.
    __syncthreads();
    if (threadIdx.x == 0) {
      int w = kSampleWarps - 1;
      while (w >= 0 && rest > shared.sums[w]) rest -= shared.sums[w--];
      int bin = -1;
      if (w >= 0) {
        bin = w * kBinsOfWarp + kBinsOfWarp - 1;
        while (rest > shared.bins[bin]) rest -= shared.bins[bin--];
      }
      shared.bin = static_cast<uint32_t>(bin);
      shared.rest = rest;
    }
    // Orders the choice before its reads, and reads of bins before new zeros.
    __syncthreads();
    rest = shared.rest;
    if (shared.bin == ~0u) return {0, 0};
    prefix = prefix * digits + shared.bin;
  }
  // Of the elements with this key the first so many.
  const unsigned long long one = measure(prefix);
  const unsigned long long ties = (rest + one - 1) / one;
  const auto is_tie = [&](int index, uint32_t key) -> unsigned long long {
    return key == prefix && keeps(index, key);
  };
  sum_parts(row, is_tie);
  return {prefix, find(row, is_tie, ties - 1)};
}

}  // namespace jax_flash::ops
