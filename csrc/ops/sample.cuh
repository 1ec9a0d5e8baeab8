// `sample` and `top_k`, a row for each thread block; docs/design/sampling.md.
//
// With k of at most kMaxRanked the row is read once: the k-th largest of the threads' own maxima
// bounds the k-th largest element from below, so only the shares of the few threads whose maximum
// reaches it are looked at again for candidates, which are then ranked one against another. Where
// ties make too many candidates, or k is larger or not given, histograms of keys find the cuts, and
// the row is read again for each, out of the L2 where it is there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "host/launch.h"
#include "ops/sample_select.cuh"

namespace jax_flash::ops {

// Each thread's largest key, and that of the row.
template <typename T>
__device__ __forceinline__ uint32_t largest_keys(const LogitRow<T>& row, uint32_t* own) {
  SampleShared& shared = sample_shared();
  uint32_t largest = 0;
  row.visit_all([&](int, uint32_t key) { largest = max(largest, key); });
  *own = largest;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  if (threadIdx.x % kWarp == 0) shared.largest[threadIdx.x / kWarp] = largest;
  if (threadIdx.x == 0) shared.thread_count = shared.count = 0;
  // Orders the maxima and counters before their reads.
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < kSampleWarps; ++i) largest = max(largest, shared.largest[i]);
  return largest;
}

// The k-th largest of the threads' keys, at least 1.
__device__ __forceinline__ uint32_t kth_largest(uint32_t own, int k) {
  uint32_t threshold = 0;
#pragma unroll 1
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if (__syncthreads_count(own >= (threshold | bit)) >= k) threshold |= bit;
  }
  return threshold == 0 ? 1 : threshold;
}

__device__ __forceinline__ void add_candidate(int index, uint32_t key) {
  SampleShared& shared = sample_shared();
  const int slot = atomicAdd(&shared.count, 1);
  if (slot < kMaxCandidates) {
    shared.candidates.keys[slot] = key;
    shared.candidates.indices[slot] = index;
  }
}

// The k best of the row in order into sorted_keys and sorted_indices; how many there are.
template <typename T>
__device__ __forceinline__ int rank_best(const LogitRow<T>& row, uint32_t own, int k) {
  SampleShared& shared = sample_shared();
  const uint32_t threshold = kth_largest(own, k);
  if (own >= threshold) shared.threads[atomicAdd(&shared.thread_count, 1)] = threadIdx.x;
  // Orders the list before its reads.
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int i = warp; i < shared.thread_count; i += kSampleWarps) {
    for (int v = shared.threads[i] + lane * kSampleThreads; v < row.vectors();
         v += kWarp * kSampleThreads) {
      row.visit(v, [&](int index, uint32_t key) {
        if (key >= threshold) add_candidate(index, key);
      });
    }
  }
  // Orders the candidates before their reads.
  __syncthreads();
  int count = shared.count;
  if (count > kMaxCandidates) {
    const Cut cut = select(
        row, [](int, uint32_t) { return true; }, [](uint32_t) -> unsigned long long { return 1; },
        k);
    // Everybody has read the count and left the histogram.
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    // Orders the zero before additions.
    __syncthreads();
    row.visit_all([&](int index, uint32_t key) {
      if (cut.keeps(index, key)) add_candidate(index, key);
    });
    // Orders the candidates before their reads.
    __syncthreads();
    count = shared.count;
  }
  const auto& candidates = shared.candidates;
  if (static_cast<int>(threadIdx.x) < count) {
    const uint32_t key = candidates.keys[threadIdx.x];
    const int index = candidates.indices[threadIdx.x];
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const uint32_t other = candidates.keys[i];
      rank += other > key || (other == key && candidates.indices[i] < index);
    }
    if (rank < k) {
      shared.candidates.sorted_keys[rank] = key;
      shared.candidates.sorted_indices[rank] = index;
    }
  }
  // Orders the sorted candidates before their reads.
  __syncthreads();
  return min(count, k);
}

// Draws among the `count` sorted candidates.
__device__ __forceinline__ void draw_ranked(const SampleRow& parameters, const Weigher& weigher,
                                            int count, int32_t* token) {
  auto& candidates = sample_shared().candidates;
  const int rank = threadIdx.x;
  uint32_t weight = 0;
  if (rank < count) {
    weight = weigher.weight(candidates.sorted_keys[rank]);
    candidates.weights[rank] = weight;
  }
  // Orders the weights before their reads.
  __syncthreads();
  unsigned long long before = 0;
  unsigned long long total = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    if (i == rank) before = total;
    total += candidates.weights[i];
  }
  const bool kept = rank < count &&
                    (parameters.mass > kAllMass || before < nucleus(total, parameters.mass)) &&
                    weigher.distance(candidates.sorted_keys[rank]) <= parameters.distance;
  // Everybody has read the weights.
  __syncthreads();
  if (rank < count && !kept) candidates.weights[rank] = 0;
  // Orders the weights before their reads.
  __syncthreads();
  before = total = 0;
  const int index = rank < count ? candidates.sorted_indices[rank] : 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    total += candidates.weights[i];
    if (candidates.sorted_indices[i] < index) before += candidates.weights[i];
  }
  const uint64_t random = uint64_t{parameters.random_high} << 32 | parameters.random_low;
  const unsigned long long target = __umul64hi(random, total);
  if (kept && target >= before && target - before < weight) *token = index;
}

// Draws among all elements.
template <typename T>
__device__ __forceinline__ void draw_any(const LogitRow<T>& row, const SampleRow& parameters,
                                         const Weigher& weigher, int32_t* token) {
  Cut by_count{0, 0};
  if (parameters.k < static_cast<uint32_t>(row.size)) {
    by_count = select(
        row, [](int, uint32_t) { return true; }, [](uint32_t) -> unsigned long long { return 1; },
        parameters.k);
  }
  Cut cut = by_count;
  if (parameters.mass <= kAllMass) {
    const unsigned long long total =
        sum_parts(row, [&](int index, uint32_t key) -> unsigned long long {
          return by_count.keeps(index, key) ? weigher.weight(key) : 0;
        });
    cut = select(
        row, [&](int index, uint32_t key) { return by_count.keeps(index, key); },
        [&](uint32_t key) -> unsigned long long { return weigher.weight(key); },
        nucleus(total, parameters.mass));
  }
  const auto weight = [&](int index, uint32_t key) -> unsigned long long {
    if (!cut.keeps(index, key)) return 0;
    const uint32_t distance = weigher.distance(key);
    return distance <= parameters.distance ? weight_of(distance) : 0;
  };
  const unsigned long long total = sum_parts(row, weight);
  const uint64_t random = uint64_t{parameters.random_high} << 32 | parameters.random_low;
  const int index = find(row, weight, __umul64hi(random, total));
  if (threadIdx.x == 0) *token = index;
}

template <typename T>
__device__ __forceinline__ LogitRow<T> logit_row(const Rows& logits, const Rows& mask, int group,
                                                 int row, int size, bool ranks_all) {
  const T* const data = row_of<T>(logits, group, row);
  return {data, mask.data == nullptr ? nullptr : row_of<bool>(mask, group, row), size,
          size % kVector<T> == 0 && is_aligned(data), ranks_all};
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const __grid_constant__ SampleParams params) {
  const int group = blockIdx.x / params.rows;
  const int in_group = blockIdx.x - group * params.rows;
  const LogitRow<T> row =
      logit_row<T>(params.logits, params.mask, group, in_group, params.size, false);
  const SampleRow parameters =
      *reinterpret_cast<const SampleRow*>(row_of<uint32_t>(params.table, group, in_group));
  int32_t* const token = params.tokens + blockIdx.x;

  uint32_t own;
  const uint32_t largest = largest_keys(row, &own);
  if (largest == 0) {
    if (threadIdx.x == 0) *token = -1;
    return;
  }
  const Weigher weigher{logit_of(largest), parameters.factor};
  if (parameters.k <= kMaxRanked) {
    const int count = rank_best(row, own, static_cast<int>(parameters.k));
    draw_ranked(parameters, weigher, count, token);
  } else {
    draw_any(row, parameters, weigher, token);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 1)
    top_k_kernel(const __grid_constant__ TopKParams params) {
  const int group = blockIdx.x / params.rows;
  const int in_group = blockIdx.x - group * params.rows;
  const LogitRow<T> row = logit_row<T>(params.logits, Rows{}, group, in_group, params.size, true);
  uint32_t own;
  largest_keys(row, &own);
  const int count = rank_best(row, own, params.k);
  const int rank = threadIdx.x;
  if (rank < count) {
    const int index = sample_shared().candidates.sorted_indices[rank];
    const int64_t target = int64_t{blockIdx.x} * params.k + rank;
    params.indices[target] = index;
    // As it is: the key does not tell zeros nor NaN apart.
    static_cast<T*>(params.values)[target] = row.logits[index];
  }
}

template <typename T>
cudaError_t launch_sample(const SampleParams& params, int64_t rows, cudaStream_t stream) {
  if (rows > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  return launch_kernel(sample_kernel<T>, dim3(static_cast<unsigned>(rows)), kSampleThreads,
                       sizeof(SampleShared), stream, params);
}

template <typename T>
cudaError_t launch_top_k(const TopKParams& params, int64_t rows, cudaStream_t stream) {
  if (rows > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  return launch_kernel(top_k_kernel<T>, dim3(static_cast<unsigned>(rows)), kSampleThreads,
                       sizeof(SampleShared), stream, params);
}

}  // namespace jax_flash::ops
