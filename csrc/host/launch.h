// Kernel launches.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

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
                                    cudaStream_t stream, const Params&... params) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace jax_flash
