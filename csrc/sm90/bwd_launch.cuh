// Launch of the sm_90 backward; instantiated in inst/.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/bwd_rows.cuh"
#include "host/device.h"
#include "host/launch.h"
#include "sm90/bwd.h"
#include "sm90/bwd_choice.h"
#include "sm90/bwd_finish.cuh"
#include "sm90/bwd_kernel.cuh"
#include "sm90/bwd_parts.cuh"
#include "sm90/order.h"
#include "sm90/tensor_map.h"
#include "sm90/work_order.cuh"

namespace jax_flash::sm90 {

// How many heads a section has where nobody knows how long blocks are. The longest block may be far
// longer than the mean, and the last section starts with it: there are short ones enough to fill
// the other multiprocessors meanwhile if each has some four blocks of a section. heads: parts of
// key heads.
inline int64_t bwd_interval_section(const MhaBwdParams& params, int64_t heads, int64_t key_blocks,
                                    int64_t query_heads, int64_t multiprocessors,
                                    int64_t l2_bytes) {
  const int64_t held =
      work_section(heads, 1, bwd_head_bytes(params, query_heads), l2_bytes);  // by the L2
  const int64_t least = std::max(held, (4 * multiprocessors + key_blocks - 1) / key_blocks);
  const int64_t sections = std::max<int64_t>(1, heads / least);
  return (heads + sections - 1) / sections;
}

// multiprocessors: or pairs of them.
template <typename Config>
cudaError_t make_plan(const MhaBwdParams& params, const BwdWay& way, int64_t multiprocessors,
                      int64_t l2_bytes, BwdPlan* plan) {
  constexpr int kKeys = Config::kClusterKeys;
  const int64_t key_blocks = bwd_key_blocks(params.key_length, kKeys);
  const int64_t floats = BwdKeySums::make<Config>(params).floats();
  const int64_t parts = bwd_parts(params, floats, Config::kRows, kKeys, multiprocessors, l2_bytes);
  const int64_t query_heads = params.heads / params.kv_heads / parts;
  const int64_t all = int64_t{params.batch} * params.kv_heads * parts;
  // Where blocks wait for longer ones, as the last to add is if it makes dQ, and where nobody knows
  // how long they are.
  const bool waits =
      params.deterministic && (params.window_right != kUnbounded || (way.finishes && !way.ring));
  plan->queued = waits || Config::kIntervals;
  plan->ring = way.ring;
  plan->strict = way.strict;
  // Equal blocks: those of one head follow each other, and share its queries.
  int64_t section = 1;
  int64_t multiple = 1;
  int64_t turn = 0;
  if constexpr (Config::kIntervals) {
    section = bwd_interval_section(params, all, key_blocks, query_heads, multiprocessors, l2_bytes);
  } else if (params.window_right != kUnbounded) {
    const std::vector<float> costs = bwd_block_costs(params, Config::kRows, kKeys, query_heads);
    section = bwd_sections(params, all, query_heads, costs, multiprocessors, l2_bytes).heads;
    if (plan->queued) {
      // Who adds in an order waits for the memory: the sums of a section, which may be wider than
      // heads, have to stay in the L2 beside what both of its halves read.
      const double row_bytes =
          2.0 * (params.head_dim + params.head_dim_v) + 4.0 * Config::kSumWidth;
      const double bytes = row_bytes * query_heads * params.query_length;
      section = std::clamp<int64_t>(static_cast<int64_t>(0.28 * l2_bytes / bytes), 1, section);
    } else {
      multiple = 2 * multiprocessors;
      turn = section_turn(multiprocessors);
    }
  }
  if (!SectionOrder::make(all, section, key_blocks, multiple, turn, &plan->order)) {
    return cudaErrorInvalidConfiguration;
  }
  // With a causal mask the first keys are seen by the most queries. Where sums have an order it is
  // the other one, in which blocks wait for blocks that started before.
  plan->first_to_last = !params.deterministic;
  // Equal blocks that add in an order keep their distance from round to round.
  plan->order.reverses = params.window_right != kUnbounded || !params.deterministic;
  plan->kv_heads = FastDivisor::make(params.kv_heads);
  plan->query_heads = static_cast<int32_t>(query_heads);
  plan->tiles =
      static_cast<int32_t>((int64_t{params.query_length} + Config::kRows - 1) / Config::kRows);
  plan->padded_rows = bwd_padded_rows(params.query_length);
  plan->parts = FastDivisor::make(static_cast<uint32_t>(parts));
  plan->inner_batch = FastDivisor::make(params.batch_dims == 2 ? params.batch_sizes[1] : 1);

  constexpr int kRows = Config::kPaired ? Config::kRows / 2 : Config::kRows;  // of a copy
  cudaError_t error =
      make_tensor_map(params, params.query,
                      {params.head_dim, params.query_length, params.query.row_stride, params.heads,
                       params.query.head_stride, kRows, 1},
                      &plan->query);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(params, params.key,
                          {params.head_dim, params.key_length, params.key.row_stride,
                           params.kv_heads, params.key.head_stride, Config::kKeys, 1},
                          &plan->key);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(params, params.value,
                          {params.head_dim_v, params.key_length, params.value.row_stride,
                           params.kv_heads, params.value.head_stride, Config::kKeys, 1},
                          &plan->value);
  if (error != cudaSuccess) return error;
  TensorView dout{};
  dout.data = params.dout;
  dout.row_stride = int64_t{params.heads} * params.head_dim_v;
  dout.head_stride = params.head_dim_v;
  dout.batch_strides[0] = params.query_length * dout.row_stride;
  MhaParams flat{};  // its batch dims are one
  flat.batch_dims = 1;
  flat.batch_sizes[0] = params.batch;
  error = make_tensor_map(flat, dout,
                          {params.head_dim_v, params.query_length, dout.row_stride, params.heads,
                           dout.head_stride, kRows, 1},
                          &plan->dout);
  if (error != cudaSuccess || params.finished_rows == 0) return error;
  TensorView dquery{};
  dquery.data = params.dquery;
  dquery.row_stride = int64_t{params.heads} * params.head_dim;
  dquery.batch_strides[0] = params.query_length * dquery.row_stride;
  return make_tensor_map(flat, dquery,
                         {params.head_dim, params.query_length, dquery.row_stride, params.heads,
                          params.head_dim, Config::kSumRows, 1},
                         &plan->dquery);
}

// Thread blocks of the main kernel, or pairs of them. Where blocks of keys keep their distance,
// each has its place among those of a head, if that leaves few multiprocessors idle.
inline int bwd_grid(const BwdPlan& plan, int multiprocessors) {
  if (plan.queued || plan.order.reverses || plan.order.blocks > multiprocessors)
    return multiprocessors;
  const int64_t heads = plan.order.ids / plan.order.blocks;
  const int64_t whole = bwd_whole_heads(plan.order.blocks, heads, multiprocessors);
  return whole > 0 ? static_cast<int>(whole) : multiprocessors;
}

template <typename Config>
cudaError_t launch_bwd(const MhaBwdParams& call, const BwdWay& way, const DeviceInfo& device,
                       cudaStream_t stream) {
  using Element = typename Config::Element;
  MhaBwdParams params = call;
  params.deterministic = way.ordered;
  params.finished_rows = way.finishes ? Config::kRows : 0;
  if constexpr (Config::kIntervals) {
    // What the mask is like is not known here.
    params.window_left = params.window_right = kUnbounded;
    params.first_stores = true;  // if bwd_prepare does not clear the tile
  } else {
    params.first_stores = bwd_first_stores(params);
  }

  const auto kernel = mha_bwd_kernel<Config>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kBwdSharedBytes<Config>);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = kBwdSharedBytes<Config>;
  config.stream = stream;
  config.attrs = attributes;
  if constexpr (Config::kPaired) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {2, 1, 1};
    config.numAttrs = 1;
  }
  int groups = device.multiprocessors;
  if constexpr (Config::kPaired) {
    // Pairs lie within a processing cluster, which may have an odd number of multiprocessors. More
    // than fit must not be launched: those that wait for their turn would keep the others out.
    config.gridDim = dim3(device.multiprocessors / 2 * 2);
    error = max_active_clusters<mha_bwd_kernel<Config>>(config, &groups);
    if (error != cudaSuccess) return error;
    if (groups == 0) return cudaErrorInvalidConfiguration;
  }

  BwdPlan plan{};
  error = make_plan<Config>(params, way, groups, device.l2_bytes, &plan);
  if (error != cudaSuccess) return error;
  if constexpr (Config::kIntervals) {
    const float softcap = params.intervals.softcap;
    const float scale = params.scale.first * params.scale.second;
    plan.logit_log2 = scale * SoftmaxScale::kLog2e;
    plan.softcap_log2 = softcap * SoftmaxScale::kLog2e;
    if (softcap != 0.0f) {
      plan.tanh = TanhPolynomial::make(scale, softcap, 1.0f);
      plan.small = SmallTanh::make(scale, softcap, 1.0f);
    }
  }
  const int parts = static_cast<int>(plan.parts.divisor);
  BwdKeySums sums = BwdKeySums::make<Config>(params);
  if (params.deterministic) {
    sums.copies = parts;
  } else if (parts > 1) {
    params.zeroed_floats = sums.floats();
  }
  error = launch_bwd_prepare<Element, typename Config::Mask>(
      params, Config::kSumWidth, stream, Config::kIntervals ? Config::kSumParts : 0);
  if (error != cudaSuccess) return error;
  if constexpr (Config::kIntervals) {
    error = launch_work_order<Config::kKeys>(params, stream);
    if (error != cudaSuccess) return error;
    attributes[config.numAttrs++] = after_work_order();
  }
  const int grid = std::min(plan.order.ids, bwd_grid(plan, groups));
  plan.groups = FastDivisor::make(static_cast<uint32_t>(grid));
  config.gridDim = dim3(Config::kPaired ? 2 * grid : grid);
  if (params.deterministic && !plan.queued) {
    // Blocks of work wait for others that have their thread blocks from the start: all have to run.
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  error = cudaLaunchKernelEx(&config, kernel, params, plan);
  if (error != cudaSuccess) return error;

  const int64_t tiles = (int64_t{params.query_length} + Config::kRows - 1) / Config::kRows;
  const int64_t row_chunks = tiles * (Config::kRows / Config::kSumRows);
  const int64_t chunks =
      params.finished_rows != 0 ? 0 : int64_t{params.batch} * params.heads * row_chunks;
  constexpr int kColumns = Config::kSumWidth / 64;
  const int64_t pieces = parts > 1 ? int64_t{sums.chunks} * sums.pieces() : 0;
  const int64_t blocks = chunks + (pieces + kColumns - 1) / kColumns;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const dim3 finish_grid(static_cast<unsigned>(blocks), kColumns);
  return launch_kernel(mha_bwd_finish_kernel<Element, Config::kSumRows>, finish_grid,
                       kBwdFinishThreads, kBwdFinishSharedBytes<Config::kSumRows>, stream, params,
                       sums, static_cast<int>(row_chunks), static_cast<int>(chunks));
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd(const MhaBwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream) {
  const auto launch = [&]<int kRows>() {
    const BwdWay way = bwd_way(params, kRows, 128, device.multiprocessors);
    return way.ordered
               ? launch_bwd<BwdConfig<kType, kHeadDim, kRows, true>>(params, way, device, stream)
               : launch_bwd<BwdConfig<kType, kHeadDim, kRows, false>>(params, way, device, stream);
  };
  if constexpr (kHeadDim > 128) {
    const BwdWay way = bwd_plain_way(params, false, device.multiprocessors);
    return way.ordered ? launch_bwd<BwdWideConfig<kType, kHeadDim, kHeadDimV, true>>(params, way,
                                                                                     device, stream)
                       : launch_bwd<BwdWideConfig<kType, kHeadDim, kHeadDimV, false>>(
                             params, way, device, stream);
  } else if constexpr (kHeadDim == 64) {
    return launch.template operator()<128>();
  } else {
    // Larger tiles are faster, but of short sequences with a diagonal they waste more.
    constexpr int kShort = 1024;
    const bool small = params.window_right != kUnbounded && params.query_length <= kShort;
    return small ? launch.template operator()<64>() : launch.template operator()<80>();
  }
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd_intervals(const MhaBwdParams& params, const DeviceInfo& device,
                                     cudaStream_t stream) {
  const BwdWay way = bwd_plain_way(params, true, device.multiprocessors);
  const auto launch = [&]<bool kDense>() {
    if constexpr (kHeadDim > 128) {
      return launch_bwd<BwdWideConfig<kType, kHeadDim, kHeadDimV, false, IntervalMask, kDense>>(
          params, way, device, stream);
    } else {
      return launch_bwd<BwdConfig<kType, kHeadDim, kIntervalRows, false, IntervalMask, kDense>>(
          params, way, device, stream);
    }
  };
  return is_dense(params) ? launch.template operator()<true>()
                          : launch.template operator()<false>();
}

}  // namespace jax_flash::sm90
