// What the roles of a thread block of the backward share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host/intervals.h"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_config.cuh"

namespace jax_flash::sm90 {

// Comes with the queries where there are intervals.
template <typename Config>
struct BwdIntervalShared {
  RowRecord records[Config::kStages][Config::kRows];
  BwdStep steps[Config::kStages];
};
struct BwdPlainShared {};

template <typename Config>
struct BwdDenseShared {
  BwdDenseStep dense_steps[Config::kStages];
};
struct NoDenseShared {};

// What follows the tiles in shared memory. "full" barriers: it has arrived. "empty": all consumers
// are done.
template <typename Config>
struct BwdShared
    : std::conditional_t<Config::kIntervals, BwdIntervalShared<Config>, BwdPlainShared>,
      std::conditional_t<Config::kDense, BwdDenseShared<Config>, NoDenseShared> {
  float row_lse[Config::kStages][Config::kRows];        // comes with the queries
  float row_delta[Config::kDoutStages][Config::kRows];  // comes with the output gradients
  // Of blocks, one at work and the next.
  static constexpr int kBlockSlots = 2;

  uint64_t key_full[Config::kKeyStages];
  uint64_t key_empty[Config::kKeyStages];
  uint64_t value_full[Config::kKeyStages];
  uint64_t value_empty[Config::kKeyStages];
  uint64_t query_full[Config::kStages];
  uint64_t query_empty[Config::kStages];  // where kQueryArrivals is not 0
  uint64_t dout_full[Config::kDoutStages];
  uint64_t dout_empty[Config::kDoutStages];  // where kDoutArrivals is not 0
  uint64_t score_full[2];                    // dS
  uint64_t score_empty[2];
  uint64_t block_full[kBlockSlots];
  uint64_t block_empty[kBlockSlots];
  BwdBlock<Config> blocks[kBlockSlots];
  // With kFinishes: the sum of the others has come, in the phase of this parity.
  uint64_t sum_full[Config::kWarpgroups];
  uint32_t sum_parity[Config::kWarpgroups];
  // The same: all threads have left dQ, of the last tile of a block, or of one before a tile whose
  // dQ they make.
  uint64_t dquery_left[Config::kWarpgroups];

  // Of a pair of thread blocks.
  uint64_t query_open[Config::kStages];     // the other one's stage may be written
  uint64_t dout_open[Config::kDoutStages];  // the same
  uint64_t other_score_full[2];             // the other one's dS has come
  uint64_t sent_score_empty[2];             // the other one is done with dS of this one
  uint64_t taken_full;                      // the number of the next block of work has come
  uint64_t taken_empty;                     // the other one has it
  alignas(16) int32_t taken[4];             // the first of these; a copy has 16 bytes
};

template <typename Config>
inline constexpr int kBwdSharedBytes = [] {
  constexpr int kBytes = Config::kStateOffset + sizeof(BwdShared<Config>);
  static_assert(kBytes <= 227 * 1024, "what a thread block may have");
  return kBytes;
}();

}  // namespace jax_flash::sm90
