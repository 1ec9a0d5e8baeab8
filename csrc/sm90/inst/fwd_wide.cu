#include "sm90/fwd_launch.cuh"

namespace jax_flash::sm90 {

template cudaError_t launch_mha_fwd<ElementType::kBf16, 192, 128>(const MhaFwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 192, 128>(const MhaFwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kBf16, 192, 192>(const MhaFwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 192, 192>(const MhaFwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kBf16, 256, 256>(const MhaFwdParams&,
                                                                  const DeviceInfo&, cudaStream_t);
template cudaError_t launch_mha_fwd<ElementType::kF16, 256, 256>(const MhaFwdParams&,
                                                                 const DeviceInfo&, cudaStream_t);

}  // namespace jax_flash::sm90
