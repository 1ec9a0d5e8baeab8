// Tensor maps of the operands, for TMA.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "host/params.h"

namespace jax_flash::sm90 {

// Describes an operand as [outer batch, inner batch, ...] x two of {row, head} x width. A box is 64
// columns (128 swizzled bytes) by box_1 by box_2; elements outside the operand read as zeros.
struct TensorMapDims {
  int64_t width;
  int64_t size_1, stride_1;  // stride in elements
  int64_t size_2, stride_2;
  uint32_t box_1, box_2;
};

inline cudaError_t make_tensor_map(const MhaParams& params, const TensorView& view,
                                   const TensorMapDims& dims, CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;

  // Batch dims from the fastest; one that all batches share has size 1 here.
  cuuint64_t batch_size[2] = {1, 1};
  cuuint64_t batch_stride[2] = {16, 16};
  for (int dim = 0; dim < params.batch_dims; ++dim) {
    const int at = params.batch_dims - 1 - dim;
    if (view.batch_strides[dim] == 0) continue;
    batch_size[at] = static_cast<cuuint64_t>(params.batch_sizes[dim]);
    batch_stride[at] = 2 * static_cast<cuuint64_t>(view.batch_strides[dim]);
  }
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(dims.width),
                               static_cast<cuuint64_t>(dims.size_1),
                               static_cast<cuuint64_t>(dims.size_2), batch_size[0], batch_size[1]};
  const cuuint64_t strides[4] = {2 * static_cast<cuuint64_t>(dims.stride_1),
                                 2 * static_cast<cuuint64_t>(dims.stride_2), batch_stride[0],
                                 batch_stride[1]};
  const cuuint32_t box[5] = {64, dims.box_1, dims.box_2, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  // The type only says how wide an element is and what a zero looks like.
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<void*>(view.data), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_flash::sm90
