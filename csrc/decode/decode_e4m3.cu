#include "decode/launch.cuh"

namespace jax_flash::decode {

template cudaError_t launch_decode<CacheType::kE4m3, 64>(const DecodeParams&, const DeviceInfo&,
                                                         cudaStream_t);
template cudaError_t launch_decode<CacheType::kE4m3, 128>(const DecodeParams&, const DeviceInfo&,
                                                          cudaStream_t);
template cudaError_t launch_decode<CacheType::kE4m3, 256>(const DecodeParams&, const DeviceInfo&,
                                                          cudaStream_t);

}  // namespace jax_flash::decode
