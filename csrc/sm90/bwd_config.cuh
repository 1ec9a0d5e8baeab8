// Tile sizes of the sm_90 backward kernel and what they use of a multiprocessor.
#pragma once

#include "host/dispatch.h"
#include "sm90/fwd_config.cuh"
#include "tile/element.cuh"

namespace jax_flash::sm90 {

// Queries of a tile; two warpgroups own 64 keys each.
template <int kHeadDim>
inline constexpr int kBwdRows = 0;
template <>
inline constexpr int kBwdRows<64> = 128;
template <>
inline constexpr int kBwdRows<128> = 64;

// kDeterministicArg: thread blocks add to dQ in an order.
template <ElementType kTypeArg, int kHeadDimArg, bool kDeterministicArg>
struct BwdConfig {
  static constexpr ElementType kType = kTypeArg;
  using Element = typename ElementOf<kType>::Type;
  static constexpr bool kDeterministic = kDeterministicArg;
  static constexpr int kHeadDim = kHeadDimArg;  // of queries, keys and values, after padding
  static constexpr int kRows = kBwdRows<kHeadDim>;
  static constexpr int kWarpgroups = 2;  // consumers of a thread block
  static constexpr int kKeys = 64 * kWarpgroups;
  static constexpr int kStages = 2;     // of queries, and of output gradients
  static constexpr int kKeyStages = 2;  // of keys and values: those of the next block come early
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

  // A product for dQ covers 64 columns by 64 queries: at width 128 each warpgroup has its columns
  // of all queries, at width 64 its queries.
  static constexpr bool kSplitsColumns = kHeadDim == 128;

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
  static constexpr int kStateOffset = kScoreOffset + 2 * ScoreLayout::kBytes;

  static_assert(kRows > 0, "kBwdRows has no entry for this width");
  static_assert(kHeadDim == 64 * (kSplitsColumns ? kWarpgroups : 1) &&
                    kRows == 64 * (kSplitsColumns ? 1 : kWarpgroups),
                "one 64 x 64 product for dQ for each warpgroup");
  static_assert(kBwdRowPadding % kRows == 0, "row states are padded to whole tiles");
};

}  // namespace jax_flash::sm90
