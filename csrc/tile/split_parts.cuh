// A float32 as the sum of two bf16, high + low, to 2^-18 of it: high is the nearest, low the
// nearest of what is missing.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ptx/math.cuh"

namespace jax_flash {

// The low parts of `first` and `second`, whose high ones are the halves of `high`.
__device__ __forceinline__ uint32_t low_parts(float first, float second, uint32_t high) {
  return ptx::cvt_rn_x2<__nv_bfloat16>(first - __uint_as_float(high << 16),
                                       second - __uint_as_float(high & 0xffff0000u));
}

}  // namespace jax_flash
