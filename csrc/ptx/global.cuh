// Loads from global memory that say how to cache (PTX ISA 9.7.9.8).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_flash::ptx {

// 16 bytes that nobody writes while the kernel runs, without a place in the L1.
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* source) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

}  // namespace jax_flash::ptx
