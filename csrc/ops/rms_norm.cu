#include "ops/launch.h"
#include "ops/rms_norm.cuh"

namespace jax_flash::ops {

cudaError_t launch_rms_norm(const RmsNormParams& params, Element type, const DeviceInfo& device,
                            cudaStream_t stream) {
  switch (type) {
    case Element::kF32:
      return launch_rms_norm<float, float>(params, device, stream);
    case Element::kBf16:
      return params.f32_weight
                 ? launch_rms_norm<__nv_bfloat16, float>(params, device, stream)
                 : launch_rms_norm<__nv_bfloat16, __nv_bfloat16>(params, device, stream);
    case Element::kF16:
      return params.f32_weight ? launch_rms_norm<__half, float>(params, device, stream)
                               : launch_rms_norm<__half, __half>(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_rms_norm_bwd(const RmsNormBwdParams& params, Element type, cudaStream_t stream) {
  switch (type) {
    case Element::kF32:
      return launch_rms_norm_bwd<float, float>(params, stream);
    case Element::kBf16:
      return params.f32_weight ? launch_rms_norm_bwd<__nv_bfloat16, float>(params, stream)
                               : launch_rms_norm_bwd<__nv_bfloat16, __nv_bfloat16>(params, stream);
    case Element::kF16:
      return params.f32_weight ? launch_rms_norm_bwd<__half, float>(params, stream)
                               : launch_rms_norm_bwd<__half, __half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_flash::ops
