#include "sm90/fwd_launch.cuh"

namespace jax_flash::sm90 {

template cudaError_t launch_mha_fwd<ElementType::kBf16, 64, 64>(const MhaFwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 64, 64>(const MhaFwdParams&,
                                                               const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kBf16, 96, 96>(const MhaFwdParams&,
                                                                const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 96, 96>(const MhaFwdParams&,
                                                               const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kBf16, 128, 128>(const MhaFwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 128, 128>(const MhaFwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);

}  // namespace jax_flash::sm90
