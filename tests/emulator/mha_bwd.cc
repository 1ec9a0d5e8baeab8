// The backward's host code and kernels on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm80/bwd_launch.cuh"
#include "sm90/bwd_launch.cuh"

// What `extern __shared__ unsigned char ...[]` of the kernels means here.
namespace jax_flash::sm80 {
alignas(1024) unsigned char shared[227 * 1024];
}  // namespace jax_flash::sm80
namespace jax_flash::sm90 {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::sm90
unsigned char* emulated_shared_memory;

namespace {

using namespace jax_flash;

// Few widths, because they take the C++ compiler longer than the tests take.
cudaError_t launch_sm80(const Arguments& arguments, const DeviceInfo& device) {
  const int width = std::max(arguments.head_dim, arguments.head_dim_v);
  constexpr auto kBf16 = ElementType::kBf16;
  constexpr auto kF16 = ElementType::kF16;
  if (arguments.f16 != 0) {
    return sm80::launch_mha_bwd<kF16, 128, 128>(backward_params(arguments, 128), device, nullptr);
  }
  return width <= 64
             ? sm80::launch_mha_bwd<kBf16, 64, 64>(backward_params(arguments, 64), device, nullptr)
             : sm80::launch_mha_bwd<kBf16, 256, 256>(backward_params(arguments, 256), device,
                                                     nullptr);
}

// As for sm_80: the widest with bf16, those before with f16.
template <ElementType kType>
cudaError_t launch_sm90(const Arguments& arguments, const DeviceInfo& device) {
  const int wider = std::max(arguments.head_dim, arguments.head_dim_v);
  if constexpr (kType == ElementType::kBf16) {
    if (wider > 192) {
      return sm90::launch_mha_bwd<kType, 256, 256>(backward_params(arguments, 256), device,
                                                   nullptr);
    }
    if (wider > 64 && wider <= 96) {
      return sm90::launch_mha_bwd<kType, 96, 96>(backward_params(arguments, 128), device, nullptr);
    }
  } else if (wider > 128) {
    return arguments.head_dim_v <= 128 ? sm90::launch_mha_bwd<kType, 192, 128>(
                                             backward_params(arguments, 192), device, nullptr)
                                       : sm90::launch_mha_bwd<kType, 192, 192>(
                                             backward_params(arguments, 192), device, nullptr);
  }
  return wider <= 64
             ? sm90::launch_mha_bwd<kType, 64, 64>(backward_params(arguments, 64), device, nullptr)
             : sm90::launch_mha_bwd<kType, 128, 128>(backward_params(arguments, 128), device,
                                                     nullptr);
}

}  // namespace

extern "C" int mha_bwd_sm90(const jax_flash::Arguments* arguments) {
  emulated_shared_memory = jax_flash::sm90::memory;
  const DeviceInfo device{90, 50 << 20, arguments->multiprocessors};
  return arguments->f16 != 0 ? launch_sm90<ElementType::kF16>(*arguments, device)
                             : launch_sm90<ElementType::kBf16>(*arguments, device);
}

extern "C" int mha_bwd_sm80(const jax_flash::Arguments* arguments) {
  emulated_shared_memory = jax_flash::sm80::shared;
  return launch_sm80(*arguments, {80, 40 << 20, arguments->multiprocessors});
}

// With the tiles of GPUs that have more shared memory.
extern "C" int mha_bwd_sm80_on_hopper(const jax_flash::Arguments* arguments) {
  emulated_shared_memory = jax_flash::sm80::shared;
  return launch_sm80(*arguments, {90, 50 << 20, arguments->multiprocessors});
}
