// Global memory that a kernel touches once: not kept in L1, and in L2 as a policy says (PTX ISA
// 9.7.9.8 ld.global.nc, 9.7.9.11 st, 9.7.9.18 createpolicy).
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// Lines leave L2 before others do.
__device__ __forceinline__ uint64_t l2_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Lines leave L2 in the order in which all do.
__device__ __forceinline__ uint64_t l2_evict_normal() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes at a multiple of 16, which nobody writes while the kernel runs.
__device__ __forceinline__ uint4 load_once(const void* address, uint64_t policy) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(address)), "l"(policy));
  return value;
}

// 16 bytes at a multiple of 16.
__device__ __forceinline__ void store_once(void* address, const uint4& value, uint64_t policy) {
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(
                   __cvta_generic_to_global(address)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(policy)
               : "memory");
}

}  // namespace jax_flash::ptx
