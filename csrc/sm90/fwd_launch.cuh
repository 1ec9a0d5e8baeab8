// Launch of the sm_90 forward kernel; instantiated in inst/.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/device.h"
#include "sm90/fwd.h"
#include "sm90/fwd_kernel.cuh"
#include "sm90/fwd_order.h"
#include "sm90/fwd_split.cuh"
#include "sm90/fwd_splits.h"
#include "sm90/row_blocks.cuh"
#include "sm90/tensor_map.h"
#include "sm90/work_order.cuh"

namespace jax_flash::sm90 {

// How many heads, as a power of two, are rows of one tile: those that share a key head, where that
// makes fewer blocks.
inline int pack_shift(const MhaFwdParams& params, int rows) {
  const int group = params.heads / params.kv_heads;
  int shift = 0;
  while (shift < 6 && group % (2 << shift) == 0) ++shift;
  const int64_t length = params.query_length;
  const int64_t apart = ((length + rows - 1) / rows) << shift;
  const int64_t packed = ((length << shift) + rows - 1) / rows;
  return packed < apart ? shift : 0;
}

template <typename Config>
cudaError_t launch(MhaFwdParams params, const DeviceInfo& device, cudaStream_t stream) {
  FwdPlan plan{};
  if (!Config::kIntervals) plan.pack_shift = pack_shift(params, Config::kRows);
  const int packed = 1 << plan.pack_shift;
  const int64_t rows = int64_t{params.query_length} * packed;
  const int64_t row_blocks = (rows + Config::kRows - 1) / Config::kRows;
  const int64_t head_groups = params.heads / packed;
  const int64_t parts = std::max(1, params.key_parts);
  if (parts > 1 && (Config::kIntervals || Config::kSplit)) return cudaErrorInvalidValue;
  plan.splits = Config::kIntervals || parts > 1
                    ? 1
                    : fwd_splits(params, head_groups * row_blocks, Config::kRows, Config::kKeys);
  plan.parts = FastDivisor::make(static_cast<uint32_t>(parts));
  plan.shares = static_cast<int32_t>(plan.splits * parts);

  const int64_t all = params.batch * parts * head_groups;
  const int64_t multiprocessors = device.multiprocessors;
  Sections sections{all, 0};
  int64_t multiple = 1;
  bool steady = false;
  if constexpr (Config::kIntervals) {
    const double bytes = 2.0 * params.key_length * (params.head_dim + params.head_dim_v);
    sections.heads = queue_section(all, params.heads / params.kv_heads, row_blocks, bytes,
                                   multiprocessors, device.l2_bytes);
  } else if (plan.shares > 1 || params.window_right == kUnbounded) {
    // Row blocks that are equal, as far as is known: those that share their keys follow each other.
    sections.heads = std::min(all, std::max<int64_t>(1, head_groups / params.kv_heads));
  } else {
    plan.front = front_rows(params, rows, Config::kRows, Config::kKeys);
    // Few blocks of a head, but many heads: one head after the other, so that there are always as
    // many of long blocks as of short ones at work, and keys are read from memory all the time.
    steady = Config::kWarpgroups == 2 && row_blocks == 4 && all >= multiprocessors;
    if (steady) {
      sections = {1, 1};
    } else {
      sections = choose_sections_once(params, head_groups, row_blocks, Config::kRows, plan.front,
                                      Config::kKeys, multiprocessors, device.l2_bytes);
      multiple = 2 * multiprocessors;
    }
  }
  const int64_t blocks =
      Config::kIntervals ? int64_t{row_list_entries(params.query_length)} : row_blocks;
  if (!SectionOrder::make(all, sections.heads, blocks, multiple, sections.turn, &plan.order)) {
    return cudaErrorInvalidConfiguration;
  }
  if (steady) plan.order.reverses = false;
  plan.head_groups = FastDivisor::make(static_cast<uint32_t>(head_groups));
  plan.inner_batch = FastDivisor::make(params.batch_dims == 2 ? params.batch_sizes[1] : 1);
  params.group_divisor = FastDivisor::make(params.heads / params.kv_heads);
  if (Config::kOptions && (!Config::kDense || ScoreOptions::any<true>(params))) {
    plan.logit_scale = params.scale.first * params.scale.second;
    plan.logit_log2 = plan.logit_scale * SoftmaxScale::kLog2e;
    const float softcap = params.intervals.softcap;
    if (softcap != 0.0f) {
      const float softcap_log2 = softcap * SoftmaxScale::kLog2e;
      plan.capped = TanhPolynomial::make(plan.logit_scale, softcap, softcap_log2);
      plan.small = SmallTanh::make(plan.logit_scale, softcap, softcap_log2);
    }
    params.scale = SoftmaxScale::make(1.0f);
  }

  const int64_t width = Config::kSplit ? 2 * Config::kHeadDim : params.head_dim;
  const int64_t width_v = Config::kSplit ? 2 * Config::kHeadDimV : params.head_dim_v;
  cudaError_t error = make_tensor_map(
      params, params.query,
      {width, params.heads, params.query.head_stride, params.query_length, params.query.row_stride,
       static_cast<uint32_t>(packed), static_cast<uint32_t>(64 / packed)},
      &plan.query);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(params, params.key,
                          {width, params.key_length, params.key.row_stride, params.kv_heads,
                           params.key.head_stride, Config::kKeys, 1},
                          &plan.key);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(params, params.value,
                          {width_v, params.key_length, params.value.row_stride, params.kv_heads,
                           params.value.head_stride, Config::kKeys, 1},
                          &plan.value);
  if (error != cudaSuccess) return error;

  if constexpr (!Config::kSplit) {
    TensorView out{};
    out.data = params.out;
    out.batch_strides[0] = int64_t{params.query_length} * params.heads * params.head_dim_v;
    MhaFwdParams flat{};  // the outputs' batch dims are one
    flat.batch_dims = 1;
    flat.batch_sizes[0] = static_cast<int32_t>(params.batch * parts);
    error = make_tensor_map(flat, out,
                            {params.head_dim_v, params.heads, params.head_dim_v,
                             params.query_length, int64_t{params.heads} * params.head_dim_v,
                             static_cast<uint32_t>(packed), static_cast<uint32_t>(64 / packed)},
                            &plan.out);
    if (error != cudaSuccess) return error;
  }

  if constexpr (Config::kIntervals) {
    // Dropout draws for tiles of 16 rows from the first of the sequence.
    error = launch_row_list<Config::kRows>(params, !Config::kDense, stream);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = mha_fwd_kernel<Config>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kFwdSharedBytes<Config>);
  if (error != cudaSuccess) return error;
  const int64_t groups = plan.splits > 1 ? int64_t{plan.order.ids}
                                         : std::min<int64_t>(plan.order.ids, multiprocessors);
  cudaLaunchAttribute attribute{};
  if constexpr (Config::kIntervals) {
    attribute = after_work_order();
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(plan.splits), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(groups * plan.splits));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = kFwdSharedBytes<Config>;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = Config::kIntervals || plan.splits > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params, plan);
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd(const MhaFwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream) {
  if constexpr (kType == ElementType::kSplit) {
    MhaFwdParams parts = params;
    const cudaError_t error = split_operands<kHeadDim, kHeadDimV>(&parts, device, stream);
    if (error != cudaSuccess) return error;
    using Config = FwdConfig<kType, kHeadDim, kHeadDimV, kFwdSplitTiles<kHeadDim>>;
    return launch<Config>(parts, device, stream);
  } else {
    using Config = FwdConfig<kType, kHeadDim, kHeadDimV, kFwdTiles<kHeadDim, kHeadDimV>>;
    return launch<Config>(params, device, stream);
  }
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_16_bits_intervals(const MhaFwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream) {
  if (is_dense(params.intervals)) {
    using Config = FwdConfig<kType, kHeadDim, kHeadDimV, kFwdDenseTiles<kHeadDim, kHeadDimV>, true,
                             true, true>;
    return launch<Config>(params, device, stream);
  }
  constexpr FwdTiles kTiles = kFwdIntervalTiles<kHeadDim, kHeadDimV>;
  if (ScoreOptions::any(params)) {
    using Config = FwdConfig<kType, kHeadDim, kHeadDimV, kTiles, true, true>;
    return launch<Config>(params, device, stream);
  }
  return launch<FwdConfig<kType, kHeadDim, kHeadDimV, kTiles, true>>(params, device, stream);
}

// Of operands that are split one kernel has all options, another one none.
template <int kHeadDim, int kHeadDimV>
cudaError_t launch_split_intervals(const MhaFwdParams& params, const DeviceInfo& device,
                                   cudaStream_t stream) {
  MhaFwdParams parts = params;
  const cudaError_t error = split_operands<kHeadDim, kHeadDimV>(&parts, device, stream);
  if (error != cudaSuccess) return error;
  if (is_dense(params.intervals) || ScoreOptions::any(params)) {
    using Config = FwdConfig<ElementType::kSplit, kHeadDim, kHeadDimV,
                             kFwdSplitOptionTiles<kHeadDim>, true, true, true>;
    return launch<Config>(parts, device, stream);
  }
  using Config =
      FwdConfig<ElementType::kSplit, kHeadDim, kHeadDimV, kFwdSplitTiles<kHeadDim>, true>;
  return launch<Config>(parts, device, stream);
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_fwd_intervals(const MhaFwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream) {
  if constexpr (kType == ElementType::kSplit) {
    return launch_split_intervals<kHeadDim, kHeadDimV>(params, device, stream);
  } else {
    return launch_16_bits_intervals<kType, kHeadDim, kHeadDimV>(params, device, stream);
  }
}

}  // namespace jax_flash::sm90
