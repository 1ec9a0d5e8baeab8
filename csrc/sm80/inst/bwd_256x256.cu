#include "sm80/bwd_launch.cuh"

namespace jax_flash::sm80 {

template cudaError_t launch_mha_bwd<ElementType::kBf16, 256, 256>(const MhaBwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_bwd<ElementType::kF16, 256, 256>(const MhaBwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);

}  // namespace jax_flash::sm80
