// The kernels of f32 on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm80/bwd_launch.cuh"
#include "sm80/fwd_launch.cuh"
#include "sm80_memory.h"

namespace {

using namespace jax_flash;

template <ElementType kType>
cudaError_t launch_forward(const Arguments& arguments, const DeviceInfo& device) {
  const MhaFwdParams params = forward_params(arguments);
  return is_narrow(arguments) ? sm80::launch_mha_fwd<kType, 64, 64>(params, device, nullptr)
                              : sm80::launch_mha_fwd<kType, 128, 128>(params, device, nullptr);
}

template <ElementType kType>
cudaError_t launch_backward(const Arguments& arguments, const DeviceInfo& device) {
  return is_narrow(arguments)
             ? sm80::launch_mha_bwd<kType, 64, 64>(backward_params(arguments, 64), device, nullptr)
             : sm80::launch_mha_bwd<kType, 128, 128>(backward_params(arguments, 128), device,
                                                     nullptr);
}

}  // namespace

extern "C" int mha_fwd_f32(const jax_flash::Arguments* arguments) {
  const DeviceInfo device{80, 40 << 20, arguments->multiprocessors};
  return arguments->tf32_products == 3 ? launch_forward<ElementType::kF32>(*arguments, device)
                                       : launch_forward<ElementType::kTf32>(*arguments, device);
}

extern "C" int mha_bwd_split(const jax_flash::Arguments* arguments) {
  const DeviceInfo device{90, 50 << 20, arguments->multiprocessors};
  return is_narrow(*arguments) ? sm80::launch_mha_bwd_split<64, 64, false>(
                                     backward_params(*arguments, 64), device, nullptr)
                               : sm80::launch_mha_bwd_split<128, 128, false>(
                                     backward_params(*arguments, 128), device, nullptr);
}

extern "C" int mha_bwd_f32(const jax_flash::Arguments* arguments) {
  const DeviceInfo device{80, 40 << 20, arguments->multiprocessors};
  return arguments->tf32_products == 3 ? launch_backward<ElementType::kF32>(*arguments, device)
                                       : launch_backward<ElementType::kTf32>(*arguments, device);
}
