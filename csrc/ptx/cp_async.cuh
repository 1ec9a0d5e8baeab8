// cp.async (PTX ISA 9.7.9.25.3): asynchronous copies from global to shared memory.
// Bytes past `valid_bytes` are written as zeros and not read from global memory.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// 16 bytes, cached in L2 only. Both addresses are 16-byte aligned.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid_bytes)
               : "memory");
}

// 4 bytes. Both addresses are 4-byte aligned.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
               "r"(valid_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// An arrival, one of those that the barrier counts, as soon as this thread's copies so far are
// done.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits until at most kPending of this thread's newest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jax_flash::ptx
