// The role of the backward that adds dQ to its sum in an order, or stores it.
#pragma once

#include <cstdint>

#include "ptx/address.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/bwd_adder.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/ring.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm90 {

// In place of BwdAdder. The block that is the last to add to a tile does not: its consumers find
// the sum of all others where they leave dQ, and leave the result there.
template <typename Config>
struct BwdFinishingAdder : BwdAdder<Config> {
  using Base = BwdAdder<Config>;
  using Base::params;
  using Base::shared;
  using Base::tiles;
  using Base::warpgroup;

  const BwdPlan& plan;
  uint32_t loads = 0;  // of sums
  uint32_t left = 0;   // how often dquery_left has been waited for

  // What is needed of a block for each tile, in registers: beside products shared memory answers
  // late.
  struct Order {
    int first_tile;
    int end_tile;
    int start_tile;
    int ring;
    BwdTileRange finish;
    // In a ring tiles that this block is the first for; else the ends of the rows, and of the keys
    // that they see, counted from this block's first key.
    int store_or_rows;
    int shift;
    int keys;

    __device__ __forceinline__ static Order of(const BwdBlock<Config>& block) {
      Order order{block.first_tile,
                  block.first_tile + block.tiles,
                  block.start(),
                  block.ring,
                  block.finish,
                  static_cast<int>(block.store.bits),
                  0,
                  0};
      if (block.ring == 0) {
        const RowMask& mask = block.mask;
        order.store_or_rows = mask.query_length;
        order.shift = mask.shift + mask.window_right - 1 - block.first_key;
        order.keys = mask.key_length - 1 - block.first_key;
      }
      return order;
    }
    __device__ __forceinline__ int after(int tile) const {
      return tile + 1 == end_tile ? first_tile : tile + 1;
    }
    // How many blocks have to have added to a tile before; 0: this one is the first. Without a ring
    // blocks add from the last that the tile sees to the first. strict: all have their place.
    __device__ __forceinline__ int awaited(int tile, bool strict) const {
      if (ring != 0) {
        if (finish.has(tile)) return ring - 1;
        return BwdTileRange{static_cast<uint32_t>(store_or_rows)}.has(tile) ? 0 : 1;
      }
      const int before =
          min(min((tile + 1) * Config::kRows, store_or_rows) + shift, keys) / Config::kKeys;
      return strict || finish.has(tile) ? before : min(before, 1);
    }
  };

  // A part of a tile.
  struct Part {
    int tile;         // of its head
    int tile_in_sum;  // of all heads
  };
  __device__ __forceinline__ int64_t in_sum(const Part& part) const {
    return int64_t{part.tile_in_sum} * Config::kSumParts + warpgroup;
  }
  __device__ __forceinline__ uint32_t place() const {
    return tiles + Config::kSumOffset + warpgroup * 4 * Config::kSumFloats;
  }

  __device__ __forceinline__ void wait_for(const Part& part, int awaited) const {
    while (ptx::ld_acquire(params.turns + in_sum(part)) < awaited) {
    }
    ptx::fence_proxy_async_global();
  }

  // Before the sum of others goes where the consumers' dQ was: racecheck takes nothing else for an
  // order of the two writes.
  __device__ __forceinline__ void wait_left() {
    ptx::mbarrier_wait(ptx::shared_address(&shared.dquery_left[warpgroup]), left % 2);
    ++left;
  }

  // Gives the consumers the place of a part of dQ.
  __device__ __forceinline__ void open() const {
    ptx::bar_arrive(Config::kSumFree + warpgroup, Config::kSumThreads);
  }
  // The same with the sum of all other blocks, for which the consumers wait.
  __device__ __forceinline__ void open_with_sum(const Order& order, const Part& part) {
    if (lane_id() == 0) {
      wait_for(part, order.awaited(part.tile, plan.strict));
      const uint32_t barrier = ptx::shared_address(&shared.sum_full[warpgroup]);
      ptx::mbarrier_arrive_expect_tx(barrier, 4 * Config::kSumFloats);
      ptx::bulk_load(place(), params.dquery_sum + in_sum(part) * Config::kSumFloats,
                     4 * Config::kSumFloats, barrier);
      shared.sum_parity[warpgroup] = loads % 2;
      ptx::mbarrier_wait(barrier, loads % 2);
    }
    ++loads;
    __syncwarp();
    open();
  }

  // Waits for dQ of a part and stores it.
  __device__ __forceinline__ void store(const BwdBlock<Config>& block, const Part& part) const {
    ptx::bar_sync(Config::kSumReady + warpgroup, Config::kSumThreads);
    if (lane_id() == 0) {
      const bool columns = Config::kSplitsColumns;
      const int batch = block.batch;
      const int head = part.tile_in_sum / plan.tiles - batch * params.heads;
      ptx::tma_store_5d(&plan.dquery, place(), columns ? 64 * warpgroup : 0,
                        part.tile * Config::kRows + (columns ? 0 : Config::kSumRows * warpgroup),
                        head, batch, 0);
      ptx::tma_store_commit_group();
      ptx::tma_store_wait_read();
    }
    __syncwarp();
  }

  // The same, but adds it. What can be asked is asked before dQ is there.
  __device__ __forceinline__ void add(const Order& order, const Part& part) const {
    const int awaited = order.awaited(part.tile, plan.strict);
    if (lane_id() == 0) wait_for(part, awaited);
    __syncwarp();
    ptx::bar_sync(Config::kSumReady + warpgroup, Config::kSumThreads);
    if (lane_id() == 0) {
      float* const sum = params.dquery_sum + in_sum(part) * Config::kSumFloats;
      if (awaited == 0) {
        ptx::bulk_store(sum, place(), 4 * Config::kSumFloats);
      } else {
        ptx::bulk_add_f32(sum, place(), 4 * Config::kSumFloats);
      }
      ptx::tma_store_commit_group();
      ptx::tma_store_wait_read();
    }
    __syncwarp();
  }

  // The next part of a block.
  __device__ __forceinline__ Part after(const Order& order, const Part& part) const {
    const int tile = order.after(part.tile);
    const int next_head = tile == order.start_tile ? plan.tiles : 0;
    return {tile, part.tile_in_sum + tile - part.tile + next_head};
  }

  __device__ __forceinline__ void run_block(const BwdBlock<Config>& block) {
    const Order order = Order::of(block);
    Part part{order.start_tile, block.in_sum + order.start_tile - order.first_tile};
    bool finishes = order.finish.has(part.tile);
    if (finishes) {
      open_with_sum(order, part);
    } else {
      open();
    }
#pragma unroll 1
    for (int steps = block.steps; steps > 0; --steps) {
      const Part next = after(order, part);
      const bool has_next = steps > 1;
      const bool next_finishes = has_next && order.finish.has(next.tile);
      if (finishes) {
        store(block, part);
      } else {
        add(order, part);
      }
      // The consumers come first, unless what they want takes longer.
      if (has_next && !next_finishes) open();
      if (!finishes && lane_id() == 0) Base::publish(params.turns + in_sum(part), 1);
      if (!has_next || (next_finishes && !finishes)) wait_left();
      if (next_finishes) open_with_sum(order, next);
      part = next;
      finishes = next_finishes;
    }
  }

  __device__ __forceinline__ void run() {
    RingIndex<BwdShared<Config>::kBlockSlots> slots;
#pragma unroll 1
    while (true) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slots.stage()]), slots.parity());
      const BwdBlock<Config>& block = shared.blocks[slots.stage()];
      if (block.tiles < 0) break;
      if (block.steps > 0) run_block(block);
      // By all lanes, which have all read it: what racecheck understands.
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slots.stage()]));
      slots.next();
    }
    ptx::bar_arrive(Config::kSumFree + warpgroup, Config::kSumThreads);
    if (lane_id() == 0) ptx::tma_store_wait();
  }
};

}  // namespace jax_flash::sm90
