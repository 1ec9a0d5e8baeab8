// `sample` and `top_k`: a row for each thread block or, where there are few, for each cluster of up
// to eight; docs/design/sampling.md.
//
// With k of at most kMaxRanked every element is read once: the k-th largest of the threads' own
// maxima bounds the k-th largest element from below, so only those parts of threads' shares whose
// maximum reaches it are looked at again for candidates, which are then ranked one against another.
// Blocks of a cluster each list the candidates of their part of the row, and the first one makes
// one list of them. Where ties make too many candidates, or k is larger or not given, histograms of
// keys find the cuts, and the row is read again for each, out of the L2 where it is there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "host/device.h"
#include "host/launch.h"
#include "ops/sample_list.cuh"
#include "ops/sample_rank.cuh"
#include "ops/sample_select.cuh"

namespace jax_flash::ops {

// Lists the k best of a row and no others, by histograms. All threads have read the old list.
template <typename T>
__device__ __forceinline__ int list_exactly(const LogitRow<T>& row, int k) {
  SampleShared& shared = sample_shared();
  const Cut cut = select(
      row, [](int, uint32_t) { return true; }, [](uint32_t) -> unsigned long long { return 1; }, k);
  if (threadIdx.x == 0) shared.listed_count = 0;
  // Orders the zero before additions.
  __syncthreads();
  row.visit_all([&](int index, uint32_t key) {
    if (cut.keeps(index, key)) list_candidate(make_candidate(index, key));
  });
  // Orders the candidates before their reads.
  __syncthreads();
  return shared.listed_count;
}

// In the first block of a row's cluster: the list of its k best, perhaps with more candidates; how
// many. The others' result has no meaning.
template <typename T>
__device__ __forceinline__ int candidates(const LogitRow<T>& row, int rank, int splits, int k) {
  // Many candidates take longer to rank than to narrow.
  const int most = splits > 1 ? kMaxCandidates : k + 2 * bound_slack(k);
  int count = list_best(row, Slice::of(row, rank, splits), k, most);
  if (splits > 1) count = gather(rank, splits, k);
  if (count <= kMaxCandidates) return count;
  // Everybody has read the count.
  __syncthreads();
  return list_exactly(row, k);
}

// The largest key of the row.
template <typename T>
__device__ __forceinline__ uint32_t largest_key(const LogitRow<T>& row) {
  SampleShared& shared = sample_shared();
  uint32_t largest = segment_maxima(row, Slice::of(row, 0, 1));
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (threadIdx.x % kWarp == 0) shared.highest[threadIdx.x / kWarp] = largest;
  // Orders the maxima before their reads.
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, shared.highest[threadIdx.x % kSampleWarps]);
}

// Draws among all elements.
template <typename T>
__device__ __forceinline__ void draw_any(const LogitRow<T>& row, const SampleRow& parameters,
                                         int32_t* token) {
  const uint32_t largest = largest_key(row);
  if (largest == 0) {
    if (threadIdx.x == 0) *token = -1;
    return;
  }
  const Weigher weigher{logit_of(largest), parameters.factor};
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

// Thread blocks of a row, and which of them this is.
struct RowBlock {
  int row;
  int rank;

  static __device__ __forceinline__ RowBlock of(int splits) {
    const int block = blockIdx.x;
    return {block / splits, block % splits};
  }
};

template <typename T>
__device__ __forceinline__ LogitRow<T> logit_row(const Rows& logits, const Rows& mask, int group,
                                                 int row, int size, bool ranks_all) {
  const T* const data = row_of<T>(logits, group, row);
  return {data, mask.data == nullptr ? nullptr : row_of<bool>(mask, group, row), size,
          size % kVector<T> == 0 && is_aligned(data), ranks_all};
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2)
    sample_kernel(const __grid_constant__ SampleParams params, int splits) {
  const RowBlock block = RowBlock::of(splits);
  const int group = block.row / params.rows;
  const int in_group = block.row - group * params.rows;
  const LogitRow<T> row =
      logit_row<T>(params.logits, params.mask, group, in_group, params.size, false);
  const SampleRow parameters =
      *reinterpret_cast<const SampleRow*>(row_of<uint32_t>(params.table, group, in_group));
  int32_t* const token = params.tokens + block.row;
  if (parameters.k <= kMaxRanked) {
    const int count = candidates(row, block.rank, splits, static_cast<int>(parameters.k));
    if (block.rank != 0) return;
    if (count == 0) {
      if (threadIdx.x == 0) *token = -1;
    } else {
      draw_ranked(parameters, count, token);
    }
  } else if (block.rank == 0) {
    draw_any(row, parameters, token);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2)
    top_k_kernel(const __grid_constant__ TopKParams params, int splits) {
  const RowBlock block = RowBlock::of(splits);
  const int group = block.row / params.rows;
  const int in_group = block.row - group * params.rows;
  const LogitRow<T> row = logit_row<T>(params.logits, Rows{}, group, in_group, params.size, true);
  const int count = candidates(row, block.rank, splits, params.k);
  if (block.rank != 0) return;
  const Team team = Team::of(count);
  const Rank own = Rank::of(team);
  if (team.leads() && own.rank < params.k) {
    const int index = index_of_candidate(own.candidate);
    const int64_t target = int64_t{block.row} * params.k + own.rank;
    params.indices[target] = index;
    // As it is: the key does not tell zeros nor NaN apart.
    static_cast<T*>(params.values)[target] = row.logits[index];
  }
}

// Thread blocks for each row: as many as there are multiprocessors for, if each then has a vector
// for each of its threads.
inline int splits_of(int64_t rows, int vectors, const DeviceInfo& device) {
  int splits = 1;
  if (device.compute_capability < 90) return splits;
  while (splits < kMaxSplits && rows * splits * 2 <= device.multiprocessors &&
         vectors >= splits * 2 * kSampleThreads) {
    splits *= 2;
  }
  return splits;
}

template <typename T, typename Params>
cudaError_t launch_rows(void (*kernel)(Params, int), const Params& params, int64_t rows,
                        const DeviceInfo& device, cudaStream_t stream) {
  if (rows > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const int splits = splits_of(rows, params.size / kVector<T>, device);
  return launch_clusters(kernel, dim3(static_cast<unsigned>(rows * splits)), kSampleThreads,
                         sizeof(SampleShared), splits, stream, params, splits);
}

template <typename T>
cudaError_t launch_sample(const SampleParams& params, int64_t rows, const DeviceInfo& device,
                          cudaStream_t stream) {
  return launch_rows<T>(sample_kernel<T>, params, rows, device, stream);
}

template <typename T>
cudaError_t launch_top_k(const TopKParams& params, int64_t rows, const DeviceInfo& device,
                         cudaStream_t stream) {
  return launch_rows<T>(top_k_kernel<T>, params, rows, device, stream);
}

}  // namespace jax_flash::ops
