// The sm_90a forward kernel as the host sees it.
#pragma once

#include <cuda_runtime.h>

#include "host/dispatch.h"

namespace jax_flash::sm90 {

// Enqueues kernels and nothing else, so a stream capture holds it. Widths are the padded ones; the
// operands are what choose_mha_fwd_kernel lets through.
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd(const MhaFwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream);

// The same for calls with intervals (docs/design/intervals.md).
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd_intervals(const MhaFwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream);

}  // namespace jax_flash::sm90
