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

}  // namespace jax_flash
