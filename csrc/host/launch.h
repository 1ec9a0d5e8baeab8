// Kernel launches.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace jax_flash {

// Launches `kernel`; the error is that of the launch alone.
template <typename... Params>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                          cudaStream_t stream, const Params&... params) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

// The same in clusters of `cluster` thread blocks, more than one on compute capability 9.0 and
// later alone.
template <typename... Params>
cudaError_t launch_clusters(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                            int cluster, cudaStream_t stream, const Params&... params) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  // Otherwise the driver may leave room for one thread block where two fit.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

// The same for a kernel that may start before the one before it in the stream has ended: on devices
// of compute capability 9.0 and later, if that one says so. Each of its threads must execute
// griddepcontrol.wait, and before that write nothing and read nothing that the other kernel writes.
template <typename... Params>
cudaError_t launch_dependent_kernel(void (*kernel)(Params...), dim3 grid, int threads,
                                    size_t shared_bytes, cudaStream_t stream,
                                    const Params&... params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

// How many clusters of a launch fit on the current device at a time: asked once for each device and
// kUse, unless the grid changes. Of `config`, nothing else may.
template <auto kKernel, int kUse = 0>
cudaError_t max_active_clusters(const cudaLaunchConfig_t& config, int* clusters) {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<uint64_t>, kMaxDevices> known{};  // the grid, and the answer for it
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool keeps = device < kMaxDevices;
  const uint64_t last = keeps ? known[device].load(std::memory_order_relaxed) : 0;
  if (last >> 32 == config.gridDim.x) {
    *clusters = static_cast<int>(last & 0xffffffffu);
    return cudaSuccess;
  }
  error = cudaOccupancyMaxActiveClusters(clusters, kKernel, &config);
  if (error != cudaSuccess) return error;
  if (keeps) {
    known[device].store(uint64_t{config.gridDim.x} << 32 | static_cast<uint32_t>(*clusters),
                        std::memory_order_relaxed);
  }
  return cudaSuccess;
}

}  // namespace jax_flash
