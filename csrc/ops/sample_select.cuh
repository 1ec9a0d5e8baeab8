// Selections and draws among all elements of a row, by histograms of keys and by sums over
// contiguous parts of the row. Sums are of integers, so no order of addition changes them.
//
// All thread blocks of a row take part, each with its slice. What one says to the others has a slot
// of its own in shared.said, which is written once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/sample_row.cuh"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"

namespace jax_flash::ops {

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sum over this lane and those before it.
__device__ __forceinline__ unsigned long long warp_sum_through(unsigned long long x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned long long before = __shfl_sync(0xffffffffu, x, max(lane - step, 0));
    if (lane >= step) x += before;
  }
  return x;
}

// The thread blocks of a row.
struct Blocks {
  int rank;
  int count;

  // Orders accesses to the shared memory of all of them.
  __device__ __forceinline__ void sync() const {
    if (count == 1) {
      __syncthreads();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }

  // What lies at `own` in block `rank`.
  __device__ __forceinline__ unsigned long long load(const unsigned long long* own,
                                                     int of_rank) const {
    if (count == 1) return *own;
    return ptx::ld_cluster_b64(ptx::mapa(ptx::shared_address(own), of_rank));
  }

  // The sum of what lies there in each.
  __device__ __forceinline__ unsigned long long sum(const unsigned long long* own) const {
    unsigned long long total = 0;
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i) {
      if (i < count) total += load(own, i);
    }
    return total;
  }

  // Says `value` to all, which is the same for each thread of a block. The sum of what the blocks
  // before this one have said, and that of all, or the largest.
  struct Said {
    unsigned long long before;
    unsigned long long total;
    unsigned long long largest;
  };
  __device__ __forceinline__ Said say(int slot, unsigned long long value) const {
    if (count == 1) return {0, value, value};
    unsigned long long* const place = &sample_shared().said[slot];
    if (threadIdx.x == 0) *place = value;
    sync();
    Said said{0, 0, 0};
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i) {
      const unsigned long long one = i < count ? load(place, i) : 0;
      if (i == rank) said.before = said.total;
      said.total += one;
      said.largest = max(said.largest, one);
    }
    return said;
  }
};

// Vectors [first, end) that a warp has to itself.
struct Part {
  int first;
  int end;

  static __device__ __forceinline__ Part of(const Slice& slice, int warp) {
    const int size = (slice.end - slice.first + kSampleWarps - 1) / kSampleWarps;
    return {min(slice.first + warp * size, slice.end),
            min(slice.first + (warp + 1) * size, slice.end)};
  }
};

// The sum of measure(index, key) over the slice; shared.sums has those of each warp's part.
template <typename Row, typename Measure>
__device__ __forceinline__ unsigned long long sum_parts(const Row& row, const Slice& slice,
                                                        const Measure& measure) {
  SampleShared& shared = sample_shared();
  const Part part = Part::of(slice, threadIdx.x / kWarp);
  unsigned long long sum = 0;
  row.template visit_all<kWarp>(part.first + static_cast<int>(threadIdx.x) % kWarp, part.end,
                                [&](int index, uint32_t key) { sum += measure(index, key); });
  sum = warp_sum(sum);
  // The last sums have been read by everybody.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = sum;
  // Orders the sums before their reads.
  __syncthreads();
  unsigned long long total = 0;
#pragma unroll
  for (int i = 0; i < kSampleWarps; ++i) total += shared.sums[i];
  return total;
}

// After sum_parts of the same measure: the index at which the slice's running sum first exceeds
// `target`, which is less than the total.
template <typename Row, typename Measure>
__device__ __forceinline__ int find(const Row& row, const Slice& slice, const Measure& measure,
                                    unsigned long long target) {
  SampleShared& shared = sample_shared();
  int owner = 0;
#pragma unroll 1
  while (owner < kSampleWarps - 1 && target >= shared.sums[owner]) {
    target -= shared.sums[owner];
    ++owner;
  }
  const Part part = Part::of(slice, owner);
  const int warp = threadIdx.x / kWarp;
  // All warps search the part; two buffers in turn.
  int turn = 0;
#pragma unroll 1
  for (int first = part.first; first < part.end; first += kSampleThreads, turn ^= 1) {
    const int vector = first + static_cast<int>(threadIdx.x);
    unsigned long long sum = 0;
    if (vector < part.end) {
      row.visit(vector, [&](int index, uint32_t key) { sum += measure(index, key); });
    }
    const unsigned long long through = warp_sum_through(sum);
    if (threadIdx.x % kWarp == kWarp - 1) shared.chunk_sums[turn][warp] = through;
    // Orders the sums before their reads.
    __syncthreads();
    unsigned long long before = through - sum;
    unsigned long long whole = 0;
#pragma unroll
    for (int i = 0; i < kSampleWarps; ++i) {
      if (i == warp) before += whole;
      whole += shared.chunk_sums[turn][i];
    }
    if (target >= before && target - before < sum) {
      unsigned long long left = target - before;
      int result = -1;
      row.visit(vector, [&](int index, uint32_t key) {
        const unsigned long long m = measure(index, key);
        if (result < 0 && left < m) result = index;
        left -= m;
      });
      shared.found = result;
    }
    if (target < whole) break;
    target -= whole;
  }
  // Orders the result before its reads.
  __syncthreads();
  return shared.found;
}

// For the first warp, whose lanes have values in descending order of what they belong to: the first
// lane with which their running sum reaches `rest`, or -1. Takes what comes before it from `rest`.
__device__ __forceinline__ int find_lane(unsigned long long value, unsigned long long* rest) {
  const unsigned long long through = warp_sum_through(value);
  const int lane = __ffs(__ballot_sync(0xffffffffu, through >= *rest)) - 1;
  *rest -= __shfl_sync(0xffffffffu, through - value, max(lane, 0));
  return lane;
}

// What select measures: elements by their number,
struct Count {
  __device__ __forceinline__ bool keeps(int, uint32_t) const { return true; }
  __device__ __forceinline__ unsigned long long of(uint32_t) const { return 1; }
};

// or those that a cut has kept by their weight.
struct Weight {
  Cut among;
  Weigher weigher;

  __device__ __forceinline__ bool keeps(int index, uint32_t key) const {
    return among.keeps(index, key);
  }
  __device__ __forceinline__ unsigned long long of(uint32_t key) const {
    return weigher.weight(key);
  }
};

// Keeps the shortest beginning, in the order of the keys, whose measure is at least `limit` > 0;
// everything if there is not so much. Says things in slots `slot` and the next. Not inlined: it is
// the longest part of the kernels, and called from several places.
template <typename Row, typename Measure>
__device__ __noinline__ Cut select(Row row, Slice slice, Blocks blocks, Measure measure,
                                   unsigned long long limit, int slot) {
  SampleShared& shared = sample_shared();
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  constexpr int kBinsOfWarp = kBins / kSampleWarps;
  constexpr int kBinsOfLane = kBinsOfWarp / kWarp;
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
    row.template visit_all<kSampleThreads>(
        slice.first + threadIdx.x, slice.end, [&](int index, uint32_t key) {
          if (!measure.keeps(index, key) || (uint64_t{key} >> shift) / digits != prefix) return;
          atomicAdd(&shared.bins[(key >> shift) % digits], measure.of(key));
        });
    // Orders additions before reads.
    __syncthreads();
    unsigned long long part = 0;
#pragma unroll
    for (int i = 0; i < kBinsOfLane; ++i) {
      part += shared.bins[warp * kBinsOfWarp + i * kWarp + lane];
    }
    part = warp_sum(part);
    if (lane == 0) shared.sums[warp] = part;
    // Orders all blocks' bins and sums before their reads.
    blocks.sync();
    if (warp == 0) {
      const unsigned long long own =
          lane < kSampleWarps ? blocks.sum(&shared.sums[kSampleWarps - 1 - lane]) : 0;
      const int owner = find_lane(own, &rest);
      int bin = -1;
      if (owner >= 0) {
        const int first =
            (kSampleWarps - 1 - owner) * kBinsOfWarp + (kWarp - 1 - lane) * kBinsOfLane;
        unsigned long long counts[kBinsOfLane];
        unsigned long long sum = 0;
#pragma unroll
        for (int i = 0; i < kBinsOfLane; ++i) {
          counts[i] = blocks.sum(&shared.bins[first + i]);
          sum += counts[i];
        }
        const int holder = find_lane(sum, &rest);
        bin = first + kBinsOfLane - 1;
#pragma unroll
        for (int i = kBinsOfLane - 1; i > 0; --i) {
          // Lanes that are not the holder count on, in vain.
          if (bin == first + i && rest > counts[i]) {
            rest -= counts[i];
            --bin;
          }
        }
        bin = __shfl_sync(0xffffffffu, bin, holder);
        rest = __shfl_sync(0xffffffffu, rest, holder);
      }
      if (lane == 0) {
        shared.bin = static_cast<uint32_t>(bin);
        shared.rest = rest;
      }
    }
    // Orders the choice before its reads, and all blocks' reads of bins before new zeros.
    blocks.sync();
    rest = shared.rest;
    if (shared.bin == ~0u) return {0, 0};
    prefix = prefix * digits + shared.bin;
  }
  // Of the elements with this key the first so many.
  const unsigned long long one = measure.of(prefix);
  const unsigned long long last = (rest + one - 1) / one - 1;
  const auto is_tie = [&](int index, uint32_t key) -> unsigned long long {
    return key == prefix && measure.keeps(index, key);
  };
  const unsigned long long own = sum_parts(row, slice, is_tie);
  const unsigned long long before = blocks.say(slot, own).before;
  int found = 0;
  if (last >= before && last - before < own) found = find(row, slice, is_tie, last - before);
  return {prefix, static_cast<int>(blocks.say(slot + 1, found).total)};
}

}  // namespace jax_flash::ops
