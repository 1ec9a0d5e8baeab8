// The list of kernels that exist, and the choice among them.
#pragma once

#include <cuda_runtime.h>

#include <span>

#include "host/device.h"
#include "host/params.h"

namespace jax_flash {

enum class ElementType { kBf16, kF16 };

// One instantiation. Widths are what it pads to.
struct MhaFwdKernel {
  ElementType type;
  int head_dim;
  int head_dim_v;
  cudaError_t (*launch)(const MhaFwdParams&, const DeviceInfo&, cudaStream_t);
};

// Every instantiation, narrowest first; plan.py in jax_flash/_src mirrors it.
std::span<const MhaFwdKernel> mha_fwd_kernels();

// The first kernel that holds both widths, or null.
const MhaFwdKernel* find_mha_fwd_kernel(ElementType type, int head_dim, int head_dim_v);

}  // namespace jax_flash
