#include "sm80/bwd_launch.cuh"

namespace jax_flash::sm80 {

template cudaError_t launch_mha_bwd<ElementType::kF32, 64, 64>(const MhaBwdParams&,
                                                               const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_bwd<ElementType::kTf32, 64, 64>(const MhaBwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_bwd<ElementType::kF32, 128, 128>(const MhaBwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_bwd<ElementType::kTf32, 128, 128>(const MhaBwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);

}  // namespace jax_flash::sm80
