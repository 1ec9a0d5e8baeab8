// What the roles of a thread block share: barriers, blocks of work, rows that are finished.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/ring.cuh"

namespace jax_flash::sm90 {

// What follows the tiles in shared memory. "full" barriers: bytes have arrived. "empty": all
// consumers are done.
template <typename Config>
struct FwdShared {
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
inline constexpr int kFwdSharedBytes = Config::kStateOffset + sizeof(FwdShared<Config>);

}  // namespace jax_flash::sm90
