// Tile sizes of the sm_80 backward kernel and what they use of a multiprocessor.
#pragma once

#include <type_traits>

#include "host/dispatch.h"
#include "tile/element.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/swizzle.cuh"

namespace jax_flash::sm80 {

// The chips that have use for a kernel; for others there is no code of it.
enum class Chips { kAll, kBeforeHopper, kFromHopper };

constexpr __host__ __device__ bool has_code(Chips chips) {
#if !defined(__CUDA_ARCH__)
  return true;
#elif __CUDA_ARCH__ >= 900
  return chips != Chips::kBeforeHopper;
#else
  return chips != Chips::kFromHopper;
#endif
}

// A thread block keeps `keys` keys and values and walks over tiles of `rows` queries. Its warps
// form one grid for scores [rows, keys], one for the gradients of keys and values [keys, width] and
// one for the gradient of queries [rows, width]; the first number of warps is given, the second is
// what remains. With two stages a tile of queries and output gradients is copied while the one
// before is worked on; with one, each once the products that read it are done.
struct BwdTiles {
  int rows;              // queries of a tile
  int keys;              // keys of a thread block
  int warps;             // of a thread block
  int stages;            // pairs of a tile of queries and one of output gradients
  int score_row_warps;   // scores: warps along queries
  int key_warps;         // gradients of keys and values: warps along keys
  int dquery_row_warps;  // gradient of queries: warps along queries
  int blocks = 1;        // thread blocks that share a multiprocessor
  int score_parts = 1;   // scores: parts of the keys, made one after another
  bool paired = false;   // half of the warps make all scores, the others all dP
  Chips chips = Chips::kAll;
};

// What 163 KB of shared memory hold: compute capabilities 8.0, 8.7, 9.x, 10.x. Up to width 128 one
// of two thread blocks multiplies while the other waits for copies, barriers or additions.
template <int kHeadDim, int kHeadDimV, bool kIntervals>
inline constexpr BwdTiles kBwdTiles{};
template <>
inline constexpr BwdTiles kBwdTiles<64, 64, false>{.rows = 64,
                                                   .keys = 128,
                                                   .warps = 4,
                                                   .stages = 1,
                                                   .score_row_warps = 2,
                                                   .key_warps = 4,
                                                   .dquery_row_warps = 2,
                                                   .blocks = 2,
                                                   .score_parts = 2,
                                                   .chips = Chips::kBeforeHopper};
template <>
inline constexpr BwdTiles kBwdTiles<96, 96, false>{64, 64, 4, 1, 2, 2, 2, 2};
template <bool kIntervals>
inline constexpr BwdTiles kBwdTiles<128, 128, kIntervals>{64, 64, 4, 1, 2, 2, 2, 2};
template <>
inline constexpr BwdTiles kBwdTiles<192, 192, false>{.rows = 64,
                                                     .keys = 64,
                                                     .warps = 8,
                                                     .stages = 2,
                                                     .score_row_warps = 2,
                                                     .key_warps = 2,
                                                     .dquery_row_warps = 2,
                                                     .paired = true};
template <>
inline constexpr BwdTiles kBwdTiles<256, 256, false>{.rows = 64,
                                                     .keys = 64,
                                                     .warps = 8,
                                                     .stages = 1,
                                                     .score_row_warps = 4,
                                                     .key_warps = 2,
                                                     .dquery_row_warps = 2,
                                                     .chips = Chips::kBeforeHopper};
template <>
inline constexpr BwdTiles kBwdTiles<256, 256, true>{64, 64, 8, 1, 4, 2, 2};

// What 227 KB hold, where that helps: capabilities 9.x and 10.x.
template <int kHeadDim, int kHeadDimV, bool kIntervals>
inline constexpr BwdTiles kBwdHopperTiles = kBwdTiles<kHeadDim, kHeadDimV, kIntervals>;
template <>
inline constexpr BwdTiles kBwdHopperTiles<64, 64, false>{.rows = 64,
                                                         .keys = 128,
                                                         .warps = 4,
                                                         .stages = 2,
                                                         .score_row_warps = 2,
                                                         .key_warps = 2,
                                                         .dquery_row_warps = 2,
                                                         .blocks = 2,
                                                         .score_parts = 2,
                                                         .chips = Chips::kFromHopper};
template <>
inline constexpr BwdTiles kBwdHopperTiles<256, 256, false>{.rows = 64,
                                                           .keys = 64,
                                                           .warps = 8,
                                                           .stages = 2,
                                                           .score_row_warps = 2,
                                                           .key_warps = 2,
                                                           .dquery_row_warps = 2,
                                                           .paired = true,
                                                           .chips = Chips::kFromHopper};

// What 99 KB hold: other capabilities. Also for rows that do not start at 16 bytes, because the
// code that copies them takes registers too.
template <int kHeadDim, int kHeadDimV>
inline constexpr BwdTiles kBwdSmallTiles{};
template <>
inline constexpr BwdTiles kBwdSmallTiles<64, 64>{64, 128, 8, 2, 2, 4, 4};
template <>
inline constexpr BwdTiles kBwdSmallTiles<96, 96>{64, 64, 8, 2, 4, 4, 4};
template <>
inline constexpr BwdTiles kBwdSmallTiles<128, 128>{64, 64, 8, 1, 4, 2, 2};
template <>
inline constexpr BwdTiles kBwdSmallTiles<192, 192>{64, 32, 8, 1, 4, 2, 2};
template <>
inline constexpr BwdTiles kBwdSmallTiles<256, 256>{32, 32, 4, 1, 2, 2, 2};

// For f32: what 99 KB hold, of which two or three thread blocks fit the larger ones. Warps have
// whole groups of 32 keys and of 32 columns.
template <int kHeadDim, int kHeadDimV>
inline constexpr BwdTiles kBwdF32Tiles{};
template <>
inline constexpr BwdTiles kBwdF32Tiles<64, 64>{64, 64, 4, 1, 2, 2, 2};
template <>
inline constexpr BwdTiles kBwdF32Tiles<128, 128>{32, 32, 4, 1, 2, 1, 1};

// For f32 as sums of two bf16, on Hopper: two thread blocks fit an SM. With intervals options take
// registers, too.
template <int kHeadDim, int kHeadDimV, bool kIntervals>
inline constexpr BwdTiles kBwdSplitTiles{};
template <>
inline constexpr BwdTiles kBwdSplitTiles<64, 64, false>{32, 128, 4, 1, 1, 4, 1};
template <>
inline constexpr BwdTiles kBwdSplitTiles<64, 64, true>{32, 64, 4, 1, 2, 2, 1};
template <>
inline constexpr BwdTiles kBwdSplitTiles<128, 128, false>{32, 64, 4, 1, 2, 2, 1};
template <>
inline constexpr BwdTiles kBwdSplitTiles<128, 128, true>{32, 64, 4, 1, 2, 1, 1};

// kWideArg: the rows of all operands and results start at multiples of 16 bytes. kIntervalsArg: the
// mask is data, and scores may have options.
template <ElementType kType, int kHeadDimArg, int kHeadDimVArg, bool kWideArg, BwdTiles kTiles,
          bool kIntervalsArg = false, bool kDenseArg = false>
struct BwdConfig {
  // Operands are f32: multiplied as such, or as sums of two bf16, which shared memory holds.
  static constexpr bool kFloats = element_bytes(kType) == 4;
  static constexpr bool kSplit = kType == ElementType::kSplit;
  static constexpr bool kF32 = kFloats && !kSplit;
  using Element = typename ElementOf<kSplit ? ElementType::kBf16 : kType>::Type;
  static constexpr int kParts = kSplit ? 2 : 1;                         // elements of a number
  static constexpr int kProducts = kType == ElementType::kF32 ? 3 : 1;  // of tf32, for one of f32
  static constexpr int kUnits = element_bytes(kType) / 2;  // of 16 bits, in which rows are copied
  static constexpr int kColumns = kHeadDimArg;             // widths after padding
  static constexpr int kColumnsV = kHeadDimVArg;
  static constexpr int kHeadDim = kUnits * kColumns;  // the same in such units
  static constexpr int kHeadDimV = kUnits * kColumnsV;
  static constexpr bool kWide = kWideArg;
  static constexpr bool kIntervals = kIntervalsArg;
  static constexpr bool kDense = kDenseArg;  // with intervals: biases, masks of bits or dropout
  using Mask = std::conditional_t<kIntervals, IntervalMask, RowMask>;
  static constexpr int kRows = kTiles.rows;
  static constexpr int kKeys = kTiles.keys;
  static constexpr int kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = kTiles.stages;
  static constexpr int kBlocks = kTiles.blocks;
  static constexpr int kScoreParts = kTiles.score_parts;
  static constexpr bool kPaired = kTiles.paired;
  static constexpr bool kHasCode = has_code(kTiles.chips);
  static constexpr int kTurnRows = 64;  // that share a turn

  // Scores: a warp's rows and keys follow each other.
  static constexpr int kScoreRowWarps = kTiles.score_row_warps;
  static constexpr int kScoreRows = kRows / kScoreRowWarps;
  static constexpr int kScoreWarps = kPaired ? kWarps / 2 : kWarps;
  static constexpr int kScoreKeys = kKeys / kScoreParts / (kScoreWarps / kScoreRowWarps);

  // Gradients of keys and values: warps take blocks of 16 keys and of 16 columns in turn.
  static constexpr int kKeyWarps = kTiles.key_warps;
  static constexpr int kKeyColumnWarps = kWarps / kKeyWarps;

  // Gradient of queries: a warp's rows follow each other, blocks of 16 columns go round.
  static constexpr int kDqueryRowWarps = kTiles.dquery_row_warps;
  static constexpr int kDqueryRows = kRows / kDqueryRowWarps;
  static constexpr int kDqueryColumnWarps = kWarps / kDqueryRowWarps;

  using QueryLayout = TileLayout<kHeadDim>;
  using KeyLayout = TileLayout<kHeadDim>;
  using ValueLayout = TileLayout<kHeadDimV>;
  using DoutLayout = TileLayout<kHeadDimV>;
  using ScoreLayout = TileLayout<kUnits * kKeys>;

  // Shared memory in bytes, from the first tile on: keys and values (later their gradients), the
  // stages, probabilities and score gradients, each stage's lse and delta.
  static constexpr int kStateBytes = 256;
  static constexpr int kQueryBytes = kRows * QueryLayout::kPitch;
  static constexpr int kScoreBytes = kRows * ScoreLayout::kPitch;
  static constexpr int kStageBytes = kQueryBytes + kRows * DoutLayout::kPitch;
  static constexpr int kRowStateBytes = kRows * 2 * 4;
  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = kKeyOffset + kKeys * KeyLayout::kPitch;
  static constexpr int kStageOffset = kValueOffset + kKeys * ValueLayout::kPitch;
  static constexpr int kProbabilityOffset = kStageOffset + kStages * kStageBytes;
  static constexpr int kDscoreOffset = kProbabilityOffset + kScoreBytes;
  static constexpr int kRowStateOffset = kDscoreOffset + kScoreBytes;
  static constexpr int kSharedBytes = kStateBytes + kRowStateOffset + kStages * kRowStateBytes;

  static_assert(kRows > 0, "kBwdTiles has no entry for these widths");
  static_assert(kTurnRows % kRows == 0 && kTurnRows == kIntervalRows,
                "one hull says who adds to a turn");
  static_assert(kStages == 1 || kStages == 2);
  static_assert(!kPaired || (kStages == 2 && kScoreParts == 1 && !kIntervals && !kFloats),
                "warps of dP know no scores, only probabilities");
  static_assert(kScoreRows % 16 == 0 && kDqueryRows % 16 == 0 && kKeys % (16 * kKeyWarps) == 0 &&
                    kHeadDim % (16 * kKeyColumnWarps) == 0 &&
                    kHeadDimV % (16 * kKeyColumnWarps) == 0 &&
                    kHeadDim % (16 * kDqueryColumnWarps) == 0,
                "a warp's part is whole 16x16 blocks");
  static_assert(!kF32 || (kScoreKeys <= 32 && kKeys % (32 * kKeyWarps) == 0 &&
                          kColumns % (32 * kKeyColumnWarps) == 0 &&
                          kColumnsV % (32 * kKeyColumnWarps) == 0 &&
                          kColumns % (32 * kDqueryColumnWarps) == 0),
                "of f32 a warp's part is whole groups of 32");
  static_assert(kScoreKeys == 16 || kScoreKeys == 32 || kScoreKeys == 64,
                "chunks of a warp's keys are told apart by address bits of their own");
  static_assert(kQueryBytes % 128 == 0 && kStageBytes % 128 == 0 && kScoreBytes % 128 == 0 &&
                    kValueOffset % 128 == 0 && kStageOffset % 128 == 0,
                "the swizzle needs tiles that start at a line of banks");
};

}  // namespace jax_flash::sm80
