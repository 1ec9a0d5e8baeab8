// How a consumer warpgroup of the backward goes through the tiles of a block.
#pragma once

#include "sm90/bwd_block.cuh"
#include "sm90/bwd_unseen_step.cuh"

namespace jax_flash::sm90 {

// BwdConsumer::for_steps with intervals: the producer says what the next tile is, and the steps
// need no number. Each step but the last looks ahead.
template <bool kOptions, typename Consumer, typename Config, typename Step>
__device__ __forceinline__ void for_interval_steps(Consumer& consumer,
                                                   const BwdBlock<Config>& block, Step step) {
  int left = block.steps;
  consumer.template look_ahead<kOptions>(block, 0);
  const auto run_step = [&]<bool kClean>() {
    step.template operator()<kClean, kOptions>(0, left == block.steps, left == 1);
  };
  while (left > 0) {
    if constexpr (kBwdPassesUnseen<Config>) {
#pragma unroll 1
      for (; left > 0 && consumer.unseen; --left) {
        unseen_step(consumer, left == block.steps, left == 1, false, false,
                    [&] { consumer.template look_ahead<kOptions>(block); });
      }
    }
    if constexpr (!Config::kDense || Config::kStagesDense) {
#pragma unroll 1
      for (; left > 0 && consumer.clean; --left) run_step.template operator()<true>();
    }
    if (left == 0) break;
    if (kBwdPassesUnseen<Config> && consumer.unseen) continue;
    run_step.template operator()<false>();
    --left;
  }
}

// The same without intervals: no step needs to know whether it is the last.
template <typename Consumer, typename Config, typename Step>
__device__ __forceinline__ void for_plain_steps(Consumer& consumer, const BwdBlock<Config>& block,
                                                Step step) {
  const int warpgroup = consumer.warpgroup;
  const int first_tile = block.first_tile;
  const int end_tile = first_tile + block.tiles;
  const int clean_first = block.clean_first[warpgroup];
  const int clean_end = block.clean_end[warpgroup];
  int tile = block.start();
  bool first = true;
  const auto advance = [&] {
    first = false;
    if (++tile == end_tile) tile = first_tile;
  };
  int left = block.steps;
  while (left > 0) {
    if constexpr (kBwdPassesUnseen<Config>) {
#pragma unroll 1
      for (; left > 0 && !block.sees(warpgroup, tile); --left) {
        const bool finishes = block.finishes_before(tile);
        const bool leaves = !finishes && block.finishes_at(tile);
        unseen_step(consumer, first, false, finishes, leaves, [] {});
        advance();
      }
    }
#pragma unroll 1
    for (; left > 0 && tile >= clean_first && tile < clean_end; --left) {
      step.template operator()<true, false>(tile, first, false);
      advance();
    }
    if (left == 0) break;
    if constexpr (kBwdPassesUnseen<Config>) {
      if (!block.sees(warpgroup, tile)) continue;
    }
    step.template operator()<false, false>(tile, first, false);
    advance();
    --left;
  }
}

}  // namespace jax_flash::sm90
