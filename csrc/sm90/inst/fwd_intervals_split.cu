#include "sm90/fwd_launch.cuh"

namespace jax_flash::sm90 {

template cudaError_t launch_mha_fwd_intervals<ElementType::kSplit, 64, 64>(const MhaFwdParams&,
                                                                           const DeviceInfo&,
                                                                           cudaStream_t);
template cudaError_t launch_mha_fwd_intervals<ElementType::kSplit, 128, 128>(const MhaFwdParams&,
                                                                             const DeviceInfo&,
                                                                             cudaStream_t);

}  // namespace jax_flash::sm90
