// FlashAttention forward for Hopper (sm_90a): TMA, wgmma, warp specialisation.
//
// One producer warp fills rings of key and value tiles; each consumer warpgroup owns 64 queries.
// A consumer's step issues S(i) = Q K(i)^T and O += P(i-1) V(i-1) together and computes the softmax
// of S(i) while the second product runs; consumers take turns at issuing. Steps of one block of
// work follow those of the block before without a gap: the last product of a block is issued with
// the first scores of the next. docs/design/fwd_sm90.md has limits, barriers and measurements.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_softmax.cuh"
#include "tile/copy.cuh"

namespace jax_flash::sm90 {

// A position in a ring of kStages buffers and the parity of its current round.
template <int kStages>
struct RingIndex {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What follows the tiles in shared memory. "full" barriers: bytes have arrived. "empty": all
// consumers are done.
template <typename Config>
struct FwdShared {
  // A block is read until its outputs are stored: up to two blocks after the last use of its queries.
  static constexpr int kBlockSlots = Config::kQueryStages + 2;

  uint64_t query_full[Config::kQueryStages][Config::kWarpgroups];
  uint64_t query_empty[Config::kQueryStages][Config::kWarpgroups];
  uint64_t key_full[Config::kKeyStages];
  uint64_t key_empty[Config::kKeyStages];
  uint64_t value_full[Config::kValueStages];
  uint64_t value_empty[Config::kValueStages];
  FwdBlock<Config> blocks[kBlockSlots];
  float2 partial[Config::kRows];  // with splits: reference point in log2 and sum of each row
};

template <typename Config>
inline constexpr int kFwdSharedBytes = Config::kStateOffset + sizeof(FwdShared<Config>);

// Coordinates of flat batch index `batch` in the two batch dims of an operand's tensor map.
struct BatchCoordinate {
  int inner;
  int outer;
};
__device__ __forceinline__ BatchCoordinate batch_coordinate(const TensorView& view, int batch,
                                                            const MhaFwdParams& params) {
  int inner = batch;
  int outer = 0;
  if (params.batch_dims == 2) {
    outer = batch / params.batch_sizes[1];
    inner = batch - outer * params.batch_sizes[1];
  }
  // A stride of 0 shares the operand along the dim, which the map then lacks.
  const int last = params.batch_dims - 1;
  return {view.batch_strides[last] == 0 ? 0 : inner, view.batch_strides[0] == 0 ? 0 : outer};
}

// The producer warp.
template <typename Config>
struct FwdProducer {
  using Shared = FwdShared<Config>;
  const MhaFwdParams& params;
  const FwdPlan& plan;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage
  bool elected;    // the lane that issues copies
  RingIndex<Config::kKeyStages> key_ring;
  RingIndex<Config::kValueStages> value_ring;
  RingIndex<Config::kQueryStages> query_ring;
  int slot = 0;  // of the next block to publish

  // All slabs of one tile of keys or values.
  template <int kRows, int kWidth>
  __device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap* map,
                                            uint32_t barrier, int row, int head,
                                            BatchCoordinate batch) const {
    using Layout = SlabLayout<kRows, kWidth>;
    ptx::mbarrier_arrive_expect_tx(barrier, Layout::kBytes);
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::tma_load_5d(target + slab * Layout::kSlabBytes, map, barrier, ptx::kEvictLast, 64 * slab,
                       row, head, batch.inner, batch.outer);
    }
  }

  __device__ __forceinline__ void copy_keys(int tile, int head, BatchCoordinate batch) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_empty[key_ring.stage]),
                       key_ring.parity ^ 1);
    if (elected) {
      copy_tile<Config::kKeys, Config::kHeadDim>(
          tiles + Config::kKeyOffset + key_ring.stage * Config::KeyLayout::kBytes, &plan.key,
          ptx::shared_address(&shared.key_full[key_ring.stage]), tile * Config::kKeys, head, batch);
    }
    key_ring.next();
  }

  __device__ __forceinline__ void copy_values(int tile, int head, BatchCoordinate batch) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_empty[value_ring.stage]),
                       value_ring.parity ^ 1);
    if (elected) {
      copy_tile<Config::kKeys, Config::kHeadDimV>(
          tiles + Config::kValueOffset + value_ring.stage * Config::ValueLayout::kBytes,
          &plan.value, ptx::shared_address(&shared.value_full[value_ring.stage]),
          tile * Config::kKeys, head, batch);
    }
    value_ring.next();
  }

  // Hands a block to the consumers, with its queries if there is anything to do with them.
  __device__ __forceinline__ void publish(const FwdBlock<Config>& block) {
    using Layout = typename Config::QueryLayout;
    const BatchCoordinate batch = batch_coordinate(params.query, block.batch, params);
#pragma unroll
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.query_empty[query_ring.stage][w]),
                         query_ring.parity ^ 1);
      if (elected) {
        const uint32_t barrier = ptx::shared_address(&shared.query_full[query_ring.stage][w]);
        // Every warpgroup waits for its own barrier, so the block is there before the first.
        if (w == 0) shared.blocks[slot] = block;
        if (block.tiles > 0) {
          ptx::mbarrier_arrive_expect_tx(barrier, Layout::kBytes);
          const uint32_t target =
              tiles + query_ring.stage * Config::kQueryStageBytes + w * Layout::kBytes;
          const int position = (block.first_row + 64 * w) >> plan.pack_shift;
#pragma unroll
          for (int slab = 0; slab < Layout::kSlabs; ++slab) {
            ptx::tma_load_5d(target + slab * Layout::kSlabBytes, &plan.query, barrier,
                             ptx::kEvictFirst, 64 * slab, block.head, position, batch.inner,
                             batch.outer);
          }
        } else {
          ptx::mbarrier_arrive(barrier);
        }
      }
    }
    query_ring.next();
    slot = slot + 1 == Shared::kBlockSlots ? 0 : slot + 1;
  }

  // Outputs 0 and lse -inf for the rows of a block that sees no keys.
  __device__ __forceinline__ void store_empty(const FwdBlock<Config>& block) const {
    const int rows = min(Config::kRows, (params.query_length << plan.pack_shift) - block.first_row);
    const int chunks = params.head_dim_v / 8;
    for (int r = 0; r < rows; ++r) {
      const int position = (block.first_row + r) >> plan.pack_shift;
      const int head = block.head + ((block.first_row + r) & ((1 << plan.pack_shift) - 1));
      const int64_t row = int64_t{block.batch} * params.query_length + position;
      uint4* const out = reinterpret_cast<uint4*>(
          static_cast<Element16*>(params.out) + (row * params.heads + head) * params.head_dim_v);
      for (int chunk = lane_id(); chunk < chunks; chunk += 32) out[chunk] = make_uint4(0, 0, 0, 0);
      if (elected) {
        params.lse[(int64_t{block.batch} * params.heads + head) * params.query_length + position] =
            kMinusInfinity;
      }
    }
  }

  // The next block that has work for the consumers; those that see no keys are finished here.
  // `tiles` is negative when there is none.
  __device__ __forceinline__ void next_block(FwdBlock<Config>& block, int& round) {
    const int splits = plan.splits;
    const int groups = gridDim.x / splits;
    const int group = blockIdx.x / splits;
    const int split = splits == 1 ? 0 : ptx::cluster_ctarank();
    // Ids in rounds of one for each thread block, every other round in reverse: with the longest
    // blocks first that evens out the sums.
    while (round * groups < plan.ids) {
      const int id = round * groups + (round % 2 == 0 ? group : groups - 1 - group);
      ++round;
      if (id >= plan.ids) continue;
      const BlockCoordinate at = block_at(plan, id);
      if (at.batch < 0) continue;
      if (make_block(params, plan, at, split, block)) return;
      if (split == 0) store_empty(block);
    }
    block.tiles = -1;
  }

  __device__ __forceinline__ void run() {
    FwdBlock<Config> block;
    int round = 0;
    // The values of a block's last tile are asked for after the next block's first keys.
    bool pending = false;
    int tile = 0;
    int kv_head = 0;
    BatchCoordinate value_batch{};
    next_block(block, round);
    // With two query stages a block is published while the one before it is at work.
    if (Config::kQueryStages > 1) publish(block);
    while (block.tiles >= 0) {
      const int old_head = kv_head;
      const BatchCoordinate old_batch = value_batch;
      const BatchCoordinate key_batch = batch_coordinate(params.key, block.batch, params);
      value_batch = batch_coordinate(params.value, block.batch, params);
      kv_head = params.group_divisor.divide(block.head);
      int left = block.tiles;
      if (left > 0) copy_keys(block.last_tile, kv_head, key_batch);
      if (pending) copy_values(tile, old_head, old_batch);
      if (Config::kQueryStages == 1) publish(block);
      tile = block.last_tile;
      pending = left > 0;
      if (Config::kQueryStages > 1) {
        next_block(block, round);
        publish(block);
      }
      for (; left > 1; --left) {
        --tile;
        copy_keys(tile, kv_head, key_batch);
        copy_values(tile + 1, kv_head, value_batch);
      }
      if (Config::kQueryStages == 1) next_block(block, round);
    }
    if (pending) copy_values(tile, kv_head, value_batch);
    if (Config::kQueryStages == 1) publish(block);
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
  RingIndex<Config::kQueryStages> query_ring;

  float s[kScores];
  uint32_t p[kScores / 2];
  float out[kOuts];
  RowSoftmax<Config> softmax;
  float inverse[2];      // of the sums of the block that is finished but not stored
  int unstored_slot;     // of that block, negative if there is none

  __device__ __forceinline__ int warp_row() const {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  }
  __device__ __forceinline__ uint32_t query_tile() const {
    return tiles + query_ring.stage * Config::kQueryStageBytes +
           warpgroup * Config::QueryLayout::kBytes;
  }
  __device__ __forceinline__ uint32_t key_tile() const {
    return tiles + Config::kKeyOffset + key_ring.stage * Config::KeyLayout::kBytes;
  }
  __device__ __forceinline__ uint32_t value_tile() const {
    return tiles + Config::kValueOffset + value_ring.stage * Config::ValueLayout::kBytes;
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

  // out += P V
  __device__ __forceinline__ void issue_values() {
    const uint64_t value =
        ptx::wgmma_descriptor(value_tile(), Config::ValueLayout::kSlabBytes);
#pragma unroll
    for (int k = 0; k < Config::kKeys / 16; ++k) {
      ptx::Wgmma<Element, Config::kHeadDimV>::rs(out, p + 4 * k, value + (16 * 128 >> 4) * k);
    }
  }

  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = ptx::cvt_rn_x2<Element>(s[2 * i], s[2 * i + 1]);
  }

  __device__ __forceinline__ void clear_out() {
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i] = 0.0f;
  }

  __device__ __forceinline__ void scale_out(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i] *= factor[i / 2 % 2];
  }

  // Issues both products, the second one into fresh accumulators if kFresh: those of the block
  // before are then stored first, while the scores are at work. `previous` is false in the very
  // first step: its second product multiplies zeros with whatever memory holds, and is dropped.
  template <bool kFresh>
  __device__ __forceinline__ void issue(bool previous) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_full[key_ring.stage]), key_ring.parity);
    take_turn();
    ptx::wgmma_fence();
    issue_scores();
    ptx::wgmma_commit_group();
    if constexpr (kFresh) {
      pass_turn();
      store_out();
    }
    if (previous) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage]),
                         value_ring.parity);
    }
    ptx::wgmma_fence();
    issue_values();
    ptx::wgmma_commit_group();
    if constexpr (!kFresh) pass_turn();
  }

  __device__ __forceinline__ void release_key() {
    warp_arrive(shared.key_empty[key_ring.stage]);
    key_ring.next();
  }
  __device__ __forceinline__ void release_value() {
    warp_arrive(shared.value_empty[value_ring.stage]);
    value_ring.next();
  }
  __device__ __forceinline__ void release_query() {
    warp_arrive(shared.query_empty[query_ring.stage][warpgroup]);
    query_ring.next();
  }

  // Whether tile `tile` lies on the border of what this warp's rows see.
  __device__ __forceinline__ bool on_border(const FwdBlock<Config>& block, int tile) const {
    const int row = block.first_row + 64 * warpgroup + warp_row();
    const KeyInterval core =
        block.mask.core(row >> plan.pack_shift, ((row + 15) >> plan.pack_shift) + 1);
    const int first_key = tile * Config::kKeys;
    return first_key < core.first || first_key + Config::kKeys > core.end;
  }

  // Masks and takes the softmax of tile `tile`; true if output accumulators must be scaled.
  __device__ __forceinline__ bool careful_softmax(const FwdBlock<Config>& block, int tile,
                                                  bool border, float (&factor)[2]) {
    if (params.scale.first != 1.0f) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] *= params.scale.first;
    }
    if (border) {
      const int row = block.first_row + 64 * warpgroup + warp_row() + fragment_row();
      softmax.apply_mask(s, block.mask, row, plan.pack_shift, tile * Config::kKeys);
    }
    return softmax.careful(s, params.scale, factor);
  }

  // The first tile of a block. The last product of the block before runs beside it; its outputs are
  // stored in the step after this one.
  __device__ __forceinline__ void first_step(int slot, bool previous, int slot_before) {
    const FwdBlock<Config>& block = shared.blocks[slot];
    issue<false>(previous);
    if (previous) finish_rows(shared.blocks[slot_before]);
    const bool border = on_border(block, block.last_tile);
    ptx::wgmma_wait_group<1>();
    if (block.tiles == 1 && Config::kQueryStages == 1) release_query();
    softmax.init();
    float factor[2];
    careful_softmax(block, block.last_tile, border, factor);
    release_key();
    const int row = block.first_row + 64 * warpgroup + warp_row() + fragment_row();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Padding rows are dropped; they should not look as if they left the range.
      if ((row + 8 * h) >> plan.pack_shift >= block.mask.query_length) softmax.reference[h] = 0.0f;
    }
    ptx::wgmma_wait_group<0>();
    if (previous) release_value();
    unstored_slot = previous ? slot_before : -1;
    // Otherwise the next step is clean and does it.
    if (block.last_tile - 1 < block.clean_first[warpgroup] ||
        block.last_tile > block.clean_end[warpgroup]) {
      store_out();
    }
    pack();
    if (block.value_rows < Config::kKeys) [[unlikely]] clear_values(block.value_rows);
  }

  // Zeroes the rows of the values from `rows` on: 0 * NaN would reach the output.
  __device__ __forceinline__ void clear_values(int rows) {
    using Layout = typename Config::ValueLayout;
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage]),
                       value_ring.parity);
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

  __device__ __forceinline__ void careful_step(const FwdBlock<Config>& block, int tile) {
    issue<false>(true);
    const bool border = on_border(block, tile);
    ptx::wgmma_wait_group<1>();
    if (Config::kQueryStages == 1 && tile == block.last_tile - block.tiles + 1) release_query();
    float factor[2];
    const bool moved = careful_softmax(block, tile, border, factor);
    release_key();
    ptx::wgmma_wait_group<0>();
    release_value();
    if (moved) scale_out(factor);
    pack();
  }

  // kSecond: the step after the first of its block.
  template <bool kSecond>
  __device__ __forceinline__ void clean_step() {
    issue<kSecond>(true);
    ptx::wgmma_wait_group<1>();
    float tile_sum[2];
    const bool left_range = softmax.clean(s, params.scale, tile_sum);
    ptx::wgmma_wait_group<0>();
    release_value();
    if (left_range) [[unlikely]] {
      float factor[2];
      softmax.recompute(s, tile_sum, factor, query_tile(), key_tile(), warp_row(), params.scale);
      scale_out(factor);
    }
    release_key();
    softmax.sum[0] += tile_sum[0];
    softmax.sum[1] += tile_sum[1];
    pack();
  }

  // Normalisation of the rows of a finished block; stores lse.
  __device__ __forceinline__ void finish_rows(const FwdBlock<Config>& block) {
    const int row = block.first_row + 64 * warpgroup + warp_row() + fragment_row();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse[h] = softmax.finish(h);
      const int position = (row + 8 * h) >> plan.pack_shift;
      const int head = block.head + ((row + 8 * h) & ((1 << plan.pack_shift) - 1));
      const bool padding = position >= block.mask.query_length;
      if (padding) inverse[h] = 0.0f;
      if (fragment_column() == 0 && position < params.query_length) {
        params.lse[(int64_t{block.batch} * params.heads + head) * params.query_length + position] =
            padding ? kMinusInfinity : softmax.lse(h, params.scale);
      }
    }
  }

  // Outputs straight from the accumulators: four lanes that share a row exchange words so that each
  // holds eight neighbouring columns, 16 bytes, of every 32. Leaves the accumulators empty.
  __device__ __forceinline__ void store_out() {
    const FwdBlock<Config>& block = shared.blocks[max(unstored_slot, 0)];
    const int lane = lane_id() % 4;
    const int row = block.first_row + 64 * warpgroup + warp_row() + fragment_row();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = (row + 8 * h) >> plan.pack_shift;
      const int head = block.head + ((row + 8 * h) & ((1 << plan.pack_shift) - 1));
      const int64_t at = int64_t{block.batch} * params.query_length + position;
      Element16* const target = static_cast<Element16*>(params.out) +
                                (at * params.heads + head) * params.head_dim_v + 8 * lane;
      const bool exists = unstored_slot >= 0 && position < params.query_length;
#pragma unroll
      for (int group = 0; group < Config::kHeadDimV / 32; ++group) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* const o = out + 16 * group + 4 * j + 2 * h;
          const uint32_t word = ptx::cvt_rn_x2<Element>(o[0] * inverse[h], o[1] * inverse[h]);
          words[j] = inverse[h] == 0.0f ? 0 : word;  // not 0 * infinity
        }
        transpose_quad(words, lane);
        if (exists && 32 * group + 8 * lane < params.head_dim_v) {
          *reinterpret_cast<uint4*>(target + 32 * group) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
    clear_out();
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

  // Key tiles of the block in `slot` after the first, from the last to the first.
  __device__ __forceinline__ void other_steps(const FwdBlock<Config>& block) {
    const int lowest = block.last_tile - block.tiles + 1;
    const int clean_end = block.clean_end[warpgroup];
    const int clean_first = block.clean_first[warpgroup];
    int tile = block.last_tile - 1;
#pragma unroll 1
    for (; tile >= max(clean_end, lowest); --tile) careful_step(block, tile);
    if (tile == block.last_tile - 1 && tile >= clean_first) {
      clean_step<true>();
      --tile;
    }
#pragma unroll 1
    for (; tile >= clean_first; --tile) clean_step<false>();
#pragma unroll 1
    for (; tile >= lowest; --tile) careful_step(block, tile);
  }

  __device__ __forceinline__ void run() {
    int slot = 0;
    int slot_before = 0;
    bool previous = false;
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = 0;
    clear_out();
    if (warpgroup == Config::kWarpgroups - 1) pass_turn();
    while (true) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.query_full[query_ring.stage][warpgroup]),
                         query_ring.parity);
      const FwdBlock<Config>& block = shared.blocks[slot];
      if (block.tiles < 0) break;
      first_step(slot, previous, slot_before);
      other_steps(block);
      if (Config::kQueryStages > 1) release_query();
      previous = true;
      slot_before = slot;
      slot = slot + 1 == Shared::kBlockSlots ? 0 : slot + 1;
    }
    if (previous) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage]),
                         value_ring.parity);
      ptx::wgmma_fence();
      issue_values();
      ptx::wgmma_commit_group();
      finish_rows(shared.blocks[slot_before]);
      ptx::wgmma_wait_group<0>();
      unstored_slot = slot_before;
      store_out();
    }
    if (warpgroup == 0) take_turn();  // the last arrival needs its partner
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
      for (uint64_t& barrier : stage) ptx::mbarrier_init(ptx::shared_address(&barrier), 4);
    }
    const auto init = [](auto& barriers, int arrivals) {
      for (uint64_t& barrier : barriers) ptx::mbarrier_init(ptx::shared_address(&barrier), arrivals);
    };
    init(shared.key_full, 1);
    init(shared.value_full, 1);
    init(shared.key_empty, Config::kConsumerWarps);
    init(shared.value_empty, Config::kConsumerWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == Config::kWarpgroups) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x / 32 % 4 == 0) {
      FwdProducer<Config> producer{params, plan, shared, tiles, lane_id() == 0};
      producer.run();
    }
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    FwdConsumer<Config> consumer{params, plan, shared, tiles, warpgroup};
    consumer.run();
  }
}

}  // namespace jax_flash::sm90
