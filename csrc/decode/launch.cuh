// Launch of the decode kernels.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
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

// Bits of the size of a cluster for each head tile, or 0. For one short sequence: with more, or
// with one that keeps the GPU busy for long, thread blocks that take pieces of all the work are
// better balanced, and the sum of splits costs little.
template <typename Config>
int cluster_bits_of(const DecodeParams& params, const DeviceInfo& device) {
  if (!Config::kClusters || device.compute_capability != 90 || params.batch > 1) return 0;
  if (params.splits == 1 || params.splits > kClusterSplits) return 0;
  const int bits = params.splits <= 8 ? 3 : 4;
  const int size = 1 << bits;
  const int64_t blocks = int64_t{params.head_tiles} << bits;
  const bool fits = blocks <= device.multiprocessors;
  const bool fills = params.splits <= size || 5 * blocks >= 2 * device.multiprocessors;
  const bool is_short = int64_t{params.splits} * params.split_keys <= 1024 * size;
  const int rows = std::min(Config::kRows, params.tokens * params.group);
  const int pieces = rows * (Config::kWidth / 4) / size;  // of a thread block
  const bool has_room = 16 + pieces * params.splits * Config::kPieceBytes <= Config::kPartBytes;
  return fits && fills && is_short && has_room ? bits : 0;
}

// Allows the kernel what its launches need on the current device. Once for each device: to set an
// attribute again costs a good part of a microsecond of a call that may last ten.
template <typename Config>
cudaError_t allow(const DeviceInfo& info) {
  constexpr int kMaxDevices = 64;
  constexpr auto kKernel = decode_split_kernel<Config>;
  static std::array<std::atomic<bool>, kMaxDevices> allowed{};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < kMaxDevices && allowed[device].load(std::memory_order_acquire)) return cudaSuccess;
  const bool clusters = Config::kClusters && info.compute_capability == 90;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Config::kSharedBytes + (clusters ? Config::kPartBytes : 0));
  if (error != cudaSuccess) return error;
  if (clusters || Config::kWarpgroup) {
    // Room for two thread blocks: not every part of the GPU need have 16 multiprocessors.
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  if (clusters) {
    // Sizes above 8 are not portable.
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  if (device < kMaxDevices) allowed[device].store(true, std::memory_order_release);
  return cudaSuccess;
}

// Launches clusters if all of them run at a time.
template <typename Config, int kBits>
cudaError_t try_clusters(DecodeParams params, cudaStream_t stream, bool* launched) {
  constexpr auto kKernel = decode_split_kernel<Config>;
  constexpr int kBytes = Config::kSharedBytes + Config::kPartBytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {1u << kBits, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.head_tiles) << kBits);
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  cudaError_t error = max_active_clusters<kKernel, kBits>(config, &clusters);
  *launched = error == cudaSuccess && clusters >= params.head_tiles;
  if (!*launched) return error;
  params.cluster_bits = kBits;
  return cudaLaunchKernelEx(&config, kKernel, params);
}

template <typename Config>
cudaError_t launch(DecodeParams params, const DeviceInfo& device, cudaStream_t stream) {
  const int rows = params.tokens * params.group;
  params.row_tiles = (rows + Config::kRows - 1) / Config::kRows;
  params.tile_rows = Config::kRows;
  params.head_tiles = params.kv_heads * params.row_tiles;
  params.row_tile_divisor = FastDivisor::make(params.row_tiles);
  cudaError_t error = allow<Config>(device);
  if (error != cudaSuccess) return error;
  if (const int bits = cluster_bits_of<Config>(params, device); bits > 0) {
    bool launched = false;
    error = bits == 3 ? try_clusters<Config, 3>(params, stream, &launched)
                      : try_clusters<Config, 4>(params, stream, &launched);
    if (launched || error != cudaSuccess) return error;
  }
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
  // Two thread blocks on each multiprocessor.
  params.enough_pieces = static_cast<int>(2 * pieces / Config::kBlocksPerSm);
  // With so many sequences nothing is gained by cutting one.
  params.whole_groups = params.splits <= kGroupSplits && heads >= 4 * capacity;
  const auto kernel = decode_split_kernel<Config>;
  error = launch_kernel(kernel, dim3(static_cast<unsigned>(grid)), Config::kThreads,
                        Config::kSharedBytes, stream, params);
  if constexpr (!Config::kSumsInLaunch) {
    if (error != cudaSuccess || params.splits == 1) return error;
    const auto sum_blocks = static_cast<unsigned>(heads * (Config::kRows / kSumRows));
    error = launch_dependent_kernel(decode_sum_kernel<Config>, dim3(sum_blocks), kSumThreads, 0,
                                    stream, params);
  }
  return error;
}

template <CacheType kCache, int kWidth>
cudaError_t launch_decode(const DecodeParams& from, const DeviceInfo& device, cudaStream_t stream) {
  DecodeParams params = from;
  params.group = params.heads / params.kv_heads;
  constexpr float kLog2e = SoftmaxScale::kLog2e;
  params.logit_factor = params.scale * (params.softcap == 0.0f ? kLog2e : 1.0f / params.softcap);
  params.cap = params.softcap * kLog2e;
  params.page_rows = params.page_table != nullptr ? params.page_size : params.room;
  params.group_divisor = FastDivisor::make(params.group);
  params.page_divisor = FastDivisor::make(params.page_size);
  params.split_divisor = FastDivisor::make(params.split_keys);
  const int rows = params.tokens * params.group;
  if constexpr (kCache == CacheType::kF32) {
    return launch<DecodeConfig<kCache, kWidth, Rows::kEight>>(params, device, stream);
  } else {
    constexpr bool kHasWarpgroup = sizeof(typename CacheElement<kCache>::Stored) == 2;
    if constexpr (kHasWarpgroup && kWidth <= 128) {
      if (has_warpgroup(rows, params.room) && device.compute_capability == 90) {
        return launch_warpgroup<kCache, kWidth>(params, device, stream);
      }
    }
    if (rows <= 8) {
      return launch<DecodeConfig<kCache, kWidth, Rows::kEight>>(params, device, stream);
    }
    return rows <= 16 ? launch<DecodeConfig<kCache, kWidth, Rows::kSixteen>>(params, device, stream)
                      : launch<DecodeConfig<kCache, kWidth, Rows::kMany>>(params, device, stream);
  }
}

}  // namespace jax_flash::decode
