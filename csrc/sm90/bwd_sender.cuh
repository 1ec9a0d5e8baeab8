// The role of the backward that sends dS to the other thread block of a pair.
#pragma once

#include <cstdint>

#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/ring.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm90 {

// Run by one warp. It waits for dS alone: whoever writes to a buffer of dS has waited until what
// was sent from it before is not needed any more.
template <typename Config>
struct BwdSender {
  BwdShared<Config>& shared;
  uint32_t tiles;  // shared address of the keys
  int rank;        // in the cluster

  __device__ __forceinline__ void send(uint32_t step) const {
    constexpr int kBytes = Config::ScoreLayout::kBytes;
    const int stage = step % 2;
    const uint32_t barrier = ptx::shared_address(&shared.other_score_full[stage]);
    // For what comes from the other. The consumers have seen what came two steps before.
    ptx::mbarrier_arrive_expect_tx(barrier, kBytes);
    ptx::bulk_copy_cluster(ptx::mapa(tiles + Config::kOtherScoreOffset + stage * kBytes, rank ^ 1),
                           tiles + Config::kScoreOffset + stage * kBytes, kBytes,
                           ptx::mapa(barrier, rank ^ 1));
  }

  __device__ __forceinline__ void run() const {
    RingIndex<BwdShared<Config>::kBlockSlots> slots;
    uint32_t step = 0;  // of all blocks
#pragma unroll 1
    while (true) {
      ptx::mbarrier_wait(ptx::shared_address(&shared.block_full[slots.stage()]), slots.parity());
      const BwdBlock<Config>& block = shared.blocks[slots.stage()];
      if (block.tiles < 0) break;
      const uint32_t end = step + block.steps;
      ptx::mbarrier_arrive(ptx::shared_address(&shared.block_empty[slots.stage()]));
      slots.next();
#pragma unroll 1
      for (; step < end; ++step) {
        ptx::mbarrier_wait(ptx::shared_address(&shared.score_full[step % 2]), step / 2 % 2);
        if (lane_id() == 0) send(step);
      }
    }
  }
};

}  // namespace jax_flash::sm90
