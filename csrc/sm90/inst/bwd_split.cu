#include "sm80/bwd_launch.cuh"

namespace jax_flash::sm80 {

template cudaError_t launch_mha_bwd_split<64, 64, false>(const MhaBwdParams&, const DeviceInfo&,
                                                         cudaStream_t);
template cudaError_t launch_mha_bwd_split<128, 128, false>(const MhaBwdParams&, const DeviceInfo&,
                                                           cudaStream_t);

}  // namespace jax_flash::sm80
