#include "sm80/fwd_launch.cuh"

namespace jax_flash::sm80 {

template cudaError_t launch_mha_fwd<ElementType::kF32, 256, 256>(const MhaFwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kTf32, 256, 256>(const MhaFwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);

}  // namespace jax_flash::sm80
