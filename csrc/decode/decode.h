// The decode kernels as the host sees them.
#pragma once

#include <cuda_runtime.h>

#include "decode/params.h"
#include "host/device.h"

namespace jax_flash::decode {

// Counters that a launch needs if a sequence can have several splits.
inline int counters_of(const DeviceInfo& device) {
  return 2 * kMostBlocksPerSm * device.multiprocessors;
}

// Enqueues one kernel and, for many rows with several splits, one that adds these up.
// kWidth: what the widths are padded to, 64, 128 or 256.
template <CacheType kCache, int kWidth>
cudaError_t launch_decode(const DecodeParams& params, const DeviceInfo& device,
                          cudaStream_t stream);

// The same on compute capability 9.0 for many rows, 16-bit caches and widths up to 128.
// `params` is as launch_decode has completed it.
template <CacheType kCache, int kWidth>
cudaError_t launch_warpgroup(const DecodeParams& params, const DeviceInfo& device,
                             cudaStream_t stream);

// The same for any widths up to kMaxWidth.
inline constexpr int kMaxWidth = 256;
cudaError_t launch(CacheType cache, const DecodeParams& params, const DeviceInfo& device,
                   cudaStream_t stream);

}  // namespace jax_flash::decode
