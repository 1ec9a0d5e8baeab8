// Launch of the decode kernels of a warpgroup, for compute capability 9.0 alone.
#pragma once

#include "decode/launch.cuh"

namespace jax_flash::decode {

template <CacheType kCache, int kWidth>
cudaError_t launch_warpgroup(const DecodeParams& params, const DeviceInfo& device,
                             cudaStream_t stream) {
  return launch<DecodeConfig<kCache, kWidth, Rows::kWarpgroup>>(params, device, stream);
}

}  // namespace jax_flash::decode
