// Thread block clusters (PTX ISA 9.7.13.4) and each other's shared memory. sm_90 and later; what
// code for older GPUs has as well, which launch no clusters, is nothing there.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

__device__ __forceinline__ int cluster_ctarank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster that has not exited arrives; writes before it are visible after the
// wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// Says nothing about memory; what has been loaded must have been used.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Address in thread block `rank` of what lies at `shared` in this one.
__device__ __forceinline__ uint32_t mapa(uint32_t shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
#else
  return shared;
#endif
}

__device__ __forceinline__ uint32_t ld_cluster_b32(uint32_t address) {
  uint32_t value = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
#endif
  return value;
}

__device__ __forceinline__ uint64_t ld_cluster_b64(uint32_t address) {
  uint64_t value = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.b64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
#endif
  return value;
}

__device__ __forceinline__ float4 ld_cluster_v4(uint32_t address) {
  float4 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
#endif
  return v;
}

__device__ __forceinline__ float2 ld_cluster_v2(uint32_t address) {
  float2 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address)
               : "memory");
#endif
  return v;
}

// Arrives at a barrier of any thread block of the cluster. For what the other one then overwrites
// and this one has read by products or copies that are complete: ordinary accesses are ordered
// within this thread block alone. A release at cluster scope is a fence of the whole GPU.
__device__ __forceinline__ void mbarrier_arrive_cluster_if(bool arrives, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.u32 arrives, %0, 0;\n"
      "@arrives mbarrier.arrive.shared::cluster.b64 _, [%1];\n"
      "}" ::"r"(static_cast<uint32_t>(arrives)),
      "r"(barrier)
      : "memory");
}

// Waits at a barrier of this thread block at which others of the cluster arrive.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Writes to another thread block's shared memory; the bytes count towards `barrier`, which is
// there, too. Who has waited for that sees them: no fence is needed.
__device__ __forceinline__ void st_async_v4(uint32_t address, float4 v, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void st_async_v2(uint32_t address, float2 v, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          address),
      "f"(v.x), "f"(v.y), "r"(barrier)
      : "memory");
#endif
}

// Contiguous bytes, a multiple of 16, from this thread block's shared memory to another one's; they
// count towards `barrier`, which is there, too.
__device__ __forceinline__ void bulk_copy_cluster(uint32_t target, uint32_t source, uint32_t bytes,
                                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(target),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace jax_flash::ptx
