// Launch of the sm_80 forward kernel; instantiated in inst/.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "host/launch.h"
#include "sm80/fwd.h"
#include "sm80/fwd_kernel.cuh"
#include "sm80/units.h"

namespace jax_flash::sm80 {

// Heads that run side by side. With equal rows, the query heads of one kv head: they share the keys
// that they read. Where later rows are longer, as many heads as the L2 holds, in equal sections,
// so that there are always long blocks to start with and short ones to end with.
inline int64_t section_heads(const MhaFwdParams& params, int l2_bytes) {
  const int64_t group = params.heads / params.kv_heads;
  if (params.window_right == kUnbounded) return group;
  const int64_t all = int64_t{params.batch} * params.heads;
  const int64_t kv_bytes = int64_t{params.key_length} * (params.head_dim + params.head_dim_v) * 2;
  const int64_t fit = std::max<int64_t>(1, l2_bytes / 2 / std::max<int64_t>(1, kv_bytes)) * group;
  const int64_t sections = std::max<int64_t>(1, all / fit);
  return (all + sections - 1) / sections;
}

template <typename Config>
cudaError_t launch(MhaFwdParams params, const DeviceInfo& device, cudaStream_t stream) {
  const auto kernel = mha_fwd_kernel<Config>;
  if constexpr (Config::kF32) count_16_bits(&params);
  const int64_t row_blocks = (params.query_length + int64_t{Config::kRows} - 1) / Config::kRows;
  const int64_t section = section_heads(params, device.l2_bytes);
  const int64_t sections = (int64_t{params.batch} * params.heads + section - 1) / section;
  const int64_t grid = sections * section * row_blocks;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  params.head_divisor = FastDivisor::make(params.heads);
  params.group_divisor = FastDivisor::make(params.heads / params.kv_heads);
  params.section_divisor = FastDivisor::make(static_cast<uint32_t>(section));
  params.row_blocks = FastDivisor::make(static_cast<uint32_t>(row_blocks));
  params.missing_heads =
      static_cast<int32_t>(sections * section - int64_t{params.batch} * params.heads);
  // At every launch: the setting belongs to the current device, and costs less than remembering it.
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(grid)), Config::kThreads,
                       Config::kSharedBytes, stream, params);
}

inline bool rows_aligned_16(const MhaFwdParams& params) {
  return params.query.alignment == 16 && params.key.alignment == 16 && params.value.alignment == 16;
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd(const MhaFwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream) {
  constexpr FwdTiles kTiles = fwd_tiles<kType, kHeadDim, kHeadDimV>();
  using Wide = FwdConfig<kType, kHeadDim, kHeadDimV, true, kTiles>;
  using Narrow = FwdConfig<kType, kHeadDim, kHeadDimV, false, narrow_tiles(kTiles)>;
  return rows_aligned_16(params) ? launch<Wide>(params, device, stream)
                                 : launch<Narrow>(params, device, stream);
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_16_bits_intervals(const MhaFwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream) {
  constexpr FwdTiles kTiles = fwd_tiles<kType, kHeadDim, kHeadDimV>();
  constexpr FwdTiles kNarrow = narrow_tiles(kTiles);
  if (is_dense(params.intervals)) {  // which takes registers, too
    using Wide = FwdConfig<kType, kHeadDim, kHeadDimV, true, kNarrow, true, true>;
    using Narrow = FwdConfig<kType, kHeadDim, kHeadDimV, false, kNarrow, true, true>;
    return rows_aligned_16(params) ? launch<Wide>(params, device, stream)
                                   : launch<Narrow>(params, device, stream);
  }
  using Wide = FwdConfig<kType, kHeadDim, kHeadDimV, true, kTiles, true>;
  using Narrow = FwdConfig<kType, kHeadDim, kHeadDimV, false, kNarrow, true>;
  return rows_aligned_16(params) ? launch<Wide>(params, device, stream)
                                 : launch<Narrow>(params, device, stream);
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd_intervals(const MhaFwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream) {
  if constexpr (element_bytes(kType) == 4) {  // one kernel for all options
    using Wide = FwdConfig<kType, kHeadDim, kHeadDimV, true, kFwdF32OptionTiles, true, true>;
    using Narrow = FwdConfig<kType, kHeadDim, kHeadDimV, false, kFwdF32OptionTiles, true, true>;
    return rows_aligned_16(params) ? launch<Wide>(params, device, stream)
                                   : launch<Narrow>(params, device, stream);
  } else {
    return launch_16_bits_intervals<kType, kHeadDim, kHeadDimV>(params, device, stream);
  }
}

}  // namespace jax_flash::sm80
