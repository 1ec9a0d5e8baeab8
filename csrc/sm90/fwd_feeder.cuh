// With kDense, beside the producer: copies biases, reads masks of bits.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_shared.cuh"
#include "sm90/fwd_tile_bits.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm90 {

// One warp. Of four (Config::kFeeders), each works for one warp of each consumer warpgroup, whose
// rows no other consumer needs; a single one works for all, but only copies biases.
//
// Bits of the mask are read up to two tiles ahead, and lie in shared memory as the consumer's lanes
// need them. Biases come by cp.async, since any dim may be shared by all heads or
// rows, which a tensor map cannot say, and copies of single rows by TMA would be issued lane by
// lane. There is one tile of them, which is free again as soon as the scores have the biases. Those
// of f32 come in two halves.
template <typename Config>
struct FwdFeeder {
  using Shared = FwdShared<Config>;
  static constexpr int kBytes = 2 * Config::kKeys;  // of a row of biases
  static constexpr int kChunks = kBytes / 16;
  using Bits = FwdBitMaker<Config::kKeys>;

  const MhaFwdParams& params;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage
  int number;      // among the feeders; known to be uniform

  // The same number, with what follows from it computed anew: registers are few.
  static __device__ __forceinline__ int fresh(int x) {
    return static_cast<int>(ptx::fresh_address(static_cast<uint32_t>(x)));
  }

  // Whether warpgroup `w` passes over tile `tile`.
  static __device__ __forceinline__ bool passes(const FwdBlock<Config>& block, int w, int tile) {
    return tile > block.start[w] || tile < block.lowest[w];
  }

  // Bits of the mask for tile `tile`, the `count`-th of all, and warpgroup `w`.
  __device__ __forceinline__ void read_mask(const FwdBlock<Config>& block, int w, int tile,
                                            uint32_t count) const {
    count = ptx::fresh_address(count);
    tile = fresh(tile);
    const int lane = fresh(lane_id());
    const int stage = count % Shared::kBitStages;
    const int warp = 4 * w + number;
    const bool passed = passes(block, w, tile);
    const int row = block.first_row + 16 * warp + lane / 4;
    uint32_t seen[2];
    if (!passed) {  // before the wait: there is time
      uint32_t words[2][Bits::kWords];
#pragma unroll
      for (int h = 0; h < 2; ++h) Bits::load_words(params, block, row + 8 * h, tile, words[h]);
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[h] = Bits::lane_bits(words[h]);
    }
    ptx::mbarrier_wait(ptx::shared_address(&shared.bits_empty[stage][warp]),
                       count / Shared::kBitStages % 2 ^ 1);
    if (!passed) shared.seen[stage][32 * warp + lane] = make_uint2(seen[0], seen[1]);
    ptx::mbarrier_arrive(ptx::shared_address(&shared.bits_full[stage][warp]));
  }

  // Biases for share `share` of the rows (FwdDenseShared), a part of tile `tile`, zeros past the
  // last key. Rows past the last one, whose results are dropped, are read as some other.
  __device__ __forceinline__ void copy_bias(const FwdBlock<Config>& block, int share, int tile,
                                            int part) const {
    constexpr int kRows = 64 / Config::kFeeders;
    constexpr int kStep = 32 / kChunks;  // rows that the warp copies at once
    const uint32_t barrier = ptx::shared_address(&shared.bias_full[share]);
    if (passes(block, share / Config::kFeeders, tile)) {
      ptx::mbarrier_arrive(barrier);
      return;
    }
    const int first_row = block.first_row + kRows * share;
    const int lane = fresh(lane_id());
    const int width = fresh(2 * parts_of(params.intervals.bias));
    const int64_t stride = params.intervals.bias.row_stride * width;
    const int last = params.query_length - 1 - first_row;
    int r = lane / kChunks;
    const int chunk = 16 * (lane % kChunks);
    const int offset = width * Config::kKeys * tile + part * kBytes + chunk;  // in a row
    const int bytes = min(max(width * ((params.key_length + 7) / 8 * 8) - offset, 0), 16);
    const unsigned char* source =
        block.bias + (first_row + min(r, last)) * stride + (bytes > 0 ? offset : 0);
    uint32_t target =
        tiles + Config::kBiasOffset + (kRows * share + r) * Config::kBiasRowBytes + chunk;
#pragma unroll 4
    for (int i = 0; i < kRows / kStep; ++i) {
      ptx::cp_async_16(target, source, bytes);
      target += kStep * Config::kBiasRowBytes;
      r += kStep;
      if (r <= last) source += kStep * stride;
    }
    ptx::cp_async_mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void run() const {
    int slot = 0;  // of blocks
    uint32_t block_parity = 0;
    uint32_t count = 0;  // of tiles
    while (true) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slot]), block_parity);
      const FwdBlock<Config>& block = shared.blocks[slot];
      if (block.tiles < 0) break;
      int tile = block.last_tile;
#pragma unroll 1
      while (block.last_tile - tile < block.tiles) {
        if (feeds_bits<Config>(params)) {
#pragma unroll 1
          for (int w = 0; w < Config::kWarpgroups; ++w) read_mask(block, w, tile, count);
        }
        if (params.intervals.bias.data != nullptr) {
          const bool two = parts_of(params.intervals.bias) == 2;
#pragma unroll 1
          for (int part = 0; part < parts_of(params.intervals.bias); ++part) {
#pragma unroll 1
            for (int w = 0; w < Config::kWarpgroups; ++w) {
              const int share = Config::kFeeders * w + number;
              ptx::mbarrier_wait(ptx::shared_address(&shared.bias_empty[share]),
                                 (two ? part : count % 2) ^ 1);
              copy_bias(block, share, tile, part);
            }
          }
        }
        ++count;
        tile = next_seen<Config::kKeys>(block.hidden, block.hidden_shift,
                                        block.last_tile - block.tiles + 1, tile);
      }
      // By all lanes, which have all read it: what racecheck understands.
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slot]));
      if (++slot == Shared::kBlockSlots) {
        slot = 0;
        block_parity ^= 1;
      }
    }
  }
};

}  // namespace jax_flash::sm90
