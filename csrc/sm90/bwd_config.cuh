// Tile sizes of the sm_90 backward kernel and what they use of a multiprocessor.
#pragma once

#include <type_traits>

#include "host/dispatch.h"
#include "host/params.h"
#include "sm90/fwd_config.cuh"
#include "tile/element.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// kRowsArg: queries of a tile; two warpgroups own 64 keys each. kDeterministicArg: blocks of work
// add to dQ in an order; with intervals the call says so. MaskArg: RowMask or IntervalMask.
template <ElementType kTypeArg, int kHeadDimArg, int kRowsArg, bool kDeterministicArg,
          typename MaskArg = RowMask, bool kDenseArg = false>
struct BwdConfig {
  using Mask = MaskArg;
  static constexpr bool kIntervals = std::is_same_v<Mask, IntervalMask>;
  static constexpr bool kDense = kDenseArg;  // with intervals: biases, masks of bits or dropout
  static constexpr ElementType kType = kTypeArg;
  using Element = typename ElementOf<kType>::Type;
  static constexpr bool kDeterministic = kDeterministicArg;
  static constexpr bool kPaired = false;  // see BwdWideConfig
  // Whether blocks that are the last to add to dQ of a tile may make it.
  static constexpr bool kFinishes = kDeterministic && !kIntervals;
  static constexpr int kHeadDim = kHeadDimArg;  // of queries, keys and values, after padding
  static constexpr int kHeadDimV = kHeadDim;
  static constexpr int kRows = kRowsArg;
  static constexpr int kWarpgroups = 2;  // consumers of a thread block
  static constexpr int kKeys = 64 * kWarpgroups;
  static constexpr int kClusterKeys = kKeys;
  static constexpr int kKeyStep = 64;  // from the keys of a warpgroup to those of the next
  static constexpr int kStages = 2;    // of queries
  static constexpr int kDoutStages = 2;
  // Of keys and values: where there is room, those of the next block come early.
  static constexpr int kKeyStages = kHeadDim == 64 ? 2 : 1;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kScoreWarps = kConsumerWarps;  // that write dS

  // Registers a thread; the launch gives all warpgroups the same, 65536 / kThreads.
  static constexpr int kProducerRegisters = kDense ? 40 : 24;
  static constexpr int kConsumerRegisters = kDense ? 232 : 240;

  // Named barriers, one for each stage, at which the consumers give queries and output gradients
  // back to the producer's warp. The ones before: turns and warpgroups (bwd_consumer.cuh).
  static constexpr int kQueryReleased = 5;
  static constexpr int kDoutReleased = kQueryReleased + kStages;
  static constexpr int kReleaseThreads = 128 * kWarpgroups + 32;
  static constexpr int kQueryArrivals = 0;  // not at an mbarrier
  static constexpr int kDoutArrivals = 0;

  // Named barriers between a consumer warpgroup and the warp that adds its part of dQ.
  static constexpr int kSumFree = kDoutReleased + kDoutStages;
  static constexpr int kSumReady = kSumFree + kWarpgroups;
  static constexpr int kSumThreads = 128 + 32;

  // At width 64 each warpgroup has half of the queries of dQ, else 64 of its columns.
  static constexpr bool kSplitsColumns = kHeadDim > 64;
  static constexpr int kSumRows = kSplitsColumns ? kRows : kRows / kWarpgroups;
  static constexpr int kSumFloats = 64 * kSumRows;  // of a warpgroup's part of a tile
  static constexpr int kSumPieces = 1;              // in which a part is handed over
  static constexpr int kSumWidth = bwd_sum_width(kHeadDim);
  static constexpr int kSumParts = kWarpgroups;  // of a tile
  static constexpr int first_part(int warpgroup, int) { return warpgroup; }
  static constexpr int parts_of(int, int, int) { return 1; }

  using KeyLayout = SlabLayout<kKeys, kHeadDim>;
  using ValueLayout = KeyLayout;
  using QueryLayout = SlabLayout<kRows, kHeadDim>;
  using DoutLayout = QueryLayout;
  using ScoreLayout = SlabLayout<kRows, kKeys>;  // of dS: a row is a query

  // Shared memory in bytes from the start; then BwdShared.
  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = KeyLayout::kBytes;  // from the keys of the same stage
  static constexpr int kKeyStageBytes = KeyLayout::kBytes + ValueLayout::kBytes;
  static constexpr int kQueryOffset = kKeyStages * kKeyStageBytes;
  static constexpr int kDoutOffset = kQueryOffset + kStages * QueryLayout::kBytes;
  static constexpr int kScoreOffset = kDoutOffset + kDoutStages * DoutLayout::kBytes;
  static constexpr int kSumOffset = kScoreOffset + 2 * ScoreLayout::kBytes;
  // With kDense, of each consumer warp: biases of 16 bits, rows of 16 keys, and words of the mask.
  static constexpr bool kStagesDense = kDense;
  static constexpr int kDenseOffset = kSumOffset + 4 * kWarpgroups * kSumFloats;
  static constexpr int kBiasBytes = 32 * kRows;
  static constexpr int kDenseBytes = kBiasBytes + 4 * kRows;
  static constexpr int kStateOffset = kDenseOffset + (kDense ? kConsumerWarps * kDenseBytes : 0);

  static_assert(kSumWidth == 64 * (kSplitsColumns ? kWarpgroups : 1),
                "one product for dQ for each warpgroup");
  static_assert(!kIntervals || kRows == kIntervalRows, "a record for each tile");
};

}  // namespace jax_flash::sm90
