// Tile sizes of the sm_80 forward kernel and what they use of a multiprocessor.
#pragma once

#include <type_traits>

#include "host/dispatch.h"
#include "tile/element.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/swizzle.cuh"

namespace jax_flash::sm80 {

// A warp owns 16 * blocks queries, so a fragment of keys or values read from shared memory feeds
// that many matrix instructions; queries are read from there for each key tile, or some of them
// are kept in registers. With one stage the tile of values is copied while keys are multiplied and
// the next keys while values are; with more, whole tiles ahead of their use, at one barrier a tile.
struct FwdTiles {
  int blocks;         // 16-row blocks of a warp
  int keys;           // keys of a tile
  int warps;          // of a thread block
  int stages;         // pairs of a key and a value tile in shared memory
  int query_steps;    // 16-wide steps of the head dim that registers hold of the queries
  int blocks_per_sm;  // thread blocks that must fit a multiprocessor
};

// Chosen by measurement: docs/design/fwd_sm80.md has the table.
template <int kHeadDim, int kHeadDimV>
inline constexpr FwdTiles kFwdTiles{};
template <>
inline constexpr FwdTiles kFwdTiles<32, 32>{2, 64, 4, 2, 2, 3};
template <>
inline constexpr FwdTiles kFwdTiles<64, 64>{2, 128, 4, 2, 0, 2};
template <>
inline constexpr FwdTiles kFwdTiles<80, 80>{2, 64, 4, 2, 0, 2};
template <>
inline constexpr FwdTiles kFwdTiles<96, 96>{2, 64, 4, 2, 0, 2};
template <>
inline constexpr FwdTiles kFwdTiles<128, 128>{2, 64, 4, 2, 0, 2};
template <>
inline constexpr FwdTiles kFwdTiles<192, 128>{2, 48, 4, 1, 0, 2};
template <>
inline constexpr FwdTiles kFwdTiles<192, 192>{1, 64, 4, 1, 0, 2};
template <>
inline constexpr FwdTiles kFwdTiles<256, 256>{1, 64, 4, 1, 2, 2};

// For f32: what 99 KB of shared memory and the registers hold. Not measured against others.
template <ElementType kType, int kHeadDim, int kHeadDimV>
inline constexpr FwdTiles kFwdF32Tiles{};
template <>
inline constexpr FwdTiles kFwdF32Tiles<ElementType::kF32, 64, 64>{2, 32, 4, 2, 0, 2};
template <>
inline constexpr FwdTiles kFwdF32Tiles<ElementType::kTf32, 64, 64>{2, 64, 4, 2, 0, 2};
template <>
inline constexpr FwdTiles kFwdF32Tiles<ElementType::kF32, 128, 128>{1, 32, 4, 2, 0, 2};
template <>
inline constexpr FwdTiles kFwdF32Tiles<ElementType::kTf32, 128, 128>{2, 32, 4, 1, 0, 2};

// The same with intervals: options take registers, too.
inline constexpr FwdTiles kFwdF32OptionTiles{1, 32, 4, 2, 0, 2};

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr FwdTiles fwd_tiles() {
  if constexpr (element_bytes(kType) == 4) {
    return kFwdF32Tiles<kType, kHeadDim, kHeadDimV>;
  } else {
    return kFwdTiles<kHeadDim, kHeadDimV>;
  }
}

// For rows that do not start at 16 bytes: few keys at a time, because the code that copies them
// takes registers too.
constexpr FwdTiles narrow_tiles(FwdTiles tiles) {
  tiles.keys = tiles.keys < 32 ? tiles.keys : 32;
  return tiles;
}

// kWideArg: the rows of all operands start at multiples of 16 bytes. kIntervalsArg: the mask is
// data, and scores may have options.
template <ElementType kType, int kHeadDimArg, int kHeadDimVArg, bool kWideArg, FwdTiles kTiles,
          bool kIntervalsArg = false, bool kDenseArg = false>
struct FwdConfig {
  using Element = typename ElementOf<kType>::Type;
  static constexpr bool kF32 = element_bytes(kType) == 4;
  static constexpr int kProducts = kType == ElementType::kF32 ? 3 : 1;  // of tf32, for one of f32
  static constexpr int kUnits = element_bytes(kType) / 2;  // of 16 bits, in which rows are copied
  static constexpr int kHeadDim = kUnits * kHeadDimArg;    // widths after padding, in such units
  static constexpr int kHeadDimV = kUnits * kHeadDimVArg;
  static constexpr bool kWide = kWideArg;
  static constexpr bool kIntervals = kIntervalsArg;
  static constexpr bool kDense = kDenseArg;  // with intervals: biases, masks of bits or dropout
  using Mask = std::conditional_t<kIntervals, IntervalMask, RowMask>;
  static constexpr int kBlocks = kTiles.blocks;
  static constexpr int kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kRows = kWarpRows * kWarps;  // queries of a thread block
  static constexpr int kKeys = kTiles.keys;
  static constexpr int kStages = kTiles.stages;
  static constexpr int kQuerySteps = kTiles.query_steps;
  static constexpr int kBlocksPerSm = kTiles.blocks_per_sm;

  using QueryLayout = TileLayout<kHeadDim>;
  using KeyLayout = TileLayout<kHeadDim>;
  using ValueLayout = TileLayout<kHeadDimV>;
  using OutLayout = TileLayout<kHeadDimV>;

  // Shared memory in bytes: the block's and the warps' state, queries (later the outputs of the
  // same rows), then the stages, each one tile of keys and one of values.
  static constexpr int kStateBytes = 256;
  static constexpr int kQueryBytes = kRows * QueryLayout::kPitch;
  static constexpr int kKeyBytes = kKeys * KeyLayout::kPitch;
  static constexpr int kStageBytes = kKeyBytes + kKeys * ValueLayout::kPitch;
  static constexpr int kSharedBytes = kStateBytes + kQueryBytes + kStages * kStageBytes;

  static_assert(kBlocks > 0, "kFwdTiles has no entry for these widths");
  static_assert(kKeys % 16 == 0, "a key tile is whole mma k-steps of the second product");
  static_assert(kHeadDimV <= kHeadDim, "outputs are staged where the queries were");
  static_assert(kQueryBytes % 128 == 0 && kKeyBytes % 128 == 0 && kStageBytes % 128 == 0,
                "the swizzle needs tiles that start at a line of banks");
};

}  // namespace jax_flash::sm80
