// The last warp of the producer warpgroup: copies biases.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_shared.cuh"
#include "tile/copy.cuh"

namespace jax_flash::sm90 {

// By cp.async, since any dim may be shared by all heads or rows, which a tensor map cannot say, and
// copies of single rows by TMA would be issued lane by lane. Each warpgroup has one tile, which is
// free again as soon as its scores have the biases. Those of f32 come in two halves.
template <typename Config>
struct FwdBiasLoader {
  using Shared = FwdShared<Config>;
  static constexpr int kBytes = 2 * Config::kKeys;  // of a row
  static constexpr int kChunks = kBytes / 16;

  const MhaFwdParams& params;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage

  static __device__ __forceinline__ bool is_needed(const MhaFwdParams& params) {
    return params.intervals.bias.data != nullptr;
  }

  // Those of warpgroup `w`, a part of tile `tile`, zeros past the last key. Rows past the last one,
  // whose results are dropped, are read as some other.
  __device__ __forceinline__ void copy(const FwdBlock<Config>& block, int w, int tile,
                                       int part) const {
    constexpr int kStep = 32 / kChunks;  // rows that the warp copies at once
    const uint32_t barrier = ptx::shared_address(&shared.bias_full[w]);
    if (tile > block.start[w] || tile < block.lowest[w]) {  // the warpgroup passes over it
      ptx::mbarrier_arrive(barrier);
      return;
    }
    const int width = 2 * parts_of(params.intervals.bias);
    const int64_t stride = params.intervals.bias.row_stride * width;
    const int last = params.query_length - 1 - block.first_row - 64 * w;
    int r = lane_id() / kChunks;
    const int chunk = 16 * (lane_id() % kChunks);
    const int offset = width * Config::kKeys * tile + part * kBytes + chunk;  // in a row
    const int bytes = min(max(width * ((params.key_length + 7) / 8 * 8) - offset, 0), 16);
    const unsigned char* source =
        block.bias + (block.first_row + 64 * w + min(r, last)) * stride + (bytes > 0 ? offset : 0);
    uint32_t target = tiles + Config::kBiasOffset + w * Config::kBiasTileBytes +
                      r * Config::kBiasRowBytes + chunk;
#pragma unroll 2
    for (int i = 0; i < 64 / kStep; ++i) {
      ptx::cp_async_16(target, source, bytes);
      target += kStep * Config::kBiasRowBytes;
      r += kStep;
      if (r <= last) source += kStep * stride;
    }
    ptx::cp_async_mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void run() {
    int slot = 0;  // of blocks
    // Bit 0: the parity of the next wait for room, with either warpgroup. Bit 1: for a block.
    uint32_t parities = 1;
    while (true) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slot]), parities / 2);
      const FwdBlock<Config>& block = shared.blocks[slot];
      if (block.tiles < 0) break;
      int tile = block.last_tile;
#pragma unroll 1
      while (block.last_tile - tile < block.tiles) {
#pragma unroll 1
        for (int part = 0; part < parts_of(params.intervals.bias); ++part) {
#pragma unroll 1
          for (int w = 0; w < Config::kWarpgroups; ++w) {
            ptx::mbarrier_wait(ptx::shared_address(&shared.bias_empty[w]), parities % 2);
            copy(block, w, tile, part);
          }
          parities ^= 1;
        }
        tile = next_seen<Config::kKeys>(block.hidden, block.hidden_shift,
                                        block.last_tile - block.tiles + 1, tile);
      }
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slot]));
      if (++slot == Shared::kBlockSlots) {
        slot = 0;
        parities ^= 2;
      }
    }
  }
};

}  // namespace jax_flash::sm90
