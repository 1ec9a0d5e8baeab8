// The role of the backward that adds dQ to its sum.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/reduction.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_config.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/ring.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm90 {

// One warp for each consumer warpgroup, whose part of dQ it takes from shared memory. It waits for
// its turn and for the memory, so that the consumers need not.
template <typename Config>
struct BwdAdder {
  const MhaBwdParams& params;
  BwdShared<Config>& shared;
  uint32_t tiles;  // shared address of the keys
  int warpgroup;

  // Key blocks add to a tile from the last that it sees to the first. At width 128 the two
  // warpgroups add to different columns under one count.
  __device__ __forceinline__ void wait_for_turn(const int32_t* turn, const BwdBlock<Config>& block,
                                                int tile) const {
    const KeyInterval keys = block.mask.hull(tile * Config::kRows, (tile + 1) * Config::kRows);
    const int last = (keys.end - 1) / Config::kKeys;
    const int before = (last - block.first_key / Config::kKeys) * (Config::kSplitsColumns ? 2 : 1);
    while (ptx::ld_acquire(turn) < before) {
    }
    ptx::fence_proxy_async_global();
  }

  // tile: its number in the head; in_sum: in the sum.
  __device__ __forceinline__ void add(const BwdBlock<Config>& block, int tile, int in_sum) const {
    const int64_t part = int64_t{in_sum} * Config::kWarpgroups + warpgroup;
    int32_t* const turn = params.turns + (Config::kSplitsColumns ? part / 2 : part);
    if (lane_id() == 0) {
      if constexpr (Config::kDeterministic) wait_for_turn(turn, block, tile);
      constexpr int kBytes = 4 * Config::kSumFloats;
      ptx::bulk_add_f32(params.dquery_sum + part * Config::kSumFloats,
                        tiles + Config::kSumOffset + warpgroup * kBytes, kBytes);
      ptx::tma_store_commit_group();
      ptx::tma_store_wait_read();
    }
    __syncwarp();
    ptx::bar_arrive(Config::kSumFree + warpgroup, Config::kSumThreads);
    if constexpr (Config::kDeterministic) {
      if (lane_id() == 0) {
        ptx::tma_store_wait();
        ptx::fence_proxy_async_global();
        ptx::red_release_add(turn, 1);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    const int group = params.heads / params.kv_heads;
    RingIndex<BwdShared<Config>::kBlockSlots> slots;
    ptx::bar_arrive(Config::kSumFree + warpgroup, Config::kSumThreads);
#pragma unroll 1
    while (true) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slots.stage()]), slots.parity());
      const BwdBlock<Config>& block = shared.blocks[slots.stage()];
      if (block.tiles < 0) break;
      const int first_tile = block.first_tile;
      const int end_tile = first_tile + block.tiles;
      int in_sum = block.in_sum;
#pragma unroll 1
      for (int head = 0; head < group; ++head) {
#pragma unroll 1
        for (int tile = first_tile; tile < end_tile; ++tile, ++in_sum) {
          ptx::bar_sync(Config::kSumReady + warpgroup, Config::kSumThreads);
          add(block, tile, in_sum);
        }
        in_sum += block.next_head - 1;
      }
      // By all lanes, which have all read it: what racecheck understands.
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slots.stage()]));
      slots.next();
    }
    if (lane_id() == 0) ptx::tma_store_wait();
  }
};

}  // namespace jax_flash::sm90
