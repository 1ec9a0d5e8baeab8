// The sm_80 backward kernels as the host sees them.
#pragma once

#include <cuda_runtime.h>

#include "host/dispatch.h"

namespace jax_flash::sm80 {

// Enqueues three kernels and nothing else, so a stream capture holds them. Widths are the padded
// ones; dquery_sum is [batch, heads, padded rows, kHeadDim].
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd(const MhaBwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream);

// The same of f32 as sums of two bf16, whose rows all start at multiples of 16 bytes, on GPUs with
// 163 KB of shared memory for a thread block. Built for Hopper: see sm90/inst. With kIntervals as
// below.
template <int kHeadDim, int kHeadDimV, bool kIntervals>
cudaError_t launch_mha_bwd_split(const MhaBwdParams& params, const DeviceInfo& device,
                                 cudaStream_t stream);

// The same with intervals: lengths, windows and alignment are not looked at.
template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd_intervals(const MhaBwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream);

}  // namespace jax_flash::sm80
