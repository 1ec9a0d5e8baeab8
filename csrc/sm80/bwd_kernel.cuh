// FlashAttention-2 backward (Dao 2023, arXiv:2307.08691) with mma.sync, for sm_80 and later.
//
// A thread block owns kKeys keys of one kv head and walks over the queries, of all heads that share
// it, that see them. The gradients of its keys and values stay in registers; those of the queries
// are added to a sum in global memory (bwd_sum.cuh).
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/reduction.cuh"
#include "sm80/bwd_block.cuh"
#include "sm80/bwd_config.cuh"
#include "sm80/bwd_scores.cuh"
#include "sm80/bwd_warp.cuh"
#include "tile/copy.cuh"

namespace jax_flash::sm80 {

// The order of sums: a block adds to kTurnRows rows when the blocks of later keys that reach them
// have added. Which do follows from the mask alone. On a diagonal a block's first rows are so the
// last ones' turn, and nobody waits who started with the others. Thread 0 takes turns before a
// barrier that comes before a tile's additions, and passes them on behind one that follows them.
template <typename Config>
__device__ __forceinline__ void take_turn(const MhaBwdParams& params, BwdBlock<Config>& block,
                                          BwdStep step) {
  if (params.deterministic) [[unlikely]] {
    if (threadIdx.x != 0) return;
    const int row = step.row / Config::kTurnRows * Config::kTurnRows;
    const int64_t head = block.flat_head + step.head;
    int* const turn = params.turns + head * (bwd_padded_rows(params.query_length) / kBwdTurnRows) +
                      row / kBwdTurnRows;
    if (step.row == row || step.row == block.rows.first) {  // the block's first of these rows
      const KeyInterval keys = block.mask.hull(row, row + Config::kTurnRows);
      const int place = (keys.end - 1) / Config::kKeys - block.key_block;
      while (ptx::ld_acquire(turn) != place) {
      }
    }
    const bool is_last = step.row + Config::kRows == row + Config::kTurnRows ||
                         step.row + Config::kRows >= block.rows.end;
    block.turn = is_last ? turn : nullptr;
  }
}
template <typename Config>
__device__ __forceinline__ void pass_turn(const MhaBwdParams& params,
                                          const BwdBlock<Config>& block) {
  if (params.deterministic) [[unlikely]] {
    if (threadIdx.x == 0 && block.turn != nullptr) ptx::red_release_add(block.turn, 1);
  }
}

// The sum of the gradients of queries of a step's head.
template <typename Config>
__device__ __forceinline__ float* head_sum(const MhaBwdParams& params,
                                           const BwdBlock<Config>& block, BwdStep step) {
  return params.dquery_sum +
         (block.flat_head + step.head) * bwd_padded_rows(params.query_length) * Config::kColumns;
}

// What this thread has copied of a tile of f32 becomes what products take.
template <typename Config, int kRows, int kWidth>
__device__ __forceinline__ void prepare_tile(uint32_t tile) {
  if constexpr (Config::kSplit) {
    split_tile<Config, kRows, kWidth>(tile);
  } else {
    f32::round_tile<Config, kRows, kWidth>(tile);
  }
}

// Walks over the tiles of queries. Keys and the first queries, then values and, with two stages,
// the first output gradients are on their way, as two groups of copies.
template <typename Config>
__device__ __forceinline__ void walk(const MhaBwdParams& params, const BwdPlan& plan,
                                     BwdBlock<Config>& block, BwdWarp<Config>& warp, uint32_t tiles,
                                     BwdStep step) {
  using Warp = BwdWarp<Config>;
  constexpr int kStages = Config::kStages;
  const uint32_t key_tile = tiles + Config::kKeyOffset;
  int stage = 0;
  bool first = true;
  do {
    ptx::cp_async_wait_group<kStages == 1 ? 1 : 0>();
    if constexpr (Config::kFloats) {
      static_assert(kStages == 1);
      if (first) prepare_tile<Config, Config::kKeys, Config::kHeadDim>(key_tile);
      prepare_tile<Config, Config::kRows, Config::kHeadDim>(tiles + Config::kStageOffset);
    }
    // Orders this tile's copies by all threads before the reads below, and all warps' reads of the
    // previous tile, probabilities and score gradients before what overwrites them.
    __syncthreads();
    pass_turn<Config>(params, block);
    if constexpr (kStages == 2) {
      const BwdStep next = next_step<Config>(block, step);
      if (next.head < plan.group) {
        copy_queries<Config>(params, block, tiles, stage ^ 1, next);
        copy_douts<Config>(params, block, tiles, stage ^ 1, next);
      }
    } else {
      copy_douts<Config>(params, block, tiles, stage, step);
    }
    ptx::cp_async_commit_group();
    const uint32_t stage_tile = tiles + Config::kStageOffset + stage * Config::kStageBytes;
    const BwdTile<Config> tile{stage_tile,
                               stage_tile + Config::kQueryBytes,
                               tiles + Config::kRowStateOffset + stage * Config::kRowStateBytes,
                               key_tile,
                               tiles + Config::kValueOffset,
                               tiles + Config::kProbabilityOffset,
                               tiles + Config::kDscoreOffset,
                               block.key_block * Config::kKeys};
    if constexpr (Config::kPaired) {
      make_scores_in_pairs<Config>(params, block, step, tile);
      warp.add_dvalue(tile.probabilities, tile.douts, [](int) {});
    } else {
#pragma unroll
      for (int part = 0; part < Config::kScoreParts; ++part) {
        make_scores<Config>(params, plan, block, step, tile.part(part), [&] {
          if (kStages == 2 || part > 0) return;
          ptx::cp_async_wait_group<0>();
          if constexpr (Config::kFloats) {
            if (first) prepare_tile<Config, Config::kKeys, Config::kHeadDimV>(tile.values);
            first = false;
            prepare_tile<Config, Config::kRows, Config::kHeadDimV>(tile.douts);
          }
          __syncthreads();  // the output gradients' copies before their reads
        });
      }
    }
    take_turn<Config>(params, block, step);
    __syncthreads();  // probabilities and score gradients of all warps before their reads

    const auto copy_next_queries = [&] {
      __syncthreads();  // all reads of the queries before the next overwrite them
      const BwdStep next = next_step<Config>(block, step);
      if (next.head < plan.group) copy_queries<Config>(params, block, tiles, stage, next);
      ptx::cp_async_commit_group();
      ptx::cp_async_commit_group();  // none: what the next wait for queries may leave in flight
    };
    float* const sum = head_sum<Config>(params, block, step);
    if constexpr (Config::kPaired) {
      warp.add_dquery_dkey(sum, step.row, tile.dscores, key_tile, tile.queries);
    } else if constexpr (kStages == 2 || Config::kScoreParts > 1) {
      typename Warp::Dquery dquery;
      Warp::multiply_dscores(dquery, tile.dscores, key_tile);
      warp.add_all(sum, step.row, dquery, tile.dscores, tile.queries, tile.probabilities,
                   tile.douts, [&] {
                     if constexpr (kStages == 1) copy_next_queries();
                   });
    } else {
      warp.add_dkey(tile.dscores, tile.queries);
      copy_next_queries();
      warp.add_dquery_dvalue(sum, step.row, tile.dscores, key_tile, tile.probabilities, tile.douts);
    }
    step = next_step<Config>(block, step);  // again: registers are full meanwhile
    if constexpr (kStages == 2) stage ^= 1;
  } while (step.head < plan.group);
}

// A gradient of keys or of values, in the operands' type through the shared tile or in f32.
template <typename Config, typename Layout, int kWidth, int kTiles>
__device__ __forceinline__ void store_gradient(
    const MhaBwdParams& params, const BwdBlock<Config>& block, uint32_t tile,
    const float (&gradient)[BwdWarp<Config>::kKeyBlocks][kTiles][4], float factor, void* target,
    bool f32, int width) {
  const int64_t row_stride = int64_t{params.kv_heads} * width;
  const int64_t offset = block.flat_key * row_stride + block.kv_head * width;
  const int first_key = block.key_block * Config::kKeys;
  const int rows = params.key_length - first_key;
  const int valid_rows = block.mask.key_length - first_key;
  if (Config::kFloats || f32) {
    BwdWarp<Config>::store_gradient(static_cast<float*>(target) + offset, row_stride, gradient,
                                    factor, valid_rows, rows, width);
    return;
  }
  if constexpr (!Config::kFloats) {
    BwdWarp<Config>::template stage_gradient<Layout>(tile, gradient, factor);
    __syncthreads();  // all warps' parts before whole rows are read
    // At least eight rows, after which the swizzle repeats.
    constexpr int kWarpKeys =
        Config::kKeys / Config::kWarps < 8 ? 8 : Config::kKeys / Config::kWarps;
    const int warp_key = warp_id() * kWarpKeys;
    if (warp_key >= Config::kKeys) return;
    TileStore<kWarpKeys, kWidth, Config::kWide>::store(
        static_cast<Element16*>(target) + offset + warp_key * row_stride, row_stride,
        tile + warp_key * Layout::kPitch, valid_rows - warp_key, rows - warp_key, width);
  }
}

template <typename Config>
__device__ __forceinline__ void run_block(const MhaBwdParams& params, const BwdPlan& plan) {
  extern __shared__ __align__(1024) unsigned char shared[];
  BwdBlock<Config>& block = *reinterpret_cast<BwdBlock<Config>*>(shared);
  static_assert(sizeof(block) <= Config::kStateBytes);
  const uint32_t tiles = ptx::shared_address(shared) + Config::kStateBytes;

  BwdStep step;
  bool any_rows;
  {
    BwdBlock<Config> found;
    if (!find_block(params, plan, found)) return;
    step = {0, found.rows.first};
    any_rows = found.rows.first < found.rows.end;
    if (any_rows) {
      copy_keys<Config>(params, found, tiles);
      copy_queries<Config>(params, found, tiles, 0, step);
      ptx::cp_async_commit_group();
      copy_values<Config>(params, found, tiles);
      if constexpr (Config::kStages == 2) copy_douts<Config>(params, found, tiles, 0, step);
      ptx::cp_async_commit_group();
    }
    if (threadIdx.x == 0) block = found;  // read after the next barrier
  }
  BwdWarp<Config> warp;
  warp.init();
  if (any_rows) walk(params, plan, block, warp, tiles, step);

  __syncthreads();  // keys and values are read no more; the state where there was no tile
  pass_turn<Config>(params, block);
  store_gradient<Config, typename Config::KeyLayout, Config::kHeadDim>(
      params, block, tiles + Config::kKeyOffset, warp.dkey, params.factor, params.dkey,
      params.f32_dkey, params.head_dim / Config::kUnits);
  store_gradient<Config, typename Config::ValueLayout, Config::kHeadDimV>(
      params, block, tiles + Config::kValueOffset, warp.dvalue,
      Config::kDense ? params.intervals.kept_scale : 1.0f, params.dvalue, params.f32_dvalue,
      params.head_dim_v / Config::kUnits);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    mha_bwd_kernel(const __grid_constant__ MhaBwdParams params,
                   const __grid_constant__ BwdPlan plan) {
  if constexpr (Config::kHasCode) run_block<Config>(params, plan);
}

}  // namespace jax_flash::sm80
