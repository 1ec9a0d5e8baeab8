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
#include "sm80/bwd_warp.cuh"
#include "tile/copy.cuh"
#include "tile/score_options.cuh"

namespace jax_flash::sm80 {

// The order of sums: a block adds to kTurnRows rows when the blocks of earlier keys that reach them
// have added. Which do follows from the mask alone.
template <typename Config>
struct BwdTurn {
  int* turn;
  int place;   // of this block among those that reach the rows
  bool first;  // whether `step` is this block's first tile of these rows
  bool last;

  __device__ __forceinline__ BwdTurn(const MhaBwdParams& params, const BwdBlock<Config>& block,
                                     BwdStep step) {
    const int row = step.row / Config::kTurnRows * Config::kTurnRows;
    const int64_t head = block.flat_head + step.head;
    turn = params.turns + head * (bwd_padded_rows(params.query_length) / kBwdTurnRows) +
           row / kBwdTurnRows;
    place = block.key_block - block.mask.hull(row, row + Config::kTurnRows).first / Config::kKeys;
    first = step.row == row || step.row == block.rows.first;
    last = step.row + Config::kRows == row + Config::kTurnRows ||
           step.row + Config::kRows >= block.rows.end;
  }

  __device__ __forceinline__ void wait() const {
    if (!first) return;
    if (threadIdx.x == 0) {
      while (ptx::ld_acquire(turn) != place) {
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void pass() const {
    if (!last) return;
    __syncthreads();  // all threads' additions come before the release
    if (threadIdx.x == 0) ptx::red_release_add(turn, 1);
  }
};

template <typename Config>
__device__ __forceinline__ void wait_turn(const MhaBwdParams& params, const BwdBlock<Config>& block,
                                          BwdStep step) {
  if (params.deterministic) [[unlikely]]
    BwdTurn<Config>(params, block, step).wait();
}
template <typename Config>
__device__ __forceinline__ void pass_turn(const MhaBwdParams& params, const BwdBlock<Config>& block,
                                          BwdStep step) {
  if (params.deterministic) [[unlikely]]
    BwdTurn<Config>(params, block, step).pass();
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
                                     const BwdBlock<Config>& block, BwdWarp<Config>& warp,
                                     uint32_t tiles, BwdStep step) {
  using Warp = BwdWarp<Config>;
  constexpr int kStages = Config::kStages;
  const uint32_t key_tile = tiles + Config::kKeyOffset;
  const uint32_t probability_tile = tiles + Config::kProbabilityOffset;
  const uint32_t dscore_tile = tiles + Config::kDscoreOffset;
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
    const uint32_t query_tile = tiles + Config::kStageOffset + stage * Config::kStageBytes;
    const uint32_t dout_tile = query_tile + Config::kQueryBytes;
    const uint32_t lses = tiles + Config::kRowStateOffset + stage * Config::kRowStateBytes;

    typename Warp::Scores scores;
    Warp::multiply_keys(scores, query_tile, key_tile);
    bool options = false;
    if constexpr (Config::kIntervals) {
      options = Config::kDense || ScoreOptions::any(params);
      if (options) {
        const int head = block.kv_head * plan.group + step.head;
        Warp::softmax_with_options(scores, block.mask, step.row, block.key_block * Config::kKeys,
                                   lses, ScoreOptions::make(params, block.batch, head),
                                   Warp::dense_of(params, block.batch, head), probability_tile);
      }
    }
    if (!options) {
      Warp::softmax(scores, block.mask, step.row, block.key_block * Config::kKeys, lses,
                    params.scale);
      Warp::store_scores(probability_tile, scores);
    }
    if constexpr (kStages == 1) {
      ptx::cp_async_wait_group<0>();
      if constexpr (Config::kFloats) {
        if (first)
          prepare_tile<Config, Config::kKeys, Config::kHeadDimV>(tiles + Config::kValueOffset);
        first = false;
        prepare_tile<Config, Config::kRows, Config::kHeadDimV>(dout_tile);
      }
      __syncthreads();  // the output gradients' copies before their reads
    }
    typename Warp::Scores dscores;
    Warp::multiply_values(dscores, dout_tile, tiles + Config::kValueOffset,
                          lses + 4 * Config::kRows);
    if (Config::kDense && params.intervals.dropout != 0) {
      Warp::multiply_dropped(dscores, scores, lses + 4 * Config::kRows,
                             params.intervals.kept_scale);
    } else {
#pragma unroll
      for (int i = 0; i < Warp::kScoreBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < Warp::kScoreTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) dscores[i][j][e] *= scores[i][j][e];
        }
      }
    }
    if constexpr (Config::kDense) {
      if (params.dbias.data != nullptr) {
        const int head = block.kv_head * plan.group + step.head;
        Warp::add_bias_gradients(BiasGradient::make(params, block.batch, head), dscores, step.row,
                                 block.key_block * Config::kKeys, params.query_length,
                                 params.key_length);
      }
      if (params.dslopes != nullptr) {
        static_assert(Config::kScoreRowWarps <= kSlopeParts);
        const int64_t part =
            (block.flat_head + step.head) * kSlopeParts + Warp::warp_id() % Config::kScoreRowWarps;
        add_slope_gradients(params.dslopes + part * params.key_length, block.mask, dscores,
                            step.row + Warp::score_row() + fragment_row(),
                            block.key_block * Config::kKeys + Warp::score_key() + fragment_column(),
                            params.key_length);
      }
    }
    Warp::store_scores(dscore_tile, dscores);
    __syncthreads();  // probabilities and score gradients of all warps before their reads

    if constexpr (kStages == 2) {
      typename Warp::Dquery dquery;
      Warp::multiply_dscores(dquery, dscore_tile, key_tile);
      wait_turn<Config>(params, block, step);
      warp.add_all(head_sum<Config>(params, block, step), step.row, dquery, dscore_tile, query_tile,
                   probability_tile, dout_tile);
    } else {
      warp.add_dkey(dscore_tile, query_tile);
      __syncthreads();  // all reads of the queries before the next overwrite them
      const BwdStep next = next_step<Config>(block, step);
      if (next.head < plan.group) copy_queries<Config>(params, block, tiles, stage, next);
      ptx::cp_async_commit_group();
      ptx::cp_async_commit_group();  // none: what the next wait for queries may leave in flight
      wait_turn<Config>(params, block, step);
      warp.add_dquery_dvalue(head_sum<Config>(params, block, step), step.row, dscore_tile, key_tile,
                             probability_tile, dout_tile);
    }
    pass_turn<Config>(params, block, step);
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
    const int warp_key = BwdWarp<Config>::warp_id() * kWarpKeys;
    if (warp_key >= Config::kKeys) return;
    TileStore<kWarpKeys, kWidth, Config::kWide>::store(
        static_cast<Element16*>(target) + offset + warp_key * row_stride, row_stride,
        tile + warp_key * Layout::kPitch, valid_rows - warp_key, rows - warp_key, width);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    mha_bwd_kernel(const __grid_constant__ MhaBwdParams params,
                   const __grid_constant__ BwdPlan plan) {
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
  store_gradient<Config, typename Config::KeyLayout, Config::kHeadDim>(
      params, block, tiles + Config::kKeyOffset, warp.dkey, params.factor, params.dkey,
      params.f32_dkey, params.head_dim / Config::kUnits);
  store_gradient<Config, typename Config::ValueLayout, Config::kHeadDimV>(
      params, block, tiles + Config::kValueOffset, warp.dvalue,
      Config::kDense ? params.intervals.kept_scale : 1.0f, params.dvalue, params.f32_dvalue,
      params.head_dim_v / Config::kUnits);
}

}  // namespace jax_flash::sm80
