// The kernels of f32 with intervals that multiply by mma.sync, on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm80/bwd_launch.cuh"
#include "sm80/fwd_launch.cuh"
#include "sm80_memory.h"

namespace {

using namespace jax_flash;
constexpr auto kF32 = ElementType::kF32;

}  // namespace

extern "C" int mha_fwd_intervals_f32(const jax_flash::Arguments* arguments) {
  const MhaFwdParams params = forward_params(*arguments);
  const DeviceInfo device{80, 40 << 20, arguments->multiprocessors};
  return is_narrow(*arguments)
             ? sm80::launch_mha_fwd_intervals<kF32, 64, 64>(params, device, nullptr)
             : sm80::launch_mha_fwd_intervals<kF32, 128, 128>(params, device, nullptr);
}

extern "C" int mha_bwd_intervals_f32(const jax_flash::Arguments* arguments) {
  const DeviceInfo device{80, 40 << 20, arguments->multiprocessors};
  return is_narrow(*arguments) ? sm80::launch_mha_bwd_intervals<kF32, 64, 64>(
                                     backward_params(*arguments, 64), device, nullptr)
                               : sm80::launch_mha_bwd_intervals<kF32, 128, 128>(
                                     backward_params(*arguments, 128), device, nullptr);
}

extern "C" int mha_bwd_intervals_split(const jax_flash::Arguments* arguments) {
  const DeviceInfo device{90, 50 << 20, arguments->multiprocessors};
  return is_narrow(*arguments) ? sm80::launch_mha_bwd_split<64, 64, true>(
                                     backward_params(*arguments, 64), device, nullptr)
                               : sm80::launch_mha_bwd_split<128, 128, true>(
                                     backward_params(*arguments, 128), device, nullptr);
}
