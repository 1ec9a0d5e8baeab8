#include "sm90/bwd_launch.cuh"

namespace jax_flash::sm90 {

template cudaError_t launch_mha_bwd_intervals<ElementType::kBf16, 64, 64>(const MhaBwdParams&,
                                                                          const DeviceInfo&,
                                                                          cudaStream_t);
template cudaError_t launch_mha_bwd_intervals<ElementType::kF16, 64, 64>(const MhaBwdParams&,
                                                                         const DeviceInfo&,
                                                                         cudaStream_t);

}  // namespace jax_flash::sm90
