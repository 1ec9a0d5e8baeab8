// The sm_90 backward with intervals on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm90/bwd_launch.cuh"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::sm90 {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::sm90
unsigned char* emulated_shared_memory = jax_flash::sm90::memory;

namespace {

using namespace jax_flash;

template <ElementType kType, int kWidth>
cudaError_t launch(const Arguments& arguments) {
  const DeviceInfo device{90, 50 << 20, arguments.multiprocessors};
  return sm90::launch_mha_bwd_intervals<kType, kWidth, kWidth>(backward_params(arguments, kWidth),
                                                               device, nullptr);
}

template <ElementType kType>
cudaError_t launch(const Arguments& arguments) {
  const int width = std::max(arguments.head_dim, arguments.head_dim_v);
  if (width <= 64) return launch<kType, 64>(arguments);
  return width <= 128 ? launch<kType, 128>(arguments) : launch<kType, 256>(arguments);
}

}  // namespace

extern "C" int mha_bwd_intervals_sm90(const jax_flash::Arguments* arguments) {
  return arguments->f16 != 0 ? launch<ElementType::kF16>(*arguments)
                             : launch<ElementType::kBf16>(*arguments);
}
