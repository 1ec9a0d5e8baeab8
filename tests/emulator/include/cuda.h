// What tensor maps need of the CUDA driver, for the emulator.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

using CUresult = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
inline constexpr CUresult CUDA_SUCCESS = 0;

struct alignas(64) CUtensorMap {
  unsigned char* data;
  uint64_t sizes[5];
  uint64_t strides[5];  // in bytes
  uint32_t box[5];
};

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* data, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  if (rank != 5 || reinterpret_cast<uintptr_t>(data) % 16 != 0) return 1;
  *map = {static_cast<unsigned char*>(data), {}, {}, {}};
  map->strides[0] = 2;
  for (int i = 0; i < 5; ++i) {
    if (sizes[i] == 0 || box[i] == 0 || box[i] > 256 || steps[i] != 1) return 1;
    if (i > 0 && strides[i - 1] % 16 != 0) return 1;
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    if (i > 0) map->strides[i] = strides[i - 1];
  }
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
inline constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
