// The forward of split operands on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm90/fwd_launch.cuh"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::sm90 {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::sm90
unsigned char* emulated_shared_memory = jax_flash::sm90::memory;

using jax_flash::Arguments;
using jax_flash::ElementType;
using jax_flash::MhaFwdParams;

namespace {

MhaFwdParams forward_params(const Arguments& arguments) {
  MhaFwdParams params{};
  describe(arguments, params);
  params.out = arguments.out;
  params.lse = arguments.lse;
  params.parts = arguments.workspace;
  return params;
}

}  // namespace

// bf16 that `workspace` must have room for.
extern "C" int64_t split_elements(const Arguments* arguments, int width) {
  return jax_flash::split_elements(forward_params(*arguments), width, width);
}

extern "C" int mha_fwd_split(const Arguments* arguments) {
  const MhaFwdParams params = forward_params(*arguments);
  const jax_flash::DeviceInfo device{90, 50 << 20, arguments->multiprocessors};
  constexpr auto kSplit = ElementType::kSplit;
  return std::max(params.head_dim, params.head_dim_v) <= 64
             ? jax_flash::sm90::launch_mha_fwd<kSplit, 64, 64>(params, device, nullptr)
             : jax_flash::sm90::launch_mha_fwd<kSplit, 128, 128>(params, device, nullptr);
}
