#include "sm80/fwd_launch.cuh"

namespace jax_flash::sm80 {

template cudaError_t launch_mha_fwd<ElementType::kBf16, 32, 32>(const MhaFwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 32, 32>(const MhaFwdParams&,
                                                               const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kBf16, 64, 64>(const MhaFwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 64, 64>(const MhaFwdParams&,
                                                               const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kBf16, 80, 80>(const MhaFwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 80, 80>(const MhaFwdParams&,
                                                               const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kBf16, 96, 96>(const MhaFwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 96, 96>(const MhaFwdParams&,
                                                               const DeviceInfo&, cudaStream_t);

}  // namespace jax_flash::sm80
