#include "sm80/fwd_launch.cuh"

namespace jax_flash::sm80 {

template cudaError_t launch_mha_fwd<ElementType::kF32, 64, 64>(const MhaFwdParams&,
                                                               const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kTf32, 64, 64>(const MhaFwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF32, 128, 128>(const MhaFwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kTf32, 128, 128>(const MhaFwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);

}  // namespace jax_flash::sm80
