#include "ops/launch.h"
#include "ops/sample.cuh"

namespace jax_flash::ops {

cudaError_t launch_sample(const SampleParams& params, int64_t rows, Element type,
                          const DeviceInfo& device, cudaStream_t stream) {
  switch (type) {
    case Element::kF32:
      return launch_sample<float>(params, rows, device, stream);
    case Element::kBf16:
      return launch_sample<__nv_bfloat16>(params, rows, device, stream);
    case Element::kF16:
      return launch_sample<__half>(params, rows, device, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_top_k(const TopKParams& params, int64_t rows, Element type,
                         const DeviceInfo& device, cudaStream_t stream) {
  switch (type) {
    case Element::kF32:
      return launch_top_k<float>(params, rows, device, stream);
    case Element::kBf16:
      return launch_top_k<__nv_bfloat16>(params, rows, device, stream);
    case Element::kF16:
      return launch_top_k<__half>(params, rows, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_flash::ops
