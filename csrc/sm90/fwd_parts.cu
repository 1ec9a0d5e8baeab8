#include "sm90/fwd_parts.cuh"

namespace jax_flash::sm90 {

cudaError_t add_fwd_parts(const FwdParts& parts, cudaStream_t stream) {
  return launch_fwd_parts(parts, stream);
}

}  // namespace jax_flash::sm90
