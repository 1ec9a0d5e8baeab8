// The list of kernels that exist, and the choice among them.
#pragma once

#include <cuda_runtime.h>

#include <span>

#include "host/device.h"
#include "host/params.h"

namespace jax_flash {

// Of operands, and of their products as far as that says: kF32 multiplies f32 to nearly all of its
// bits, kTf32 rounds f32 operands to tf32, kSplit multiplies sums of two bf16. A call has one of
// the others.
enum class ElementType { kBf16, kF16, kF32, kTf32, kSplit };

constexpr int element_bytes(ElementType type) {
  return type == ElementType::kBf16 || type == ElementType::kF16 ? 2 : 4;
}

enum class Family { kSm80, kSm90 };

// One instantiation. Widths are what it pads to.
template <typename Params>
struct Kernel {
  Family family;
  ElementType type;
  int head_dim;
  int head_dim_v;
  cudaError_t (*launch)(const Params&, const DeviceInfo&, cudaStream_t);
};
using MhaFwdKernel = Kernel<MhaFwdParams>;
using MhaBwdKernel = Kernel<MhaBwdParams>;

// Every instantiation, for calls with intervals or those without, in the order of preference;
// plan.py in jax_flash/_src mirrors it.
std::span<const MhaFwdKernel> mha_fwd_kernels(bool intervals);
std::span<const MhaBwdKernel> mha_bwd_kernels(bool intervals);

// All that the choice of a kernel depends on.
struct MhaFacts {
  ElementType type;
  int head_dim;  // as called
  int head_dim_v;
  int key_length;
  int batch_dims;          // that stay apart after merging
  int alignment;           // bytes that all addresses of rows are multiples of: 16, 4 or 2
  int compute_capability;  // 10 * major + minor
  bool force_sm80;
  bool intervals;          // whether the call has intervals, which other kernels read
  bool may_split = false;  // whether f32 operands may be split; in the forward, if there is room
};

// The first kernel that can run the call, or null.
const MhaFwdKernel* choose_mha_fwd_kernel(const MhaFacts& facts);
const MhaBwdKernel* choose_mha_bwd_kernel(const MhaFacts& facts);

// Whether JAX_FLASH_FORCE_SM80=1 is in the environment, which is read once.
bool force_sm80();

}  // namespace jax_flash
