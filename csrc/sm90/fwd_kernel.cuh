// FlashAttention forward for Hopper (sm_90a): TMA, wgmma, warp specialisation.
//
// One producer warp fills rings of key and value tiles; each consumer warpgroup owns 64 queries.
// A consumer's step issues S(i) = Q K(i)^T and O += P(i-1) V(i-1) together and computes the softmax
// of S(i) while the second product runs; consumers take turns at issuing. Steps of one block of
// work follow those of the block before without a gap: the last product of a block is issued with
// the first scores of the next. docs/design/fwd_sm90.md has limits, barriers and measurements.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_combine.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_softmax.cuh"
#include "tile/copy.cuh"

namespace jax_flash::sm90 {

// A position in a ring of kStages buffers, and the parity of its current round. One register where
// the number of stages is a power of two, else two.
template <int kStages, bool kPowerOfTwo = (kStages & (kStages - 1)) == 0>
class RingIndex {
 public:
  __device__ __forceinline__ int stage() const { return count_ % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return count_ / kStages % 2; }
  __device__ __forceinline__ void next() { ++count_; }

 private:
  uint32_t count_ = 0;
};

template <int kStages>
class RingIndex<kStages, false> {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void next() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// What follows the tiles in shared memory. "full" barriers: bytes have arrived. "empty": all
// consumers are done.
template <typename Config>
struct FwdShared {
  // A block is read until its outputs are stored, when the next one is already at work.
  static constexpr int kBlockSlots = 4;
  static_assert(Config::kQueryStages + 2 <= kBlockSlots);

  uint64_t query_full[Config::kQueryStages][Config::kWarpgroups];
  uint64_t query_empty[Config::kQueryStages][Config::kWarpgroups];
  uint64_t rows_full[Config::kWarpgroups];  // finished rows, and their outputs where these are staged
  uint64_t rows_empty[Config::kWarpgroups];
  uint64_t key_full[Config::kKeyStages];
  uint64_t key_empty[Config::kKeyStages];
  uint64_t value_full[Config::kValueStages];
  uint64_t value_empty[Config::kValueStages];
  uint64_t block_full[kBlockSlots];
  uint64_t block_empty[kBlockSlots];
  FwdBlock<Config> blocks[kBlockSlots];
  float2 rows[Config::kRows];  // reference point and sum of finished rows
};

template <typename Config>
inline constexpr int kFwdSharedBytes = Config::kStateOffset + sizeof(FwdShared<Config>);

// Coordinates of flat batch index `batch` in the two batch dims of an operand's tensor map.
struct BatchCoordinate {
  int inner;
  int outer;
};
__device__ __forceinline__ BatchCoordinate batch_coordinate(const TensorView& view, int batch,
                                                            const MhaFwdParams& params,
                                                            const FwdPlan& plan) {
  int inner = batch;
  int outer = 0;
  if (params.batch_dims == 2) {
    outer = plan.inner_batch.divide(batch);
    inner = batch - outer * static_cast<int>(plan.inner_batch.divisor);
  }
  // A stride of 0 shares the operand along the dim, which the map then lacks.
  const int last = params.batch_dims - 1;
  return {view.batch_strides[last] == 0 ? 0 : inner, view.batch_strides[0] == 0 ? 0 : outer};
}

// The planner warp: finds this thread block's work, and finishes rows that see no keys.
template <typename Config>
struct FwdPlanner {
  using Shared = FwdShared<Config>;
  const MhaFwdParams& params;
  const FwdPlan& plan;
  Shared& shared;

  // Outputs 0 and lse -inf for the rows of a block that sees no keys.
  __device__ __forceinline__ void store_empty(const BlockCoordinate& at) const {
    const int first_row = at.row_block * Config::kRows;
    const int rows = min(Config::kRows, (params.query_length << plan.pack_shift) - first_row);
    const int chunks = params.head_dim_v / 8;
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const int position = (first_row + r) >> plan.pack_shift;
      const int head =
          (at.head << plan.pack_shift) + ((first_row + r) & ((1 << plan.pack_shift) - 1));
      const int64_t row = int64_t{at.batch} * params.query_length + position;
      uint4* const out = reinterpret_cast<uint4*>(
          static_cast<Element16*>(params.out) + (row * params.heads + head) * params.head_dim_v);
      for (int chunk = lane_id(); chunk < chunks; chunk += 32) out[chunk] = make_uint4(0, 0, 0, 0);
      if (lane_id() == 0) {
        params.lse[(int64_t{at.batch} * params.heads + head) * params.query_length + position] =
            kMinusInfinity;
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int groups = gridDim.x / plan.splits;
    const int group = blockIdx.x / plan.splits;
    RingIndex<Shared::kBlockSlots> ring;
    // Ids in rounds of one for each thread block, every other round in reverse: with the longest
    // blocks first that evens out the sums.
#pragma unroll 1
    for (int round = 0; round * groups < plan.ids; ++round) {
      const int id = round * groups + (round % 2 == 0 ? group : groups - 1 - group);
      if (id >= plan.ids) continue;
      const BlockCoordinate at = block_at(plan, id);
      if (at.batch < 0) continue;
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_empty[ring.stage()]), ring.parity() ^ 1);
      bool sees_keys = false;
      if (lane_id() == 0) {
        sees_keys = make_block(params, plan, at, blockIdx.x - group * plan.splits,
                               shared.blocks[ring.stage()]);
        if (sees_keys) {
          ptx::mbarrier_arrive(ptx::shared_address(&shared.block_full[ring.stage()]));
        }
      }
      if (__any_sync(0xffffffffu, sees_keys)) {
        ring.next();
      } else if (plan.splits == 1 || blockIdx.x == group * plan.splits) {
        store_empty(at);
      }
    }
    ptx::mbarrier_wait(ptx::shared_address(&shared.block_empty[ring.stage()]), ring.parity() ^ 1);
    if (lane_id() == 0) {
      shared.blocks[ring.stage()].tiles = -1;
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_full[ring.stage()]));
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
  template <int kRows, int kWidth>
  __device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap* map,
                                            const TensorView& view, uint32_t barrier, int row,
                                            int head, int flat_batch) const {
    using Layout = SlabLayout<kRows, kWidth>;
    const BatchCoordinate batch = batch_coordinate(view, flat_batch, params, plan);
    ptx::mbarrier_arrive_expect_tx(barrier, Layout::kBytes);
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::tma_load_5d(target + slab * Layout::kSlabBytes, map, barrier, ptx::kEvictLast, 64 * slab,
                       row, head, batch.inner, batch.outer);
    }
  }

  __device__ __forceinline__ void copy_keys(int tile, int head, int batch) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_empty[key_ring.stage()]),
                       key_ring.parity() ^ 1);
    if (elected()) {
      copy_tile<Config::kKeys, Config::kHeadDim>(
          tiles + Config::kKeyOffset + key_ring.stage() * Config::KeyLayout::kBytes, &plan.key,
          params.key, ptx::shared_address(&shared.key_full[key_ring.stage()]), tile * Config::kKeys, head, batch);
    }
    key_ring.next();
  }

  __device__ __forceinline__ void copy_values(int tile, int head, int batch) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_empty[value_ring.stage()]),
                       value_ring.parity() ^ 1);
    if (elected()) {
      copy_tile<Config::kKeys, Config::kHeadDimV>(
          tiles + Config::kValueOffset + value_ring.stage() * Config::ValueLayout::kBytes,
          &plan.value, params.value, ptx::shared_address(&shared.value_full[value_ring.stage()]),
          tile * Config::kKeys, head, batch);
    }
    value_ring.next();
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
        const BatchCoordinate batch = batch_coordinate(params.query, block.batch, params, plan);
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
  __device__ __forceinline__ void run() {
    constexpr bool kEarly = Config::kQueryStages > 1;
    constexpr int kTilesBefore = 2;
    bool pending = false;  // there is a block at work
    int early_tile = 0;    // after which the next block's queries are asked for
    int tile = 0;          // whose keys were copied last
    int lowest = 0;
    int head = 0;
    int batch = 0;
    const FwdBlock<Config>* next = nullptr;
    while (true) {
#pragma unroll 1
      while (true) {
        if (tile == early_tile) {
          next = &next_block();
          if (kEarly) copy_queries(*next);
        }
        if (tile == lowest) break;
        --tile;
        copy_keys(tile, head, batch);
        copy_values(tile + 1, head, batch);
      }
      const int next_head = params.group_divisor.divide(next->head);
      if (next->tiles > 0) copy_keys(next->last_tile, next_head, next->batch);
      if (pending) copy_values(tile, head, batch);
      if (!kEarly) copy_queries(*next);
      if (next->tiles < 0) break;
      pending = next->tiles > 0;
      tile = next->last_tile;
      lowest = pending ? tile - next->tiles + 1 : tile;
      early_tile = max(lowest, tile - kTilesBefore);
      head = next_head;
      batch = next->batch;
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
      if (position >= params.query_length) continue;
      const float2 state = rows[r];
      const float m = state.x == kMinusInfinity ? 0.0f : state.x;
      block.lse[int64_t{row & heads} * params.query_length + position] =
          state.y == 0.0f || r >= block.rows ? kMinusInfinity
                                             : fmaf(m, params.scale.second, logf(state.y));
    }
  }

  __device__ __forceinline__ void store_out(const FwdBlock<Config>& block, int w,
                                            uint32_t tile) const {
    using Layout = typename Config::OutLayout;
    const int position = (block.first_row + 64 * w) >> plan.pack_shift;
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::tma_store_5d(&plan.out, tile + slab * Layout::kSlabBytes, 64 * slab, block.head,
                        position, block.batch, 0);
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
        if (Config::kStaged && lane_id() == 0) {
          store_out(block, w, tiles + Config::kOutOffset + w * Config::OutLayout::kBytes);
        }
        store_lse(block, 64 * w, shared.rows);
        __syncwarp();
        if (lane_id() == 0) {
          if (Config::kStaged) ptx::tma_store_wait_read();
          ptx::mbarrier_arrive(ptx::shared_address(&shared.rows_empty[w]));
        }
      }
      if (lane_id() == 0) ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slot]));
      block_ring.next();
      ring.next();
    }
  }
};

// One consumer warpgroup.
template <typename Config>
struct FwdConsumer {
  using Element = typename Config::Element;
  using Shared = FwdShared<Config>;
  static constexpr int kScores = Config::kKeys / 2;
  static constexpr int kOuts = Config::kHeadDimV / 2;

  const MhaFwdParams& params;
  const FwdPlan& plan;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage
  int warpgroup;
  RingIndex<Config::kKeyStages> key_ring;
  RingIndex<Config::kValueStages> value_ring;
  int blocks = 0;  // before the one at work: the position in the rings of blocks and queries

  float s[kScores];
  uint32_t p[kScores / 2];
  float out[kOuts];
  RowSoftmax<Config> softmax;
  float inverse[2];      // of the sums of the block that is finished but not stored

  __device__ __forceinline__ int warp_row() const {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  }
  __device__ __forceinline__ uint32_t query_tile() const {
    return tiles + blocks % Config::kQueryStages * Config::kQueryStageBytes +
           warpgroup * Config::QueryLayout::kBytes;
  }
  __device__ __forceinline__ uint32_t key_tile() const {
    return tiles + Config::kKeyOffset + key_ring.stage() * Config::KeyLayout::kBytes;
  }
  __device__ __forceinline__ uint32_t value_tile() const {
    return tiles + Config::kValueOffset + value_ring.stage() * Config::ValueLayout::kBytes;
  }

  static __device__ __forceinline__ void warp_arrive(uint64_t& barrier) {
    if (lane_id() == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
  }

  // Turns: warpgroup w issues when all 256 threads of it and its predecessor are at barrier 1 + w.
  __device__ __forceinline__ void take_turn() const { ptx::bar_sync(1 + warpgroup, 256); }
  __device__ __forceinline__ void pass_turn() const {
    ptx::bar_arrive(warpgroup + 1 == Config::kWarpgroups ? 1 : 2 + warpgroup, 256);

  }

  // s = Q K^T
  __device__ __forceinline__ void issue_scores() {
    const uint64_t query = ptx::wgmma_descriptor(query_tile(), 0);
    const uint64_t key = ptx::wgmma_descriptor(key_tile(), 0);
#pragma unroll
    for (int k = 0; k < Config::kHeadDim / 16; ++k) {
      ptx::Wgmma<Element, Config::kKeys>::ss(
          s, query + (Config::QueryLayout::offset(0, 2 * k) >> 4),
          key + (Config::KeyLayout::offset(0, 2 * k) >> 4), k != 0);
    }
  }

  // out = P V, or out += P V
  __device__ __forceinline__ void issue_values(bool accumulate) {
    const uint64_t value =
        ptx::wgmma_descriptor(value_tile(), Config::ValueLayout::kSlabBytes);
#pragma unroll
    for (int k = 0; k < Config::kKeys / 16; ++k) {
      ptx::Wgmma<Element, Config::kHeadDimV>::rs(out, p + 4 * k, value + (16 * 128 >> 4) * k,
                                                 accumulate || k > 0);
    }
  }

  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = ptx::cvt_rn_x2<Element>(s[2 * i], s[2 * i + 1]);
  }

  __device__ __forceinline__ void scale_out(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i] *= factor[i / 2 % 2];
  }

  // Issues both products, the second one into fresh accumulators or not. `previous` is false in the
  // very first step: its second product multiplies zeros with whatever memory holds, and is dropped.
  __device__ __forceinline__ void issue(bool previous, bool fresh) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_full[key_ring.stage()]), key_ring.parity());
    take_turn();
    ptx::wgmma_fence();
    issue_scores();
    ptx::wgmma_commit_group();
    if (previous) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage()]),
                         value_ring.parity());
    }
    ptx::wgmma_fence();
    issue_values(!fresh);
    ptx::wgmma_commit_group();
    pass_turn();
  }

  __device__ __forceinline__ void release_key() {
    warp_arrive(shared.key_empty[key_ring.stage()]);
    key_ring.next();
  }
  __device__ __forceinline__ void release_value() {
    warp_arrive(shared.value_empty[value_ring.stage()]);
    value_ring.next();
  }
  __device__ __forceinline__ void release_query() {
    warp_arrive(shared.query_empty[blocks % Config::kQueryStages][warpgroup]);
  }

  // Scales and masks the scores of tile `tile` if need be, and follows their maxima.
  __device__ __forceinline__ bool prepare(const FwdBlock<Config>& block, int tile,
                                          float (&factor)[2]) {
    if (params.scale.first != 1.0f) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] *= params.scale.first;
    }
    const bool left = tile < block.full_first[warpgroup];
    if (left || tile >= block.full_end[warpgroup]) {
      const int row = block.first_row + 64 * warpgroup + warp_row() + fragment_row();
      softmax.apply_mask(s, block.mask, row, plan.pack_shift, tile * Config::kKeys, left);
    }
    return softmax.template follow_maximum<true>(s, params.scale, factor);
  }

  // One key tile. `careful`: it needs a mask or a maximum, as the first of a block does; known at
  // compile time or not.
  // Beside the first tile of a block runs the last product of the block before, whose outputs are
  // stored then. fresh: the second tile, whose product starts new accumulators.
  template <typename Careful>
  __device__ __forceinline__ void step(const FwdBlock<Config>& block, int tile, Careful careful,
                                       bool first, bool fresh) {
    const bool previous = !first || blocks > 0;
    issue(previous, fresh);
    if (first) {
      if (previous) finish_rows(blocks - 1);
      softmax.init();
    }
    ptx::wgmma_wait_group<1>();
    if (Config::kQueryStages == 1 && tile == block.last_tile - block.tiles + 1) release_query();
    float factor[2] = {1.0f, 1.0f};
    bool moved = false;
    if (careful) {
      moved = prepare(block, tile, factor);
    } else if (softmax.watching) [[unlikely]] {
      moved = softmax.template follow_maximum<false>(s, params.scale, factor);
    }
    float tile_sum[2];
    const bool left_range = softmax.exponentials(s, params.scale, tile_sum);
    ptx::wgmma_wait_group<0>();
    if (previous) release_value();
    if (first) {
      if (previous) store_out(blocks - 1);
      // Padding rows are dropped; they should not look as if they left the range.
      const int row = 64 * warpgroup + warp_row() + fragment_row();
      if (row >= block.rows) softmax.reference[0] = 0.0f;
      if (row + 8 >= block.rows) softmax.reference[1] = 0.0f;
    } else {
      if (!careful && left_range) [[unlikely]] {
        softmax.recover(s, tile_sum, factor, query_tile(), key_tile(), warp_row(), params.scale);
        moved = true;
      }
      if (!careful && (left_range || softmax.watching)) [[unlikely]] softmax.keep_watching();
      if (moved) scale_out(factor);
    }
    release_key();
    softmax.sum[0] += tile_sum[0];
    softmax.sum[1] += tile_sum[1];
    pack();
    if (first && block.value_rows < Config::kKeys) [[unlikely]] clear_values(block.value_rows);
  }

  // Zeroes the rows of the values from `rows` on: 0 * NaN would reach the output.
  __device__ __forceinline__ void clear_values(int rows) {
    using Layout = typename Config::ValueLayout;
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage()]),
                       value_ring.parity());
    const uint32_t zeros[4] = {0, 0, 0, 0};
    const int thread = threadIdx.x % 128;
    for (int i = thread; i < (Config::kKeys - rows) * 8; i += 128) {
#pragma unroll
      for (int slab = 0; slab < Layout::kSlabs; ++slab) {
        ptx::st_shared_v4(value_tile() + slab * Layout::kSlabBytes + rows * 128 + 16 * i, zeros);
      }
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(5 + warpgroup, 128);
  }

  // Normalisation of the rows of block `number`, which is finished; the storer warp gets what lse needs.
  __device__ __forceinline__ void finish_rows(int number) {
    const FwdBlock<Config>& block = shared.blocks[number % Shared::kBlockSlots];
    const int row = 64 * warpgroup + warp_row() + fragment_row();
    ptx::mbarrier_wait(ptx::shared_address(&shared.rows_empty[warpgroup]), (number + 1) % 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse[h] = softmax.finish(h);
      if (row + 8 * h >= block.rows) inverse[h] = 0.0f;
      if (lane_id() % 4 == 0) {
        shared.rows[row + 8 * h] = make_float2(softmax.reference[h], softmax.sum[h]);
      }
    }
  }

  // Two neighbouring outputs, normalised and packed. A row without keys gives 0, even if its
  // accumulators hold 0 * infinity.
  __device__ __forceinline__ uint32_t out_word(int i) const {
    const int h = i / 2 % 2;
    const uint32_t word = ptx::cvt_rn_x2<Element>(out[i] * inverse[h], out[i + 1] * inverse[h]);
    return inverse[h] == 0.0f ? 0 : word;
  }

  // Outputs of block `number`: through shared memory, from where the storer warp takes them, or
  // straight to global memory.
  __device__ __forceinline__ void store_out(int number) {
    const int slot = number % Shared::kBlockSlots;
    if constexpr (Config::kStaged) {
      stage_out();
    } else {
      store_direct(shared.blocks[slot]);
    }
    __syncwarp();
    warp_arrive(shared.rows_full[warpgroup]);
    warp_arrive(shared.block_empty[slot]);
  }

  __device__ __forceinline__ void stage_out() const {
    using Layout = typename Config::OutLayout;
    const uint32_t tile = tiles + Config::kOutOffset + warpgroup * Layout::kBytes;
    const int row = warp_row() + lane_id() % 16;
#pragma unroll
    for (int j = 0; j < Config::kHeadDimV / 8; j += 2) {
      const uint32_t words[4] = {out_word(4 * j), out_word(4 * j + 2), out_word(4 * j + 4),
                                 out_word(4 * j + 6)};
      ptx::stmatrix_x4(tile + Layout::offset(row, j + lane_id() / 16), words);
    }
    ptx::fence_proxy_async_shared();
  }

  // Straight from the accumulators: four lanes that share a row exchange words so that each holds
  // eight neighbouring columns, 16 bytes, of every 32.
  __device__ __forceinline__ void store_direct(const FwdBlock<Config>& block) const {
    const int lane = lane_id() % 4;
    const int row = block.first_row + 64 * warpgroup + warp_row() + fragment_row();
    const int heads = (1 << plan.pack_shift) - 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = (row + 8 * h) >> plan.pack_shift;
      Element16* const target =
          block.out + (int64_t{position} * params.heads + ((row + 8 * h) & heads)) *
                          params.head_dim_v + 8 * lane;
      const bool exists = position < params.query_length;
#pragma unroll
      for (int group = 0; group < Config::kHeadDimV / 32; ++group) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = out_word(16 * group + 4 * j + 2 * h);
        transpose_quad(words, lane);
        if (exists && 32 * group + 8 * lane < params.head_dim_v) {
          *reinterpret_cast<uint4*>(target + 32 * group) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  // words[j] of lane t becomes words[t] of lane j, among four lanes.
  static __device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = lane & bit;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j & bit) continue;
        const uint32_t given = upper ? words[j] : words[j + bit];
        const uint32_t taken = __shfl_xor_sync(0xffffffffu, given, bit);
        if (upper) {
          words[j] = taken;
        } else {
          words[j + bit] = taken;
        }
      }
    }
  }

  // All key tiles of a block, from the last to the first.
  __device__ __forceinline__ void run_block(const FwdBlock<Config>& block, bool& fresh) {
    int tile = block.last_tile;
    const int lowest = tile - block.tiles + 1;
    const int clean_first = block.clean_first[warpgroup];
    const int clean_end = block.clean_end[warpgroup];
    bool first = true;
    while (tile >= lowest) {
      if constexpr (!Config::kOneBody) {
#pragma unroll 1
        for (; tile < clean_end && tile >= clean_first; --tile) {
          step(block, tile, std::false_type(), false, fresh);
          fresh = false;
        }
        if (tile < lowest) break;
        step(block, tile, std::true_type(), first, fresh);
      } else {
        step(block, tile, tile >= clean_end || tile < clean_first, first, fresh);
      }
      fresh = first;
      first = false;
      --tile;
    }
  }

  __device__ __forceinline__ void run() {
    bool fresh = true;
    bool pending = false;  // the product of the last tile
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = 0;
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i] = 0.0f;
    softmax.init();
    if (warpgroup == Config::kWarpgroups - 1) pass_turn();
    while (true) {
      ptx::mbarrier_wait(
          ptx::shared_address(&shared.query_full[blocks % Config::kQueryStages][warpgroup]),
          blocks / Config::kQueryStages % 2);
      const FwdBlock<Config>& block = shared.blocks[blocks % Shared::kBlockSlots];
      if (block.tiles < 0) break;
      if (block.tiles > 0) {
        run_block(block, fresh);
        pending = true;
      }
      if (Config::kQueryStages > 1 || block.tiles == 0) release_query();
      ++blocks;
    }
    if (pending) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage()]),
                         value_ring.parity());
      ptx::wgmma_fence();
      issue_values(!fresh);
      ptx::wgmma_commit_group();
      if (plan.splits == 1) finish_rows(blocks - 1);
      ptx::wgmma_wait_group<0>();
      if (plan.splits == 1) store_out(blocks - 1);
    }
    if (warpgroup == 0) take_turn();  // the last arrival needs its partner
    if (plan.splits > 1 && blocks > 0) {
      combine_splits(params, plan, tiles, shared.blocks[0], out, softmax, warpgroup);
    }
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    mha_fwd_kernel(const __grid_constant__ MhaFwdParams params,
                   const __grid_constant__ FwdPlan plan) {
  extern __shared__ __align__(1024) unsigned char memory[];
  using Shared = FwdShared<Config>;
  Shared& shared = *reinterpret_cast<Shared*>(memory + Config::kStateOffset);
  const uint32_t tiles = ptx::shared_address(memory);
  // Uniform over the warp, and known to be.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    for (auto& stage : shared.query_full) {
      for (uint64_t& barrier : stage) ptx::mbarrier_init(ptx::shared_address(&barrier), 1);
    }
    for (auto& stage : shared.query_empty) {
      for (uint64_t& barrier : stage) {
        ptx::mbarrier_init(ptx::shared_address(&barrier), 4);
      }
    }
    const auto init = [](auto& barriers, int arrivals) {
      for (uint64_t& barrier : barriers) ptx::mbarrier_init(ptx::shared_address(&barrier), arrivals);
    };
    init(shared.key_full, 1);
    init(shared.value_full, 1);
    init(shared.key_empty, Config::kConsumerWarps);
    init(shared.value_empty, Config::kConsumerWarps);
    init(shared.rows_full, 4);
    init(shared.rows_empty, 1);
    init(shared.block_full, 1);
    init(shared.block_empty, Config::kConsumerWarps + 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == Config::kWarpgroups) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
      FwdProducer<Config> producer{params, plan, shared, tiles};
      producer.run();
    } else if (warp == 1) {
      FwdPlanner<Config> planner{params, plan, shared};
      planner.run();
    } else if (warp == 2 && plan.splits == 1) {
      FwdStorer<Config> storer{params, plan, shared, tiles};
      storer.run();
    }
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    FwdConsumer<Config> consumer{params, plan, shared, tiles, warpgroup};
    consumer.run();
  }
}

}  // namespace jax_flash::sm90
