// What device code and launches use of the CUDA runtime, for the emulator.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// `extern __shared__ unsigned char memory[]` is a global array; kernels have no other.
#define __shared__

using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0;
inline constexpr cudaError_t cudaErrorInvalidValue = 1;
inline constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
inline constexpr cudaError_t cudaErrorNotSupported = 801;
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
inline constexpr int cudaSharedmemCarveoutMaxShared = 100;
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// As many as the emulated device, which the driver knows of and this does not.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  *count = std::max(1, static_cast<int>(config->gridDim.x / config->attrs->val.clusterDim.x));
  return cudaSuccess;
}
// Runs the kernel at once. `emulated_shared_memory` is that array of the kernel's namespace.
extern unsigned char* emulated_shared_memory;
template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Params&... params) {
  if (config->dynamicSmemBytes > emulator::kSharedBytes) return cudaErrorInvalidConfiguration;
  int cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = static_cast<int>(config->attrs[i].val.clusterDim.x);
    }
    cooperative |= config->attrs[i].id == cudaLaunchAttributeCooperative;
  }
  // All thread blocks run at once. Clusters need not: they wait for earlier ones.
  if (cooperative && cluster == 1) {
    cluster = static_cast<int>(config->gridDim.x * config->gridDim.y);
  }
  emulator::launch(static_cast<int>(config->gridDim.x), static_cast<int>(config->gridDim.y),
                   static_cast<int>(config->blockDim.x), cluster, emulated_shared_memory,
                   [&] { kernel(params...); });
  return cudaSuccess;
}

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline void __syncthreads() { emulator::barrier(0, emulator::current->block->threads, true); }
inline int __syncthreads_count(bool value) { return emulator::vote(value); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  const uint64_t none = 0;
  emulator::exchange(&none, 1);
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  const uint64_t bits = emulator::bits_of(value);
  return emulator::bit_cast<T>(emulator::exchange(&bits, 1)[source % 32][0]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bit) {
  return __shfl_sync(mask, value, emulator::lane() ^ bit);
}
template <typename F>
uint32_t reduce_lanes(uint32_t value, F f) {
  const uint64_t bits = value;
  auto& all = emulator::exchange(&bits, 1);
  uint32_t result = static_cast<uint32_t>(all[0][0]);
  for (int i = 1; i < 32; ++i) result = f(result, static_cast<uint32_t>(all[i][0]));
  return result;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  return reduce_lanes(value, [](uint32_t x, uint32_t y) { return std::max(x, y); });
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  return reduce_lanes(value, [](uint32_t x, uint32_t y) { return std::min(x, y); });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t bits = value;
  auto& all = emulator::exchange(&bits, 1);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(all[i][0]) << i;
  return votes;
}
// From 1; 0 where there is none.
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(bits); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline bool __any_sync(unsigned, bool value) {
  const uint64_t bits = value;
  auto& all = emulator::exchange(&bits, 1);
  return std::any_of(all, all + 32, [](const uint64_t* lane) { return lane[0] != 0; });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float __uint_as_float(uint32_t bits) { return emulator::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) {
  return static_cast<uint32_t>(emulator::bits_of(value));
}
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __ffs(uint32_t x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
inline uint32_t __umulhi(uint32_t x, uint32_t y) {
  return static_cast<uint32_t>(static_cast<uint64_t>(x) * y >> 32);
}
inline uint64_t __umul64hi(uint64_t x, uint64_t y) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// Fibers do not interrupt each other.
template <typename T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __log2f(float x) { return std::log2(x); }
