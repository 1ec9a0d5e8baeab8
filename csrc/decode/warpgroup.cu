#include "decode/warpgroup_launch.cuh"

namespace jax_flash::decode {

template cudaError_t launch_warpgroup<CacheType::kBf16, 64>(const DecodeParams&, const DeviceInfo&,
                                                            cudaStream_t);
template cudaError_t launch_warpgroup<CacheType::kBf16, 128>(const DecodeParams&, const DeviceInfo&,
                                                             cudaStream_t);
template cudaError_t launch_warpgroup<CacheType::kF16, 64>(const DecodeParams&, const DeviceInfo&,
                                                           cudaStream_t);
template cudaError_t launch_warpgroup<CacheType::kF16, 128>(const DecodeParams&, const DeviceInfo&,
                                                            cudaStream_t);

}  // namespace jax_flash::decode
