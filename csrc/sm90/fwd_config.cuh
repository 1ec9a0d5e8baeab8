// Tile sizes of the sm_90 forward kernel and what they use of a multiprocessor.
#pragma once

#include <type_traits>

#include "host/dispatch.h"
#include "tile/copy.cuh"
#include "tile/element.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/swizzle.cuh"

namespace jax_flash::sm90 {

// A consumer warpgroup owns 64 queries. Keys and values have rings of their own; with two query
// stages the next block's queries arrive while this block's are in use.
struct FwdTiles {
  int warpgroups;  // consumers of a thread block
  int keys;        // of a tile
  int query_stages;
  int key_stages;
  int value_stages;
};

// Chosen by measurement: docs/design/fwd_sm90.md has the table.
template <int kHeadDim, int kHeadDimV>
inline constexpr FwdTiles kFwdTiles{};
template <>
inline constexpr FwdTiles kFwdTiles<64, 64>{3, 128, 2, 4, 4};
template <>
inline constexpr FwdTiles kFwdTiles<96, 96>{2, 128, 2, 2, 2};
template <>
inline constexpr FwdTiles kFwdTiles<128, 128>{2, 128, 2, 2, 2};
template <>
inline constexpr FwdTiles kFwdTiles<192, 128>{2, 128, 1, 2, 2};
template <>
inline constexpr FwdTiles kFwdTiles<192, 192>{2, 112, 1, 2, 2};
template <>
inline constexpr FwdTiles kFwdTiles<256, 256>{2, 64, 1, 3, 2};

// With intervals, a warpgroup's queries are those of one RowTile. Three warpgroups would have too
// few registers.
template <int kHeadDim, int kHeadDimV>
inline constexpr FwdTiles kFwdIntervalTiles = kFwdTiles<kHeadDim, kHeadDimV>;
template <>
inline constexpr FwdTiles kFwdIntervalTiles<64, 64>{2, 128, 2, 4, 4};

// The same with biases, masks of bits or dropout: there is room for a tile of biases, too.
template <int kHeadDim, int kHeadDimV>
inline constexpr FwdTiles kFwdDenseTiles = kFwdIntervalTiles<kHeadDim, kHeadDimV>;
template <>
inline constexpr FwdTiles kFwdDenseTiles<128, 128>{2, 128, 1, 2, 2};
template <>
inline constexpr FwdTiles kFwdDenseTiles<256, 256>{2, 64, 1, 2, 2};

// Of operands that are split: a tile has twice the columns.
template <int kWidth>
inline constexpr FwdTiles kFwdSplitTiles{};
template <>
inline constexpr FwdTiles kFwdSplitTiles<64>{2, 128, 2, 2, 2};
template <>
inline constexpr FwdTiles kFwdSplitTiles<128>{2, 64, 1, 2, 2};

// The same with options: there is room for a tile of biases, too, and registers for what they need.
template <int kWidth>
inline constexpr FwdTiles kFwdSplitOptionTiles = kFwdSplitTiles<kWidth>;
template <>
inline constexpr FwdTiles kFwdSplitOptionTiles<64>{2, 64, 2, 4, 4};

template <ElementType kTypeArg, int kHeadDimArg, int kHeadDimVArg, FwdTiles kTiles,
          bool kIntervalsArg = false, bool kOptionsArg = false, bool kDenseArg = false>
struct FwdConfig {
  static constexpr ElementType kType = kTypeArg;

  // Queries, keys, values and probabilities are sums high + low of two bf16 each. A row of a tile
  // holds all high parts, then all low ones; of a product of two sums, that of the low parts is
  // left out, and the low parts of probabilities follow the high ones in the registers.
  static constexpr bool kSplit = kType == ElementType::kSplit;
  static constexpr int kParts = kSplit ? 2 : 1;
  static constexpr int kProducts = kSplit ? 3 : 1;
  // Which parts product `i` multiplies.
  static constexpr __host__ __device__ int left_part(int i) { return i == 1 ? 1 : 0; }
  static constexpr __host__ __device__ int right_part(int i) { return i == 2 ? 1 : 0; }

  static constexpr bool kIntervals = kIntervalsArg;
  // Of calls with intervals: biases, masks of bits or dropout.
  static constexpr bool kDense = kDenseArg;
  // Scores may have options (ScoreOptions). With kDense, which has a kernel for all of them, the
  // parameters say whether they do.
  static constexpr bool kOptions = kOptionsArg || kDense;
  using Mask = std::conditional_t<kIntervals, IntervalMask, RowMask>;
  using Element = typename ElementOf<kSplit ? ElementType::kBf16 : kType>::Type;
  using Out = std::conditional_t<kSplit, float, Element16>;
  // How large the sum of a row's exponentials over a lane's share of a tile may get before the row
  // moves its reference point: far from f16's 65504, and a key that outweighs all others by more
  // than that has a probability of exactly 1, as if all maxima were taken.
  static constexpr float kRange = 256.0f;
  static constexpr int kHeadDim = kHeadDimArg;  // widths after padding
  static constexpr int kHeadDimV = kHeadDimVArg;
  static constexpr int kWarpgroups = kTiles.warpgroups;
  static constexpr int kKeys = kTiles.keys;
  static constexpr int kQueryStages = kTiles.query_stages;
  static constexpr int kKeyStages = kTiles.key_stages;
  static constexpr int kValueStages = kTiles.value_stages;
  static constexpr int kRows = 64 * kWarpgroups;  // queries of a thread block
  // Warps that feed the consumers (FwdFeeder), with kDense: a warpgroup, which reads masks, too, or
  // the last warp of the producer's. Four warpgroups begin with 128 registers a thread, too few for
  // a product of 256 columns.
  static constexpr int kFeeders = !kDense ? 0 : kHeadDimVArg <= 128 ? 4 : 1;
  static constexpr bool kFeedsBits = kFeeders == 4;
  static constexpr int kHelpers = kFeedsBits ? 2 : 1;  // warpgroups that are not consumers
  static constexpr int kThreads = 128 * (kWarpgroups + kHelpers);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;

  // Registers a thread; the launch gives all warpgroups the same, 65536 / kThreads.
  static constexpr int kProducerRegisters = kFeedsBits || kWarpgroups == 3 ? 32 : 40;
  static constexpr int kFeederRegisters = kFeedsBits ? 32 : 0;  // of a warpgroup of feeders
  static constexpr int kConsumerRegisters = kFeedsBits ? 224 : kWarpgroups == 2 ? 232 : 160;

  // Tiles that are masked on the left alone take no maximum. Options would be applied to scores of
  // -inf.
  static constexpr bool kMasksClean = kIntervals && !kOptions;

  // One loop for all key tiles instead of one for those that need neither mask nor maximum, which
  // is faster by a little and takes registers.
  static constexpr bool kOneBody = kHeadDimV > 192;

  // Clean tiles may have biases. With one loop for all tiles, registers are too few.
  static constexpr bool kBiasClean = kDense && !kOneBody;

  // Warpgroups pass over the tiles that none of their rows see where tiles are small against the
  // rows that share them.
  static constexpr bool kSkips = kKeys < 64 * kWarpgroups;

  // A warpgroup's softmax runs beside its own second product; with three warpgroups, only beside
  // those of the others.
  static constexpr bool kOverlaps = kWarpgroups == 2;

  // Outputs leave through shared memory where that has room.
  static constexpr bool kStaged = kQueryStages > 1 && !kSplit;

  // A block's first step has a body of its own, which stages the outputs of the block before; what
  // masks need is asked for before the turn comes.
  static constexpr bool kQuickStart = kIntervals && !kDense && !kOneBody && kStaged;

  using QueryLayout = SlabLayout<64, kParts * kHeadDim>;  // of one warpgroup
  using KeyLayout = SlabLayout<kKeys, kParts * kHeadDim>;
  using ValueLayout = SlabLayout<kKeys, kParts * kHeadDimV>;
  using OutLayout = SlabLayout<64, kHeadDimV>;  // of one warpgroup

  // Shared memory in bytes from the start: queries, keys, values, outputs, biases, then
  // FwdShared.
  static constexpr int kQueryStageBytes = kWarpgroups * QueryLayout::kBytes;
  static constexpr int kKeyOffset = kQueryStages * kQueryStageBytes;
  static constexpr int kValueOffset = kKeyOffset + kKeyStages * KeyLayout::kBytes;
  static constexpr int kOutOffset = kValueOffset + kValueStages * ValueLayout::kBytes;
  static constexpr int kBiasOffset = kOutOffset + (kStaged ? kWarpgroups * OutLayout::kBytes : 0);

  // With kDense, biases, a tile for each warpgroup: rows of kKeys of 16 bits, or half as many of
  // f32, 16 bytes further apart, so that eight of them lie in different banks.
  static constexpr int kBiasRowBytes = 2 * kKeys + 16;
  static constexpr int kBiasTileBytes = 64 * kBiasRowBytes;
  static constexpr int kStateOffset = kBiasOffset + (kDense ? kWarpgroups * kBiasTileBytes : 0);

  static_assert(kProducerRegisters + kFeederRegisters + kWarpgroups * kConsumerRegisters <=
                    65536 / kThreads / 8 * 8 * (kWarpgroups + kHelpers),
                "more registers than the launch gives are waited for in vain");
  static_assert(kIntervals || !kOptions, "options come with intervals");
  static_assert(kWarpgroups == 2 || kWarpgroups == 3, "kFwdTiles has no entry for these widths");
  static_assert(kIntervals || !kDense, "what is dense has intervals, too");
  static_assert(kKeys % 16 == 0 && kHeadDim % 16 == 0, "whole wgmma steps");
  static_assert(!kSplit || (kHeadDim % 64 == 0 && kHeadDimV % 64 == 0), "parts are whole slabs");
  static_assert(kHeadDimV % 32 == 0, "outputs are stored 32 columns at a time");
};

}  // namespace jax_flash::sm90
