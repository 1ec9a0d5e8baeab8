#include "ops/launch.h"
#include "ops/rope_append.cuh"

namespace jax_flash::ops {

cudaError_t launch_rope_append(const RopeAppendParams& params, Element type, cudaStream_t stream) {
  switch (type) {
    case Element::kF32:
      return launch_rope_append<float>(params, stream);
    case Element::kBf16:
      return launch_rope_append<__nv_bfloat16>(params, stream);
    case Element::kF16:
      return launch_rope_append<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_flash::ops
