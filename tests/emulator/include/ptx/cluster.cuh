// csrc/ptx/cluster.cuh for the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "emulator.h"

namespace jax_flash::ptx {

inline int cluster_ctarank() { return emulator::current->block->rank; }
inline void cluster_arrive() {
  emulator::current->cluster_round = emulator::cluster->barrier.round;
  ++emulator::cluster->barrier.arrived;
  ++emulator::progress;
  emulator::complete_cluster_barrier();
}
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
inline float2 ld_cluster_v2(uint32_t address) { return ld_cluster<float2>(address); }

}  // namespace jax_flash::ptx
