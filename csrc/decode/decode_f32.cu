#include "decode/launch.cuh"

namespace jax_flash::decode {

template cudaError_t launch_decode<CacheType::kF32, 64>(const DecodeParams&, const DeviceInfo&,
                                                        cudaStream_t);
template cudaError_t launch_decode<CacheType::kF32, 128>(const DecodeParams&, const DeviceInfo&,
                                                         cudaStream_t);
template cudaError_t launch_decode<CacheType::kF32, 256>(const DecodeParams&, const DeviceInfo&,
                                                         cudaStream_t);

}  // namespace jax_flash::decode
