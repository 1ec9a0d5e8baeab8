// The sm_80 forward kernel as the host sees it.
#pragma once

#include <cuda_runtime.h>

#include "host/dispatch.h"

namespace jax_flash::sm80 {

// Enqueues one kernel and nothing else, so a stream capture holds it. Widths are the padded ones.
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd(const MhaFwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream);

// The same with intervals: lengths, windows and alignment are not looked at.
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd_intervals(const MhaFwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream);

}  // namespace jax_flash::sm80
