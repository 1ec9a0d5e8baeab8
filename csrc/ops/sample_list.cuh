// Candidates for the best of a row: what one block finds in its part of the row, and what becomes
// of the lists of several blocks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "ops/sample_bound.cuh"
#include "ops/sample_row.cuh"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"

namespace jax_flash::ops {

// The largest key in each segment of each thread's share into shared.segments; the thread's
// largest.
template <typename Row>
__device__ __forceinline__ uint32_t segment_maxima(const Row& row, const Slice& slice) {
  constexpr int kV = Row::kV;
  SampleShared& shared = sample_shared();
  const int thread = threadIdx.x;
  uint32_t own = 0;
  int vector = slice.first + thread;
  if (thread == 0) shared.item_count = shared.listed_count = 0;
  if (thread < kTallies) shared.tallies[thread] = 0;
  if (row.mask == nullptr && row.wide()) {
    // In shared memory, since the compiler will not keep so many loads in flight to registers. No
    // barriers: a thread copies and reads what is its own.
    const uint32_t ring = ptx::shared_address(&shared.ring[0][thread]);
    constexpr int kSlot = kSampleThreads * sizeof(uint4);
    const auto copy = [&](int slot, int v) {
      if (v < slice.end) ptx::cp_async_16(ring + slot * kSlot, row.logits + v * kV, 16);
      ptx::cp_async_commit_group();
    };
#pragma unroll
    for (int i = 0; i < kRing; ++i) copy(i, vector + i * kSampleThreads);
#pragma unroll 1
    for (int segment = 0; segment < kSegments; ++segment) {
      uint32_t largest = 0;
#pragma unroll 1
      for (int turn = 0; turn < slice.turns && vector < slice.end; ++turn) {
        // The maximum of a number and NaN is the number.
        float logit = std::numeric_limits<float>::quiet_NaN();
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
          ptx::cp_async_wait_group<kRing - 1>();
          if (vector < slice.end) {
            float x[kV];
            unpack<typename Row::Element>(ptx::ld_shared_v4(ring + i * kSlot), x);
#pragma unroll
            for (int e = 0; e < kV; ++e) logit = fmaxf(logit, x[e]);
          }
          copy(i, vector + kRing * kSampleThreads);
          vector += kSampleThreads;
        }
        largest = max(largest, row.key(logit));
      }
      shared.segments[segment][thread] = largest;
      own = max(own, largest);
    }
  } else {
#pragma unroll 1
    for (int segment = 0; segment < kSegments; ++segment) {
      uint32_t largest = 0;
      const int end = min(vector + slice.turns * kRing * kSampleThreads, slice.end);
      row.template visit_all<kSampleThreads>(
          vector, end, [&](int, uint32_t key) { largest = max(largest, key); });
      vector += slice.turns * kRing * kSampleThreads;
      shared.segments[segment][thread] = largest;
      own = max(own, largest);
    }
  }
  return own;
}

__device__ __forceinline__ void list_candidate(unsigned long long candidate) {
  SampleShared& shared = sample_shared();
  const int slot = atomicAdd(&shared.listed_count, 1);
  if (slot < kMaxListed) shared.listed[slot] = candidate;
}

// Of the candidates that the threads hold (0: none) makes the new list: the k best and at most
// bound_slack(k) more, however many are equal.
template <int kHeld>
__device__ __forceinline__ int narrow(const unsigned long long (&held)[kHeld], int k) {
  SampleShared& shared = sample_shared();
  if (threadIdx.x == 0) shared.listed_count = 0;
  uint32_t keys[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) keys[i] = key_of_candidate(held[i]);
  // Its barriers order reads of the old list, and the zero, before additions.
  unsigned long long bound = static_cast<unsigned long long>(lower_bound(keys, k)) << 32;
  const int rest = shared.tally_rest;
  if (shared.tally_bin >= 0 && shared.tally_count - rest > bound_slack(k)) {
    // All in the bin of the bound are equal to it: a bound for the complements of their indices,
    // which are the lower words and never 0.
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      keys[i] = held[i] >> 32 == bound >> 32 ? static_cast<uint32_t>(held[i]) : 0;
    }
    bound |= lower_bound(keys, rest);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (held[i] >= bound) list_candidate(held[i]);
  }
  // Orders the candidates before their reads.
  __syncthreads();
  return shared.listed_count;
}

// After segment_maxima, whose result is `largest`: lists the k best of the slice and some more, up
// to `most` if that is possible. How many, or more than kMaxListed if there are too many.
template <typename Row>
__device__ __forceinline__ int list_best(const Row& row, const Slice& slice, uint32_t largest,
                                         int k, int most) {
  SampleShared& shared = sample_shared();
  const int thread = threadIdx.x;
  const uint32_t own[1] = {largest};
  // Its barriers order zeros before additions.
  const uint32_t bound = lower_bound(own, k);
  if (own[0] >= bound) {
    uint32_t keys[kSegments];
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      keys[segment] = shared.segments[segment][thread];
    }
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      if (keys[segment] >= bound) {
        const int slot = atomicAdd(&shared.item_count, 1);
        shared.items[slot] = static_cast<uint16_t>(segment * kSampleThreads + thread);
      }
    }
  }
  // Orders the items before their reads.
  __syncthreads();
  const int vectors = slice.turns * kRing;
  const int total = shared.item_count * vectors;
#pragma unroll 1
  for (int i = thread; i < total; i += kSampleThreads) {
    const int item = shared.items[i / vectors];
    const int number = item / kSampleThreads * vectors + i % vectors;
    const int vector = slice.first + number * kSampleThreads + item % kSampleThreads;
    if (vector >= slice.end) continue;
    row.visit(vector, [&](int index, uint32_t key) {
      if (key >= bound) list_candidate(make_candidate(index, key));
    });
  }
  // Orders the candidates before their reads.
  __syncthreads();
  const int count = shared.listed_count;
  if (count <= most || count > kMaxListed) return count;
  unsigned long long held[kMaxListed / kSampleThreads];
#pragma unroll
  for (int i = 0; i < kMaxListed / kSampleThreads; ++i) {
    const int slot = i * kSampleThreads + thread;
    held[i] = slot < count ? shared.listed[slot] : 0;
  }
  // Everybody has read the count.
  __syncthreads();
  return narrow(held, k);
}

// Makes one list, in the first block of a cluster, of those of its `splits` blocks; how many are on
// it there, or more than kMaxCandidates if there are too many. The others' result has no meaning.
__device__ __forceinline__ int gather(int rank, int splits, int k) {
  SampleShared& shared = sample_shared();
  // Orders the lists before their reads by the first block.
  ptx::cluster_arrive();
  ptx::cluster_wait();
  int count = 0;
  if (rank == 0) {
    const uint32_t candidate = ptx::shared_address(&shared.listed[threadIdx.x]);
    const uint32_t list_count = ptx::shared_address(&shared.listed_count);
    unsigned long long held[kMaxSplits];
    uint32_t counts[kMaxSplits];
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i) {
      held[i] = 0;
      counts[i] = 0;
      if (i < splits) {
        held[i] = ptx::ld_cluster_b64(ptx::mapa(candidate, i));
        counts[i] = ptx::ld_cluster_b32(ptx::mapa(list_count, i));
      }
    }
    bool fits = true;
#pragma unroll
    for (int i = 0; i < kMaxSplits; ++i) {
      fits = fits && counts[i] <= kMaxCandidates;
      if (threadIdx.x >= counts[i]) held[i] = 0;
    }
    // Everybody has read the count.
    __syncthreads();
    count = fits ? narrow(held, k) : kMaxCandidates + 1;
  }
  // Other blocks' shared memory is there until it has been read.
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  return count;
}

}  // namespace jax_flash::ops
