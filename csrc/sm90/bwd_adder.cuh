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

// One warp for each consumer warpgroup, whose parts of dQ it takes from shared memory. It waits for
// its turn and for the memory, so that the consumers need not.
template <typename Config>
struct BwdAdder {
  const MhaBwdParams& params;
  BwdShared<Config>& shared;
  uint32_t tiles;  // shared address of the keys
  int warpgroup;
  int rank;  // in the cluster

  // With an order, in which key blocks add from the last that the tile sees to the first: waits
  // until this block may add to a part of a tile; returns whether it is to store instead.
  __device__ __forceinline__ bool wait_for_turn(const int32_t* turn, const BwdBlock<Config>& block,
                                                int tile) const {
    const KeyInterval keys = block.mask.hull(tile * Config::kRows, (tile + 1) * Config::kRows);
    constexpr int kKeys = Config::kClusterKeys;
    const int before = (keys.end - 1) / kKeys - block.first_key / kKeys;
    while (ptx::ld_acquire(turn) < before) {
    }
    ptx::fence_proxy_async_global();
    return before == 0;
  }

  // Without an order: whether a part is there to be added to. Most are, but for those of the first
  // blocks of work of a head.
  __device__ __forceinline__ bool is_stored(const int32_t* turn) const {
    if (!params.first_stores) return true;
    if (ptx::ld_acquire(turn) < kBwdStored) return false;
    ptx::fence_proxy_async_global();
    return true;
  }
  // Returns whether this block is the first to add to a part, and is to store; else waits until it
  // is stored.
  __device__ __forceinline__ bool comes_first(int32_t* turn) const {
    const int before = ptx::atom_acquire_add(turn, 1);
    if (before > 0 && before < kBwdStored) {
      while (ptx::ld_acquire(turn) < kBwdStored) {
      }
    }
    ptx::fence_proxy_async_global();
    return before == 0;
  }

  // One part of a tile; stores: instead of adding, as only the lane that adds need know.
  // before_first(): what that lane does first when dQ is there.
  template <typename BeforeFirst>
  __device__ __forceinline__ void add_part(int64_t part, bool& stores,
                                           BeforeFirst before_first) const {
#pragma unroll
    for (int piece = 0; piece < Config::kSumPieces; ++piece) {
      ptx::bar_sync(Config::kSumReady + warpgroup, Config::kSumThreads);
      if (lane_id() == 0) {
        if (piece == 0) before_first();
        constexpr int kFloats = Config::kSumFloats / Config::kSumPieces;
        float* const sum = params.dquery_sum + part * Config::kSumFloats + piece * kFloats;
        const uint32_t source = tiles + Config::kSumOffset + warpgroup * 4 * kFloats;
        if (stores) {
          ptx::bulk_store(sum, source, 4 * kFloats);
        } else {
          ptx::bulk_add_f32(sum, source, 4 * kFloats);
        }
        ptx::tma_store_commit_group();
        ptx::tma_store_wait_read();
      }
      __syncwarp();
      ptx::bar_arrive(Config::kSumFree + warpgroup, Config::kSumThreads);
    }
  }

  // What this lane has added is there for others to add to.
  __device__ __forceinline__ void publish(int32_t* turn, int32_t value) const {
    ptx::tma_store_wait();
    ptx::fence_proxy_async_global();
    ptx::red_release_add(turn, value);
  }

  // This warp's parts of a tile, from the one numbered `first` in the sum. tile: its number in the
  // head. What can be asked is asked while dQ is computed: each answer takes as long as the copy of
  // a part. With an order the parts have one turn, that of the first.
  __device__ __forceinline__ void add(const BwdBlock<Config>& block, int tile, int64_t first,
                                      int parts) const {
    int32_t* const turns = params.turns + first;
    bool stores = false;
    if (adds_in_order<Config>(params)) {
      if (lane_id() == 0) stores = wait_for_turn(turns, block, tile);
      __syncwarp();
#pragma unroll 1
      for (int part = 0; part < parts; ++part) add_part(first + part, stores, [] {});
      if (lane_id() == 0) {
        publish(turns, 1);
        // That there is something in the other parts, for the last kernel.
        for (int part = 1; part < parts; ++part) ptx::red_add(turns + part, 1);
      }
    } else {
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        bool stored = false;
        if (lane_id() == 0) stored = is_stored(turns + part);
        __syncwarp();
        add_part(first + part, stores, [&] { stores = !stored && comes_first(turns + part); });
        if (stores) publish(turns + part, kBwdStored);
        stores = false;
      }
    }
  }

  // This warp's parts of a tile of the block, which is number `in_sum` of the sum.
  __device__ __forceinline__ void add_tile(const BwdBlock<Config>& block, int tile,
                                           int in_sum) const {
    const int64_t first_part =
        int64_t{in_sum} * Config::kSumParts + Config::first_part(warpgroup, rank);
    const int parts = Config::parts_of(warpgroup, rank, tile);
    if (parts > 0) add(block, tile, first_part, parts);
  }

  // All tiles of a block.
  __device__ __forceinline__ void add_block(const BwdBlock<Config>& block) const {
    const int first_tile = block.first_tile;
    const int end_tile = first_tile + block.tiles;
    const int heads = block.query_heads;
    int in_sum = block.in_sum;
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
#pragma unroll 1
      for (int tile = first_tile; tile < end_tile; ++tile, ++in_sum) add_tile(block, tile, in_sum);
      in_sum += block.next_head - 1;
    }
  }

  // The same with intervals: which of 32 tiles meet the block each lane finds of one, beforehand.
  __device__ __forceinline__ void add_intervals(const BwdBlock<Config>& block) const {
    int head_in_sum = block.in_sum;
#pragma unroll 1
    for (int head = 0; head < block.query_heads; ++head) {
#pragma unroll 1
      for (int base = 0; base < block.tiles; base += 32) {
        const int own = base + lane_id();
        const bool meets = own < block.tiles && block.meets(block.first_tile + own);
#pragma unroll 1
        for (uint32_t left = __ballot_sync(0xffffffffu, meets); left != 0; left &= left - 1) {
          const int at = base + __ffs(static_cast<int>(left)) - 1;
          add_tile(block, block.first_tile + at, head_in_sum + at);
        }
      }
      head_in_sum += block.next_head + block.tiles - 1;
    }
  }

  __device__ __forceinline__ void run() const {
    RingIndex<BwdShared<Config>::kBlockSlots> slots;
    ptx::bar_arrive(Config::kSumFree + warpgroup, Config::kSumThreads);
#pragma unroll 1
    while (true) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slots.stage()]), slots.parity());
      const BwdBlock<Config>& block = shared.blocks[slots.stage()];
      if (block.tiles < 0) break;
      if constexpr (Config::kIntervals) {
        add_intervals(block);
      } else {
        add_block(block);
      }
      // By all lanes, which have all read it: what racecheck understands.
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slots.stage()]));
      slots.next();
    }
    if (lane_id() == 0) ptx::tma_store_wait();
  }
};

}  // namespace jax_flash::sm90
