// The order of the blocks of work of a call with intervals, of which the host knows no lengths.
//
// A kernel of one small thread block for each sequence sorts its blocks by length, the longest
// first, before the main kernel starts, whose thread blocks then take one after another from a
// queue. With short blocks at the end all of them are done at about the same time. Blocks of equal
// length are in any order: results do not depend on who works off what, nor when.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "host/intervals.h"
#include "host/launch.h"
#include "host/params.h"
#include "ptx/griddepcontrol.cuh"
#include "ptx/reduction.cuh"
#include "tile/fragment.cuh"
#include "tile/intervals.cuh"

namespace jax_flash::sm90 {

inline constexpr int kWorkOrderThreads = 256;
inline constexpr int kWorkOrderBins = 4 * kWorkOrderThreads;  // of lengths

// What is sorted: `blocks` of `rows` rows by the tiles of `keys` keys that they see, or the other
// way round.
struct WorkLengths {
  int blocks;
  int rows;
  int keys;
  int shift;  // lengths of 2^shift neighbouring numbers of tiles count as equal

  template <bool kOfKeys>
  static WorkLengths make(const MhaParams& params, int rows, int keys) {
    const int row_blocks = (params.query_length + rows - 1) / rows;
    const int key_blocks = (params.key_length + keys - 1) / keys;
    WorkLengths lengths{kOfKeys ? key_blocks : row_blocks, rows, keys, 0};
    const int longest = kOfKeys ? row_blocks : key_blocks;
    while (longest >> lengths.shift >= kWorkOrderBins) ++lengths.shift;
    return lengths;
  }

  // The bin of a block: the longest blocks have the first.
  template <bool kOfKeys>
  __device__ __forceinline__ int bin(const IntervalMask& mask, int block) const {
    int first, end, tile;
    if constexpr (kOfKeys) {
      const RowInterval seen = mask.rows(block * keys, (block + 1) * keys);
      first = seen.first, end = seen.end, tile = rows;
    } else {
      const KeyInterval seen = mask.hull(block * rows, (block + 1) * rows);
      first = seen.first, end = seen.end, tile = keys;
    }
    const int tiles = first < end ? (end + tile - 1) / tile - first / tile : 0;
    return kWorkOrderBins - 1 - min(tiles >> shift, kWorkOrderBins - 1);
  }
};

// Writes the queue of a call: who is next, and the blocks of each sequence by length.
template <bool kOfKeys>
__global__ void __launch_bounds__(kWorkOrderThreads)
    interval_order_kernel(const __grid_constant__ MhaParams params,
                          const __grid_constant__ WorkLengths lengths) {
  extern __shared__ __align__(1024) unsigned char memory[];
  int* const bins = reinterpret_cast<int*>(memory);  // how many blocks; then the place of the next
  int* const sums = bins + kWorkOrderBins;           // of each warp's bins
  const int batch = blockIdx.x;
  const int thread = threadIdx.x;
  ptx::griddepcontrol_launch_dependents();
  const IntervalMask mask = IntervalMask::make(params, batch);
  int32_t* const order =
      params.intervals.queue + kQueueHeader +
      int64_t{batch} * interval_tiles(kOfKeys ? params.key_length : params.query_length);
  if (batch == 0 && thread == 0) *params.intervals.queue = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bins[4 * thread + i] = 0;
  // Orders the zeros before the counts.
  __syncthreads();
#pragma unroll 1
  for (int block = thread; block < lengths.blocks; block += kWorkOrderThreads) {
    atomicAdd(&bins[lengths.bin<kOfKeys>(mask, block)], 1);
  }
  // Orders the counts before their sums.
  __syncthreads();
  int own[4];
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    own[i] = sum;
    sum += bins[4 * thread + i];
  }
  // Of the lanes before this one, and of the whole warp.
  int before = 0;
  int all = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, all, step);
    if ((lane_id() & step) != 0) before += other;
    all += other;
  }
  if (lane_id() == 0) sums[thread / 32] = all;
  // Orders the sums of warps before their reads.
  __syncthreads();
#pragma unroll 1
  for (int warp = 0; warp < thread / 32; ++warp) before += sums[warp];
#pragma unroll
  for (int i = 0; i < 4; ++i) bins[4 * thread + i] = before + own[i];
  // Orders the places before they are taken.
  __syncthreads();
#pragma unroll 1
  for (int block = thread; block < lengths.blocks; block += kWorkOrderThreads) {
    order[atomicAdd(&bins[lengths.bin<kOfKeys>(mask, block)], 1)] = block;
  }
  // The main kernel of a backward waits for this kernel alone, and needs what came before it, too.
  if constexpr (kOfKeys) ptx::griddepcontrol_wait();
}

template <bool kOfKeys>
cudaError_t launch_work_order(const MhaParams& params, int rows, int keys, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.batch));
  constexpr size_t kBytes = sizeof(int) * (kWorkOrderBins + kWorkOrderThreads / 32);
  const WorkLengths lengths = WorkLengths::make<kOfKeys>(params, rows, keys);
  if constexpr (kOfKeys) {
    // It reads nothing that bwd_prepare writes, and writes nothing that it reads.
    return launch_dependent_kernel(interval_order_kernel<kOfKeys>, grid, kWorkOrderThreads, kBytes,
                                   stream, params, lengths);
  } else {
    return launch_kernel(interval_order_kernel<kOfKeys>, grid, kWorkOrderThreads, kBytes, stream,
                         params, lengths);
  }
}

// Lets the main kernel, whose launch has this attribute, start while the order is still made. Only
// the warp that takes work has to wait for it; all others wait for that warp.
inline cudaLaunchAttribute after_work_order() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}
__device__ __forceinline__ void wait_for_work_order() { ptx::griddepcontrol_wait(); }

// The number of the next block of work, for the first lane.
__device__ __forceinline__ int take_work(const MhaParams& params) {
  return ptx::atom_acquire_add(params.intervals.queue, 1);
}

// The block with place `rank` in the order of its sequence.
template <bool kOfKeys>
__device__ __forceinline__ int work_at(const MhaParams& params, int batch, int rank) {
  const int64_t first =
      kQueueHeader +
      int64_t{batch} * interval_tiles(kOfKeys ? params.key_length : params.query_length);
  // Not by __ldg, which memory that is written while this kernel runs is not for.
  return params.intervals.queue[first + rank];
}

// How many heads a section of the order has, so that what they share fits the L2: all of those that
// share keys, in sections of about the same size. bytes: of what such a group reads.
inline int64_t work_section(int64_t heads, int64_t group, double bytes, int64_t l2_bytes) {
  const int64_t groups = heads / group;
  const int64_t sections =
      std::max<int64_t>(1, std::llround(static_cast<double>(groups) * bytes / (0.7 * l2_bytes)));
  return group * ((groups + sections - 1) / sections);
}

}  // namespace jax_flash::sm90
