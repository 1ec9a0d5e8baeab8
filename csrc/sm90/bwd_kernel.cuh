// FlashAttention backward for Hopper (sm_90a): TMA, wgmma, warp specialisation.
//
// Thread blocks stay and work off blocks of keys (bwd_block.cuh). One warp plans and copies; two
// consumer warpgroups own 64 keys each and go through the queries that see them, of all query heads
// that share the key head, so dK and dV are summed in registers. dQ is added to a sum in global
// memory, which the last to add or bwd_finish.cuh turns into the result. Over width 128 thread
// blocks work in pairs, unless there are intervals. docs/design/bwd_sm90.md has limits, barriers
// and measurements.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/bwd_adder.cuh"
#include "sm90/bwd_consumer.cuh"
#include "sm90/bwd_finishing_adder.cuh"
#include "sm90/bwd_paired_consumer.cuh"
#include "sm90/bwd_producer.cuh"
#include "sm90/bwd_sender.cuh"
#include "sm90/bwd_shared.cuh"
#include "sm90/bwd_wide_config.cuh"
#include "sm90/bwd_wide_consumer.cuh"

namespace jax_flash::sm90 {

// The consumers that a Config is for.
template <typename Config>
struct ConsumerOf {
  using Type = BwdConsumer<Config>;
};
template <ElementType kType, int kHeadDim, int kHeadDimV, bool kDeterministic, typename Mask,
          bool kDense>
struct ConsumerOf<BwdWideConfig<kType, kHeadDim, kHeadDimV, kDeterministic, Mask, kDense>> {
  using Config = BwdWideConfig<kType, kHeadDim, kHeadDimV, kDeterministic, Mask, kDense>;
  using Type =
      std::conditional_t<Config::kPaired, BwdPairedConsumer<Config>, BwdWideConsumer<Config>>;
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    mha_bwd_kernel(const __grid_constant__ MhaBwdParams params,
                   const __grid_constant__ BwdPlan plan) {
  extern __shared__ __align__(1024) unsigned char memory[];
  using Shared = BwdShared<Config>;
  Shared& shared = *reinterpret_cast<Shared*>(memory + Config::kStateOffset);
  const uint32_t tiles = ptx::shared_address(memory);
  // Uniform over the warp, and known to be.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int rank = Config::kPaired ? ptx::cluster_ctarank() : 0;
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&plan.query, &plan.key, &plan.value, &plan.dout}) {
      ptx::tma_prefetch_map(map);
    }
    const auto init = [](uint64_t& barrier, int arrivals) {
      ptx::mbarrier_init(ptx::shared_address(&barrier), arrivals);
    };
    for (int i = 0; i < Config::kKeyStages; ++i) {
      init(shared.key_full[i], 1);
      init(shared.key_empty[i], Config::kConsumerWarps);
      init(shared.value_full[i], 1);
      init(shared.value_empty[i], Config::kConsumerWarps);
    }
    for (int i = 0; i < Config::kStages; ++i) init(shared.query_full[i], 1);
    if constexpr (Config::kQueryArrivals > 0) {
      for (uint64_t& barrier : shared.query_empty) init(barrier, Config::kQueryArrivals);
      for (uint64_t& barrier : shared.dout_empty) init(barrier, Config::kDoutArrivals);
    }
    for (int i = 0; i < Config::kDoutStages; ++i) init(shared.dout_full[i], 1);
    if constexpr (Config::kFinishes) {
      for (uint64_t& barrier : shared.sum_full) init(barrier, 1);
      for (uint64_t& barrier : shared.dquery_left) init(barrier, 128);
    }
    for (int i = 0; i < 2; ++i) {
      init(shared.score_full[i], Config::kScoreWarps);
      init(shared.score_empty[i], Config::kConsumerWarps);
      init(shared.block_full[i], 1);
      init(shared.block_empty[i], (128 + 32) * Config::kWarpgroups + (Config::kPaired ? 32 : 0));
    }
    if constexpr (Config::kPaired) {
      for (uint64_t& barrier : shared.query_open) init(barrier, 1);
      for (uint64_t& barrier : shared.dout_open) init(barrier, 1);
      for (uint64_t& barrier : shared.other_score_full) init(barrier, 1);
      for (uint64_t& barrier : shared.sent_score_empty) init(barrier, Config::kConsumerWarps);
      init(shared.taken_full, 1);
      init(shared.taken_empty, 1);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (Config::kPaired) {
    ptx::cluster_arrive();  // the other one uses these barriers, too
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }

  if (warpgroup == Config::kWarpgroups) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) % 128 / 32, 0);
    if (warp == 0) {
      BwdProducer<Config> producer{params, plan, shared, tiles, rank};
      producer.run();
    } else if (warp <= Config::kWarpgroups) {
      if constexpr (Config::kFinishes) {
        BwdFinishingAdder<Config> adder{{params, shared, tiles, warp - 1, rank}, plan};
        adder.run();
      } else {
        BwdAdder<Config> adder{params, shared, tiles, warp - 1, rank};
        adder.run();
      }
    } else if constexpr (Config::kPaired) {
      BwdSender<Config> sender{shared, tiles, rank};
      sender.run();
    }
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    typename ConsumerOf<Config>::Type consumer{params, plan, shared, tiles, warpgroup};
    if constexpr (Config::kPaired) consumer.rank = rank;
    consumer.run();
  }
  if constexpr (Config::kPaired) {
    ptx::cluster_arrive();  // the other one may still arrive here
    ptx::cluster_wait();
  }
}

}  // namespace jax_flash::sm90
