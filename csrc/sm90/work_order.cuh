// The order of the blocks of work of a call with intervals, of which the host knows no lengths.
//
// A small kernel sorts the blocks of each sequence before the main kernel starts, whose thread
// blocks then take one after another from a queue: the longest documents first, and the blocks of a
// document one after the other, the longest first if it is causal. So those who work at a time read
// the same keys (queries), and what is left at the end is short. Results do not depend on who works
// off what, nor when.
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

// What is sorted: `blocks` of `size` rows that see keys, or of keys that are seen by rows.
struct WorkBlocks {
  int blocks;
  int size;
  int chunks;  // thread blocks of a sequence

  template <bool kOfKeys>
  static WorkBlocks make(const MhaParams& params, int size) {
    const int length = kOfKeys ? params.key_length : params.query_length;
    const int blocks = (length + size - 1) / size;
    return {blocks, size, (blocks + kWorkOrderThreads - 1) / kWorkOrderThreads};
  }

  // The length of the document of a block: of keys (rows) from the first that its rows (keys) meet
  // to the last that those meet who meet that one. -1 if it meets none.
  template <bool kOfKeys>
  __device__ __forceinline__ int document(const IntervalMask& mask, int block) const {
    const int row_tiles = interval_tiles(mask.query_length);
    const int key_tiles = interval_tiles(mask.key_length);
    if constexpr (kOfKeys) {
      const RowInterval seen = mask.rows(block * size, (block + 1) * size);
      if (seen.first >= seen.end) return -1;
      const RowTile& last = mask.row_tiles[min(seen.end / kIntervalRows, row_tiles) - 1];
      // Its first keys may share a tile with another document's.
      const int tile = min((last.first + kIntervalKeys - 1) / kIntervalKeys, key_tiles - 1);
      return max(0, seen.end - mask.key_tiles[tile].first);
    } else {
      const KeyInterval seen = mask.hull(block * size, (block + 1) * size);
      if (seen.first >= seen.end) return -1;
      const KeyTile& first = mask.key_tiles[seen.first / kIntervalKeys];
      const RowTile& last = mask.row_tiles[max(1, min(first.end / kIntervalRows, row_tiles)) - 1];
      return max(0, last.end - seen.first);
    }
  }
};

// Writes the queue of a call: who is next, and the blocks of each sequence in their order. Each
// thread finds the place of one block.
template <bool kOfKeys>
__global__ void __launch_bounds__(kWorkOrderThreads)
    interval_order_kernel(const __grid_constant__ MhaParams params,
                          const __grid_constant__ WorkBlocks work) {
  extern __shared__ __align__(1024) unsigned char memory[];
  int* const documents = reinterpret_cast<int*>(memory);
  const int batch = blockIdx.x / work.chunks;
  const int thread = threadIdx.x;
  const int block = (blockIdx.x - batch * work.chunks) * kWorkOrderThreads + thread;
  ptx::griddepcontrol_launch_dependents();
  const IntervalMask mask = IntervalMask::make(params, batch);
  if (blockIdx.x == 0 && thread == 0) *params.intervals.queue = 0;
  const int own = block < work.blocks ? work.document<kOfKeys>(mask, block) : -1;
  int place = 0;
#pragma unroll 1
  for (int first = 0; first < work.blocks; first += kWorkOrderThreads) {
    const int other = first + thread;
    int document = -2;
    if (other == block) {
      document = own;
    } else if (other < work.blocks) {
      document = work.document<kOfKeys>(mask, other);
    }
    documents[thread] = document;
    // Orders the lengths before they are read.
    __syncthreads();
    const int end = min(kWorkOrderThreads, work.blocks - first);
#pragma unroll 8
    for (int i = 0; i < end; ++i) {
      const bool before = kOfKeys ? first + i < block : first + i > block;
      place += documents[i] > own || (documents[i] == own && before) ? 1 : 0;
    }
    // Orders the reads before the next lengths.
    __syncthreads();
  }
  if (block < work.blocks) {
    const int length = kOfKeys ? params.key_length : params.query_length;
    params.intervals.queue[kQueueHeader + int64_t{batch} * interval_tiles(length) + place] = block;
  }
  // The main kernel of a backward waits for this kernel alone, and needs what came before it, too.
  if constexpr (kOfKeys) ptx::griddepcontrol_wait();
}

template <bool kOfKeys>
cudaError_t launch_work_order(const MhaParams& params, int size, cudaStream_t stream) {
  const WorkBlocks work = WorkBlocks::make<kOfKeys>(params, size);
  const dim3 grid(static_cast<unsigned>(params.batch * work.chunks));
  constexpr size_t kBytes = sizeof(int) * kWorkOrderThreads;
  if constexpr (kOfKeys) {
    // It reads nothing that bwd_prepare writes, and writes nothing that it reads.
    return launch_dependent_kernel(interval_order_kernel<kOfKeys>, grid, kWorkOrderThreads, kBytes,
                                   stream, params, work);
  } else {
    return launch_kernel(interval_order_kernel<kOfKeys>, grid, kWorkOrderThreads, kBytes, stream,
                         params, work);
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
