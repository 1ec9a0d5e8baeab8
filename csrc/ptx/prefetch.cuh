// Hints about what is read later.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// The line of global memory that holds `address` comes to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// `bytes` from `address` on, both multiples of 16, come to the L2 cache.
__device__ __forceinline__ void bulk_prefetch_l2(const void* address, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
      "r"(bytes));
#else
  for (uint32_t i = 0; i < bytes; i += 32) prefetch_l2(static_cast<const char*>(address) + i);
#endif
}

}  // namespace jax_flash::ptx
