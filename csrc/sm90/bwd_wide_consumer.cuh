// The consumer warpgroups of the backward at widths over 128.
#pragma once

#include <cstdint>

#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/bwd_consumer.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/ring.cuh"

namespace jax_flash::sm90 {

// A warpgroup's registers hold one gradient of 64 keys and no more, so the two have parts of their
// own: the first S^T and dV, the second dP^T, dS^T and dK. P goes from one to the other through
// shared memory as it lies in registers, in the place where dS will lie. Both then have columns of
// dQ, whose products wait for the next step as in BwdConsumer.
template <typename Config>
struct BwdWideConsumer : BwdConsumer<Config> {
  using Base = BwdConsumer<Config>;
  using Element = typename Config::Element;
  using KeyLayout = typename Config::KeyLayout;
  using ValueLayout = typename Config::ValueLayout;
  using QueryLayout = typename Config::QueryLayout;
  using DoutLayout = typename Config::DoutLayout;
  using Base::kRows;
  using Base::kScores;
  using Base::kSums;
  static constexpr int kParts = 2;  // of dQ, of a warpgroup, unless in pairs
  static_assert(Config::kPaired ||
                    (Config::parts_of(0, 0, 0) == kParts && Config::parts_of(1, 0, 0) == kParts),
                "what waits count on");

  using Base::blocks;
  using Base::params;
  using Base::shared;
  using Base::steps;
  using Base::tiles;
  using Base::wait;
  using Base::warp_arrive;
  using Base::warpgroup;

  // The gradient that this warpgroup has: of values, or of keys.
  template <int kRole>
  using Gradient = float[(kRole == 0 ? Config::kHeadDimV : Config::kHeadDim) / 2];

  // d = A B^T: 64 rows of `a` by those of `b`, over the columns of both.
  template <typename Left, typename Right>
  static __device__ __forceinline__ void issue_scores(float (&d)[kScores], uint32_t a, uint32_t b) {
    const uint64_t left = ptx::wgmma_descriptor(a, 0);
    const uint64_t right = ptx::wgmma_descriptor(b, 0);
#pragma unroll
    for (int k = 0; k < Left::kSlabs * 4; ++k) {
      ptx::Wgmma<Element, kRows>::ss(d, left + (Left::offset(0, 2 * k) >> 4),
                                     right + (Right::offset(0, 2 * k) >> 4), k != 0);
    }
    ptx::wgmma_commit_group();
  }

  // d += A B: A, keys by queries, from registers, B the queries or their output gradients.
  template <typename Right, int kCount>
  static __device__ __forceinline__ void issue_gradient(float (&d)[kCount],
                                                        const uint32_t (&a)[kScores / 2],
                                                        uint32_t b) {
    const uint64_t rows = ptx::wgmma_descriptor(b, Right::kSlabBytes);
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
      ptx::Wgmma<Element, 2 * kCount>::rs(d, a + 4 * k, rows + (16 * 128 >> 4) * k, 1);
    }
    ptx::wgmma_commit_group();
  }

  // All parts of dQ of step `step` that are this warpgroup's.
  template <int kRole>
  __device__ __forceinline__ void issue_dqueries(float (&d)[kParts][kSums], uint32_t step) const {
#pragma unroll
    for (int part = 0; part < Config::parts_of(kRole, 0, 0); ++part) {
      this->issue_dquery(d[part], step, Config::first_part(kRole, 0) + part);
    }
  }
  template <int kRole>
  __device__ __forceinline__ void hand_over_all(const float (&d)[kParts][kSums]) const {
#pragma unroll
    for (int part = 0; part < Config::parts_of(kRole, 0, 0); ++part) this->hand_over(d[part]);
  }

  // This lane's part of P in the place of dS.
  __device__ __forceinline__ uint32_t probabilities(uint32_t step) const {
    return this->score_tile(step) + threadIdx.x % 128 * 16;
  }
  // The second warpgroup's products for dQ, of the step before the last, are done with the place
  // of P. All of its lanes say so, which have read and written there: racecheck follows no others.
  __device__ __forceinline__ void wait_scores_used() const {
    if (steps > 0) ptx::bar_sync(Config::kScoresUsed, 256);
  }
  // dS of the step before is there.
  __device__ __forceinline__ void wait_scores() const {
    wait(shared.score_full[(steps + 1) % 2], steps / 2 % 2);
  }

  // P of a tile of queries of one head, in registers and where the other warpgroup finds it.
  // beside(): what is done while the scores are computed.
  template <bool kClean, bool kOptions, typename Beside>
  __device__ __forceinline__ void share_probabilities(uint32_t (&p)[kScores / 2],
                                                      const BwdBlock<Config>& block, int tile,
                                                      Beside beside) const {
    const int first_row = tile * kRows;
    wait(shared.query_full[this->stage()], this->parity());
    if constexpr (!kClean) {
      wait(shared.dout_full[this->dout_stage()], this->dout_parity());
      this->clear_dead_rows(block, first_row);
    }
    float s[kScores];
    uint32_t weights[kScores / 2];
    ptx::wgmma_fence();
    issue_scores<KeyLayout, QueryLayout>(s, this->fresh_key_tile(), this->query_tile());
    float2 early[Base::kEarlyLoads];
    Base::load_early(early, this->lse_columns());
    const auto seen = this->template find_seen<kClean>(block);
    BwdBias bias{};
    if constexpr (kClean && kOptions) bias = this->option_scores(block, this->stage()).bias();
    beside();
    ptx::wgmma_wait_group<0>();
    this->template take_probabilities<kClean, kOptions>(p, weights, s, early, block, first_row,
                                                        seen, bias);
    wait_scores_used();
    if constexpr (Config::kPaired) {  // nor does the other thread block need what was sent there
      ptx::mbarrier_wait_cluster(ptx::shared_address(&shared.sent_score_empty[steps % 2]),
                                 (steps / 2 + 1) % 2);
    }
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) {
      const uint32_t words[4] = {weights[4 * i], weights[4 * i + 1], weights[4 * i + 2],
                                 weights[4 * i + 3]};
      ptx::st_shared_v4(probabilities(steps) + 2048 * i, words);
    }
    ptx::bar_arrive(Config::kScored, 256);
  }

  // One tile of queries of one head; see BwdConsumer. The first warpgroup's part.
  template <bool kClean, bool kOptions>
  __device__ __forceinline__ void step_scores(const BwdBlock<Config>& block, Gradient<0>& dvalue,
                                              int tile, bool first, bool last) {
    uint32_t p[kScores / 2];
    share_probabilities<kClean, kOptions>(p, block, tile, [] {});
    wait(shared.dout_full[this->dout_stage()], this->dout_parity());
    ptx::wgmma_fence();
    issue_gradient<DoutLayout>(dvalue, p, this->dout_tile());
    wait_scores();
    float dquery[kParts][kSums];
    ptx::wgmma_fence();
    // In the first step of a block of what lies there from the block before: dropped.
    issue_dqueries<0>(dquery, steps + 1);
    ptx::wgmma_wait_group<2>();
    this->release_douts();
    ptx::wgmma_wait_group<1>();
    if (!first) this->hand_over(dquery[0]);
    if (!last) this->template look_ahead<kOptions>(block);
    ptx::wgmma_wait_group<0>();
    if (!first) this->hand_over(dquery[1]);
    this->release_queries();
    ++steps;
  }

  // dS of a tile, in registers and where all who need it find it.
  template <bool kClean>
  __device__ __forceinline__ void share_score_gradients(uint32_t (&ds)[kScores / 2],
                                                        const BwdBlock<Config>& block,
                                                        int tile) const {
    const int first_row = tile * kRows;
    wait(shared.dout_full[this->dout_stage()], this->dout_parity());
    if constexpr (!kClean) {
      wait(shared.query_full[this->stage()], this->parity());
      this->clear_dead_rows(block, first_row);
    }
    float dp[kScores];
    uint32_t p[kScores / 2];
    ptx::wgmma_fence();
    issue_scores<ValueLayout, DoutLayout>(dp, this->fresh_key_tile() + Config::kValueOffset,
                                          this->dout_tile());
    ptx::bar_sync(Config::kScored, 256);
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) {
      const uint4 words = ptx::ld_shared_v4(probabilities(steps) + 2048 * i);
      p[4 * i] = words.x;
      p[4 * i + 1] = words.y;
      p[4 * i + 2] = words.z;
      p[4 * i + 3] = words.w;
    }
    float2 early[Base::kEarlyLoads];
    Base::load_early(early, this->delta_columns());
    ptx::wgmma_wait_group<0>();
    this->template take_score_gradients<kClean>(ds, p, p, dp, early, block);
    this->release_douts();
    ptx::bar_sync(3 + warpgroup, 128);  // all have read P
    this->store_scores(ds);
    ptx::fence_proxy_async_shared();
    warp_arrive(shared.score_full[steps % 2]);
  }

  // The second warpgroup's.
  template <bool kClean, bool kOptions>
  __device__ __forceinline__ void step_gradients(const BwdBlock<Config>& block, Gradient<1>& dkey,
                                                 int tile, bool first, bool last) {
    uint32_t ds[kScores / 2];
    share_score_gradients<kClean>(ds, block, tile);
    wait(shared.query_full[this->stage()], this->parity());
    wait_scores();
    float dquery[kParts][kSums];
    ptx::wgmma_fence();
    issue_dqueries<1>(dquery, steps + 1);
    issue_gradient<QueryLayout>(dkey, ds, this->query_tile());
    ptx::wgmma_wait_group<1>();
    ptx::bar_arrive(Config::kScoresUsed, 256);
    if (!first) hand_over_all<1>(dquery);
    if (!last) this->template look_ahead<kOptions>(block);
    ptx::wgmma_wait_group<0>();
    this->release_queries();
    ++steps;
  }

  template <int kRole, bool kClean, bool kOptions>
  __device__ __forceinline__ void step(const BwdBlock<Config>& block, Gradient<kRole>& gradient,
                                       int tile, bool first, bool last) {
    if constexpr (kRole == 0) {
      step_scores<kClean, kOptions>(block, gradient, tile, first, last);
    } else {
      step_gradients<kClean, kOptions>(block, gradient, tile, first, last);
    }
  }

  template <int kRole>
  __device__ __forceinline__ void run_block(const BwdBlock<Config>& block,
                                            Gradient<kRole>& gradient) {
    this->begin_block(block);
    this->for_steps(block, [&]<bool kClean, bool kOptions>(int tile, bool first, bool last) {
      step<kRole, kClean, kOptions>(block, gradient, tile, first, last);
    });
    warp_arrive(shared.value_empty[0]);
    wait_scores();
    float dquery[kParts][kSums];
    ptx::wgmma_fence();
    issue_dqueries<kRole>(dquery, steps + 1);
    ptx::wgmma_wait_group<0>();
    warp_arrive(shared.key_empty[0]);
    hand_over_all<kRole>(dquery);
    ++blocks;
  }

  // run_block<kRole>(block, gradient) has the steps of a block of work.
  template <int kRole, typename RunBlock>
  __device__ __forceinline__ void run_role(RunBlock run_block) {
    RingIndex<BwdShared<Config>::kBlockSlots> slots;
#pragma unroll 1
    while (true) {
      wait(shared.block_full[slots.stage()], slots.parity());
      const BwdBlock<Config>& block = shared.blocks[slots.stage()];
      if (block.tiles < 0) break;
      if constexpr (Config::kIntervals) blocks = block.key_copies;
      Gradient<kRole> gradient;
#pragma unroll
      for (float& x : gradient) x = 0.0f;
      if (block.tiles > 0) {
        // Of the step before the first, which pairs do not wait for.
        if (!Config::kPaired && kRole == 1 && blocks == 0) warp_arrive(shared.score_full[1]);
        run_block.template operator()<kRole>(block, gradient);
      }
      this->template store_gradient<kRole == 1>(gradient, block);
      if constexpr (Config::kIntervals) slots = block.slot;
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slots.stage()]));
      slots.next();
    }
    ptx::bar_sync(Config::kSumFree + warpgroup, Config::kSumThreads);  // the last arrival's partner
  }

  template <typename RunBlock>
  __device__ __forceinline__ void run_roles(RunBlock run_block) {
    if (warpgroup == 0) {
      run_role<0>(run_block);
      wait_scores_used();  // the last arrival's partner
    } else {
      run_role<1>(run_block);
    }
  }
  __device__ __forceinline__ void run() {
    run_roles([&]<int kRole>(const BwdBlock<Config>& block, Gradient<kRole>& gradient) {
      run_block<kRole>(block, gradient);
    });
  }
};

}  // namespace jax_flash::sm90
