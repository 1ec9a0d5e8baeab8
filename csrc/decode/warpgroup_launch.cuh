// Launch of the decode kernels of warpgroups, for compute capability 9.0 alone.
#pragma once

#include "decode/launch.cuh"

namespace jax_flash::decode {

template <CacheType kCache, int kWidth>
cudaError_t launch_warpgroups(const DecodeParams& params, const DeviceInfo& device,
                              cudaStream_t stream) {
  return params.tokens * params.group <= 64
             ? launch<DecodeConfig<kCache, kWidth, Rows::kWarpgroup>>(params, device, stream)
             : launch<DecodeConfig<kCache, kWidth, Rows::kTwoWarpgroups>>(params, device, stream);
}

}  // namespace jax_flash::decode
