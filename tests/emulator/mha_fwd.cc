// The forward's host code and kernels on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm90/fwd_launch.cuh"
#include "sm90/fwd_parts.cuh"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::sm90 {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::sm90
unsigned char* emulated_shared_memory = jax_flash::sm90::memory;

namespace {

using namespace jax_flash;

template <ElementType kType>
cudaError_t launch_sm90(const MhaFwdParams& params, const DeviceInfo& device) {
  const int width = std::max(params.head_dim, params.head_dim_v);
  if (width <= 64) return sm90::launch_mha_fwd<kType, 64, 64>(params, device, nullptr);
  if (width <= 128) return sm90::launch_mha_fwd<kType, 128, 128>(params, device, nullptr);
  return sm90::launch_mha_fwd<kType, 256, 256>(params, device, nullptr);
}

}  // namespace

extern "C" int mha_fwd_sm90(const jax_flash::Arguments* arguments) {
  MhaFwdParams params = forward_params(*arguments);
  const DeviceInfo device{90, 50 << 20, arguments->multiprocessors};
  const bool cut = arguments->parts > 1;
  if (cut) {
    // lse of parts, then their outputs.
    params.key_parts = arguments->parts;
    params.lse = arguments->workspace;
    params.out =
        params.lse + int64_t{params.batch} * params.key_parts * params.heads * params.query_length;
  }
  const cudaError_t error = arguments->f16 != 0 ? launch_sm90<ElementType::kF16>(params, device)
                                                : launch_sm90<ElementType::kBf16>(params, device);
  if (error != cudaSuccess || !cut) return error;
  return sm90::launch_fwd_parts(
      {params.out, params.lse, arguments->out, arguments->lse, params.batch, params.key_parts,
       params.query_length, params.heads, params.head_dim_v, arguments->f16 == 0},
      nullptr);
}
