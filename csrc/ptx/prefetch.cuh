// Hints about what is read later.
#pragma once

namespace jax_flash::ptx {

// The line of global memory that holds `address` comes to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

}  // namespace jax_flash::ptx
