// A step of a consumer warpgroup of the backward whose keys no query of the tile sees.
//
// A diagonal often starts below the first tile of the second warpgroup, a window often ends before
// the last tile of the first. The other warpgroup has the tensor cores for itself meanwhile.
#pragma once

#include <cstdint>

#include "ptx/wgmma.cuh"

namespace jax_flash::sm90 {

// In place of BwdConsumer::step, with the same arrivals (finishes, leaves: of dQ of the step
// before): dS is 0, and nothing is added to dK and dV. Rows that may hold anything need not be
// zeroed for this warpgroup. With intervals (else look_ahead is not called, and nothing need be the
// last) the queries are there, as in that step.
template <typename Consumer, typename LookAhead>
__device__ __forceinline__ void unseen_step(Consumer& consumer, bool first, bool last,
                                            bool finishes, bool leaves, LookAhead look_ahead) {
  constexpr bool kIntervals = Consumer::kIntervals;
  auto& shared = consumer.shared;
  const uint32_t steps = consumer.steps;
  if constexpr (!kIntervals) consumer.wait(shared.query_full[consumer.stage()], consumer.parity());
  consumer.wait(shared.dout_full[consumer.dout_stage()], consumer.dout_parity());
  consumer.pass_turn(consumer.warpgroup == 1 || !first);
  if constexpr (kIntervals) {
    if (last) consumer.release_values();
  }
  const uint32_t ds[Consumer::kScores / 2] = {};
  consumer.share_scores(ds);
  consumer.take_turn();
  consumer.wait(shared.score_full[(steps + 1) % 2], steps / 2 % 2);
  float dquery[Consumer::kSums];
  ptx::wgmma_fence();
  consumer.issue_dquery(dquery, steps + 1, consumer.own_columns());
  ptx::wgmma_wait_group<0>();
  consumer.warp_arrive(shared.score_empty[(steps + 1) % 2]);
  consumer.release_douts();
  consumer.release_queries();
  if (!first) consumer.hand_over(dquery, finishes, leaves);
  if constexpr (kIntervals) {
    if (!last) look_ahead();
  }
  ++consumer.steps;
}

}  // namespace jax_flash::sm90
