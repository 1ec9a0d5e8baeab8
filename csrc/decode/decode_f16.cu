#include "decode/launch.cuh"

namespace jax_flash::decode {

template cudaError_t launch_decode<CacheType::kF16, 64>(const DecodeParams&, const DeviceInfo&,
                                                        cudaStream_t);
template cudaError_t launch_decode<CacheType::kF16, 128>(const DecodeParams&, const DeviceInfo&,
                                                         cudaStream_t);
template cudaError_t launch_decode<CacheType::kF16, 256>(const DecodeParams&, const DeviceInfo&,
                                                         cudaStream_t);

}  // namespace jax_flash::decode
