#include "sm90/fwd_launch.cuh"

namespace jax_flash::sm90 {

template cudaError_t launch_mha_fwd_intervals<ElementType::kBf16, 256, 256>(const MhaFwdParams&,
                                                                            const DeviceInfo&,
                                                                            cudaStream_t);
template cudaError_t launch_mha_fwd_intervals<ElementType::kF16, 256, 256>(const MhaFwdParams&,
                                                                           const DeviceInfo&,
                                                                           cudaStream_t);

}  // namespace jax_flash::sm90
