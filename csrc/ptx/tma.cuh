// Tensor copies by the tensor memory accelerator (PTX ISA 9.7.9.27): one thread asks for a box of
// a tensor described by a CUtensorMap; elements outside the tensor arrive as zeros.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace jax_flash::ptx {

// L2 eviction priorities, as createpolicy encodes them for the whole access.
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000;
inline constexpr uint64_t kEvictLast = 0x14f0000000000000;

// Fetches a tensor map, so that the first copy does not wait for it.
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at coordinates (c0 fastest) to shared memory; its bytes count towards `barrier`.
__device__ __forceinline__ void tma_load_5d(uint32_t shared, const CUtensorMap* map,
                                            uint32_t barrier, uint64_t policy, int c0, int c1,
                                            int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(shared),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "l"(policy)
      : "memory");
}

// The same to the same place of all thread blocks of the cluster whose ranks are bits of `ranks`;
// in each, the bytes count towards its own barrier at this place.
__device__ __forceinline__ void tma_load_5d_multicast(uint32_t shared, const CUtensorMap* map,
                                                      uint32_t barrier, uint64_t policy,
                                                      uint16_t ranks, int c0, int c1, int c2,
                                                      int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;" ::"r"(
          shared),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "h"(ranks), "l"(policy)
      : "memory");
}

// Brings the box at coordinates (c0 fastest) to the L2.
__device__ __forceinline__ void tma_prefetch_5d(const CUtensorMap* map, int c0, int c1, int c2,
                                                int c3, int c4) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Contiguous bytes, a multiple of 16, to shared memory; they count towards `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// The box at coordinates (c0 fastest) from shared memory; elements outside the tensor are dropped.
__device__ __forceinline__ void tma_store_5d(const CUtensorMap* map, uint32_t shared, int c0,
                                             int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
          "l"(map),
      "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's stores have read shared memory.
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until this thread's stores and additions are done.
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Contiguous bytes, a multiple of 16, from shared memory to global memory.
__device__ __forceinline__ void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared), "r"(bytes)
               : "memory");
}

// Adds contiguous f32, a multiple of 16 bytes, from shared memory to global memory. Belongs to a
// group as stores do.
__device__ __forceinline__ void bulk_add_f32(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared), "r"(bytes)
      : "memory");
}

// Orders accesses to global memory by the async proxy and ordinary ones.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Orders this thread's earlier ordinary accesses to shared memory before later ones by the async
// proxy (TMA, wgmma) that a barrier puts after them.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace jax_flash::ptx
