// The sm_80 forward, and kernels with intervals, on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm80/bwd_launch.cuh"
#include "sm80/fwd_launch.cuh"
#include "sm80_memory.h"

namespace {

using namespace jax_flash;
constexpr auto kBf16 = ElementType::kBf16;
constexpr auto kF16 = ElementType::kF16;

// Few widths, because they take the C++ compiler longer than the tests take.
cudaError_t launch_forward(const Arguments& arguments) {
  const MhaFwdParams params = forward_params(arguments);
  const DeviceInfo device{80, 40 << 20, arguments.multiprocessors};
  if (arguments.f16 != 0) return sm80::launch_mha_fwd<kF16, 128, 128>(params, device, nullptr);
  return std::max(arguments.head_dim, arguments.head_dim_v) <= 64
             ? sm80::launch_mha_fwd<kBf16, 64, 64>(params, device, nullptr)
             : sm80::launch_mha_fwd<kBf16, 256, 256>(params, device, nullptr);
}

cudaError_t launch_forward_intervals(const Arguments& arguments) {
  const MhaFwdParams params = forward_params(arguments);
  const DeviceInfo device{80, 40 << 20, arguments.multiprocessors};
  return arguments.f16 != 0
             ? sm80::launch_mha_fwd_intervals<kF16, 128, 128>(params, device, nullptr)
             : sm80::launch_mha_fwd_intervals<kBf16, 256, 256>(params, device, nullptr);
}

cudaError_t launch_backward_intervals(const Arguments& arguments, int compute_capability) {
  const DeviceInfo device{compute_capability, 40 << 20, arguments.multiprocessors};
  return arguments.f16 != 0 ? sm80::launch_mha_bwd_intervals<kF16, 128, 128>(
                                  backward_params(arguments, 128), device, nullptr)
                            : sm80::launch_mha_bwd_intervals<kBf16, 256, 256>(
                                  backward_params(arguments, 256), device, nullptr);
}

}  // namespace

extern "C" int mha_fwd_sm80(const jax_flash::Arguments* arguments) {
  return launch_forward(*arguments);
}

extern "C" int mha_fwd_intervals_sm80(const jax_flash::Arguments* arguments) {
  return launch_forward_intervals(*arguments);
}

extern "C" int mha_bwd_intervals_sm80(const jax_flash::Arguments* arguments) {
  return launch_backward_intervals(*arguments, 80);
}

// With the tiles of GPUs that have less shared memory.
extern "C" int mha_bwd_intervals_sm89(const jax_flash::Arguments* arguments) {
  return launch_backward_intervals(*arguments, 89);
}
