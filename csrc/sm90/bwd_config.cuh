// Tile sizes of the sm_90 backward kernel and what they use of a multiprocessor.
#pragma once

#include "host/dispatch.h"
#include "sm90/fwd_config.cuh"
#include "tile/element.cuh"

namespace jax_flash::sm90 {

// kRowsArg: queries of a tile; two warpgroups own 64 keys each. kDeterministicArg: thread blocks
// add to dQ in an order.
template <ElementType kTypeArg, int kHeadDimArg, int kRowsArg, bool kDeterministicArg>
struct BwdConfig {
  static constexpr ElementType kType = kTypeArg;
  using Element = typename ElementOf<kType>::Type;
  static constexpr bool kDeterministic = kDeterministicArg;
  static constexpr int kHeadDim = kHeadDimArg;  // of queries, keys and values, after padding
  static constexpr int kRows = kRowsArg;
  static constexpr int kWarpgroups = 2;  // consumers of a thread block
  static constexpr int kKeys = 64 * kWarpgroups;
  static constexpr int kStages = 2;  // of queries, and of output gradients
  // Of keys and values: where there is room, those of the next block come early.
  static constexpr int kKeyStages = kHeadDim == 64 ? 2 : 1;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;

  // Registers a thread; the launch gives all warpgroups the same, 65536 / kThreads.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  // Named barriers, one for each stage, at which the consumers give queries and output gradients
  // back to the producer's warp. The ones before: turns and warpgroups (bwd_consumer.cuh).
  static constexpr int kQueryReleased = 5;
  static constexpr int kDoutReleased = kQueryReleased + kStages;
  static constexpr int kReleaseThreads = 128 * kWarpgroups + 32;

  // Named barriers between a consumer warpgroup and the warp that adds its part of dQ.
  static constexpr int kSumFree = kDoutReleased + kStages;
  static constexpr int kSumReady = kSumFree + kWarpgroups;
  static constexpr int kSumThreads = 128 + 32;

  // At width 128 each warpgroup has half of the columns of dQ, at width 64 half of the queries.
  static constexpr bool kSplitsColumns = kHeadDim == 128;
  static constexpr int kSumRows = kSplitsColumns ? kRows : kRows / kWarpgroups;
  static constexpr int kSumFloats = 64 * kSumRows;  // of a warpgroup's part of a tile

  using KeyLayout = SlabLayout<kKeys, kHeadDim>;    // of keys, and of values
  using QueryLayout = SlabLayout<kRows, kHeadDim>;  // of queries, and of output gradients
  using ScoreLayout = SlabLayout<kRows, kKeys>;     // of dS: a row is a query

  // Shared memory in bytes from the start; then BwdShared.
  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = KeyLayout::kBytes;  // from the keys of the same stage
  static constexpr int kKeyStageBytes = 2 * KeyLayout::kBytes;
  static constexpr int kQueryOffset = kKeyStages * kKeyStageBytes;
  static constexpr int kDoutOffset = kQueryOffset + kStages * QueryLayout::kBytes;
  static constexpr int kScoreOffset = kDoutOffset + kStages * QueryLayout::kBytes;
  static constexpr int kSumOffset = kScoreOffset + 2 * ScoreLayout::kBytes;
  static constexpr int kStateOffset = kSumOffset + 4 * kWarpgroups * kSumFloats;

  static_assert(kHeadDim == 64 * (kSplitsColumns ? kWarpgroups : 1),
                "one product for dQ for each warpgroup");
};

}  // namespace jax_flash::sm90
