// Launch of the sm_80 backward kernels; instantiated in inst/.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/bwd_rows.cuh"
#include "host/launch.h"
#include "sm80/bwd.h"
#include "sm80/bwd_kernel.cuh"
#include "sm80/units.h"
#include "tile/element.cuh"

namespace jax_flash::sm80 {

// Shared memory that a thread block may ask for; a multiprocessor has 1 KB more, and a thread block
// takes 1 KB more than it asks for.
constexpr int shared_limit(int compute_capability) {
  const int major = compute_capability / 10;
  if (major == 9 || major == 10) return 227 * 1024;
  return compute_capability == 80 || compute_capability == 87 ? 163 * 1024 : 99 * 1024;
}

// What thread blocks that share a multiprocessor ask for, all but one with its 1 KB.
template <typename Config>
constexpr int shared_bytes() {
  return Config::kBlocks * (Config::kSharedBytes + 1024) - 1024;
}

// Kv heads that run side by side. With equal key blocks, one: they share its queries. Where the
// first are seen by more queries, as many as the L2 holds the queries and their sums of, in equal
// sections. The same for sums in order: blocks of one head would wait for each other.
inline int64_t bwd_section_heads(const MhaBwdParams& params, int l2_bytes) {
  if (params.window_right == kUnbounded && !params.deterministic) return 1;
  const int64_t all = int64_t{params.batch} * params.kv_heads;
  const int64_t group = params.heads / params.kv_heads;
  const int64_t row_bytes = int64_t{params.head_dim} * 6 + int64_t{params.head_dim_v} * 2;
  const int64_t bytes = std::max<int64_t>(1, group * params.query_length * row_bytes);
  const int64_t fit = std::max<int64_t>(1, l2_bytes / 2 / bytes);
  const int64_t sections = std::max<int64_t>(1, all / fit);
  return (all + sections - 1) / sections;
}

template <typename Config>
cudaError_t launch_main(MhaBwdParams params, const DeviceInfo& device, cudaStream_t stream) {
  if constexpr (Config::kFloats) count_16_bits(&params);
  const auto kernel = mha_bwd_kernel<Config>;
  const int64_t all = int64_t{params.batch} * params.kv_heads;
  const int64_t key_blocks = (params.key_length + int64_t{Config::kKeys} - 1) / Config::kKeys;
  const int64_t section = bwd_section_heads(params, device.l2_bytes);
  const int64_t sections = (all + section - 1) / section;
  const int64_t grid = sections * section * key_blocks;
  if (grid == 0) return cudaSuccess;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const BwdPlan plan{
      FastDivisor::make(params.kv_heads), FastDivisor::make(static_cast<uint32_t>(section)),
      FastDivisor::make(static_cast<uint32_t>(key_blocks)),
      static_cast<int32_t>(sections * section - all), params.heads / params.kv_heads};
  // At every launch: the setting belongs to the current device, and costs less than remembering it.
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(grid)), Config::kThreads,
                       Config::kSharedBytes, stream, params, plan);
}

inline bool rows_aligned_16(const void* data, int width) {
  return width % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <ElementType kType, int kHeadDim, int kHeadDimV, bool kIntervals>
cudaError_t launch_all(const MhaBwdParams& params, const DeviceInfo& device, cudaStream_t stream) {
  constexpr BwdTiles kHopper = kBwdHopperTiles<kHeadDim, kHeadDimV, kIntervals>;
  constexpr BwdTiles kLarge = kBwdTiles<kHeadDim, kHeadDimV, kIntervals>;
  constexpr BwdTiles kSmall = kBwdSmallTiles<kHeadDim, kHeadDimV>;
  using Hopper = BwdConfig<kType, kHeadDim, kHeadDimV, true, kHopper, kIntervals>;
  using Large = BwdConfig<kType, kHeadDim, kHeadDimV, true, kLarge, kIntervals>;
  using Small = BwdConfig<kType, kHeadDim, kHeadDimV, true, kSmall, kIntervals>;
  using Narrow = BwdConfig<kType, kHeadDim, kHeadDimV, false, kSmall, kIntervals>;
  static_assert(shared_bytes<Hopper>() <= shared_limit(90));
  static_assert(shared_bytes<Large>() <= shared_limit(80));
  static_assert(shared_bytes<Small>() <= shared_limit(89));
  using Element = typename Large::Element;
  cudaError_t error = launch_bwd_prepare<Element, typename Large::Mask>(params, kHeadDim, stream);
  if (error != cudaSuccess) return error;

  const bool wide = params.query.alignment == 16 && params.key.alignment == 16 &&
                    params.value.alignment == 16 &&
                    rows_aligned_16(params.dout, params.head_dim_v) &&
                    rows_aligned_16(params.dkey, params.head_dim) &&
                    rows_aligned_16(params.dvalue, params.head_dim_v);
  if constexpr (kIntervals) {
    if (is_dense(params)) {
      using WideDense = BwdConfig<kType, kHeadDim, kHeadDimV, true, kSmall, true, true>;
      using NarrowDense = BwdConfig<kType, kHeadDim, kHeadDimV, false, kSmall, true, true>;
      error = wide ? launch_main<WideDense>(params, device, stream)
                   : launch_main<NarrowDense>(params, device, stream);
      if (error != cudaSuccess) return error;
      return launch_bwd_finish<Element, DquerySum<kHeadDim>>(params, stream);
    }
  }
  if (!wide) {
    error = launch_main<Narrow>(params, device, stream);
  } else if (shared_limit(device.compute_capability) >= shared_limit(90)) {
    error = launch_main<Hopper>(params, device, stream);
  } else if (shared_limit(device.compute_capability) >= shared_limit(80)) {
    error = launch_main<Large>(params, device, stream);
  } else {
    error = launch_main<Small>(params, device, stream);
  }
  if (error != cudaSuccess) return error;
  return launch_bwd_finish<Element, DquerySum<kHeadDim>>(params, stream);
}

// With intervals one kernel has all options.
template <ElementType kType, int kHeadDim, int kHeadDimV, bool kIntervals>
cudaError_t launch_f32(const MhaBwdParams& params, const DeviceInfo& device, cudaStream_t stream) {
  constexpr BwdTiles kTiles = kBwdF32Tiles<kHeadDim, kHeadDimV>;
  using Wide = BwdConfig<kType, kHeadDim, kHeadDimV, true, kTiles, kIntervals, kIntervals>;
  using Narrow = BwdConfig<kType, kHeadDim, kHeadDimV, false, kTiles, kIntervals, kIntervals>;
  static_assert(shared_bytes<Wide>() <= shared_limit(89));
  cudaError_t error = launch_bwd_prepare<float, typename Wide::Mask>(params, kHeadDim, stream);
  if (error != cudaSuccess) return error;
  const bool wide = params.query.alignment == 16 && params.key.alignment == 16 &&
                    params.value.alignment == 16 &&
                    rows_aligned_16(params.dout, 2 * params.head_dim_v);
  error = wide ? launch_main<Wide>(params, device, stream)
               : launch_main<Narrow>(params, device, stream);
  if (error != cudaSuccess) return error;
  return launch_bwd_finish<float, DqueryF32Sum<kHeadDim>>(params, stream);
}

template <int kHeadDim, int kHeadDimV, bool kIntervals>
cudaError_t launch_mha_bwd_split(const MhaBwdParams& params, const DeviceInfo& device,
                                 cudaStream_t stream) {
  constexpr BwdTiles kTiles = kBwdSplitTiles<kHeadDim, kHeadDimV, kIntervals>;
  using Config =
      BwdConfig<ElementType::kSplit, kHeadDim, kHeadDimV, true, kTiles, kIntervals, kIntervals>;
  cudaError_t error = launch_bwd_prepare<float, typename Config::Mask>(params, kHeadDim, stream);
  if (error != cudaSuccess) return error;
  error = launch_main<Config>(params, device, stream);
  if (error != cudaSuccess) return error;
  return launch_bwd_finish<float, DquerySum<kHeadDim>>(params, stream);
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd(const MhaBwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream) {
  if constexpr (element_bytes(kType) == 4) {
    return launch_f32<kType, kHeadDim, kHeadDimV, false>(params, device, stream);
  } else {
    return launch_all<kType, kHeadDim, kHeadDimV, false>(params, device, stream);
  }
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd_intervals(const MhaBwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream) {
  if constexpr (element_bytes(kType) == 4) {
    return launch_f32<kType, kHeadDim, kHeadDimV, true>(params, device, stream);
  } else {
    return launch_all<kType, kHeadDim, kHeadDimV, true>(params, device, stream);
  }
}

}  // namespace jax_flash::sm80
