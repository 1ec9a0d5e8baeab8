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

// Lists the k best of a row and no others, by histograms, in one block. All threads have read the
// old list.
template <typename Row>
__device__ __forceinline__ int list_exactly(const Row& row, int k) {
  SampleShared& shared = sample_shared();
  const Slice all = Slice::of(row, 0, 0);
  const Cut cut = select(row, all, Blocks{0, 1}, Count{}, k, 0);
  if (threadIdx.x == 0) shared.listed_count = 0;
  // Orders the zero before additions.
  __syncthreads();
  row.template visit_all<kSampleThreads>(threadIdx.x, all.end, [&](int index, uint32_t key) {
    if (cut.keeps(index, key)) list_candidate(make_candidate(index, key));
  });
  // Orders the candidates before their reads.
  __syncthreads();
  return shared.listed_count;
}

// In the first block of a row, after segment_maxima: the list of its k best, perhaps with more
// candidates; how many. The others' result has no meaning.
template <typename Row>
__device__ __forceinline__ int candidates(const Row& row, const Slice& slice, const Blocks& blocks,
                                          uint32_t largest, int k) {
  // Many candidates take longer to rank than to narrow.
  const int most = blocks.count > 1 ? kMaxCandidates : k + 2 * bound_slack(k);
  int count = list_best(row, slice, largest, k, most);
  if (blocks.count > 1) count = gather(blocks.rank, blocks.count, k);
  if (count <= kMaxCandidates) return count;
  // Everybody has read the count.
  __syncthreads();
  return list_exactly(row, k);
}

inline constexpr int kElsewhere = -2;

// Draws among all elements of a row, all of its blocks together, after segment_maxima. The
// token, -1 if there is none, or kElsewhere if another block has it.
template <typename Row>
__device__ __forceinline__ int draw_any(const Row& row, const Slice& slice, const Blocks& blocks,
                                        uint32_t largest) {
  SampleShared& shared = sample_shared();
  const SampleRow& parameters = shared.parameters;
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (threadIdx.x % kWarp == 0) shared.highest[threadIdx.x / kWarp] = largest;
  // Orders the maxima and the parameters before their reads.
  __syncthreads();
  Cut by_count{0, 0};
  if (parameters.k < static_cast<uint32_t>(row.size)) {
    by_count = select(row, slice, blocks, Count{}, parameters.k, 1);
  }
  largest = __reduce_max_sync(0xffffffffu, shared.highest[threadIdx.x % kSampleWarps]);
  largest = static_cast<uint32_t>(blocks.say(0, largest).largest);
  const Weigher weigher{logit_of(largest), parameters.factor};
  Cut cut = by_count;
  if (parameters.mass <= kAllMass) {
    const Weight measure{by_count, weigher};
    const unsigned long long own =
        sum_parts(row, slice, [&](int index, uint32_t key) -> unsigned long long {
          return measure.keeps(index, key) ? measure.of(key) : 0;
        });
    const unsigned long long total = blocks.say(3, own).total;
    cut = select(row, slice, blocks, measure, nucleus(total, parameters.mass), 4);
  }
  const uint32_t most = parameters.distance;
  const auto weight = [&](int index, uint32_t key) -> unsigned long long {
    if (!cut.keeps(index, key)) return 0;
    const uint32_t distance = weigher.distance(key);
    return distance <= most ? weight_of(distance) : 0;
  };
  const unsigned long long own = sum_parts(row, slice, weight);
  const Blocks::Said sums = blocks.say(6, own);
  const uint64_t random = uint64_t{parameters.random_high} << 32 | parameters.random_low;
  const unsigned long long target = __umul64hi(random, sums.total);
  int token = kElsewhere;
  if (sums.total == 0) {
    // Nothing may be chosen: the best, if there is one, has a weight.
    if (blocks.rank == 0) token = -1;
  } else if (target >= sums.before && target - sums.before < own) {
    token = find(row, slice, weight, target - sums.before);
  }
  // Other blocks' shared memory is there until it has been read.
  if (blocks.count > 1) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  }
  return token;
}

// Where a thread block is: in which row, of how many in 2^split_bits blocks each.
struct RowBlock {
  int rank;  // among the blocks of its row
  int flat;  // among all rows
  int group;
  int row;  // of the group

  // No division is on the way to the loads of the usual case.
  static __device__ __forceinline__ RowBlock of(int rows, int split_bits) {
    const int block = blockIdx.x;
    const int flat = block >> split_bits;
    const int group = flat < rows ? 0 : flat / rows;
    return {block & ((1 << split_bits) - 1), flat, group, flat - group * rows};
  }
};

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const __grid_constant__ SampleParams params, int split_bits) {
  const RowBlock block = RowBlock::of(params.rows, split_bits);
  const bool* const mask =
      params.mask.data == nullptr ? nullptr : row_of<bool>(params.mask, block.group, block.row);
  const LogitRow<T, false> row{row_of<T>(params.logits, block.group, block.row), mask, params.size};
  const SampleRow* const parameters =
      reinterpret_cast<const SampleRow*>(row_of<uint32_t>(params.table, block.group, block.row));
  const uint32_t k = parameters->k;
  const Blocks blocks{block.rank, 1 << split_bits};
  const Slice slice = Slice::of(row, block.rank, split_bits);
  const uint32_t largest = segment_maxima(row, slice);
  SampleShared& shared = sample_shared();
  if (threadIdx.x == 0) {
    // Both paths have barriers before their use.
    shared.parameters = *parameters;
    shared.token = params.tokens + block.flat;
  }
  if (k <= kMaxRanked) {
    const int count = candidates(row, slice, blocks, largest, static_cast<int>(k));
    if (block.rank != 0) return;
    if (count == 0) {
      if (threadIdx.x == 0) *shared.token = -1;
    } else {
      draw_ranked(shared.parameters, count, shared.token);
    }
  } else {
    const int index = draw_any(row, slice, blocks, largest);
    if (threadIdx.x == 0 && index != kElsewhere) *shared.token = index;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2)
    top_k_kernel(const __grid_constant__ TopKParams params, int split_bits) {
  const RowBlock block = RowBlock::of(params.rows, split_bits);
  const LogitRow<T, true> row{row_of<T>(params.logits, block.group, block.row), nullptr,
                              params.size};
  const Slice slice = Slice::of(row, block.rank, split_bits);
  const uint32_t largest = segment_maxima(row, slice);
  const int count = candidates(row, slice, Blocks{block.rank, 1 << split_bits}, largest, params.k);
  if (block.rank != 0) return;
  const Team team = Team::of(count);
  const Rank own = Rank::of(team);
  if (team.leads() && own.rank < params.k) {
    const int index = index_of_candidate(own.candidate);
    const int64_t target = int64_t{block.flat} * params.k + own.rank;
    params.indices[target] = index;
    // As it is: the key does not tell zeros nor NaN apart.
    static_cast<T*>(params.values)[target] = row.logits[index];
  }
}

// As many thread blocks for each row as there are multiprocessors for, if each then has a vector
// for each of its threads: 2 to this power.
inline int split_bits_of(int64_t rows, int vectors, const DeviceInfo& device) {
  int bits = 0;
  if (device.compute_capability < 90) return bits;
  while (2 << bits <= kMaxSplits && rows * (2 << bits) <= device.multiprocessors &&
         vectors >= (2 << bits) * kSampleThreads) {
    ++bits;
  }
  return bits;
}

template <typename T, typename Params>
cudaError_t launch_rows(void (*kernel)(Params, int), const Params& params, int64_t rows,
                        const DeviceInfo& device, cudaStream_t stream) {
  const int split_bits = split_bits_of(rows, params.size / kVector<T>, device);
  if (rows << split_bits > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  return launch_clusters(kernel, dim3(static_cast<unsigned>(rows << split_bits)), kSampleThreads,
                         sizeof(SampleShared), 1 << split_bits, stream, params, split_bits);
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
