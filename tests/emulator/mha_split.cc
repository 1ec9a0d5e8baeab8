// The forward of split operands, without intervals and with them, on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm90/fwd_launch.cuh"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::sm90 {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::sm90
unsigned char* emulated_shared_memory = jax_flash::sm90::memory;

namespace {

using namespace jax_flash;
constexpr auto kSplit = ElementType::kSplit;

MhaFwdParams split_params(const Arguments& arguments) {
  MhaFwdParams params = forward_params(arguments);
  params.parts = arguments.workspace;
  return params;
}

DeviceInfo device_of(const Arguments& arguments) {
  return {90, 50 << 20, arguments.multiprocessors};
}

}  // namespace

// bf16 that `workspace` must have room for.
extern "C" int64_t split_elements(const jax_flash::Arguments* arguments, int width) {
  return jax_flash::split_elements(split_params(*arguments), width, width);
}

extern "C" int mha_fwd_split(const jax_flash::Arguments* arguments) {
  const MhaFwdParams params = split_params(*arguments);
  const DeviceInfo device = device_of(*arguments);
  return is_narrow(*arguments) ? sm90::launch_mha_fwd<kSplit, 64, 64>(params, device, nullptr)
                               : sm90::launch_mha_fwd<kSplit, 128, 128>(params, device, nullptr);
}

extern "C" int mha_fwd_intervals_split(const jax_flash::Arguments* arguments) {
  const MhaFwdParams params = split_params(*arguments);
  const DeviceInfo device = device_of(*arguments);
  return is_narrow(*arguments)
             ? sm90::launch_mha_fwd_intervals<kSplit, 64, 64>(params, device, nullptr)
             : sm90::launch_mha_fwd_intervals<kSplit, 128, 128>(params, device, nullptr);
}
