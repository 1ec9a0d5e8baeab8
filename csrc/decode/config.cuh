// Tile sizes of the decode kernels and what they use of a multiprocessor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "decode/params.h"
#include "tile/swizzle.cuh"

namespace jax_flash::decode {

// How many rows (tokens x query heads of a kv head) there are: up to 8, which are columns of the
// products (columns.cuh), up to 16, or more. On compute capability 9.0, with caches of 16 bits and
// widths up to 128, more are multiplied by a warpgroup (warpgroup.cuh).
enum class Rows { kEight, kSixteen, kMany, kWarpgroup };

// Whether a warpgroup has so many rows: also 9 to 16 on long caches, where the second kernel that
// adds up the splits costs less than the products of a warp.
inline bool has_warpgroup(int rows, int room) { return rows > (room > 4096 ? 8 : 16); }

// A team of warps shares tiles of keys and values and walks over them with a barrier of its own.
// With up to 16 rows every warp is a team: all have the same rows and keys of their own, and meet
// when the split is done. With more rows a thread block is one
// team, each warp with 16 rows of its own.
struct DecodeTiles {
  int warps;
  int team_warps;
  int keys;    // of a tile
  int stages;  // tiles of keys and values in shared memory, for each team
  int blocks_per_sm;
};

// 64 KB in flight on a multiprocessor reach the rate of the memory (docs/design/decode.md). Shared
// memory stays within the 99 KB of compute capability 8.6 and 8.9.
template <int kWidth, bool kManyRows, int kCacheBytes>
inline constexpr DecodeTiles kDecodeTiles{};
template <>
inline constexpr DecodeTiles kDecodeTiles<64, false, 2>{4, 1, 16, 4, 3};
template <>
inline constexpr DecodeTiles kDecodeTiles<128, false, 2>{4, 1, 16, 3, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<256, false, 2>{2, 1, 16, 3, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<64, true, 2>{4, 4, 64, 4, 3};
template <>
inline constexpr DecodeTiles kDecodeTiles<128, true, 2>{4, 4, 64, 3, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<256, true, 2>{4, 4, 16, 4, 2};
// Bytes in flight as above.
template <>
inline constexpr DecodeTiles kDecodeTiles<64, false, 1>{4, 1, 32, 4, 3};
template <>
inline constexpr DecodeTiles kDecodeTiles<128, false, 1>{4, 1, 32, 3, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<256, false, 1>{2, 1, 16, 5, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<64, true, 1>{4, 4, 64, 5, 3};
template <>
inline constexpr DecodeTiles kDecodeTiles<128, true, 1>{4, 4, 64, 4, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<256, true, 1>{4, 4, 16, 8, 2};

// Bytes in flight as above. Any number of rows, in tiles of up to 8.
template <>
inline constexpr DecodeTiles kDecodeTiles<64, false, 4>{4, 1, 16, 3, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<128, false, 4>{4, 1, 8, 3, 2};
template <>
inline constexpr DecodeTiles kDecodeTiles<256, false, 4>{2, 1, 8, 3, 2};

// Of a warpgroup; all of a multiprocessor's shared memory.
template <int kWidth>
inline constexpr DecodeTiles kWarpgroupTiles{};
template <>
inline constexpr DecodeTiles kWarpgroupTiles<64>{4, 4, 128, 3, 2};
template <>
inline constexpr DecodeTiles kWarpgroupTiles<128>{4, 4, 64, 3, 2};

template <CacheType kCache>
struct CacheElement {
  using Math = __half;     // that the tensor cores multiply
  using Stored = uint8_t;  // only moved
};
template <>
struct CacheElement<CacheType::kF16> {
  using Math = __half;
  using Stored = uint16_t;
};
template <>
struct CacheElement<CacheType::kBf16> {
  using Math = __nv_bfloat16;
  using Stored = uint16_t;
};
template <>
struct CacheElement<CacheType::kF32> {
  using Math = float;
  using Stored = uint32_t;
};

template <CacheType kCache, int kWidth, Rows kRows>
constexpr DecodeTiles decode_tiles() {
  if constexpr (kRows == Rows::kWarpgroup) {
    return kWarpgroupTiles<kWidth>;
  } else {
    constexpr int kBytes = sizeof(typename CacheElement<kCache>::Stored);
    return kDecodeTiles<kWidth, kRows == Rows::kMany, kBytes>;
  }
}

// kWidthArg: what key and value widths are padded to.
template <CacheType kCacheArg, int kWidthArg, Rows kRowsArg>
struct DecodeConfig {
  static constexpr bool kColumns = kRowsArg == Rows::kEight;
  static constexpr bool kFewRows = kColumns || kRowsArg == Rows::kSixteen;
  static constexpr bool kWarpgroup = kRowsArg == Rows::kWarpgroup;
  static constexpr CacheType kCache = kCacheArg;
  using Element = typename CacheElement<kCache>::Math;
  using Stored = typename CacheElement<kCache>::Stored;
  static constexpr bool kQuantised = sizeof(Stored) == 1;
  static constexpr bool kF32 = kCache == CacheType::kF32;
  static constexpr DecodeTiles kTiles = decode_tiles<kCache, kWidthArg, kRowsArg>();
  static constexpr int kWidth = kWidthArg;
  static constexpr int kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTeamWarps = kTiles.team_warps;
  static constexpr int kTeams = kWarps / kTeamWarps;
  static constexpr int kRows = kColumns ? 8 : 16 * kTeamWarps;  // of a thread block
  static constexpr int kKeys = kTiles.keys;
  static constexpr int kCopyRows = kKeys / kTeamWarps;  // that a warp copies of each tile
  // Wide rows leave few registers for addresses and queries ahead of their time.
  static constexpr bool kQueriesEarly = !kWarpgroup && ((kColumns && !kF32) || kWidth <= 128);
  static constexpr bool kKeepsSources = kColumns && kQueriesEarly;  // of copies
  static constexpr int kCopyUnroll = kQueriesEarly || kF32 || kWarpgroup ? kCopyRows : 1;
  // Whether there are registers for the sum of a group of splits, which else goes to the L2.
  static constexpr bool kHolds = kColumns && kWidth <= 128;
  // Whether thread blocks add up splits among them, or a kernel of its own does.
  static constexpr bool kSumsInLaunch = kFewRows;
  // How many parts are loaded at a time where splits are added up: as many as there are registers
  // for.
  static constexpr int kBatchedParts = kQuantised ? 4 : 8;
  static constexpr int kStages = kTiles.stages;
  static constexpr int kBlocksPerSm = kTiles.blocks_per_sm;
  static constexpr int kPairs = kWidth * sizeof(Stored) / 2;  // 16-bit pieces of a row of a tile
  using Layout =
      std::conditional_t<kWarpgroup, SlabLayout<kTiles.keys, kPairs>, TileLayout<kPairs>>;
  static constexpr int kChunkElements = 16 / sizeof(Stored);

  // Shared memory in bytes: three places of each warp, the plan, states of the unit's rows before
  // and after a split, where the teams leave their outputs, states of the teams' rows, then the
  // stages of the teams, each a tile of keys and one of values. A warpgroup has no states and
  // outputs there, but queries.
  static constexpr int kPlaceBytes = 52;
  static constexpr int kPlanOffset = 624;
  static constexpr int kPlanBytes = 16;
  static constexpr int kGroupOffset = kPlanOffset + kPlanBytes;
  static constexpr int kOutputsOffset = kGroupOffset + 2 * 8 * kRows;
  static constexpr int kStateOffset = kOutputsOffset + 128;
  using QueryLayout = SlabLayout<kRows, kWidth>;
  static constexpr int kQueryOffset = (kGroupOffset + 1023) / 1024 * 1024;
  static constexpr int kTileOffset =
      kWarpgroup ? kQueryOffset + QueryLayout::kBytes : kStateOffset + 8 * kTeams * kRows;
  static constexpr int kTileBytes = 2 * kPairs * kKeys;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kTeamBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kTileOffset + kTeams * kTeamBytes;

  // With clusters, behind that: a barrier, then what the thread block adds up, pieces of rows of
  // all splits (ClusterParts). As much as leaves a multiprocessor of compute capability 9.0 two
  // such blocks.
  static constexpr bool kClusters = kFewRows;
  static constexpr int kPieceBytes = 16 + 8;  // four columns of a row, and its state
  static constexpr int kPartBytes = (12 << 10) + 16;

  // Outputs of a team in f32. Where they fit one stage, that which has just been read is free for
  // them, while the next split's tiles are on their way to the others; else all stages are, after
  // the split. Those of a warpgroup stay in registers.
  static constexpr int kOutputBytes = kRows * kWidth * 4;
  static constexpr bool kAhead = kWarpgroup || kOutputBytes <= kStageBytes;

  static_assert(3 * kPlaceBytes * kWarps <= kPlanOffset && 4 * kTeams <= 128);
  static_assert(kPlanOffset % 16 == 0);
  static_assert(kBlocksPerSm <= kMostBlocksPerSm);
  static_assert(kTileOffset % 128 == 0, "the swizzle needs tiles that start at a line of banks");
  static_assert(!kWarpgroup || kTileOffset % 1024 == 0, "which wgmma counts from");
  static_assert(kWarpgroup || kOutputBytes <= kTeamBytes, "outputs fit the stages");
  static_assert(kWarpgroup || kSharedBytes <= 99 * 1024, "fits every GPU from sm_80 on");
  static_assert(!kWarpgroup || kBlocksPerSm * (kSharedBytes + 1024) <= 228 * 1024);
  static_assert(!kClusters || 2 * (kSharedBytes + kPartBytes + 1024) <= 228 * 1024);
  static_assert(kCopyRows <= 32 && kKeys % (kF32 ? 8 : 16) == 0);
  static_assert(kColumns || !kF32, "any number of rows, in tiles of up to 8");
  static_assert(!kWarpgroup || (sizeof(Stored) == 2 && kWidth <= 128));
};

}  // namespace jax_flash::decode
