// The role of a consumer warpgroup: products, softmax, outputs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_clear.cuh"
#include "sm90/fwd_combine.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_dense.cuh"
#include "sm90/fwd_float_out.cuh"
#include "sm90/fwd_logits.cuh"
#include "sm90/fwd_mask.cuh"
#include "sm90/fwd_products.cuh"
#include "sm90/fwd_shared.cuh"
#include "sm90/fwd_softmax.cuh"
#include "sm90/fwd_store.cuh"
#include "tile/copy.cuh"
#include "tile/score_options.cuh"

namespace jax_flash::sm90 {

// One consumer warpgroup.
template <typename Config>
struct FwdConsumer {
  using Element = typename Config::Element;
  using Shared = FwdShared<Config>;
  using Dense = FwdDense<Config, Config::kDense>;
  static constexpr int kScores = Config::kKeys / 2;
  static constexpr bool kLogits = Config::kOptions && !Config::kDense;  // of clean tiles, too
  static constexpr int kOuts = Config::kHeadDimV / 2;
  static constexpr bool kQuickStart = Config::kQuickStart;
  // Of rows that are dropped, with intervals perhaps another block's: more than any score.
  static constexpr float kDroppedReference = Config::kIntervals ? 1e30f : 0.0f;

  const MhaFwdParams& params;
  const FwdPlan& plan;
  Shared& shared;
  uint32_t tiles;  // shared address of the first query stage
  int warpgroup;
  RingIndex<Config::kKeyStages> key_ring;
  RingIndex<Config::kValueStages> value_ring;
  int blocks = 0;  // before the one at work: the position in the rings of blocks and queries

  float s[kScores];
  uint32_t p[Config::kParts * kScores / 2];
  float out[kOuts];
  RowSoftmax<Config> softmax;
  float inverse[2];          // of the sums of the block that is finished but not stored
  FwdLogits<Config> logits;  // of the block at work; with kOptions
  Dense dense;               // of the tile at work

  __device__ __forceinline__ int fresh_warpgroup() const {
    if constexpr (!Config::kDense) return warpgroup;
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);  // few registers
  }
  __device__ __forceinline__ int warp_row() const {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  }
  // This lane's first row of the head, where rows are not packed.
  __device__ __forceinline__ int head_row(const FwdBlock<Config>& block) const {
    return block.first_row + 64 * warpgroup + warp_row() + fragment_row();
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

  // Where outputs are staged, and the row of that which this lane writes.
  __device__ __forceinline__ uint32_t out_tile() const {
    return tiles + Config::kOutOffset + warpgroup * Config::OutLayout::kBytes;
  }
  __device__ __forceinline__ int out_row() const { return warp_row() + lane_id() % 16; }

  static __device__ __forceinline__ void warp_arrive(uint64_t& barrier) {
    ptx::mbarrier_arrive_if(lane_id() == 0, ptx::shared_address(&barrier));
  }

  // Turns: warpgroup w issues when all 256 threads of it and its predecessor are at barrier 1 + w.
  __device__ __forceinline__ void take_turn() const { ptx::bar_sync(1 + warpgroup, 256); }
  __device__ __forceinline__ void pass_turn() const {
    ptx::bar_arrive(warpgroup + 1 == Config::kWarpgroups ? 1 : 2 + warpgroup, 256);
  }

  // s = Q K^T
  __device__ __forceinline__ void issue_scores() {
    multiply_scores<Config>(s, query_tile(), key_tile());
  }

  // out = P V, or out += P V
  __device__ __forceinline__ void issue_values(bool accumulate) {
    multiply_values<Config>(out, p, value_tile(), accumulate);
  }

  __device__ __forceinline__ void pack() { pack_weights<Config>(p, s); }

  __device__ __forceinline__ void scale_out(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i] *= factor[i / 2 % 2];
  }

  // Issues both products, the second one into fresh accumulators or not. `previous` is false in the
  // very first step: its second product multiplies zeros with whatever memory holds, and is
  // dropped. between(): what is done between the two, where the first one keeps the tensor cores
  // busy.
  template <typename Between>
  __device__ __forceinline__ void issue(bool previous, bool fresh, Between between) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_full[key_ring.stage()]), key_ring.parity());
    take_turn();
    ptx::wgmma_fence();
    issue_scores();
    ptx::wgmma_commit_group();
    between();
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

  using MaskLoads = FwdMaskLoads<Config>;
  template <bool kMixed>
  __device__ __forceinline__ MaskLoads load_mask(const FwdBlock<Config>& block, int tile) const {
    MaskLoads loads{};
    if constexpr (Config::kIntervals) {
      loads.template load<kMixed>(block, tile, warpgroup, head_row(block));
    } else {
      loads.masked = tile < block.full_first[warpgroup] || tile >= block.full_end[warpgroup];
      if (!loads.masked) return loads;
      const int row = head_row(block);
      KeyInterval keys[2];
      for (int h = 0; h < 2; ++h) keys[h] = block.mask.interval((row + 8 * h) >> plan.pack_shift);
      loads.mask = FwdMask<Config::kKeys>::of(keys, block.key_of(tile) + fragment_column());
    }
    return loads;
  }

  __device__ __forceinline__ void begin_logits(const FwdBlock<Config>& block) {
    const int row = 64 * warpgroup + warp_row() + fragment_row();
    logits.begin(block, params.intervals.softcap, row, is_dropped(block, row),
                 is_dropped(block, row + 8));
  }

  // Scales and masks the scores of tile `tile` if need be, and follows their maxima.
  __device__ __forceinline__ bool prepare(const FwdBlock<Config>& block, int tile, MaskLoads& loads,
                                          float (&factor)[2]) {
    if (params.scale.first != 1.0f) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] *= params.scale.first;
    }
    if constexpr (Config::kDense) {
      const bool optional = ScoreOptions::any(params);
      if (optional) [[unlikely]] {
        begin_logits(block);  // not kept: registers are few
        logits.template apply<false>(s, params, plan, tile * Config::kKeys);
      }
      add_bias(optional ? 1.0f : plan.logit_scale);
      dense.load(params, shared, key_ring);  // not before: registers are few
      dense.hide(s, params, block, head_row(block), tile);
      if constexpr (!Dense::kEarly) loads = load_mask<true>(block, tile);
    } else if constexpr (Config::kOptions) {
      logits.template apply<true>(s, params, plan, tile * Config::kKeys);
    }
    if (loads.masked) loads.mask.apply(s);
    return softmax.template follow_maximum<true>(s, params.scale, factor);
  }

  // With kDense. Scores become logits by `factor` and the bias, if there is one.
  __device__ __forceinline__ void add_bias(float factor) {
    const uint32_t row = tiles + Config::kBiasOffset + warpgroup * Config::kBiasTileBytes +
                         warp_row() * Config::kBiasRowBytes;
    Dense::take_bias(s, factor, params, shared, warpgroup, key_ring.count(), row);
  }

  // Exponentials of a tile. careful: as for `step`; its scores are logits. is_inside: as for
  // FwdLogits.
  __device__ __forceinline__ bool exponentials(int tile, bool careful, float (&tile_sum)[2],
                                               bool& is_inside) {
    if constexpr (kLogits) {
      if (!careful) {
        return logits.exponentials(s, softmax, params, plan, tile * Config::kKeys, tile_sum,
                                   is_inside);
      }
    }
    return dense.exponentials(s, softmax, params, careful, tile_sum);
  }

  // Lets the keys of a tile pass, and the biases.
  __device__ __forceinline__ void skip_keys() {
    if constexpr (Config::kDense) {
      Dense::pass_bias(params, shared, warpgroup, key_ring.count());
      dense.load(params, shared, key_ring);
    }
    take_turn();
    pass_turn();
    // What was there before was released by all.
    ptx::mbarrier_wait(ptx::shared_address(&shared.key_full[key_ring.stage()]), key_ring.parity());
    release_key();
  }

  // Lets the values of `tiles` tiles pass.
  __device__ __forceinline__ void skip_values(int tiles) {
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage()]),
                         value_ring.parity());
      release_value();
    }
  }

  // What keeps a tile that was taken for clean from being finished at once.
  // kWatchedRows: or it is special. kInvalid: its soft cap is not a polynomial. kDeadKeys: values
  // are still to be cleared.
  enum class Left { kNothing, kWatchedRows, kRange, kInvalid, kDeadKeys };

  // One key tile. `careful`: it needs a mask or a maximum, as the first of a block does; known at
  // compile time or not. With kMasksClean one that is not may need a mask, too.
  // Beside the first tile of a block runs the last product of the block before, whose outputs are
  // stored then. fresh: the second tile, whose product starts new accumulators.
  // What is rarely needed is left to finish_rare, outside the loop.
  template <typename Careful, typename First>
  __device__ __forceinline__ Left step(const FwdBlock<Config>& block, int tile, Careful careful,
                                       First first, bool fresh, float (&tile_sum)[2]) {
    constexpr bool kClean = std::is_same_v<Careful, std::false_type>;
    // With kQuickStart the first block of all does not begin with a body of its own.
    constexpr bool kBegins = std::is_same_v<First, std::true_type>;
    const bool previous = kBegins || !first || (!kQuickStart && blocks > 0);
    bool watching = false;
    MaskLoads loads{};
    if constexpr (kQuickStart && !kClean) loads.ask(block, tile, warpgroup, head_row(block));
    issue(previous, fresh, [&] {
      dense.drop_late(p, params);
      if constexpr (kLogits) {
        if (!careful) watching = logits.is_special(softmax.watching, tile * Config::kKeys);
      }
    });
    if (first) {
      if (previous) finish_rows(blocks - 1);
      softmax.init();
      if constexpr (kLogits) begin_logits(block);
    }
    if constexpr (kQuickStart && !kClean) {
      loads.template find<true>(block, tile, warpgroup, head_row(block));
    } else if ((careful && Dense::kEarly) ||
               (Config::kMasksClean && tile < block.full_first[warpgroup])) {
      loads = load_mask<!kClean>(block, tile);
    }
    if (!careful) {
      dense.draw(params, block, head_row(block), tile);  // feeders may still be at work
      dense.load(params, shared, key_ring);
    }
    // Uniform over the warp, and known to be.
    if (!kLogits) watching = !careful && __any_sync(0xffffffffu, softmax.watching);
    if constexpr (Config::kOverlaps) {
      ptx::wgmma_wait_group<1>();
    } else {
      finish_products(previous);
    }
    // The last tile is not clean.
    if (Config::kQueryStages == 1 && !(Config::kDense && kClean) &&
        tile == block.lowest[warpgroup]) {
      release_query();
    }
    float factor[2] = {1.0f, 1.0f};
    bool moved = false;
    Left left = Left::kNothing;
    bool is_inside = true;
    if (careful) {
      moved = prepare(block, tile, loads, factor);
    } else if (Config::kMasksClean && loads.masked) {
      loads.mask.apply(s);
    } else if constexpr (Config::kDense) {
      if constexpr (Config::kBiasClean) add_bias(plan.logit_scale);
      if constexpr (!Dense::kHidesBeside) dense.hide(s, params, block, head_row(block), tile);
    }
    if constexpr (kBegins) {
      finish_products(previous);
      const auto word = [&](int i, const float (&factor)[2]) { return out_word(i, factor); };
      stage_beside_exponentials<Config>(out_tile(), out_row(), inverse, word, softmax, s,
                                        params.scale, tile_sum);
      finish_store((blocks - 1) % Shared::kBlockSlots);
    } else if (!careful && watching) [[unlikely]] {
      left = Left::kWatchedRows;
    } else if (exponentials(tile, careful, tile_sum, is_inside) && !careful) [[unlikely]] {
      // A branch on what all exponentials lead to, before the wait: ptxas would move the wait to
      // where they begin.
      left = Left::kRange;
      if constexpr (kLogits) logits.is_inside = is_inside;
      __syncwarp();
    } else if (Config::kMasksClean && !careful && loads.dead_keys != 0) [[unlikely]] {
      left = Left::kDeadKeys;
    }
    // One instruction for all warps of the warpgroup, on whichever path they come.
    if constexpr (Config::kOverlaps && !kBegins) finish_products(previous);
    if (left != Left::kNothing) [[unlikely]]
      return left;
    // Before outputs are stored, where registers are few.
    if constexpr (Config::kDense) finish_step(tile_sum);
    if (first) {
      if constexpr (Config::kSkips) skip_values(block.last_tile - tile);
      if (!kBegins && previous) store_out(blocks - 1);
      // Padding rows are dropped; they should not look as if they left the range.
      const int row = 64 * warpgroup + warp_row() + fragment_row();
      if (is_dropped(block, row)) softmax.reference[0] = kDroppedReference;
      if (is_dropped(block, row + 8)) softmax.reference[1] = kDroppedReference;
    } else if (moved) {
      scale_out(factor);
    }
    if constexpr (!Config::kDense) finish_step(tile_sum);
    if (careful) dense.draw(params, block, head_row(block), tile);
    dense.drop(p, params, block, head_row(block), tile);
    if constexpr (Config::kIntervals) {
      if (loads.dead_keys != 0) clear_dead_values(block, tile);
    } else {
      if (first && tile == block.last_tile && block.value_rows < Config::kKeys) [[unlikely]] {
        clear_values(block.value_rows);
      }
    }
    return Left::kNothing;
  }

  // Whether row `row` of the block, one of this warpgroup's, is padding or dead.
  __device__ __forceinline__ bool is_dropped(const FwdBlock<Config>& block, int row) const {
    if constexpr (Config::kIntervals) {
      if (!block.drops[warpgroup]) return false;
      return row >= block.rows || block.mask.row(block.first_row + row).id < 0;
    }
    return row >= block.rows;
  }

  // Waits for both products. previous: the second one was that of a tile.
  __device__ __forceinline__ void finish_products(bool previous) {
    ptx::wgmma_wait_group<0>();
    if (previous) release_value();
  }

  __device__ __forceinline__ void finish_step(const float (&tile_sum)[2]) {
    release_key();
    softmax.sum[0] += tile_sum[0];
    softmax.sum[1] += tile_sum[1];
    pack();
  }

  // The rest of a step for a warp with rows that are watched, or that left the range, or for all
  // warps with dead keys.
  __device__ __forceinline__ void finish_rare(const FwdBlock<Config>& block, int tile, Left left,
                                              float (&tile_sum)[2]) {
    if (kLogits && left == Left::kRange && __any_sync(0xffffffffu, !logits.is_inside)) {
      left = Left::kInvalid;
    }
    MaskLoads loads{};  // once more
    if constexpr (Config::kMasksClean) loads = load_mask<false>(block, tile);
    float factor[2] = {1.0f, 1.0f};
    bool moved = false;
    if (left == Left::kWatchedRows) {
      if constexpr (kLogits) {
        logits.template apply<false>(s, params, plan, tile * Config::kKeys);
      }
      if constexpr (Dense::kHidesBeside) dense.hide(s, params, block, head_row(block), tile);
      moved = softmax.template follow_maximum<false>(s, params.scale, factor);
      if (softmax.exponentials(s, params.scale, tile_sum)) left = Left::kRange;
    }
    if (left == Left::kRange || left == Left::kInvalid) {
      const auto logit = [&](float score, int h, float column) {
        if constexpr (Config::kMasksClean) {
          const bool seen = !loads.masked || loads.mask.sees(h, static_cast<int>(column));
          return seen ? score : kMinusInfinity;
        } else if constexpr (Config::kDense) {
          const int key = tile * Config::kKeys + fragment_column() + static_cast<int>(column);
          return Dense::logit(params, block, head_row(block) + 8 * h, key, score, plan.logit_scale);
        } else if constexpr (Config::kOptions) {
          const ScoreOptions options = {plan.logit_scale, params.intervals.softcap, logits.slope};
          return options.logit(score, logits.distance(h, tile * Config::kKeys) - column);
        } else {
          return score;
        }
      };
      softmax.recover(s, tile_sum, factor, query_tile(), key_tile(), warp_row(), params.scale,
                      left == Left::kInvalid, logit);
      if (kLogits && left == Left::kInvalid) logits.leave_polynomial();
      moved = true;
    }
    softmax.keep_watching();
    if (moved) scale_out(factor);
    finish_step(tile_sum);
    dense.drop(p, params, block, head_row(block), tile);
    if constexpr (Config::kMasksClean) {
      if (loads.dead_keys != 0) clear_dead_values(block, tile);
    }
  }

  // Zeroes the rows of the values from `rows` on: 0 * NaN would reach the output.
  __device__ __forceinline__ void clear_values(int rows) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage()]),
                       value_ring.parity());
    clear_last_rows<Config>(value_tile(), rows, 5 + warpgroup);
  }

  // The same for those of dead keys, anywhere in a tile.
  __device__ __forceinline__ void clear_dead_values(const FwdBlock<Config>& block, int tile) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.value_full[value_ring.stage()]),
                       value_ring.parity());
    clear_dead_rows<Config>(value_tile(), block, block.key_of(tile), 5 + warpgroup);
  }

  // Normalisation of the rows of block `number`; the storer warp gets what lse needs.
  __device__ __forceinline__ void finish_rows(int number) {
    if constexpr (Config::kDense) number = static_cast<int>(ptx::fresh_address(number));
    const FwdBlock<Config>& block = shared.blocks[number % Shared::kBlockSlots];
    const int row = 64 * warpgroup + warp_row() + fragment_row();
    ptx::mbarrier_wait(ptx::shared_address(&shared.rows_empty[fresh_warpgroup()]),
                       (number + 1) % 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse[h] = softmax.finish(h);
      if (is_dropped(block, row + 8 * h)) inverse[h] = 0.0f;
      // Then lse is -inf.
      if (Config::kIntervals && inverse[h] == 0.0f) softmax.sum[h] = 0.0f;
      if (lane_id() % 4 == 0) {
        shared.rows[row + 8 * h] = make_float2(softmax.reference[h], softmax.sum[h]);
      }
    }
  }

  // Two neighbouring outputs, normalised and packed. A row without keys gives 0, even if its
  // accumulators hold 0 * infinity.
  __device__ __forceinline__ uint32_t out_word(int i, const float (&inverse)[2]) const {
    const int h = i / 2 % 2;
    const uint32_t word = ptx::cvt_rn_x2<Element>(out[i] * inverse[h], out[i + 1] * inverse[h]);
    return this->inverse[h] == 0.0f ? 0 : word;
  }

  // Outputs of block `number`: through shared memory, from where the storer warp takes them, or
  // straight to global memory.
  __device__ __forceinline__ void store_out(int number) {
    // Not computed early and kept: registers are few.
    if constexpr (Config::kDense) number = static_cast<int>(ptx::fresh_address(number));
    const int slot = number % Shared::kBlockSlots;
    if constexpr (Config::kDense) {
      // Computed again rather than kept beside a tile's softmax: registers are few.
      __syncwarp();
      const int row = 64 * warpgroup + warp_row() + fragment_row();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = shared.rows[row + 8 * h].y;
        inverse[h] = sum == 0.0f ? 0.0f : __fdividef(params.intervals.kept_scale, sum);
      }
    }
    if constexpr (Config::kSplit) {
      const int row = 64 * warpgroup + warp_row() + fragment_row();
      store_floats(params, plan, shared.blocks[slot], row, out, inverse);
    } else {
      const auto word = [&](int i) { return out_word(i, inverse); };
      if constexpr (Config::kStaged) {
        stage_out<Config>(out_tile(), out_row(), word);
      } else {
        const FwdBlock<Config>& block = shared.blocks[slot];
        store_direct<Config>(params, plan, block, head_row(block), word);
      }
    }
    finish_store(slot);
  }

  __device__ __forceinline__ void finish_store(int slot) {
    ptx::mbarrier_arrive(ptx::shared_address(&shared.rows_full[fresh_warpgroup()]));
    __syncwarp();
    warp_arrive(shared.block_empty[slot]);
  }

  // All key tiles of a block, from the last to the first.
  __device__ __forceinline__ void run_block(const FwdBlock<Config>& block, bool& fresh) {
    int tile = block.last_tile;
    if constexpr (Config::kSkips) {
#pragma unroll 1
      for (const int start = block.start[warpgroup]; tile > start; --tile) skip_keys();
    }
    const int clean_first = block.clean_first[warpgroup];
    const int kept_end = block.clean_end[warpgroup];
    const auto clean_end = [&] { return Config::kDense ? block.clean_end[warpgroup] : kept_end; };
    bool first = true;
    float tile_sum[2];
    if constexpr (kQuickStart) {
      first = blocks == 0;
      if (!first) step(block, tile--, std::true_type(), std::true_type(), fresh, tile_sum);
      fresh = fresh || !first;
    }
    const int kept_lowest = block.lowest[warpgroup];
    const auto lowest = [&] { return Config::kDense ? block.lowest[warpgroup] : kept_lowest; };
    const bool holes = has_holes(block);
    const auto next = [&](int from) {
      return Config::kOneBody || holes ? next_tile(block, warpgroup, from) : from - 1;
    };
    while (tile >= lowest()) {
      Left left = Left::kNothing;
      if constexpr (Config::kOneBody) {
        left = step(block, tile, tile >= clean_end() || tile < clean_first, first, fresh, tile_sum);
        fresh = first;
        first = false;
      } else {
        const bool below = Config::kDense && tile < clean_end();
#pragma unroll 1
        for (; (Config::kDense ? below : tile < clean_end()) && tile >= clean_first;
             tile = next(tile)) {
          left = step(block, tile, std::false_type(), false, fresh, tile_sum);
          fresh = false;
          if (left != Left::kNothing) [[unlikely]]
            break;
        }
        if (left == Left::kNothing) {
          if (tile < lowest()) break;
          step(block, tile, std::true_type(), first, fresh, tile_sum);
          fresh = first;
          first = false;
        }
      }
      if (left != Left::kNothing) [[unlikely]]
        finish_rare(block, tile, left, tile_sum);
      tile = next(tile);
    }
    // By a warpgroup without rows: the product that is still to come may use any values.
#pragma unroll 1
    for (int i = block.passed[warpgroup]; i > 0; --i) {
      skip_keys();
      skip_values(1);
    }
  }

  __device__ __forceinline__ void run() {
    bool fresh = true;
    bool pending = false;  // the product of the last tile
#pragma unroll
    for (int i = 0; i < Config::kParts * kScores / 2; ++i) p[i] = 0;
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i] = 0.0f;
    softmax.init();
    if (warpgroup == Config::kWarpgroups - 1) pass_turn();
    while (true) {
      ptx::mbarrier_wait(
          ptx::shared_address(&shared.query_full[blocks % Config::kQueryStages][fresh_warpgroup()]),
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
      dense.drop_late(p, params);
      ptx::wgmma_fence();
      issue_values(!fresh);
      ptx::wgmma_commit_group();
      if (plan.splits == 1) finish_rows(blocks - 1);
      ptx::wgmma_wait_group<0>();
      if (plan.splits == 1) store_out(blocks - 1);
    }
    if (warpgroup == 0) take_turn();  // the last arrival needs its partner
    if (!Config::kIntervals && plan.splits > 1 && blocks > 0) {
      combine_splits(params, plan, tiles, shared.blocks[0], out, softmax, warpgroup);
    }
  }
};

}  // namespace jax_flash::sm90
