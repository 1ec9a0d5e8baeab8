// The order of the blocks of work of a backward with intervals, of which the host knows no lengths,
// and what kernels with a queue share. A forward's blocks are those of row_blocks.cuh.
//
// A small kernel sorts the blocks of each sequence before the main kernel starts, whose thread
// blocks then take one after another from a queue: the longest documents first, and the blocks of a
// document one after the other, the longest first if it is causal. So those who work at a time read
// the same queries, and what is left at the end is short. Results do not depend on who works off
// what, nor when.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "host/intervals.h"
#include "host/launch.h"
#include "host/params.h"
#include "ptx/griddepcontrol.cuh"
#include "ptx/reduction.cuh"
#include "tile/intervals.cuh"

namespace jax_flash::sm90 {

inline constexpr int kWorkOrderThreads = 256;

// What is sorted: `blocks` of kSize keys.
template <int kSize>
struct WorkBlocks {
  int blocks;
  int chunks;  // thread blocks of a sequence

  static WorkBlocks make(const MhaParams& params) {
    const int blocks = (params.key_length + kSize - 1) / kSize;
    return {blocks, (blocks + kWorkOrderThreads - 1) / kWorkOrderThreads};
  }

  // The length of the document of a block: of rows from the first that its keys meet to the last
  // that those meet who meet that one. -1 if it meets none.
  __device__ __forceinline__ int document(const IntervalMask& mask, int block) const {
    const int row_tiles = interval_tiles(mask.query_length);
    const int key_tiles = interval_tiles(mask.key_length);
    const RowInterval seen = mask.rows(block * kSize, (block + 1) * kSize);
    if (seen.first >= seen.end) return -1;
    const RowTile& last = mask.row_tiles[min(seen.end / kIntervalRows, row_tiles) - 1];
    // Its first keys may share a tile with another document's.
    const int tile = min((last.first + kIntervalKeys - 1) / kIntervalKeys, key_tiles - 1);
    return max(0, seen.end - mask.key_tiles[tile].first);
  }
};

// Writes the queue of a call: who is next, and the blocks of each sequence in their order. Each
// thread finds the place of one block.
template <int kSize>
__global__ void __launch_bounds__(kWorkOrderThreads)
    interval_order_kernel(const __grid_constant__ MhaParams params,
                          const __grid_constant__ WorkBlocks<kSize> work) {
  extern __shared__ __align__(1024) unsigned char memory[];
  int* const documents = reinterpret_cast<int*>(memory);
  const int batch = blockIdx.x / work.chunks;
  const int thread = threadIdx.x;
  const int block = (blockIdx.x - batch * work.chunks) * kWorkOrderThreads + thread;
  ptx::griddepcontrol_launch_dependents();
  const IntervalMask mask = IntervalMask::make(params, batch);
  if (blockIdx.x == 0 && thread == 0) *params.intervals.queue = 0;
  const int own = block < work.blocks ? work.document(mask, block) : -1;
  int place = 0;
#pragma unroll 1
  for (int first = 0; first < work.blocks; first += kWorkOrderThreads) {
    const int other = first + thread;
    int document = -2;
    if (other == block) {
      document = own;
    } else if (other < work.blocks) {
      document = work.document(mask, other);
    }
    documents[thread] = document;
    // Orders the lengths before they are read.
    __syncthreads();
    const int end = min(kWorkOrderThreads, work.blocks - first);
#pragma unroll 8
    for (int i = 0; i < end; ++i) {
      const bool before = first + i < block;
      place += documents[i] > own || (documents[i] == own && before) ? 1 : 0;
    }
    // Orders the reads before the next lengths.
    __syncthreads();
  }
  if (block < work.blocks) {
    const int64_t first = kQueueHeader + int64_t{batch} * interval_tiles(params.key_length);
    params.intervals.queue[first + place] = block;
  }
  // The main kernel waits for this kernel alone, and needs what came before it, too.
  ptx::griddepcontrol_wait();
}

template <int kSize>
cudaError_t launch_work_order(const MhaParams& params, cudaStream_t stream) {
  const auto work = WorkBlocks<kSize>::make(params);
  const dim3 grid(static_cast<unsigned>(params.batch * work.chunks));
  constexpr size_t kBytes = sizeof(int) * kWorkOrderThreads;
  // It reads nothing that bwd_prepare writes, and writes nothing that it reads.
  return launch_dependent_kernel(interval_order_kernel<kSize>, grid, kWorkOrderThreads, kBytes,
                                 stream, params, work);
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

// The number of the next block of work, for the first lane. What the order says was there before
// the first one was taken, so nothing has to be ordered, and what the L1 has of it stays.
__device__ __forceinline__ int take_work(const MhaParams& params) {
  return ptx::atom_relaxed_add(params.intervals.queue, 1);
}

// The block of keys with place `rank` in the order of its sequence.
__device__ __forceinline__ int work_at(const MhaParams& params, int batch, int rank) {
  const int64_t first = kQueueHeader + int64_t{batch} * interval_tiles(params.key_length);
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
