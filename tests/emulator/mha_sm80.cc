// The sm_80 forward, and kernels with intervals, on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm80/fwd_launch.cuh"

// What `extern __shared__ unsigned char shared[]` of the kernels means here.
namespace jax_flash::sm80 {
alignas(1024) unsigned char shared[227 * 1024];
}  // namespace jax_flash::sm80
unsigned char* emulated_shared_memory = jax_flash::sm80::shared;

namespace {

using namespace jax_flash;
constexpr auto kBf16 = ElementType::kBf16;
constexpr auto kF16 = ElementType::kF16;

MhaFwdParams forward_params(const Arguments& from) {
  MhaFwdParams to{};
  describe(from, to);
  to.out = from.out;
  to.lse = from.lse;
  return to;
}

DeviceInfo device(const Arguments& arguments) {
  return {80, 40 << 20, arguments.multiprocessors};
}

// Few widths, because they take the C++ compiler longer than the tests take.
int width(const Arguments& arguments) { return std::max(arguments.head_dim, arguments.head_dim_v); }

}  // namespace

extern "C" int mha_fwd_sm80(const jax_flash::Arguments* arguments) {
  const MhaFwdParams params = forward_params(*arguments);
  if (arguments->f16 != 0) {
    return sm80::launch_mha_fwd<kF16, 128, 128>(params, device(*arguments), nullptr);
  }
  return width(*arguments) <= 64
             ? sm80::launch_mha_fwd<kBf16, 64, 64>(params, device(*arguments), nullptr)
             : sm80::launch_mha_fwd<kBf16, 256, 256>(params, device(*arguments), nullptr);
}

extern "C" int mha_fwd_intervals_sm80(const jax_flash::Arguments* arguments) {
  const MhaFwdParams params = forward_params(*arguments);
  return arguments->f16 != 0
             ? sm80::launch_mha_fwd_intervals<kF16, 128, 128>(params, device(*arguments), nullptr)
             : sm80::launch_mha_fwd_intervals<kBf16, 256, 256>(params, device(*arguments), nullptr);
}
