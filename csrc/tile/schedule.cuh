// Which rows of which head a thread block works on.
//
// Block ids run through the row blocks of a section of heads before the next section starts, so
// that the keys and values in use fit the L2 cache. Inside a section the row block is the slow
// index and runs from the last rows to the first: with a causal mask the longest blocks start
// first and short ones fill the tail.
#pragma once

#include "host/params.h"

namespace jax_flash {

struct BlockCoordinate {
  int row_block;
  int head;   // query head
  int batch;  // flat index over all batch dims; negative where there is no work
};

__device__ __forceinline__ BlockCoordinate block_coordinate(const MhaFwdParams& params) {
  // id = (section * row_blocks + row_block) * section_heads + head in section
  const int upper = params.section_divisor.divide(blockIdx.x);
  const int section = params.row_blocks.divide(upper);
  const int row_block = upper - section * static_cast<int>(params.row_blocks.divisor);
  const int section_heads = params.section_divisor.divisor;
  // The heads that the last section lacks are left out of the first: the tail should be full.
  const int flat_head = (section - upper) * section_heads + blockIdx.x - params.missing_heads;
  if (flat_head < 0) return {0, 0, -1};
  const int batch = params.head_divisor.divide(flat_head);
  return {static_cast<int>(params.row_blocks.divisor) - 1 - row_block,
          flat_head - batch * params.heads, batch};
}

// Offset in elements of flat batch index `batch`, of which the last dim varies fastest.
__device__ __forceinline__ int64_t batch_offset(const int64_t (&strides)[kMaxBatchDims], int batch,
                                                const MhaParams& params) {
  if (params.batch_dims == 1) return batch * strides[0];
  int64_t offset = 0;
#pragma unroll 1
  for (int dim = params.batch_dims - 1; dim >= 0; --dim) {
    offset += batch % params.batch_sizes[dim] * strides[dim];
    batch /= params.batch_sizes[dim];
  }
  return offset;
}

}  // namespace jax_flash
