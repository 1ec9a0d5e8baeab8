// The launches of csrc/ops, one for each operation; the element type is chosen here.
#pragma once

#include <cuda_runtime.h>

#include "host/device.h"
#include "ops/params.h"

namespace jax_flash::ops {

cudaError_t launch_rms_norm(const RmsNormParams& params, Element type, const DeviceInfo& device,
                            cudaStream_t stream);
cudaError_t launch_rms_norm_bwd(const RmsNormBwdParams& params, Element type, cudaStream_t stream);
cudaError_t launch_rope_append(const RopeAppendParams& params, Element type, cudaStream_t stream);
cudaError_t launch_sample(const SampleParams& params, int64_t rows, Element type,
                          const DeviceInfo& device, cudaStream_t stream);
cudaError_t launch_top_k(const TopKParams& params, int64_t rows, Element type,
                         const DeviceInfo& device, cudaStream_t stream);

}  // namespace jax_flash::ops
