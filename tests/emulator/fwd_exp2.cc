// Exponentials on the FMA pipe: alone, and in the forward's kernel of width 64, on the CPU.
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

template <ElementType kType>
cudaError_t launch_mixed(const MhaFwdParams& params, const DeviceInfo& device) {
  constexpr sm90::FwdTiles kTiles{3, 128, 2, 4, 4, 2};
  return sm90::launch<sm90::FwdConfig<kType, 64, 64, kTiles>>(params, device, nullptr);
}

}  // namespace

extern "C" int mha_fwd_sm90_mixed(const jax_flash::Arguments* arguments) {
  MhaFwdParams params{};
  describe(*arguments, params);
  params.out = arguments->out;
  params.lse = arguments->lse;
  const DeviceInfo device{90, 50 << 20, arguments->multiprocessors};
  return arguments->f16 != 0 ? launch_mixed<ElementType::kF16>(params, device)
                             : launch_mixed<ElementType::kBf16>(params, device);
}

// results[i] = 2^((scores[i] - reference) * log2)
extern "C" void exp2_polynomial(const float* scores, float* results, int count, float reference,
                                float log2) {
  const auto polynomial = sm90::Exp2Polynomial::of_row(reference, log2);
  for (int i = 0; i < count; ++i) results[i] = polynomial(scores[i]);
}
