// Tiles of the sm_90 backward kernel at widths over 128 and what they use of a multiprocessor.
#pragma once

#include <type_traits>

#include "host/dispatch.h"
#include "host/params.h"
#include "sm90/fwd_config.cuh"
#include "tile/element.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// 64 keys and 64 queries. One warpgroup has the scores and dV, the other dP, dS and dK; both have
// parts of dQ, of 64 columns each. Without intervals there are clusters of two thread blocks with
// neighbouring keys, which exchange dS; each has half of the columns of dQ, over the keys of both.
template <ElementType kTypeArg, int kHeadDimArg, int kHeadDimVArg, bool kDeterministicArg,
          typename MaskArg = RowMask, bool kDenseArg = false>
struct BwdWideConfig {
  using Mask = MaskArg;
  static constexpr bool kIntervals = std::is_same_v<Mask, IntervalMask>;
  static constexpr bool kDense = kDenseArg;  // with intervals: biases, masks of bits or dropout
  static constexpr bool kStagesDense = false;
  static constexpr ElementType kType = kTypeArg;
  using Element = typename ElementOf<kType>::Type;
  static constexpr bool kDeterministic = kDeterministicArg;
  static constexpr bool kPaired = !kIntervals;
  static constexpr bool kFinishes = false;
  static constexpr int kHeadDim = kHeadDimArg;  // widths after padding
  static constexpr int kHeadDimV = kHeadDimVArg;
  static constexpr int kRows = 64;
  static constexpr int kWarpgroups = 2;  // consumers of a thread block
  static constexpr int kKeys = 64;
  static constexpr int kClusterKeys = kPaired ? 2 * kKeys : kKeys;  // of a block of work
  static constexpr int kKeyStep = 0;                                // both have the same keys
  static constexpr int kStages = 2;                                 // of queries
  static constexpr int kDoutStages = kHeadDim > 192 ? 1 : 2;
  static constexpr int kKeyStages = 1;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kScoreWarps = 4;  // that write dS

  // Registers a thread; the launch gives all warpgroups the same, 65536 / kThreads. Copies of pairs
  // take more, their products fewer.
  static constexpr int kProducerRegisters = kPaired ? 40 : 24;
  static constexpr int kConsumerRegisters = kPaired ? 232 : 240;

  // Named barriers, as in BwdConfig but for the first two: P is there; its place is free again.
  static constexpr int kScored = 1;
  static constexpr int kScoresUsed = 2;
  // Queries and output gradients are given back at mbarriers: racecheck does not follow one
  // warpgroup's reads of lse or delta through a named one that the other reaches much later. The
  // other's warps arrive once, but with intervals both have read records.
  static constexpr int kQueryArrivals = 128 + (kIntervals ? 128 : 4);
  static constexpr int kDoutArrivals = 128 + 4;
  static constexpr int kSumFree = 5;
  static constexpr int kSumReady = kSumFree + kWarpgroups;
  static constexpr int kSumThreads = 128 + 32;

  static constexpr bool kSplitsColumns = true;
  static constexpr int kSumRows = kRows;
  static constexpr int kSumFloats = 64 * kSumRows;  // of a part
  // In which a part is handed over: at width 256 there is no room for whole ones of a pair.
  static constexpr int kSumPieces = kPaired && kHeadDim > 192 ? 2 : 1;
  static constexpr int kSumWidth = bwd_sum_width(kHeadDim);
  static constexpr int kSumParts = kHeadDim / 64;  // of a tile
  // Parts of a warpgroup of the thread block `rank` of a cluster, of a tile of a head. Of three
  // parts a pair has one by turns.
  static constexpr __host__ __device__ int first_part(int warpgroup, int rank) {
    if (!kPaired) return warpgroup == 0 ? 0 : 2;
    return warpgroup == 0 || kSumParts == 4 ? 2 * rank + warpgroup : 1;
  }
  static constexpr __host__ __device__ int parts_of(int warpgroup, int rank, int tile) {
    if (!kPaired) return 2;
    return warpgroup == 0 || kSumParts == 4 ? 1 : 1 - (tile + rank) % 2;
  }

  // Of a pair, the slabs of the other's keys that this one's parts need.
  static constexpr int kOtherSlabs = 2;
  static constexpr __host__ __device__ int first_other_slab(int rank) {
    return rank * (kSumParts - kOtherSlabs);
  }

  using KeyLayout = SlabLayout<kKeys, kHeadDim>;
  using ValueLayout = SlabLayout<kKeys, kHeadDimV>;
  using QueryLayout = SlabLayout<kRows, kHeadDim>;
  using DoutLayout = SlabLayout<kRows, kHeadDimV>;
  using OtherKeyLayout = SlabLayout<kKeys, 64 * kOtherSlabs>;
  using ScoreLayout = SlabLayout<kRows, kKeys>;  // of dS: a row is a query

  // Shared memory in bytes from the start; then BwdShared.
  static constexpr int kKeyOffset = 0;
  static constexpr int kValueOffset = KeyLayout::kBytes;
  static constexpr int kKeyStageBytes = KeyLayout::kBytes + ValueLayout::kBytes;
  static constexpr int kQueryOffset = kKeyStages * kKeyStageBytes;
  static constexpr int kDoutOffset = kQueryOffset + kStages * QueryLayout::kBytes;
  static constexpr int kScoreOffset = kDoutOffset + kDoutStages * DoutLayout::kBytes;
  static constexpr int kSumOffset = kScoreOffset + 2 * ScoreLayout::kBytes;
  static constexpr int kOtherKeyOffset =
      kSumOffset + 4 * kWarpgroups * kSumFloats / kSumPieces;  // of a pair
  static constexpr int kOtherScoreOffset = kOtherKeyOffset + (kPaired ? OtherKeyLayout::kBytes : 0);
  static constexpr int kStateOffset = kOtherScoreOffset + (kPaired ? 2 * ScoreLayout::kBytes : 0);

  static_assert(kSumParts == 4 || (kPaired && kSumParts == 3), "what parts are written for");
  static_assert(kHeadDim % 64 == 0 && kHeadDimV % 32 == 0, "whole slabs, and groups of a store");
};

}  // namespace jax_flash::sm90
