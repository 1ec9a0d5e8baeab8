// FlashAttention forward for Hopper (sm_90a): TMA, wgmma, warp specialisation.
//
// Thread blocks stay and work off blocks of queries (fwd_block.cuh). Of the producer warpgroup, one
// warp plans, one copies queries, keys and values, one stores; each consumer warpgroup owns 64
// queries. With kDense, one more warpgroup feeds these with biases, masks and dropout. A consumer's
// step issues S(i) = Q K(i)^T and O += P(i-1) V(i-1) together and computes the softmax of S(i)
// while the second product runs; consumers take turns at issuing. Steps of one block of work follow
// those of the block before without a gap: the last product of a block is issued with the first
// scores of the next. docs/design/fwd_sm90.md has limits, barriers and measurements.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_consumer.cuh"
#include "sm90/fwd_feeder.cuh"
#include "sm90/fwd_producer.cuh"
#include "sm90/fwd_shared.cuh"

namespace jax_flash::sm90 {

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
      for (uint64_t& barrier : barriers)
        ptx::mbarrier_init(ptx::shared_address(&barrier), arrivals);
    };
    init(shared.key_full, 1);
    init(shared.value_full, 1);
    init(shared.key_empty, Config::kConsumerWarps);
    init(shared.value_empty, Config::kConsumerWarps);
    init(shared.rows_full, 128);
    init(shared.rows_empty, 32);
    init(shared.block_full, 1);
    int arrivals = Config::kConsumerWarps + 32 + 32;  // and the lanes of two warps
    if constexpr (Config::kDense) {
      for (auto& stage : shared.bits_full) init(stage, 32);
      for (auto& stage : shared.bits_empty) init(stage, 32);
      init(shared.bias_full, 32);
      init(shared.bias_empty, 128 / Config::kFeeders);
      arrivals += 32 * Config::kFeeders;
    }
    init(shared.block_empty, arrivals);
    if constexpr (Config::kIntervals) {
      ptx::mbarrier_init(ptx::shared_address(&shared.block_wanted), 1);
    }
    ptx::fence_mbarrier_init();
  } else if (threadIdx.x == 32) {  // while the planner looks for the first block
    ptx::tma_prefetch_map(&plan.query);
    ptx::tma_prefetch_map(&plan.key);
    ptx::tma_prefetch_map(&plan.value);
    if (Config::kStaged) ptx::tma_prefetch_map(&plan.out);
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
    } else if (Config::kFeeders == 1 && warp == 3) {
      if constexpr (Config::kDense) {
        FwdFeeder<Config> feeder{params, shared, tiles, 0};
        feeder.run();
      }
    }
  } else if (Config::kFeedsBits && warpgroup > Config::kWarpgroups) {
    if constexpr (Config::kFeedsBits) {
      ptx::setmaxnreg_dec<Config::kFeederRegisters>();
      const int number = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 % 4, 0);
      FwdFeeder<Config> feeder{params, shared, tiles, number};
      feeder.run();
    }
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    // With kDense found again rather than kept: registers are few.
    const int own = Config::kDense
                        ? __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0)
                        : warpgroup;
    FwdConsumer<Config> consumer{params, plan, shared, tiles, own};
    consumer.run();
  }
}

}  // namespace jax_flash::sm90
