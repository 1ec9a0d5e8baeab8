// Launch of the decode kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "decode/decode.h"
#include "decode/kernel.cuh"
#include "host/launch.h"

namespace jax_flash::decode {

// How many neighbouring head tiles go side by side: as many as divide all of them and leave hardly
// any of `capacity` thread blocks without work. From 8 on they read at least a kilobyte in a row.
inline int crew_of(int head_tiles, int capacity) {
  for (int crew = std::min(16, head_tiles); crew > 1; --crew) {
    const int idle = capacity % crew;
    if (head_tiles % crew == 0 && crew <= capacity && 33 * idle < capacity) return crew;
  }
  return 1;
}

template <typename Config>
cudaError_t launch(DecodeParams params, const DeviceInfo& device, cudaStream_t stream) {
  const int rows = params.tokens * params.group;
  params.row_tiles = (rows + Config::kRows - 1) / Config::kRows;
  params.tile_rows = Config::kRows;
  params.head_tiles = params.kv_heads * params.row_tiles;
  params.row_tile_divisor = FastDivisor::make(params.row_tiles);
  const int64_t heads = int64_t{params.batch} * params.head_tiles;
  const int64_t units = heads * params.splits;
  // Half of what an int holds, so that sums with numbers of thread blocks fit it, too.
  if (units > std::numeric_limits<int32_t>::max() / 2) return cudaErrorInvalidConfiguration;
  const int64_t capacity = int64_t{device.multiprocessors} * Config::kBlocksPerSm;
  const int crew = crew_of(params.head_tiles, static_cast<int>(capacity));
  const int64_t pieces = std::min(units / crew, capacity / crew);
  const int64_t grid = pieces * crew;
  params.crew_divisor = FastDivisor::make(crew);
  params.piece_divisor = FastDivisor::make(static_cast<uint32_t>(pieces));
  // With so many sequences nothing is gained by cutting one.
  params.whole_groups = params.splits <= kGroupSplits && heads >= 4 * capacity;
  const auto kernel = decode_split_kernel<Config>;
  // At every launch: the setting belongs to the current device, and costs less than remembering it.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  error = launch_kernel(kernel, dim3(static_cast<unsigned>(grid)), Config::kThreads,
                        Config::kSharedBytes, stream, params);
  if (error != cudaSuccess || params.splits == 1 || params.whole_groups) return error;
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
  params.split_divisor = FastDivisor::make(params.split_keys);
  const bool many = params.tokens * params.group > 16;
  return many ? launch<DecodeConfig<kCache, kWidth, true>>(params, device, stream)
              : launch<DecodeConfig<kCache, kWidth, false>>(params, device, stream);
}

}  // namespace jax_flash::decode
