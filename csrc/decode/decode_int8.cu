#include "decode/launch.cuh"

namespace jax_flash::decode {

template cudaError_t launch_decode<CacheType::kInt8, 64>(const DecodeParams&, const DeviceInfo&,
                                                         cudaStream_t);
template cudaError_t launch_decode<CacheType::kInt8, 128>(const DecodeParams&, const DeviceInfo&,
                                                          cudaStream_t);
template cudaError_t launch_decode<CacheType::kInt8, 256>(const DecodeParams&, const DeviceInfo&,
                                                          cudaStream_t);

}  // namespace jax_flash::decode
