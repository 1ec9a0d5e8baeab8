#include "host/dispatch.h"

#include "sm80/fwd.h"

namespace jax_flash {
namespace {

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaFwdKernel entry() {
  return {kType, kHeadDim, kHeadDimV, sm80::launch_mha_fwd<kType, kHeadDim, kHeadDimV>};
}

constexpr auto kBf16 = ElementType::kBf16;
constexpr auto kF16 = ElementType::kF16;

constexpr MhaFwdKernel kMhaFwdKernels[] = {
    entry<kBf16, 32, 32>(),   entry<kF16, 32, 32>(),    //
    entry<kBf16, 64, 64>(),   entry<kF16, 64, 64>(),    //
    entry<kBf16, 80, 80>(),   entry<kF16, 80, 80>(),    //
    entry<kBf16, 96, 96>(),   entry<kF16, 96, 96>(),    //
    entry<kBf16, 128, 128>(), entry<kF16, 128, 128>(),  //
    entry<kBf16, 192, 128>(), entry<kF16, 192, 128>(),  //
    entry<kBf16, 192, 192>(), entry<kF16, 192, 192>(),  //
    entry<kBf16, 256, 256>(), entry<kF16, 256, 256>(),
};

}  // namespace

std::span<const MhaFwdKernel> mha_fwd_kernels() { return kMhaFwdKernels; }

const MhaFwdKernel* find_mha_fwd_kernel(ElementType type, int head_dim, int head_dim_v) {
  for (const MhaFwdKernel& kernel : kMhaFwdKernels) {
    if (kernel.type == type && kernel.head_dim >= head_dim && kernel.head_dim_v >= head_dim_v) {
      return &kernel;
    }
  }
  return nullptr;
}

}  // namespace jax_flash
