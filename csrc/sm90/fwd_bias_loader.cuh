// The last warp of the producer warpgroup: copies biases of 16 bits.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/prefetch.cuh"
#include "ptx/tma.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_shared.cuh"
#include "sm90/ring.cuh"
#include "tile/copy.cuh"

namespace jax_flash::sm90 {

// Row by row: any dim may be shared by all heads or rows, which a tensor map cannot say. Each
// warpgroup has one tile, which is free again as soon as its scores have the biases.
template <typename Config>
struct FwdBiasLoader {
  using Shared = FwdShared<Config>;
  static constexpr int kElement = 2;
  static constexpr int kLine = 128;

  const MhaFwdParams& params;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage

  static __device__ __forceinline__ bool is_needed(const MhaFwdParams& params) {
    const BiasView& bias = params.intervals.bias;
    return bias.data != nullptr && bias.type != BiasType::kF32;
  }

  // For warpgroup `w`, and asks for the next tile to come to the L2. Rows past the last one are
  // read as the last one; columns past the last one hold anything, and are masked.
  __device__ __forceinline__ void copy(const FwdBlock<Config>& block, int w, int tile) const {
    const int first_key = tile * Config::kKeys;
    const int keys = min(Config::kKeys, (params.key_length - first_key + 7) / 8 * 8);
    const uint32_t bytes = keys * kElement;
    const uint32_t target = tiles + Config::kBiasOffset + w * Config::kBiasTileBytes;
    const uint32_t barrier = ptx::shared_address(&shared.bias_full[w]);
    if (lane_id() == 0) ptx::mbarrier_arrive_expect_tx(barrier, 64 * bytes);
    __syncwarp();
#pragma unroll 1
    for (int r = lane_id(); r < 64; r += 32) {
      const int row = min(max(block.first_row + 64 * w + r, 0), params.query_length - 1);
      const unsigned char* const source =
          block.bias + (row * params.intervals.bias.row_stride + first_key) * kElement;
      ptx::bulk_load(target + r * Config::kBiasRowBytes, source, bytes, barrier);
      if (tile == block.lowest[w]) continue;
#pragma unroll
      for (int i = 0; i < kElement * Config::kKeys; i += kLine) {
        ptx::prefetch_l2(source - kElement * Config::kKeys + i);
      }
    }
  }

  __device__ __forceinline__ void run() {
    RingIndex<Shared::kBlockSlots> block_ring;
    uint32_t parities = 0;  // bit w: of the next wait for the tile of warpgroup w
    while (true) {
      const int slot = block_ring.stage();
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slot]), block_ring.parity());
      const FwdBlock<Config>& block = shared.blocks[slot];
      if (block.tiles < 0) break;
#pragma unroll 1
      for (int tile = block.last_tile; tile > block.last_tile - block.tiles; --tile) {
#pragma unroll 1
        for (int w = 0; w < Config::kWarpgroups; ++w) {
          if (tile > block.start[w] || tile < block.lowest[w]) continue;
          ptx::mbarrier_wait(ptx::shared_address(&shared.bias_empty[w]), (parities >> w & 1) ^ 1);
          parities ^= 1u << w;
          copy(block, w, tile);
        }
      }
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slot]));
      block_ring.next();
    }
  }
};

}  // namespace jax_flash::sm90
