// The sm_90 backward as the host sees it.
#pragma once

#include <cuda_runtime.h>

#include "host/dispatch.h"

namespace jax_flash::sm90 {

// Enqueues three kernels and nothing else, so a stream capture holds them. Widths are the padded
// ones, and equal.
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd(const MhaBwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream);

// The same of a call with intervals.
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd_intervals(const MhaBwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream);

}  // namespace jax_flash::sm90
