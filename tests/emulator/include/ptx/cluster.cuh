// csrc/ptx/cluster.cuh for the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "emulator.h"
#include "ptx/mbarrier.cuh"

namespace jax_flash::ptx {

inline int cluster_ctarank() { return emulator::current->block->rank; }
inline void cluster_arrive() {
  emulator::current->cluster_round = emulator::cluster->barrier.round;
  ++emulator::cluster->barrier.arrived;
  ++emulator::progress;
  emulator::complete_cluster_barrier();
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  emulator::wait_until(
      [] { return emulator::cluster->barrier.round != emulator::current->cluster_round; });
}
inline uint32_t mapa(uint32_t shared, int rank) { return emulator::cluster_address(shared, rank); }

template <typename T>
T ld_cluster(uint32_t address) {
  if (address % sizeof(T) != 0) emulator::fail("a load is not aligned", address);
  T value;
  std::memcpy(&value, emulator::shared_pointer(address), sizeof value);
  return value;
}
inline float4 ld_cluster_v4(uint32_t address) { return ld_cluster<float4>(address); }
inline uint32_t ld_cluster_b32(uint32_t address) { return ld_cluster<uint32_t>(address); }
inline uint64_t ld_cluster_b64(uint32_t address) { return ld_cluster<uint64_t>(address); }
inline float2 ld_cluster_v2(uint32_t address) { return ld_cluster<float2>(address); }

// Seen by no other thread before it has waited for the barrier.
template <typename T>
void st_async(uint32_t address, T value, uint32_t barrier) {
  if (address % sizeof(T) != 0) emulator::fail("a store is not aligned", address);
  emulator::copy_some_time([=] {
    std::memcpy(emulator::shared_pointer(address), &value, sizeof value);
    mbarrier_complete(barrier, sizeof value);
  });
}
inline void st_async_v4(uint32_t address, float4 value, uint32_t barrier) {
  st_async(address, value, barrier);
}
inline void st_async_v2(uint32_t address, float2 value, uint32_t barrier) {
  st_async(address, value, barrier);
}

inline void mbarrier_arrive_cluster_if(bool arrives, uint32_t barrier) {
  mbarrier_arrive_if(arrives, barrier);
}
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
}
inline void bulk_copy_cluster(uint32_t target, uint32_t source, uint32_t bytes, uint32_t barrier) {
  if (target % 16 != 0 || source % 16 != 0 || bytes % 16 != 0) {
    emulator::fail("a bulk copy is not aligned", bytes);
  }
  source = mapa(source, cluster_ctarank());  // whichever runs then
  emulator::copy_some_time([=] {
    std::memcpy(emulator::shared_pointer(target), emulator::shared_pointer(source), bytes);
    mbarrier_complete(barrier, bytes);
  });
}

}  // namespace jax_flash::ptx
