// Launch of the decode kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "decode/decode.h"
#include "decode/kernel.cuh"
#include "host/launch.h"

namespace jax_flash::decode {

template <typename Config>
cudaError_t launch(DecodeParams params, const DeviceInfo& device, cudaStream_t stream) {
  const int rows = params.tokens * params.group;
  params.row_tiles = (rows + Config::kRows - 1) / Config::kRows;
  const int64_t heads = int64_t{params.batch} * params.kv_heads * params.row_tiles;
  const int64_t capacity = int64_t{device.multiprocessors} * Config::kBlocksPerSm;
  // Where there are units to spare, whole groups: partial results then are a few bytes in a
  // thousand of what is read.
  const int64_t groups = (params.splits + kGroupSplits - 1) / kGroupSplits;
  params.unit_splits = heads * groups >= 4 * capacity ? kGroupSplits : 1;
  const int64_t units = heads * (params.unit_splits > 1 ? groups : params.splits);
  if (units > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const int64_t grid = std::min(units, capacity);
  const auto kernel = decode_split_kernel<Config>;
  // At every launch: the setting belongs to the current device, and costs less than remembering it.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  error = launch_kernel(kernel, dim3(static_cast<unsigned>(grid)), Config::kThreads,
                        Config::kSharedBytes, stream, params);
  if (error != cudaSuccess || params.splits <= params.unit_splits) return error;
  const int64_t threads = int64_t{params.batch} * params.kv_heads * rows * (params.head_dim_v / 4);
  const int64_t blocks = (threads + 127) / 128;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const auto combine = decode_combine_kernel<Config::kCache>;
  const dim3 combine_grid(static_cast<unsigned>(blocks));
  return device.compute_capability >= 90
             ? launch_dependent_kernel(combine, combine_grid, 128, 0, stream, params)
             : launch_kernel(combine, combine_grid, 128, 0, stream, params);
}

template <CacheType kCache, int kWidth>
cudaError_t launch_decode(const DecodeParams& from, const DeviceInfo& device, cudaStream_t stream) {
  DecodeParams params = from;
  params.group = params.heads / params.kv_heads;
  params.group_divisor = FastDivisor::make(params.group);
  params.page_divisor = FastDivisor::make(params.page_size);
  const bool many = params.tokens * params.group > 16;
  return many ? launch<DecodeConfig<kCache, kWidth, true>>(params, device, stream)
              : launch<DecodeConfig<kCache, kWidth, false>>(params, device, stream);
}

}  // namespace jax_flash::decode
