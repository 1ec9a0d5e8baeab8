// The roles of the producer warpgroup, one warp each: planner, producer, storer.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "sm90/batch_coordinate.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_shared.cuh"
#include "sm90/work_order.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// The planner warp: finds this thread block's work, and finishes rows that see no keys.
template <typename Config>
struct FwdPlanner {
  using Shared = FwdShared<Config>;
  const MhaFwdParams& params;
  const FwdPlan& plan;
  Shared& shared;

  // Outputs 0 and lse -inf for the rows of a block that sees no keys, in the place at.batch. Of a
  // part, outputs of such rows do not count.
  __device__ __forceinline__ void store_empty(const BlockCoordinate& at, int first_row,
                                              int rows) const {
    const int chunks = params.head_dim_v * sizeof(typename Config::Out) / sizeof(uint4);
    const int first_head = at.head << plan.pack_shift;
    const int heads = (1 << plan.pack_shift) - 1;
    const int first = max(0, -first_row);
#pragma unroll 1
    for (int r = first + lane_id(); r < rows; r += 32) {
      const int64_t head =
          int64_t{at.batch} * params.heads + first_head + ((first_row + r) & heads);
      params.lse[head * params.query_length + ((first_row + r) >> plan.pack_shift)] =
          kMinusInfinity;
    }
    if (plan.parts.divisor > 1) return;
#pragma unroll 1
    for (int r = first; r < rows; ++r) {
      const int position = (first_row + r) >> plan.pack_shift;
      const int head = first_head + ((first_row + r) & heads);
      const int64_t row = int64_t{at.batch} * params.query_length + position;
      uint4* const out = reinterpret_cast<uint4*>(static_cast<typename Config::Out*>(params.out) +
                                                  (row * params.heads + head) * params.head_dim_v);
      for (int chunk = lane_id(); chunk < chunks; chunk += 32) out[chunk] = make_uint4(0, 0, 0, 0);
    }
  }

  // Waits until there is room for a block and takes the next from the queue. The first one of each
  // thread block is none of those.
  __device__ __forceinline__ int next_id(const RingIndex<Shared::kBlockSlots>& ring,
                                         bool first) const {
    ptx::mbarrier_wait(ptx::shared_address(&shared.block_empty[ring.stage()]), ring.parity() ^ 1);
    int id = blockIdx.x;
    if (lane_id() == 0 && !first) id = gridDim.x + take_work(params);
    return __shfl_sync(0xffffffffu, id, 0);
  }

  // With intervals: who is about to finish a block takes the next of the list.
  __device__ __forceinline__ void take_blocks(RingIndex<Shared::kBlockSlots>& ring) const {
    wait_for_work_order();
    const int most = most_row_blocks(params);
    const int ids = plan.order.ids_of(most);
    int taken = -1;  // blocks at work before the next; -1: none was looked at
    while (true) {
      if (taken > 0) ptx::mbarrier_wait(ptx::shared_address(&shared.block_wanted), (taken - 1) % 2);
      const int id = next_id(ring, taken < 0);
      if (id >= ids) break;
      taken = max(taken, 0);
      const SectionOrder::Place place = plan.order.place_of(id, most);
      const int batch = plan.head_groups.divide(place.head);
      const int head = place.head - batch * static_cast<int>(plan.head_groups.divisor);
      const RowBlock rows = row_block_at(params, batch, place.block, most);
      if (rows.rows == 0) continue;
      FwdBlock<Config>& block = shared.blocks[ring.stage()];
      look_at_rows(params, rows, batch, block);
      bool sees_keys = false;
      if (lane_id() == 0) {
        sees_keys = make_block(params, plan, {0, head, batch}, batch, 0, block);
        if (sees_keys) {
          ptx::mbarrier_arrive(ptx::shared_address(&shared.block_full[ring.stage()]));
        }
      }
      if (__any_sync(0xffffffffu, sees_keys)) {
        ring.next();
        ++taken;
      } else {
        store_empty({0, head, batch}, rows.first, rows.rows);
      }
    }
  }

  __device__ __forceinline__ void run() {
    RingIndex<Shared::kBlockSlots> ring;
    if constexpr (Config::kIntervals) {
      take_blocks(ring);
    } else {
      follow_order(ring);
    }
    ptx::mbarrier_wait(ptx::shared_address(&shared.block_empty[ring.stage()]), ring.parity() ^ 1);
    if (lane_id() == 0) {
      shared.blocks[ring.stage()].tiles = -1;
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_full[ring.stage()]));
    }
  }

  // Without intervals: ids in rounds of one for each thread block, every other round in reverse.
  // With the longest blocks first that evens out the sums.
  __device__ __forceinline__ void follow_order(RingIndex<Shared::kBlockSlots>& ring) const {
    // A group shares the keys of a block.
    const int groups = gridDim.x / plan.splits;
    const int group = blockIdx.x / plan.splits;
    const int rank = blockIdx.x - group * plan.splits;
#pragma unroll 1
    for (int round = 0; round * groups < plan.order.ids; ++round) {
      const int id = plan.order.id_of(round, group, groups);
      if (id >= plan.order.ids) continue;
      const BlockCoordinate at = block_at<Config>(params, plan, id);
      if (at.batch < 0) continue;
      const int place = at.batch;
      const int batch = plan.parts.divide(place);
      const int share = rank + place - batch * static_cast<int>(plan.parts.divisor);
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_empty[ring.stage()]), ring.parity() ^ 1);
      bool sees_keys = false;
      if (lane_id() == 0) {
        sees_keys = make_block(params, plan, {at.row_block, at.head, batch}, place, share,
                               shared.blocks[ring.stage()]);
        if (sees_keys) {
          ptx::mbarrier_arrive(ptx::shared_address(&shared.block_full[ring.stage()]));
        }
      }
      if (__any_sync(0xffffffffu, sees_keys)) {
        ring.next();
      } else if (rank == 0) {
        const int first_row = at.row_block * Config::kRows - plan.front;
        const int rows = (params.query_length << plan.pack_shift) - first_row;
        store_empty(at, first_row, min(Config::kRows, rows));
      }
    }
  }
};

// The producer warp: copies tiles.
template <typename Config>
struct FwdProducer {
  using Shared = FwdShared<Config>;
  const MhaFwdParams& params;
  const FwdPlan& plan;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage
  RingIndex<Config::kKeyStages> key_ring;
  RingIndex<Config::kValueStages> value_ring;
  RingIndex<Config::kQueryStages> query_ring;
  RingIndex<Shared::kBlockSlots> block_ring;

  // The lane that issues copies. Asked again each time: registers are few here.
  static __device__ __forceinline__ bool elected() { return lane_id() == 0; }

  // All slabs of one tile of keys or values.
  template <typename Layout>
  __device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap* map,
                                            const TensorView& view, uint32_t barrier, int row,
                                            int head, int flat_batch) const {
    const BatchCoordinate batch = batch_coordinate(view, flat_batch, params, plan.inner_batch);
    ptx::mbarrier_arrive_expect_tx(barrier, Layout::kBytes);
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::tma_load_5d(target + slab * Layout::kSlabBytes, map, barrier, ptx::kEvictLast, 64 * slab,
                       row, head, batch.inner, batch.outer);
    }
  }

  __device__ __forceinline__ void copy_keys(int first_key, int tile, int head, int batch) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_empty[key_ring.stage()]),
                       key_ring.parity() ^ 1);
    if (elected()) {
      copy_tile<typename Config::KeyLayout>(
          tiles + Config::kKeyOffset + key_ring.stage() * Config::KeyLayout::kBytes, &plan.key,
          params.key, ptx::shared_address(&shared.key_full[key_ring.stage()]),
          first_key + tile * Config::kKeys, head, batch);
    }
    key_ring.next();
  }

  __device__ __forceinline__ void copy_values(int first_key, int tile, int head, int batch) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_empty[value_ring.stage()]),
                       value_ring.parity() ^ 1);
    if (elected()) {
      copy_tile<typename Config::ValueLayout>(
          tiles + Config::kValueOffset + value_ring.stage() * Config::ValueLayout::kBytes,
          &plan.value, params.value, ptx::shared_address(&shared.value_full[value_ring.stage()]),
          first_key + tile * Config::kKeys, head, batch);
    }
    value_ring.next();
  }

  // Of which a block's queries and keys are.
  __device__ __forceinline__ int sequence_of(const FwdBlock<Config>& block) const {
    return Config::kIntervals ? block.place : plan.parts.divide(block.place);
  }

  // Also tells the consumers that there is a block.
  __device__ __forceinline__ void copy_queries(const FwdBlock<Config>& block) {
    using Layout = typename Config::QueryLayout;
#pragma unroll 1
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.query_empty[query_ring.stage()][w]),
                         query_ring.parity() ^ 1);
      if (elected()) {
        const uint32_t barrier = ptx::shared_address(&shared.query_full[query_ring.stage()][w]);
        const uint32_t target =
            tiles + query_ring.stage() * Config::kQueryStageBytes + w * Layout::kBytes;
        const int position = (block.first_row + 64 * w) >> plan.pack_shift;
        const BatchCoordinate batch =
            batch_coordinate(params.query, sequence_of(block), params, plan.inner_batch);
        if (block.tiles <= 0) {
          ptx::mbarrier_arrive(barrier);
          continue;
        }
        ptx::mbarrier_arrive_expect_tx(barrier, Layout::kBytes);
#pragma unroll
        for (int slab = 0; slab < Layout::kSlabs; ++slab) {
          ptx::tma_load_5d(target + slab * Layout::kSlabBytes, &plan.query, barrier,
                           ptx::kEvictFirst, 64 * slab, block.head, position, batch.inner,
                           batch.outer);
        }
      }
    }
    query_ring.next();
  }

  // Waits for the planner's next block.
  __device__ __forceinline__ const FwdBlock<Config>& next_block() {
    const int slot = block_ring.stage();
    ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slot]), block_ring.parity());
    block_ring.next();
    return shared.blocks[slot];
  }

  // Copies run a tile ahead of the block: the values of a block's last tile are asked for after the
  // first keys of the next. With two query stages, the next block's queries are asked for early,
  // though not before the copies that are waited for sooner.
  //
  // With intervals the next block is taken late, so that the last blocks of all thread blocks end
  // at about the same time: the planner, which takes about as long as one and a half tiles, begins
  // kTilesAfter tiles before the last, when consumers have two more to do.
  __device__ __forceinline__ void run() {
    constexpr bool kEarly = Config::kQueryStages > 1;
    constexpr int kTilesBefore = 2;
    constexpr int kTilesAfter = 2;
    bool pending = false;                   // there is a block at work
    int early_tile = 0;                     // after which the next block's queries are asked for
    [[maybe_unused]] int wanted_tile = -1;  // and after which the planner is asked for it
    int tile = 0;                           // whose keys were copied last
    int lowest = 0;
    int head = 0;
    int batch = 0;
    int first_key = 0;
    [[maybe_unused]] uint64_t hidden = 0;
    [[maybe_unused]] int hidden_shift = 0;
    const FwdBlock<Config>* next = nullptr;
    while (true) {
#pragma unroll 1
      while (true) {
        if constexpr (Config::kIntervals) {
          if (tile == wanted_tile && elected()) {
            ptx::mbarrier_arrive(ptx::shared_address(&shared.block_wanted));
          }
        }
        if (tile == early_tile) {
          next = &next_block();
          if (kEarly) copy_queries(*next);
        }
        if (tile == lowest) break;
        const int before = tile;
        if constexpr (Config::kDense) {
          tile = next_seen<Config::kKeys>(hidden, hidden_shift, lowest, tile);
        } else {
          --tile;
        }
        copy_keys(first_key, tile, head, batch);
        copy_values(first_key, before, head, batch);
      }
      const int next_head = params.group_divisor.divide(next->head);
      if (next->tiles > 0)
        copy_keys(next->key_of(0), next->last_tile, next_head, sequence_of(*next));
      if (pending) copy_values(first_key, tile, head, batch);
      if (!kEarly) copy_queries(*next);
      if (next->tiles < 0) break;
      pending = next->tiles > 0;
      tile = next->last_tile;
      lowest = pending ? tile - next->tiles + 1 : tile;
      if constexpr (Config::kIntervals && !Config::kDense) {
        early_tile = lowest;
        wanted_tile = min(tile, lowest + kTilesAfter);
      } else {
        early_tile = max(lowest, tile - kTilesBefore);
      }
      if constexpr (Config::kDense) {
        wanted_tile = tile;
        hidden = next->hidden;
        hidden_shift = next->hidden_shift;
        early_tile = tile;
#pragma unroll 1
        for (int i = 0; i < kTilesBefore && early_tile > lowest; ++i) {
          early_tile = next_seen<Config::kKeys>(hidden, hidden_shift, lowest, early_tile);
        }
      }
      head = next_head;
      batch = sequence_of(*next);
      first_key = next->key_of(0);
      // By all lanes, which have all read it: what racecheck understands.
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[next - shared.blocks]));
    }
  }
};

// The storer warp: writes lse, and outputs where they are staged in shared memory.
template <typename Config>
struct FwdStorer {
  using Shared = FwdShared<Config>;
  const MhaFwdParams& params;
  const FwdPlan& plan;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage

  __device__ __forceinline__ void store_lse(const FwdBlock<Config>& block, int first,
                                            const float2* rows) const {
    const int heads = (1 << plan.pack_shift) - 1;
#pragma unroll 1
    for (int r = first + lane_id(); r < first + 64; r += 32) {
      const int row = block.first_row + r;
      const int position = row >> plan.pack_shift;
      if (position < 0 || position >= params.query_length) continue;
      if (Config::kIntervals && r >= block.rows) continue;  // of another block
      const float2 state = rows[r];
      const float m = state.x == kMinusInfinity ? 0.0f : state.x;
      block.lse[int64_t{row & heads} * params.query_length + position] =
          r >= block.rows ? kMinusInfinity : natural_lse(m, state.y, params.scale);
    }
  }

  // The outputs of one warpgroup.
  __device__ __forceinline__ void store_out(const FwdBlock<Config>& block, int w,
                                            uint32_t tile) const {
    if constexpr (Config::kIntervals) {
      // A copy of whole tiles writes no rows past the last one.
      const int rows = block.rows - 64 * w;
      if (rows < 64 && block.first_row + block.rows < params.query_length) {
        store_rows(block, w, tile, rows);
        return;
      }
    }
    if (lane_id() == 0) store_tile(block, w, tile);
  }

  // The first `rows` rows of a warpgroup, if any, after which there are those of another block.
  __device__ __forceinline__ void store_rows(const FwdBlock<Config>& block, int w, uint32_t tile,
                                             int rows) const {
    using Layout = typename Config::OutLayout;
    constexpr int kChunks = Config::kHeadDimV / 8;  // of a row, a power of two
    const int64_t stride = int64_t{params.heads} * params.head_dim_v;
    typename Config::Out* const target = block.out + (block.first_row + 64 * w) * stride;
#pragma unroll 4
    for (int i = lane_id(); i < rows * kChunks; i += 32) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      if (8 * chunk >= params.head_dim_v) continue;
      *reinterpret_cast<uint4*>(target + row * stride + 8 * chunk) =
          ptx::ld_shared_v4(tile + Layout::offset(row, chunk));
    }
  }

  __device__ __forceinline__ void store_tile(const FwdBlock<Config>& block, int w,
                                             uint32_t tile) const {
    using Layout = typename Config::OutLayout;
    const int position = (block.first_row + 64 * w) >> plan.pack_shift;
    // Padding before the first row; a tensor store may not start at a negative coordinate.
    if (position < 0) return;
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::tma_store_5d(&plan.out, tile + slab * Layout::kSlabBytes, 64 * slab, block.head,
                        position, block.place, 0);
    }
    ptx::tma_store_commit_group();
  }

  __device__ __forceinline__ void run() {
    RingIndex<Shared::kBlockSlots> block_ring;
    RingIndex<1> ring;
    while (true) {
      const int slot = block_ring.stage();
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slot]), block_ring.parity());
      const FwdBlock<Config>& block = shared.blocks[slot];
      if (block.tiles < 0) break;
#pragma unroll 1
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        ptx::mbarrier_wait(ptx::shared_address(&shared.rows_full[w]), ring.parity());
        if constexpr (Config::kStaged) {
          store_out(block, w, tiles + Config::kOutOffset + w * Config::OutLayout::kBytes);
        }
        store_lse(block, 64 * w, shared.rows);
        if (Config::kStaged && lane_id() == 0) ptx::tma_store_wait_read();
        ptx::mbarrier_arrive(ptx::shared_address(&shared.rows_empty[w]));
      }
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slot]));
      block_ring.next();
      ring.next();
    }
  }
};

}  // namespace jax_flash::sm90
