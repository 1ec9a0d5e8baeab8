// What the roles of a thread block share: barriers, blocks of work, rows that are finished.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host/params.h"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/ring.cuh"

namespace jax_flash::sm90 {

// Between feeders and consumers, of which each has a counterpart: of one warp each.
template <typename Config>
struct FwdDenseShared {
  static constexpr int kBitStages = 2;
  uint2 seen[kBitStages][32 * Config::kConsumerWarps];  // what FwdMask says, of each lane
  uint64_t bits_full[kBitStages][Config::kConsumerWarps];
  uint64_t bits_empty[kBitStages][Config::kConsumerWarps];
  // Of the rows of a warpgroup each feeder has an equal share.
  static constexpr int kBiasShares = Config::kWarpgroups * Config::kFeeders;
  uint64_t bias_full[kBiasShares];
  uint64_t bias_empty[kBiasShares];
};
struct NoDenseBarriers {};

// With intervals: whether the planner shall take the block after that at work.
struct FwdQueueShared {
  uint64_t block_wanted;
};
struct NoQueue {};

// Whether feeders read a mask.
template <typename Config>
__device__ __forceinline__ bool feeds_bits(const MhaFwdParams& params) {
  return Config::kFeedsBits && params.intervals.mask.data != nullptr;
}

// In how many parts the biases of a tile come: those of f32 in two halves.
__device__ __forceinline__ int parts_of(const BiasView& bias) {
  return bias.type == BiasType::kF32 ? 2 : 1;
}

// What follows the tiles in shared memory. "full" barriers: bytes have arrived. "empty": all
// consumers are done.
template <typename Config>
struct FwdShared : std::conditional_t<Config::kDense, FwdDenseShared<Config>, NoDenseBarriers>,
                   std::conditional_t<Config::kIntervals, FwdQueueShared, NoQueue> {
  // A block is read until its outputs are stored, when the next one is already at work and the one
  // after that may be asked for. With a queue no block is taken sooner than it has to be.
  static constexpr int kBlockSlots = Config::kIntervals ? 3 : 4;

  uint64_t query_full[Config::kQueryStages][Config::kWarpgroups];
  uint64_t query_empty[Config::kQueryStages][Config::kWarpgroups];
  // Finished rows, and their outputs where these are staged.
  uint64_t rows_full[Config::kWarpgroups];
  uint64_t rows_empty[Config::kWarpgroups];
  uint64_t key_full[Config::kKeyStages];
  uint64_t key_empty[Config::kKeyStages];
  uint64_t value_full[Config::kValueStages];
  uint64_t value_empty[Config::kValueStages];
  uint64_t block_full[kBlockSlots];
  uint64_t block_empty[kBlockSlots];
  FwdBlock<Config> blocks[kBlockSlots];
  float2 rows[Config::kRows];  // reference point and sum of finished rows
};

template <typename Config>
inline constexpr int kFwdSharedBytes = [] {
  constexpr int kBytes = Config::kStateOffset + sizeof(FwdShared<Config>);
  static_assert(kBytes <= 227 * 1024, "what a thread block may have");
  return kBytes;
}();

}  // namespace jax_flash::sm90
