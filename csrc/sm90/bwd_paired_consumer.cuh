// The consumer warpgroups of the backward at widths over 128, of pairs of thread blocks.
#pragma once

#include <cstdint>

#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/bwd_wide_consumer.cuh"
#include "sm90/clear_rows.cuh"

namespace jax_flash::sm90 {

// As BwdWideConsumer, but a warpgroup has one part of dQ or none, over the keys of both thread
// blocks: those of this one with its own dS, those of the other with the dS that was sent. Both are
// at the same step, in blocks of work of the same queries.
template <typename Config>
struct BwdPairedConsumer : BwdWideConsumer<Config> {
  using Base = BwdWideConsumer<Config>;
  using Element = typename Config::Element;
  using KeyLayout = typename Config::KeyLayout;
  using QueryLayout = typename Config::QueryLayout;
  using DoutLayout = typename Config::DoutLayout;
  using ScoreLayout = typename Config::ScoreLayout;
  using Base::kScores;
  using Base::kSums;
  using Base::shared;
  using Base::steps;
  using Base::tiles;
  using Base::wait;
  using Base::warp_arrive;
  using Base::warpgroup;
  template <int kRole>
  using Gradient = typename Base::template Gradient<kRole>;

  int rank;  // in the cluster

  // Of the first warpgroup: the last piece of dQ that has to be handed over, if there is one.
  static constexpr bool kLeavesRest = Config::kDoutStages == 1;
  static_assert(!kLeavesRest || Config::kSumPieces == 2, "one piece at once, one later");
  float rest[Base::kPieceSums];
  bool has_rest = false;

  __device__ __forceinline__ bool has_part(int tile) const {
    return Config::parts_of(warpgroup, rank, tile) > 0;
  }
  // The tile of the step before, which is not in another block of work.
  static __device__ __forceinline__ int tile_before(const BwdBlock<Config>& block, int tile) {
    return tile > block.first_tile ? tile - 1 : block.first_tile + block.tiles - 1;
  }

  // dS of the step before is there, of both thread blocks.
  __device__ __forceinline__ void wait_all_scores() const {
    const uint32_t parity = (steps + 1) / 2 % 2 ^ 1;
    wait(shared.score_full[(steps + 1) % 2], parity);
    wait(shared.other_score_full[(steps + 1) % 2], parity);
  }
  // This warp is done with the other's dS of the step before.
  __device__ __forceinline__ void give_scores_back(bool gives) const {
    __syncwarp();
    const uint32_t barrier = ptx::shared_address(&shared.sent_score_empty[(steps + 1) % 2]);
    ptx::mbarrier_arrive_cluster_if(gives && lane_id() == 0, ptx::mapa(barrier, rank ^ 1));
  }

  // d = K^T dS^T of the step before, over the keys of both: this warpgroup's slab of the width.
  template <int kRole>
  __device__ __forceinline__ void issue_dquery_of_pair(float (&d)[kSums]) const {
    const int slab = Config::first_part(kRole, rank);
    const uint32_t keys[2] = {this->fresh_key_tile() + slab * KeyLayout::kSlabBytes,
                              ptx::fresh_address(tiles) + Config::kOtherKeyOffset +
                                  (slab - Config::first_other_slab(rank)) * KeyLayout::kSlabBytes};
    const uint32_t scores[2] = {
        this->score_tile(steps + 1),
        tiles + Config::kOtherScoreOffset + (steps + 1) % 2 * ScoreLayout::kBytes};
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint64_t left = ptx::wgmma_descriptor(keys[block], 0);
      const uint64_t right = ptx::wgmma_descriptor(scores[block], 0);
#pragma unroll
      for (int k = 0; k < Config::kKeys / 16; ++k) {
        ptx::Wgmma<Element, Config::kSumRows>::template ss<1>(
            d, left + (16 * 128 >> 4) * k, right + (ScoreLayout::offset(0, 2 * k) >> 4),
            block + k != 0);
      }
    }
    ptx::wgmma_commit_group();
  }

  // dV += P^T dO, and dQ of the step before.
  template <bool kWithQueries>
  __device__ __forceinline__ void add_to_values(Gradient<0>& dvalue,
                                                const uint32_t (&p)[kScores / 2]) {
    wait(shared.dout_full[this->dout_stage()], this->dout_parity());
    if constexpr (kWithQueries && kLeavesRest) {
      add_to_values_first(dvalue, p);
      return;
    }
    float dquery[kSums];
    if constexpr (kWithQueries) {
      wait_all_scores();
      ptx::wgmma_fence();
      issue_dquery_of_pair<0>(dquery);
    } else {
      ptx::wgmma_fence();
    }
    Base::template issue_gradient<DoutLayout>(dvalue, p, this->dout_tile());
    if constexpr (kWithQueries) {
      ptx::wgmma_wait_group<1>();
      give_scores_back(true);
      this->hand_over(dquery);
    }
    ptx::wgmma_wait_group<0>();
    this->release_douts();
  }

  // With one stage of output gradients: dV first, which needs nothing of the other thread block, so
  // that they are given back before dQ is done. Its last piece follows beside the next scores.
  __device__ __forceinline__ void add_to_values_first(Gradient<0>& dvalue,
                                                      const uint32_t (&p)[kScores / 2]) {
    ptx::wgmma_fence();
    Base::template issue_gradient<DoutLayout>(dvalue, p, this->dout_tile());
    wait_all_scores();
    float dquery[kSums];
    ptx::wgmma_fence();
    issue_dquery_of_pair<0>(dquery);
    ptx::wgmma_wait_group<1>();
    this->release_douts();
    ptx::wgmma_wait_group<0>();
    give_scores_back(true);
    float piece[Base::kPieceSums];
#pragma unroll
    for (int i = 0; i < Base::kPieceSums; ++i) {
      piece[i] = dquery[i];
      rest[i] = dquery[kSums - Base::kPieceSums + i];
    }
    this->hand_over_piece(piece);
    has_rest = true;
  }
  // The last piece of dQ of an earlier step, of the first warpgroup.
  __device__ __forceinline__ void hand_over_rest() {
    if (kLeavesRest && has_rest) this->hand_over_piece(rest);
    has_rest = false;
  }

  // dK += dS^T Q, and dQ of the step before if there is one: `first` is of the block of work.
  template <bool kWithQueries>
  __device__ __forceinline__ void add_to_keys(Gradient<1>& dkey, const uint32_t (&ds)[kScores / 2],
                                              bool first) const {
    float dquery[kSums];
    if constexpr (kWithQueries) {
      wait_all_scores();
      ptx::wgmma_fence();
      issue_dquery_of_pair<1>(dquery);
    } else {
      ptx::wgmma_fence();
    }
    Base::template issue_gradient<QueryLayout>(dkey, ds, this->query_tile());
    if constexpr (kWithQueries) ptx::wgmma_wait_group<1>();
    ptx::bar_arrive(Config::kScoresUsed, 256);
    give_scores_back(!first);
    if constexpr (kWithQueries) this->hand_over(dquery);
    ptx::wgmma_wait_group<0>();
  }

  template <int kRole, bool kClean>
  __device__ __forceinline__ void step(const BwdBlock<Config>& block, Gradient<kRole>& gradient,
                                       int tile, bool first) {
    const bool with_queries = !first && has_part(tile_before(block, tile));
    uint32_t scores[kScores / 2];
    if constexpr (kRole == 0) {
      Base::template share_probabilities<kClean, false>(scores, block, tile,
                                                        [&] { hand_over_rest(); });
      if (with_queries) {
        add_to_values<true>(gradient, scores);
      } else {
        add_to_values<false>(gradient, scores);
      }
    } else {
      Base::template share_score_gradients<kClean>(scores, block, tile);
      wait(shared.query_full[this->stage()], this->parity());
      if (with_queries) {
        add_to_keys<true>(gradient, scores, first);
      } else {
        add_to_keys<false>(gradient, scores, first);
      }
    }
    this->release_queries();
    ++steps;
  }

  // What is left after the last step of a block of work.
  template <int kRole, bool kWithQueries>
  __device__ __forceinline__ void finish_block() {
    float dquery[kSums];
    if constexpr (kRole == 0) hand_over_rest();
    if constexpr (kWithQueries) {
      wait_all_scores();
      ptx::wgmma_fence();
      issue_dquery_of_pair<kRole>(dquery);
      ptx::wgmma_wait_group<0>();
    }
    warp_arrive(shared.key_empty[0]);
    give_scores_back(true);
    if constexpr (kWithQueries) this->hand_over(dquery);
  }

  // As in BwdConsumer, and the other's keys.
  __device__ __forceinline__ void begin_block(const BwdBlock<Config>& block) const {
    Base::begin_block(block);
    const int other_keys = block.mask.key_length - (block.first_key ^ Config::kKeys);
    if (other_keys < Config::kKeys) {
      clear_rows<typename Config::OtherKeyLayout>(tiles + Config::kOtherKeyOffset,
                                                  max(other_keys, 0), Config::kKeys);
      this->end_clearing();
    }
  }

  template <int kRole>
  __device__ __forceinline__ void run_block(const BwdBlock<Config>& block,
                                            Gradient<kRole>& gradient) {
    begin_block(block);
    this->for_steps(block, [&]<bool kClean, bool kOptions>(int tile, bool first, bool) {
      step<kRole, kClean>(block, gradient, tile, first);
    });
    warp_arrive(shared.value_empty[0]);
    if (has_part(block.first_tile + block.tiles - 1)) {
      finish_block<kRole, true>();
    } else {
      finish_block<kRole, false>();
    }
    ++this->blocks;
  }

  __device__ __forceinline__ void run() {
    Base::run_roles([&]<int kRole>(const BwdBlock<Config>& block, Gradient<kRole>& gradient) {
      run_block<kRole>(block, gradient);
    });
  }
};

}  // namespace jax_flash::sm90
