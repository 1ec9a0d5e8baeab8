// The producer of the backward: finds this thread block's work, copies tiles.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/reduction.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/batch_coordinate.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_config.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/ring.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm90 {

// Run by one warp, whose first lane does the work; the others are there for named barriers.
template <typename Config>
struct BwdProducer {
  const MhaBwdParams& params;
  const BwdPlan& plan;
  BwdShared<Config>& shared;
  uint32_t tiles;  // shared address of the keys
  int rank;        // in the cluster
  // Whether blocks of work may come from a counter; if they do not, rounds go one way, without
  // turns.
  static constexpr bool kMayQueue = Config::kDeterministic || Config::kIntervals;

  RingIndex<Config::kKeyStages> key_ring;
  int copied = 0;  // tiles of queries
  int taken = 0;   // from the counter, by a pair

  // All slabs of a tile.
  template <typename Layout>
  __device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap* map,
                                            uint32_t barrier, uint64_t policy, int row, int head,
                                            const BatchCoordinate& batch) const {
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::tma_load_5d(target + slab * Layout::kSlabBytes, map, barrier, policy, 64 * slab, row,
                       head, batch.inner, batch.outer);
    }
  }

  __device__ __forceinline__ void copy_keys(const BwdBlock<Config>& block) {
    const int stage = key_ring.stage();
    const uint32_t keys = tiles + Config::kKeyOffset + stage * Config::kKeyStageBytes;
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_empty[stage]), key_ring.parity() ^ 1);
    uint32_t barrier = ptx::shared_address(&shared.value_full[stage]);
    ptx::mbarrier_arrive_expect_tx(barrier, Config::ValueLayout::kBytes);
    copy_tile<typename Config::ValueLayout>(
        keys + Config::kValueOffset, &plan.value, barrier, ptx::kEvictFirst, block.first_key,
        block.head, batch_coordinate(params.value, block.batch, params, plan.inner_batch));
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_empty[stage]), key_ring.parity() ^ 1);
    barrier = ptx::shared_address(&shared.key_full[stage]);
    const BatchCoordinate batch =
        batch_coordinate(params.key, block.batch, params, plan.inner_batch);
    if constexpr (Config::kPaired) {
      using OtherLayout = typename Config::OtherKeyLayout;
      ptx::mbarrier_arrive_expect_tx(barrier, Config::KeyLayout::kBytes + OtherLayout::kBytes);
#pragma unroll
      for (int slab = 0; slab < OtherLayout::kSlabs; ++slab) {
        ptx::tma_load_5d(tiles + Config::kOtherKeyOffset + slab * OtherLayout::kSlabBytes,
                         &plan.key, barrier, ptx::kEvictFirst,
                         64 * (Config::first_other_slab(rank) + slab),
                         block.first_key ^ Config::kKeys, block.head, batch.inner, batch.outer);
      }
    } else {
      ptx::mbarrier_arrive_expect_tx(barrier, Config::KeyLayout::kBytes);
    }
    copy_tile<typename Config::KeyLayout>(keys, &plan.key, barrier, ptx::kEvictFirst,
                                          block.first_key, block.head, batch);
    key_ring.next();
  }

  // Brings keys and values to the L2, where there is no room for them yet: their copies are what a
  // block of work begins with.
  __device__ __forceinline__ void fetch_keys(const BwdBlock<Config>& block) const {
    const auto fetch = [&](const CUtensorMap* map, int slabs, const BatchCoordinate& batch) {
#pragma unroll 1
      for (int slab = 0; slab < slabs; ++slab) {
        ptx::tma_prefetch_5d(map, 64 * slab, block.first_key, block.head, batch.inner, batch.outer);
      }
    };
    fetch(&plan.value, Config::ValueLayout::kSlabs,
          batch_coordinate(params.value, block.batch, params, plan.inner_batch));
    fetch(&plan.key, Config::KeyLayout::kSlabs,
          batch_coordinate(params.key, block.batch, params, plan.inner_batch));
  }

  // Waits until all consumers are done with what the next of `stages` tiles held before: at a named
  // barrier, the first of which is `named`, or at an mbarrier.
  __device__ __forceinline__ void wait_released(int named, int stages) const {
    if (copied >= stages) ptx::bar_sync(named + copied % stages, Config::kReleaseThreads);
  }
  template <int kStages>
  __device__ __forceinline__ void wait_released(const uint64_t (&empty)[kStages]) const {
    ptx::mbarrier_wait(ptx::shared_address(&empty[copied % kStages]), copied / kStages % 2 ^ 1);
  }

  __device__ __forceinline__ void wait_queries_released() const {
    if constexpr (Config::kQueryArrivals == 0) {
      wait_released(Config::kQueryReleased, Config::kStages);
    } else {
      wait_released(shared.query_empty);
    }
  }
  __device__ __forceinline__ void wait_douts_released() const {
    if constexpr (Config::kDoutArrivals == 0) {
      wait_released(Config::kDoutReleased, Config::kDoutStages);
    } else {
      wait_released(shared.dout_empty);
    }
  }

  // All slabs of a tile of queries or output gradients, whose stage is free. Of a pair, each copies
  // half of the rows to both, when both stages are free: this thread has the other's word for it at
  // `open`.
  template <typename Layout>
  __device__ __forceinline__ void copy_rows(uint32_t target, const CUtensorMap* map,
                                            uint32_t barrier, const uint64_t& open, int stages,
                                            int row, int head, const BatchCoordinate& batch) const {
    if constexpr (Config::kPaired) {
      constexpr int kHalf = Config::kRows / 2;
      const uint32_t opened = ptx::shared_address(&open);
      ptx::mbarrier_arrive_cluster_if(true, ptx::mapa(opened, rank ^ 1));
      ptx::mbarrier_wait_cluster(opened, copied / stages % 2);
#pragma unroll
      for (int slab = 0; slab < Layout::kSlabs; ++slab) {
        ptx::tma_load_5d_multicast(target + slab * Layout::kSlabBytes + rank * kHalf * 128, map,
                                   barrier, ptx::kEvictLast, 3, 64 * slab, row + rank * kHalf, head,
                                   batch.inner, batch.outer);
      }
    } else {
      copy_tile<Layout>(target, map, barrier, ptx::kEvictLast, row, head, batch);
    }
  }

  // Queries `row`.. of a head with their lse. state: where that is. flags: of them, with intervals.
  __device__ __forceinline__ void copy_query_rows(const BwdBlock<Config>& block, int head, int row,
                                                  int64_t state, uint32_t flags) const {
    using QueryLayout = typename Config::QueryLayout;
    constexpr int kStateBytes = 4 * Config::kRows;
    float slope = 0.0f;
    if constexpr (Config::kIntervals) {
      if (block.slopes != nullptr) slope = __ldg(block.slopes + head);
    }
    wait_queries_released();
    if (lane_id() == 0) {
      const int stage = copied % Config::kStages;
      const uint32_t barrier = ptx::shared_address(&shared.query_full[stage]);
      if constexpr (Config::kIntervals) {
        constexpr int kRecordBytes = sizeof shared.records[0];
        shared.steps[stage] = {flags, slope};
        if constexpr (Config::kDense) shared.dense_steps[stage] = {head, row};
        ptx::mbarrier_arrive_expect_tx(barrier, QueryLayout::kBytes + kStateBytes + kRecordBytes);
        ptx::bulk_load(ptx::shared_address(shared.records[stage]), block.mask.row_records + row,
                       kRecordBytes, barrier);
      } else {
        ptx::mbarrier_arrive_expect_tx(barrier, QueryLayout::kBytes + kStateBytes);
      }
      copy_rows<QueryLayout>(tiles + Config::kQueryOffset + stage * QueryLayout::kBytes,
                             &plan.query, barrier, shared.query_open[stage], Config::kStages, row,
                             head,
                             batch_coordinate(params.query, block.batch, params, plan.inner_batch));
      ptx::bulk_load(ptx::shared_address(shared.row_lse[stage]), params.row_lse + state,
                     kStateBytes, barrier);
    }
  }

  // Their output gradients with their delta.
  __device__ __forceinline__ void copy_dout_rows(const BwdBlock<Config>& block, int head, int row,
                                                 int64_t state) const {
    using DoutLayout = typename Config::DoutLayout;
    constexpr int kStateBytes = 4 * Config::kRows;
    wait_douts_released();
    if (lane_id() == 0) {
      const int stage = copied % Config::kDoutStages;
      const uint32_t barrier = ptx::shared_address(&shared.dout_full[stage]);
      ptx::mbarrier_arrive_expect_tx(barrier, DoutLayout::kBytes + kStateBytes);
      copy_rows<DoutLayout>(tiles + Config::kDoutOffset + stage * DoutLayout::kBytes, &plan.dout,
                            barrier, shared.dout_open[stage], Config::kDoutStages, row, head,
                            {block.batch, 0});
      ptx::bulk_load(ptx::shared_address(shared.row_delta[stage]), params.row_delta + state,
                     kStateBytes, barrier);
    }
  }

  // Both, in the order in which a step's places become free: with as many stages, output gradients
  // are given back in the middle of the step at whose end the queries are.
  __device__ __forceinline__ void copy_queries(const BwdBlock<Config>& block, int head, int row,
                                               uint32_t flags = 0) {
    constexpr bool kDoutsFirst = Config::kIntervals && Config::kDoutStages == Config::kStages;
    const int64_t state = (int64_t{block.batch} * params.heads + head) * plan.padded_rows + row;
    if (kDoutsFirst) copy_dout_rows(block, head, row, state);
    copy_query_rows(block, head, row, state, flags);
    if (!kDoutsFirst) copy_dout_rows(block, head, row, state);
    ++copied;
  }

  // All tiles of a block.
  __device__ __forceinline__ void copy_all(const BwdBlock<Config>& block) {
    [[maybe_unused]] bool first = true;
#pragma unroll 1
    for (int head = block.first_head; head < block.first_head + block.query_heads; ++head) {
      // The first queries do not wait for the block before to give its keys back.
      if constexpr (Config::kFinishes) {
        int tile = block.start();
#pragma unroll 1
        do {
          copy_queries(block, head, tile * Config::kRows);
          // There is no register to note it in.
          const bool is_first = head == block.first_head && tile == block.start();
          if (is_first && lane_id() == 0) copy_keys(block);
          tile = block.after(tile);
        } while (tile != block.start());
      } else {
#pragma unroll 1
        for (int tile = block.first_tile; tile < block.first_tile + block.tiles; ++tile) {
          copy_queries(block, head, tile * Config::kRows);
          if (first && lane_id() == 0) copy_keys(block);
          first = false;
        }
      }
    }
  }

  // With intervals: all tiles of a block. Each lane finds the flags of one of 32 tiles, beforehand:
  // nothing is looked up between the release of a stage and the next copy to it.
  __device__ __forceinline__ void copy_intervals(BwdBlock<Config>& block) {
#pragma unroll 1
    for (int head = block.first_head; head < block.first_head + block.query_heads; ++head) {
#pragma unroll 1
      for (int base = 0; base < block.tiles; base += 32) {
        const int own = base + lane_id();
        const bool may_be_clean = params.scale.first == 1.0f;
        const uint32_t flags =
            own < block.tiles ? step_flags(block, block.first_tile + own, may_be_clean) : 0;
#pragma unroll 1
        for (uint32_t left = __ballot_sync(0xffffffffu, flags != 0); left != 0; left &= left - 1) {
          const int lane = __ffs(static_cast<int>(left)) - 1;
          copy_queries(block, head, (block.first_tile + base + lane) * Config::kRows,
                       __shfl_sync(0xffffffffu, flags, lane));
          // The first queries do not wait for the block before to give its keys back.
          if (lane_id() == 0 && !block.copied) {
            copy_keys(block);
            block.copied = true;
          }
        }
      }
    }
  }

  // With intervals: how many steps there are.
  __device__ __forceinline__ void count_steps(BwdBlock<Config>& block) const {
    int met = 0;
#pragma unroll 1
    for (int i = lane_id(); i < block.tiles; i += 32) met += block.meets(block.first_tile + i);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) met += __shfl_xor_sync(0xffffffffu, met, step);
    __syncwarp();
    if (lane_id() == 0) {
      block.steps = block.query_heads * met;
      if (met == 0) block.tiles = 0;
    }
    __syncwarp();
  }

  __device__ __forceinline__ BwdBlock<Config>& empty_slot(
      const RingIndex<BwdShared<Config>::kBlockSlots>& slots) const {
    ptx::mbarrier_wait(ptx::shared_address(&shared.block_empty[slots.stage()]), slots.parity() ^ 1);
    return shared.blocks[slots.stage()];
  }

  // The next id that nobody has taken. Of a pair, the first takes it and tells the other one, which
  // says when it has heard it.
  __device__ __forceinline__ int take() {
    int id = 0;
    if constexpr (!Config::kPaired) {
      if (lane_id() == 0) id = ptx::atom_acquire_add(params.queue, 1);
    } else {
      if (lane_id() == 0) {
        const uint32_t told = ptx::shared_address(shared.taken);
        const uint32_t full = ptx::shared_address(&shared.taken_full);
        const uint32_t empty = ptx::shared_address(&shared.taken_empty);
        constexpr int kBytes = sizeof shared.taken;
        if (rank == 0) {
          ptx::mbarrier_wait_cluster(empty, (taken + 1) % 2);
          id = ptx::atom_acquire_add(params.queue, 1);
          shared.taken[0] = id;
          ptx::fence_proxy_async_shared();
          ptx::bulk_copy_cluster(ptx::mapa(told, 1), told, kBytes, ptx::mapa(full, 1));
        } else {
          ptx::mbarrier_arrive_expect_tx(full, kBytes);
          ptx::mbarrier_wait(full, taken % 2);
          id = shared.taken[0];
          // Not before the number is here: this arrival orders no accesses.
          ptx::mbarrier_arrive_cluster_if(id >= 0, ptx::mapa(empty, 0));
        }
      }
      ++taken;
    }
    return __shfl_sync(0xffffffffu, id, 0);
  }

  // SectionOrder::id_of for this thread block, of the round that begins with `first_id`: without a
  // counter of rounds and a division, for which there are no registers.
  __device__ __forceinline__ int group() const {
    return Config::kPaired ? blockIdx.x / 2 : blockIdx.x;
  }
  __device__ __forceinline__ int id_of_round(int first_id) const {
    const SectionOrder& order = plan.order;
    const int place =
        plan.groups.remainder(group() + order.section_ids.divide(first_id) * order.turn);
    const bool back = order.reverses && plan.groups.divide(first_id) % 2 == 1;
    return first_id + (back ? static_cast<int>(plan.groups.divisor) - 1 - place : place);
  }

  __device__ __forceinline__ void run() {
    RingIndex<BwdShared<Config>::kBlockSlots> slots;
    // The next id, or the first of the round that it is in.
    int next = kMayQueue ? group() : 0;
    if constexpr (Config::kIntervals) wait_for_work_order();
#pragma unroll 1
    for (;; next += plan.groups.divisor) {
      // Before a block of work is taken: others may wait for it.
      BwdBlock<Config>& block = empty_slot(slots);
      if (kMayQueue && (Config::kIntervals || plan.queued)) next = take();
      if (next >= plan.order.ids) break;
      const int id = kMayQueue ? next : id_of_round(next);
      if (id >= plan.order.ids) continue;
      bool made = false;
      if (lane_id() == 0) made = make_block(params, plan, id, rank, block);
      __syncwarp();
      if (!__any_sync(0xffffffffu, made)) continue;
      if constexpr (Config::kIntervals) {
        if (lane_id() == 0) {
          block.slot = slots;
          block.key_copies = key_ring.count();
        }
        count_steps(block);
      }
      if (lane_id() == 0) {
        ptx::mbarrier_arrive(ptx::shared_address(&shared.block_full[slots.stage()]));
        if constexpr (Config::kKeyStages == 1) fetch_keys(block);
      }
      slots.next();
      if (block.tiles == 0) continue;
      if constexpr (Config::kIntervals) {
        copy_intervals(block);
      } else {
        copy_all(block);
      }
    }
    BwdBlock<Config>& end = empty_slot(slots);
    if (lane_id() == 0) {
      end.tiles = -1;
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_full[slots.stage()]));
    }
    // No arrival stays without its partner.
    if constexpr (Config::kQueryArrivals == 0) {
      for (int stage = 0; stage < min(copied, Config::kStages); ++stage) {
        ptx::bar_sync(Config::kQueryReleased + stage, Config::kReleaseThreads);
      }
    }
    if constexpr (Config::kDoutArrivals == 0) {
      for (int stage = 0; stage < min(copied, Config::kDoutStages); ++stage) {
        ptx::bar_sync(Config::kDoutReleased + stage, Config::kReleaseThreads);
      }
    }
  }
};

}  // namespace jax_flash::sm90
