// csrc/ptx/cluster.cuh for the emulator, which has no clusters.
#pragma once

#include <cuda_runtime.h>

namespace jax_flash::ptx {

inline int cluster_ctarank() { emulator::fail("clusters are not emulated"); }
inline void cluster_arrive() { emulator::fail("clusters are not emulated"); }
inline void cluster_wait() { emulator::fail("clusters are not emulated"); }
inline uint32_t mapa(uint32_t, int) { emulator::fail("clusters are not emulated"); }
inline float4 ld_cluster_v4(uint32_t) { emulator::fail("clusters are not emulated"); }
inline float2 ld_cluster_v2(uint32_t) { emulator::fail("clusters are not emulated"); }

}  // namespace jax_flash::ptx
