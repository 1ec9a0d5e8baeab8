// The role of a consumer warpgroup of the backward: products and gradients.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_config.cuh"
#include "sm90/bwd_dense.cuh"
#include "sm90/bwd_option_scores.cuh"
#include "sm90/bwd_scores.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/bwd_steps.cuh"
#include "sm90/bwd_store.cuh"
#include "sm90/clear_rows.cuh"
#include "sm90/ring.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/quad.cuh"
#include "tile/score_options.cuh"

namespace jax_flash::sm90 {

// One consumer warpgroup: 64 keys of a block. Scores are held as S^T, keys by queries, so that P^T
// and dS^T are first operands of the products for dV and dK as they are. dQ needs dS of both
// warpgroups; it goes through shared memory, and its product waits for the next step.
template <typename Config>
struct BwdConsumer {
  using Element = typename Config::Element;
  using QueryLayout = typename Config::QueryLayout;
  using DoutLayout = typename Config::DoutLayout;
  using KeyLayout = typename Config::KeyLayout;
  using ValueLayout = typename Config::ValueLayout;
  using ScoreLayout = typename Config::ScoreLayout;
  static constexpr int kRows = Config::kRows;
  static constexpr int kScores = kRows / 2;
  static constexpr int kGrads = Config::kHeadDim / 2;
  static constexpr int kSums = Config::kSumRows / 2;
  static constexpr int kPieceSums = kSums / Config::kSumPieces;
  static constexpr bool kIntervals = Config::kIntervals;
  static constexpr bool kPassesUnseen = kBwdPassesUnseen<Config>;
  static constexpr int kEarlyLoads = Config::kHeadDim == 64 ? 4 : 2;

  const MhaBwdParams& params;
  const BwdPlan& plan;
  BwdShared<Config>& shared;
  uint32_t tiles;  // shared address of the keys
  int warpgroup;
  uint32_t steps = 0;   // before the one at work: the position in the rings of queries and scores
  uint32_t blocks = 0;  // that have tiles, before the one at work: the position in that of keys
  bool clean = false;   // with intervals: whether the tile of the next step is
  bool unseen = false;  // the same: whether none of its queries sees a key, where kPassesUnseen

  float dkey[kGrads];
  float dvalue[kGrads];

  __device__ __forceinline__ int stage() const { return steps % Config::kStages; }
  __device__ __forceinline__ uint32_t parity() const { return steps / Config::kStages % 2; }
  // The same of output gradients.
  __device__ __forceinline__ int dout_stage() const { return steps % Config::kDoutStages; }
  __device__ __forceinline__ uint32_t dout_parity() const {
    return steps / Config::kDoutStages % 2;
  }
  __device__ __forceinline__ uint32_t query_tile() const {
    return tiles + Config::kQueryOffset + stage() * QueryLayout::kBytes;
  }
  __device__ __forceinline__ uint32_t dout_tile() const {
    return tiles + Config::kDoutOffset + dout_stage() * DoutLayout::kBytes;
  }
  __device__ __forceinline__ uint32_t score_tile(uint32_t step) const {
    return tiles + Config::kScoreOffset + step % 2 * ScoreLayout::kBytes;
  }

  static __device__ __forceinline__ void wait(const uint64_t& barrier, uint32_t parity) {
    ptx::mbarrier_wait(ptx::shared_address(&barrier), parity);
  }
  static __device__ __forceinline__ void warp_arrive(uint64_t& barrier) {
    __syncwarp();
    ptx::mbarrier_arrive_if(lane_id() == 0, ptx::shared_address(&barrier));
  }

  // Give this step's queries or output gradients back. All lanes read what comes with them.
  __device__ __forceinline__ void release_queries() const {
    if constexpr (Config::kQueryArrivals == 0) {
      ptx::bar_arrive(Config::kQueryReleased + stage(), Config::kReleaseThreads);
    } else if (warpgroup == 0 || Config::kIntervals) {
      ptx::mbarrier_arrive(ptx::shared_address(&shared.query_empty[stage()]));
    } else {
      warp_arrive(shared.query_empty[stage()]);
    }
  }
  __device__ __forceinline__ void release_douts() const {
    if constexpr (Config::kDoutArrivals == 0) {
      ptx::bar_arrive(Config::kDoutReleased + dout_stage(), Config::kReleaseThreads);
    } else if (warpgroup == 1) {
      ptx::mbarrier_arrive(ptx::shared_address(&shared.dout_empty[dout_stage()]));
    } else {
      warp_arrive(shared.dout_empty[dout_stage()]);
    }
  }

  __device__ __forceinline__ void release_values() const {
    warp_arrive(shared.value_empty[blocks % Config::kKeyStages]);
  }

  __device__ __forceinline__ uint32_t key_tile() const {
    return tiles + Config::kKeyOffset + blocks % Config::kKeyStages * Config::kKeyStageBytes;
  }
  // The same, computed anew: descriptors that are kept through the loop cost more registers than
  // there are.
  __device__ __forceinline__ uint32_t fresh_key_tile() const {
    return ptx::fresh_address(key_tile());
  }

  // d = A B^T over the head dim: 64 rows of `a` (keys or values) by the rows of `b`.
  static __device__ __forceinline__ void issue_scores(float (&d)[kScores], uint32_t a, uint32_t b) {
    const uint64_t keys = ptx::wgmma_descriptor(a, 0);
    const uint64_t queries = ptx::wgmma_descriptor(b, 0);
#pragma unroll
    for (int k = 0; k < Config::kHeadDim / 16; ++k) {
      ptx::Wgmma<Element, kRows>::ss(d, keys + (KeyLayout::offset(0, 2 * k) >> 4),
                                     queries + (QueryLayout::offset(0, 2 * k) >> 4), k != 0);
    }
    ptx::wgmma_commit_group();
  }

  // d += A B: A, keys by queries, from registers, B the queries or their output gradients.
  static __device__ __forceinline__ void issue_gradient(float (&d)[kGrads],
                                                        const uint32_t (&a)[kScores / 2],
                                                        uint32_t b) {
    const uint64_t rows = ptx::wgmma_descriptor(b, QueryLayout::kSlabBytes);
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
      ptx::Wgmma<Element, Config::kHeadDim>::rs(d, a + 4 * k, rows + (16 * 128 >> 4) * k, 1);
    }
    ptx::wgmma_commit_group();
  }

  // d = K^T dS^T of step `step`: slab `columns` of the width, and this warpgroup's queries.
  __device__ __forceinline__ void issue_dquery(float (&d)[kSums], uint32_t step,
                                               int columns) const {
    const int rows = Config::kSplitsColumns ? 0 : Config::kSumRows * warpgroup;
    const uint64_t keys =
        ptx::wgmma_descriptor(fresh_key_tile() + columns * KeyLayout::kSlabBytes, 0);
    const uint64_t scores = ptx::wgmma_descriptor(score_tile(step) + rows * 128, 0);
#pragma unroll
    for (int k = 0; k < Config::kKeys / 16; ++k) {
      ptx::Wgmma<Element, Config::kSumRows>::template ss<1>(
          d, keys + (16 * 128 >> 4) * k, scores + (ScoreLayout::offset(0, 2 * k) >> 4), k != 0);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ int own_columns() const {
    return Config::kSplitsColumns ? warpgroup : 0;
  }

  // Turns at the products for dQ and dK: each warpgroup has its own after the other has asked for
  // its next scores. Whole in each block of work: the last turns of a block do not wait for the
  // first scores of the next, whose keys come when this one is done.
  __device__ __forceinline__ void pass_turn(bool passes) const {
    ptx::bar_arrive_if(passes, 2 - warpgroup, 256);
  }
  __device__ __forceinline__ void take_turn() const { ptx::bar_sync(1 + warpgroup, 256); }

  // Makes rows that were zeroed visible to this warpgroup's products; the other one does the same
  // for itself.
  __device__ __forceinline__ void end_clearing() const {
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(3 + warpgroup, 128);
  }

  // Leaves a piece of a product for dQ, in the order of its registers, to the warp that adds it to
  // the sum.
  __device__ __forceinline__ void hand_over_piece(const float (&d)[kPieceSums]) const {
    ptx::bar_sync(Config::kSumFree + warpgroup, Config::kSumThreads);
    const uint32_t target =
        tiles + Config::kSumOffset + warpgroup * 512 * kPieceSums + threadIdx.x % 128 * 16;
#pragma unroll
    for (int i = 0; i < kPieceSums / 4; ++i) {
      const float* const x = d + 4 * i;
      const uint32_t words[4] = {__float_as_uint(x[0]), __float_as_uint(x[1]),
                                 __float_as_uint(x[2]), __float_as_uint(x[3])};
      ptx::st_shared_v4(target + 2048 * i, words);
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_arrive(Config::kSumReady + warpgroup, Config::kSumThreads);
  }
  // finishes: whether this block is the last to add to it, and makes dQ. leaves: see dquery_left.
  __device__ __forceinline__ void hand_over(const float (&d)[kSums], bool finishes = false,
                                            bool leaves = false) const {
    if constexpr (Config::kFinishes) {
      if (finishes) {
        finish_dquery(d);
      } else {
        hand_over_pieces(d);
      }
      if (leaves) ptx::mbarrier_arrive(ptx::shared_address(&shared.dquery_left[warpgroup]));
    } else {
      hand_over_pieces(d);
    }
  }
  __device__ __forceinline__ void hand_over_pieces(const float (&d)[kSums]) const {
#pragma unroll
    for (int piece = 0; piece < Config::kSumPieces; ++piece) {
      float x[kPieceSums];
#pragma unroll
      for (int i = 0; i < kPieceSums; ++i) x[i] = d[piece * kPieceSums + i];
      hand_over_piece(x);
    }
  }

  // Makes dQ of this block's part and the sum of all others, which is where that part would go, and
  // leaves it there, a row for each query.
  __device__ __forceinline__ void finish_dquery(const float (&d)[kSums]) const {
    ptx::bar_sync(Config::kSumFree + warpgroup, Config::kSumThreads);
    wait(shared.sum_full[warpgroup], shared.sum_parity[warpgroup]);
    const uint32_t sum = tiles + Config::kSumOffset + warpgroup * 4 * Config::kSumFloats;
    float x[kSums];
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      const uint4 words = ptx::ld_shared_v4(sum + threadIdx.x % 128 * 16 + 2048 * i);
      x[4 * i] = d[4 * i] + __uint_as_float(words.x);
      x[4 * i + 1] = d[4 * i + 1] + __uint_as_float(words.y);
      x[4 * i + 2] = d[4 * i + 2] + __uint_as_float(words.z);
      x[4 * i + 3] = d[4 * i + 3] + __uint_as_float(words.w);
    }
    ptx::bar_sync(3 + warpgroup, 128);  // all have read
    using Layout = SlabLayout<Config::kSumRows, 64>;
    const int lane = lane_id();
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const uint32_t target = sum + Layout::offset(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < Config::kSumRows / 16; ++k) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = ptx::cvt_rn_x2<Element>(params.factor * x[8 * k + 2 * j],
                                           params.factor * x[8 * k + 2 * j + 1]);
      }
      ptx::stmatrix_x4_trans(target + 16 * 128 * k, words);
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_arrive(Config::kSumReady + warpgroup, Config::kSumThreads);
  }

  // Zeroes the rows of queries and output gradients that may hold anything.
  __device__ __forceinline__ void clear_dead_rows(const BwdBlock<Config>& block,
                                                  int first_row) const {
    if constexpr (Config::kIntervals) {
      const RowRecord* const records = shared.records[stage()];
      const float* const lse = shared.row_lse[stage()];
      if (!shared.steps[stage()].dead()) {
        if (!Config::kDense || !ScoreOptions::hides(params)) return;
        const float largest = fmaxf(lse[lane_id()], lse[lane_id() + 32]);
        if (!__any_sync(0xffffffffu, largest == __builtin_huge_valf())) return;
      }
      const auto is_dead = [&](int row) {
        if (Config::kDense && lse[row] == __builtin_huge_valf()) return true;
        return records[row].first >= records[row].end;
      };
      clear_rows_if<QueryLayout>(query_tile(), kRows, is_dead);
      clear_rows_if<DoutLayout>(dout_tile(), kRows, is_dead);
    } else {
      const RowInterval live = block.live;
      if (live.first <= first_row && min(first_row + kRows, params.query_length) <= live.end) {
        return;
      }
      const int begin = min(max(live.first - first_row, 0), kRows);
      const int end = min(max(live.end - first_row, begin), kRows);
      clear_rows<QueryLayout>(query_tile(), 0, begin);
      clear_rows<QueryLayout>(query_tile(), end, kRows);
      clear_rows<DoutLayout>(dout_tile(), 0, begin);
      clear_rows<DoutLayout>(dout_tile(), end, kRows);
    }
    end_clearing();
  }

  __device__ __forceinline__ const float* lse_columns() const {
    return shared.row_lse[stage()] + fragment_column();
  }
  __device__ __forceinline__ const float* delta_columns() const {
    return shared.row_delta[dout_stage()] + fragment_column();
  }
  // The first of them: read before a wait, which nothing is moved across.
  template <int kCount>
  static __device__ __forceinline__ void load_early(float2 (&early)[kCount], const float* columns) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      early[j] = *reinterpret_cast<const float2*>(columns + 8 * j);
    }
  }

  __device__ __forceinline__ BwdDense<Config> dense(const BwdBlock<Config>& block) const {
    const int i = stage();
    return {params,    block, shared.steps[i], shared.dense_steps[i], shared.records[i],
            warpgroup, tiles};
  }

  __device__ __forceinline__ OptionScores<Config> option_scores(const BwdBlock<Config>& block,
                                                                int stage) const {
    return {params, plan, shared.records[stage], shared.steps[stage], block, warpgroup};
  }

  // Which of this lane's scores of this step are seen, by the intervals of the queries: bits, found
  // while the scores are computed. Unless the tile is clean. With kDense, what BwdDense finds.
  template <bool kClean>
  __device__ __forceinline__ auto find_seen(const BwdBlock<Config>& block) const {
    if constexpr (Config::kDense) {
      return dense(block).find_bits();
    } else if constexpr (Config::kIntervals && !kClean) {
      const int warp = static_cast<int>(ptx::fresh_address(threadIdx.x)) / 32 % 4;
      const int key = block.first_key + Config::kKeyStep * warpgroup + 16 * warp + fragment_row();
      const RowRecord* const rows = shared.records[stage()] + fragment_column();
      if (!shared.steps[stage()].mixed()) return seen_scores<kScores, false>(rows, key, {0, 0});
      return seen_scores<kScores, true>(rows, key, {block.mask.id(key), block.mask.id(key + 8)});
    } else {
      return uint32_t{0};
    }
  }

  // P = 2^(S - lse) of this step's queries, from `first_row` on. weights: what dS is a multiple of,
  // P unless scores have options (kOptions), where s has them, too; else s is used up. seen: see
  // find_seen. bias: in a clean tile.
  template <bool kClean, bool kOptions, int kEarly, typename Seen>
  __device__ __forceinline__ void take_probabilities(uint32_t (&p)[kScores / 2],
                                                     uint32_t (&weights)[kScores / 2],
                                                     float (&s)[kScores],
                                                     const float2 (&early)[kEarly],
                                                     const BwdBlock<Config>& block, int first_row,
                                                     Seen seen, const BwdBias& bias) const {
    if constexpr (Config::kDense) {
      dense(block).template take<kClean>(p, weights, s, early, lse_columns(), seen);
    } else if constexpr (kOptions) {
      option_scores(block, stage())
          .template take<kClean>(p, weights, s, early, lse_columns(), seen, bias);
    } else {
      plain_probabilities<Config, kClean>(p, s, early, lse_columns(), params, block, warpgroup,
                                          first_row, seen);
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) weights[i] = p[i];
    }
  }

  // dS = P (dP - delta), with P times the derivatives of the logits: weights, in f32 or packed. p:
  // see BwdDense.
  template <bool kClean, typename Weights, int kEarly>
  __device__ __forceinline__ void take_score_gradients(uint32_t (&ds)[kScores / 2],
                                                       const Weights& weights,
                                                       const uint32_t (&p)[kScores / 2],
                                                       const float (&dp)[kScores],
                                                       const float2 (&early)[kEarly],
                                                       const BwdBlock<Config>& block) const {
    const float* const delta = delta_columns();
    if constexpr (Config::kDense) {
      dense(block).template take_gradients<kClean>(ds, weights, p, dp, early, delta);
    } else {
      score_gradients<Config>(ds, weights, dp, early, delta);
    }
  }

  // One tile of queries of one head. kClean: see BwdBlock. kOptions: of scores. first, last: of the
  // block; in the first step there is no product for dQ of the step before. With intervals its
  // queries are there, it looks at those of the next while products run, and gives the values back.
  template <bool kClean, bool kOptions>
  __device__ __forceinline__ void step(const BwdBlock<Config>& block, int tile, bool first,
                                       bool last) {
    const int first_row = tile * kRows;
    if constexpr (!Config::kIntervals) wait(shared.query_full[stage()], parity());
    wait(shared.dout_full[dout_stage()], dout_parity());
    if constexpr (!kClean || Config::kDense) clear_dead_rows(block, first_row);
    const int own = Config::kKeyStep * warpgroup;  // first key
    float s[kScores];
    float dp[kScores];
    uint32_t p[kScores / 2];
    uint32_t weights[kScores / 2];
    uint32_t ds[kScores / 2];
    // Both products want all that shared memory can give: what is asked for beside them comes when
    // they are done.
    // At width 64 without intervals ptxas spills one type with this, the other without it.
    constexpr bool kFits =
        Config::kHeadDim > 64 || Config::kIntervals || std::is_same_v<Element, __half>;
    constexpr bool kLoadsFirst = kClean && !Config::kDense && kFits;
    constexpr bool kKeepsWeights = kLoadsFirst && kOptions;
    float2 early_lse[kLoadsFirst ? kRows / 8 : kEarlyLoads];
    BwdBias bias{};
    if constexpr (kLoadsFirst) {
      load_early(early_lse, lse_columns());
      if constexpr (kOptions) bias = option_scores(block, stage()).bias();
    }
    ptx::wgmma_fence();
    issue_scores(s, fresh_key_tile() + own * 128, query_tile());
    const auto issue_value_scores = [&] {
      issue_scores(dp, fresh_key_tile() + Config::kValueOffset + own * 128, dout_tile());
    };
    // Options beside what is dense take the registers that dP beside S and P would need.
    constexpr bool kOneByOne = Config::kDense && !kClean && Config::kHeadDim > 64;
    if constexpr (!kOneByOne) issue_value_scores();
    pass_turn(warpgroup == 1 || !first);

    if constexpr (!kLoadsFirst) load_early(early_lse, lse_columns());
    const auto seen = find_seen<kClean>(block);
    ptx::wgmma_wait_group<kOneByOne ? 0 : 1>();
    take_probabilities<kClean, kOptions>(p, weights, s, early_lse, block, first_row, seen, bias);
    float2 early[kLoadsFirst ? kRows / 8 : kEarlyLoads];
    if constexpr (kLoadsFirst) load_early(early, delta_columns());
    ptx::wgmma_fence();
    if constexpr (kOneByOne) issue_value_scores();
    issue_gradient(dvalue, p, dout_tile());

    if constexpr (!kLoadsFirst) load_early(early, delta_columns());
    ptx::wgmma_wait_group<kOneByOne ? 0 : 1>();
    if constexpr (Config::kIntervals) {
      if (last) release_values();
    }
    if constexpr (kKeepsWeights) {
      take_score_gradients<kClean>(ds, s, p, dp, early, block);
    } else {
      take_score_gradients<kClean>(ds, weights, p, dp, early, block);
    }
    share_scores(ds);

    take_turn();
    wait(shared.score_full[(steps + 1) % 2], steps / 2 % 2);
    float dquery[kSums];
    ptx::wgmma_fence();
    // In the first step of a block of what lies there from the block before: dropped.
    issue_dquery(dquery, steps + 1, own_columns());
    issue_gradient(dkey, ds, query_tile());
    const bool finishes = block.finishes_before(tile);
    const bool leaves = !finishes && block.finishes_at(tile);
    ptx::wgmma_wait_group<1>();
    warp_arrive(shared.score_empty[(steps + 1) % 2]);
    release_douts();
    if (!first) hand_over(dquery, finishes, leaves);
    if constexpr (Config::kIntervals) {
      if (!last) look_ahead<kOptions>(block);
    }
    ptx::wgmma_wait_group<0>();
    release_queries();
    ++steps;
  }

  // dS of this step for both warpgroups' products for dQ.
  __device__ __forceinline__ void share_scores(const uint32_t (&ds)[kScores / 2]) const {
    wait(shared.score_empty[steps % 2], (steps - 1) / 2 % 2);
    store_scores(ds);
    ptx::fence_proxy_async_shared();
    warp_arrive(shared.score_full[steps % 2]);
  }

  // dS^T to shared memory as dS, a row for each query.
  __device__ __forceinline__ void store_scores(const uint32_t (&ds)[kScores / 2]) const {
    const int lane = lane_id();
    const int warp = static_cast<int>(ptx::fresh_address(threadIdx.x) / 32 % 4);
    const uint32_t target =
        score_tile(steps) +
        ScoreLayout::offset(lane / 16 * 8 + lane % 8,
                            Config::kKeyStep / 8 * warpgroup + 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
      const uint32_t words[4] = {ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3]};
      ptx::stmatrix_x4_trans(target + 16 * 128 * k, words);
    }
  }

  // The gradient of the keys of a block, or of their values.
  template <bool kIsKey, int kCount>
  __device__ __forceinline__ void store_gradient(const float (&grad)[kCount],
                                                 const BwdBlock<Config>& block) const {
    // P of what dropout keeps is larger.
    const float value_factor = Config::kDense ? params.intervals.kept_scale : 1.0f;
    const float factor = kIsKey ? params.factor : value_factor;
    if (plan.parts.divisor > 1) {
      constexpr int kOffset = kIsKey ? 0 : kBwdKeyChunk * Config::kHeadDim;
      add_key_gradient(grad, factor, kOffset, block, params, warpgroup);
    } else if constexpr (kIsKey) {
      store_key_gradient(grad, factor, params.dkey, params.f32_dkey, params.head_dim, block, params,
                         warpgroup);
    } else {
      store_key_gradient(grad, factor, params.dvalue, params.f32_dvalue, params.head_dim_v, block,
                         params, warpgroup);
    }
  }

  // The keys and values of a block are there, and nothing else is read with them.
  __device__ __forceinline__ void begin_block(const BwdBlock<Config>& block) const {
    const int key_stage = blocks % Config::kKeyStages;
    wait(shared.key_full[key_stage], blocks / Config::kKeyStages % 2);
    wait(shared.value_full[key_stage], blocks / Config::kKeyStages % 2);
    if constexpr (Config::kIntervals) {
      if (!block.dead_keys) return;
      const auto is_dead = [&](int row) { return block.mask.id(block.first_key + row) < 0; };
      clear_rows_if<KeyLayout>(key_tile(), Config::kKeys, is_dead);
      clear_rows_if<ValueLayout>(key_tile() + Config::kValueOffset, Config::kKeys, is_dead);
      end_clearing();
    } else if (block.keys < Config::kKeys) {
      clear_rows<KeyLayout>(key_tile(), block.keys, Config::kKeys);
      clear_rows<ValueLayout>(key_tile() + Config::kValueOffset, block.keys, Config::kKeys);
      end_clearing();
    }
  }

  // With intervals: waits for the queries that are `ahead` steps further, and finds out what their
  // tile is.
  template <bool kOptions>
  __device__ __forceinline__ void look_ahead(const BwdBlock<Config>& block, uint32_t ahead = 1) {
    const uint32_t at = steps + ahead;
    const int stage = at % Config::kStages;
    wait(shared.query_full[stage], at / Config::kStages % 2);
    const BwdStep step = shared.steps[stage];
    clean = step.clean(warpgroup);
    if constexpr (kPassesUnseen) unseen = step.unseen(warpgroup);
    if constexpr (Config::kStagesDense) {
      clean = BwdDense<Config>::is_clean(params, step, warpgroup);
      BwdDense<Config>::request(params, block, shared.dense_steps[stage], tiles);
    }
    if constexpr (kOptions) {
      if (clean && params.intervals.slopes != nullptr) {
        clean = option_scores(block, stage).on_one_side();
      }
    }
  }

  // Calls step<kClean, kOptions>(tile, first, last) for all tiles of a block.
  template <typename Step>
  __device__ __forceinline__ void for_steps(const BwdBlock<Config>& block, Step step) {
    if constexpr (!Config::kIntervals) {
      for_plain_steps(*this, block, step);
    } else if (!Config::kDense && ScoreOptions::any(params)) {
      for_interval_steps<true>(*this, block, step);
    } else {
      for_interval_steps<false>(*this, block, step);
    }
  }

  // All of a block but storing dK. dV is stored beside the last product for dQ, and while the adder
  // may still be at work on the dQ before.
  __device__ __forceinline__ void run_block(const BwdBlock<Config>& block) {
    const int key_stage = blocks % Config::kKeyStages;
    begin_block(block);
    for_steps(block, [&]<bool kClean, bool kOptions>(int tile, bool first, bool last) {
      step<kClean, kOptions>(block, tile, first, last);
    });
    if constexpr (!Config::kIntervals) warp_arrive(shared.value_empty[key_stage]);
    pass_turn(warpgroup == 0);
    wait(shared.score_full[(steps + 1) % 2], steps / 2 % 2);
    float dquery[kSums];
    ptx::wgmma_fence();
    issue_dquery(dquery, steps + 1, own_columns());
    store_gradient<false>(dvalue, block);
    ptx::wgmma_wait_group<0>();
    warp_arrive(shared.key_empty[key_stage]);
    hand_over(dquery, block.finishes_before(block.start()), true);
    ++blocks;
  }

  __device__ __forceinline__ void run() {
    RingIndex<BwdShared<Config>::kBlockSlots> slots;
#pragma unroll 1
    while (true) {
      wait(shared.block_full[slots.stage()], slots.parity());
      const BwdBlock<Config>& block = shared.blocks[slots.stage()];
      if (block.tiles < 0) break;
      if constexpr (Config::kIntervals) blocks = block.key_copies;
#pragma unroll
      for (int i = 0; i < kGrads; ++i) dkey[i] = dvalue[i] = 0.0f;
      if (block.tiles > 0) {
        if (blocks == 0) warp_arrive(shared.score_full[1]);  // of the step before the first
        run_block(block);
      } else {
        store_gradient<false>(dvalue, block);
      }
      store_gradient<true>(dkey, block);
      if constexpr (Config::kIntervals) slots = block.slot;
      // By all threads, which have all read it: what racecheck understands.
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slots.stage()]));
      slots.next();
    }
    ptx::bar_sync(Config::kSumFree + warpgroup, Config::kSumThreads);  // the last arrival's partner
  }
};

}  // namespace jax_flash::sm90
