// Launch of the sm_90 backward; instantiated in inst/, one file per width and type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/bwd_rows.cuh"
#include "host/device.h"
#include "host/launch.h"
#include "sm90/bwd.h"
#include "sm90/bwd_finish.cuh"
#include "sm90/bwd_kernel.cuh"
#include "sm90/order.h"
#include "sm90/tensor_map.h"

namespace jax_flash::sm90 {

// How many key heads make a section of the order of blocks.
inline int64_t bwd_section_heads(const MhaBwdParams& params, int64_t key_blocks, int rows, int keys,
                                 int64_t multiprocessors, int64_t l2_bytes) {
  // What a block costs beside its tiles, in tiles.
  constexpr float kBlockCost = 3.0f;
  const RowMask mask = RowMask::make(params.query_length, params.key_length, params.window_left,
                                     params.window_right, params.bottom_right);
  const int64_t group = params.heads / params.kv_heads;
  std::vector<float> costs;
  for (int64_t block = 0; block < key_blocks; ++block) {
    const int first_key = static_cast<int>(block * keys);
    const RowInterval seen = mask.rows(first_key, first_key + keys);
    const int tiles = seen.first < seen.end ? (seen.end + rows - 1) / rows - seen.first / rows : 0;
    costs.push_back(kBlockCost + static_cast<float>(group * tiles));
  }
  // Queries, their output gradients and the sum of their gradients.
  const double head_bytes = (2.0 + 2.0 + 4.0) * group * params.query_length * params.head_dim;
  return best_sections(int64_t{params.batch} * params.kv_heads, costs, head_bytes, multiprocessors,
                       l2_bytes, {section_turn(multiprocessors)})
      .heads;
}

template <typename Config>
cudaError_t make_plan(const MhaBwdParams& params, const DeviceInfo& device, BwdPlan* plan) {
  const int64_t key_blocks = (int64_t{params.key_length} + Config::kKeys - 1) / Config::kKeys;
  const int64_t all = int64_t{params.batch} * params.kv_heads;
  const int64_t multiprocessors = device.multiprocessors;
  // Equal blocks: those of one head follow each other, and share its queries.
  int64_t section = 1;
  int64_t multiple = 1;
  int64_t turn = 0;
  if (params.window_right != kUnbounded) {
    section = bwd_section_heads(params, key_blocks, Config::kRows, Config::kKeys, multiprocessors,
                                device.l2_bytes);
    multiple = 2 * multiprocessors;
    turn = section_turn(multiprocessors);
  }
  if (!SectionOrder::make(all, section, key_blocks, multiple, turn, &plan->order)) {
    return cudaErrorInvalidConfiguration;
  }
  // With a causal mask the first keys are seen by the most queries. Where sums have an order it is
  // the other one, in which blocks wait for blocks that started before.
  plan->first_to_last = !params.deterministic;
  plan->kv_heads = FastDivisor::make(params.kv_heads);
  plan->inner_batch = FastDivisor::make(params.batch_dims == 2 ? params.batch_sizes[1] : 1);

  cudaError_t error =
      make_tensor_map(params, params.query,
                      {params.head_dim, params.query_length, params.query.row_stride, params.heads,
                       params.query.head_stride, Config::kRows, 1},
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
  return make_tensor_map(flat, dout,
                         {params.head_dim_v, params.query_length, dout.row_stride, params.heads,
                          dout.head_stride, Config::kRows, 1},
                         &plan->dout);
}

template <typename Config>
cudaError_t launch_bwd(const MhaBwdParams& params, const DeviceInfo& device, cudaStream_t stream) {
  using Element = typename Config::Element;
  BwdPlan plan{};
  cudaError_t error = make_plan<Config>(params, device, &plan);
  if (error != cudaSuccess) return error;
  error = launch_bwd_prepare<Element>(params, Config::kHeadDim, stream);
  if (error != cudaSuccess) return error;

  const auto kernel = mha_bwd_kernel<Config>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kBwdSharedBytes<Config>);
  if (error != cudaSuccess) return error;
  const int grid = std::min(plan.order.ids, device.multiprocessors);
  error = launch_kernel(kernel, dim3(grid), Config::kThreads, kBwdSharedBytes<Config>, stream,
                        params, plan);
  if (error != cudaSuccess) return error;

  const int64_t row_chunks = bwd_padded_rows(params.query_length) / 64;
  const int64_t chunks = int64_t{params.batch} * params.heads * row_chunks;
  if (chunks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const dim3 finish_grid(static_cast<unsigned>(chunks), Config::kHeadDim / 64);
  return launch_kernel(mha_bwd_finish_kernel<Element>, finish_grid, kBwdFinishThreads,
                       kBwdFinishSharedBytes, stream, params);
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
cudaError_t launch_mha_bwd(const MhaBwdParams& params, const DeviceInfo& device,
                           cudaStream_t stream) {
  static_assert(kHeadDim == kHeadDimV);
  return params.deterministic
             ? launch_bwd<BwdConfig<kType, kHeadDim, true>>(params, device, stream)
             : launch_bwd<BwdConfig<kType, kHeadDim, false>>(params, device, stream);
}

}  // namespace jax_flash::sm90
