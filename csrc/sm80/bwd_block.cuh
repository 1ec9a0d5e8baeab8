// Which keys a thread block of the backward works on, the steps of its walk, and what it copies.
#pragma once

#include <cstdint>

#include "host/fast_divisor.h"
#include "host/params.h"
#include "ptx/cp_async.cuh"
#include "sm80/bwd_config.cuh"
#include "tile/copy.cuh"
#include "tile/copy_live.cuh"
#include "tile/copy_part.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"
#include "tile/score_options.cuh"
#include "tile/sequence.cuh"

namespace jax_flash::sm80 {

// The order of thread blocks, set by the launch. As in tile/schedule.cuh, but key blocks run from
// the first to the last, because with a causal mask the first are seen by the most queries; with
// sums in order from the last to the first, so that a block waits only for those before it.
struct BwdPlan {
  FastDivisor kv_heads;
  FastDivisor section;  // (batch, kv head) pairs whose queries share the L2 at a time
  FastDivisor key_blocks;
  int32_t missing_heads;  // by which batch * kv_heads is short of whole sections
  int32_t group;          // heads / kv_heads
};

// What is needed only now and then lives in shared memory; registers hold the accumulators.
template <typename Config>
struct BwdBlock {
  typename Config::Mask mask;
  RowInterval rows;   // that see a key of this block, from the first row of a tile on
  RowInterval valid;  // that see any key: other rows are not read. Not with intervals
  int key_block;
  int kv_head;
  int64_t flat_key;      // batch * key_length + first key
  int64_t flat_head;     // batch * heads + first head of the group
  const Element16* key;  // row 0 of the kv head
  const Element16* value;
  const Element16* query;  // row 0 of the first head of the group
  const Element16* dout;
  const float* row_lse;
  const float* row_delta;
  int* turn;        // to pass on when all have added; of one thread, for sums in order
  int batch;        // with intervals
  int padded_rows;  // these two with what is dense: of a head, in row_lse
  bool hides;       // whether rows that have keys may see none
  bool skips;  // tiles that a mask hides; with an order of sums every tile of a hull has a turn
};

// A tile of queries of one head of the group.
struct BwdStep {
  int head;
  int row;
};

__device__ __forceinline__ const Element16* head_rows(const TensorView& view, int batch, int head,
                                                      const MhaBwdParams& params) {
  return static_cast<const Element16*>(view.data) +
         batch_offset(view.batch_strides, batch, params) + head * view.head_stride;
}

// With intervals: whether the rows of a tile reach a key of this block.
template <typename Config>
__device__ __forceinline__ bool reaches(const BwdBlock<Config>& block, int row) {
  const KeyInterval keys = block.mask.hull(row, row + Config::kRows);
  const int first_key = block.key_block * Config::kKeys;
  if (keys.first >= first_key + Config::kKeys || keys.end <= first_key) return false;
  if constexpr (Config::kDense) {
    static_assert(kIntervalRows % Config::kRows == 0, "a tile is of one record");
    const RowTile& tile = block.mask.row_tiles[row / kIntervalRows];
    if (block.skips) return !block.mask.hides(tile, first_key, first_key + Config::kKeys);
  }
  return true;
}

// False if there is no work.
template <typename Config>
__device__ __forceinline__ bool find_block(const MhaBwdParams& params, const BwdPlan& plan,
                                           BwdBlock<Config>& block) {
  const int upper = plan.section.divide(blockIdx.x);
  const int section = plan.key_blocks.divide(upper);
  const int section_heads = plan.section.divisor;
  const int key_blocks = plan.key_blocks.divisor;
  const int number = upper - section * key_blocks;
  const int key_block = params.deterministic ? key_blocks - 1 - number : number;
  const int flat = (section - upper) * section_heads + blockIdx.x - plan.missing_heads;
  if (flat < 0) return false;
  const int batch = plan.kv_heads.divide(flat);
  const int kv_head = flat - batch * params.kv_heads;
  const int head = kv_head * plan.group;
  const int first_key = key_block * Config::kKeys;

  block.mask = mask_of<typename Config::Mask>(params, batch);
  block.rows = block.mask.rows(first_key, first_key + Config::kKeys);
  block.key_block = key_block;
  if constexpr (Config::kIntervals) {
    if constexpr (Config::kDense) {
      block.skips = params.intervals.mask.data != nullptr && !params.deterministic;
    }
    while (block.rows.first < block.rows.end && !reaches(block, block.rows.first)) {
      block.rows.first += Config::kRows;
    }
    block.batch = batch;
    if constexpr (Config::kDense) {
      block.padded_rows = bwd_padded_rows(params.query_length);
      block.hides = ScoreOptions::hides(params);
    }
  } else {
    if (block.rows.first < block.rows.end) {
      block.rows.first = block.rows.first / Config::kRows * Config::kRows;
    }
    block.valid = block.mask.rows(0, block.mask.key_length);
  }
  block.turn = nullptr;
  block.flat_key = int64_t{batch} * params.key_length + first_key;
  block.kv_head = kv_head;
  block.flat_head = int64_t{batch} * params.heads + head;
  block.query = head_rows(params.query, batch, head, params);
  block.dout = static_cast<const Element16*>(params.dout) +
               (int64_t{batch} * params.query_length * params.heads + head) * params.head_dim_v;
  block.key = head_rows(params.key, batch, kv_head, params);
  block.value = head_rows(params.value, batch, kv_head, params);
  block.row_lse = params.row_lse + block.flat_head * bwd_padded_rows(params.query_length);
  block.row_delta = params.row_delta + block.flat_head * bwd_padded_rows(params.query_length);
  return true;
}

template <typename Config>
__device__ __forceinline__ BwdStep next_step(const BwdBlock<Config>& block, BwdStep step) {
  do {
    step.row += Config::kRows;
  } while (Config::kIntervals && step.row < block.rows.end && !reaches(block, step.row));
  if (step.row >= block.rows.end) {
    step.row = block.rows.first;
    ++step.head;
  }
  return step;
}

// Of this block's keys, or values: those past the end of the sequence, and dead ones, become zeros.
// They may hold anything.
template <typename Config, int kWidth>
__device__ __forceinline__ void copy_key_rows(const BwdBlock<Config>& block, uint32_t tile,
                                              const Element16* operand, int64_t row_stride,
                                              int width, int alignment) {
  const int first_key = block.key_block * Config::kKeys;
  if constexpr (Config::kIntervals) {
    if (block.mask.dead_keys(first_key, first_key + Config::kKeys)) {
      copy_live_rows<Config::kKeys, kWidth, Config::kThreads, Config::kWide>(
          tile, operand, row_stride, first_key, width,
          [&](int key) { return block.mask.id(key) >= 0; });
      return;
    }
  }
  TileCopy<Config::kKeys, kWidth, Config::kThreads, Config::kWide>::copy(
      tile, operand, row_stride, first_key, block.mask.key_length, width, alignment);
}
template <typename Config>
__device__ __forceinline__ void copy_keys(const MhaBwdParams& params, const BwdBlock<Config>& block,
                                          uint32_t tiles) {
  copy_key_rows<Config, Config::kHeadDim>(block, tiles + Config::kKeyOffset, block.key,
                                          params.key.row_stride, params.head_dim,
                                          params.key.alignment);
}
template <typename Config>
__device__ __forceinline__ void copy_values(const MhaBwdParams& params,
                                            const BwdBlock<Config>& block, uint32_t tiles) {
  copy_key_rows<Config, Config::kHeadDimV>(block, tiles + Config::kValueOffset, block.value,
                                           params.value.row_stride, params.head_dim_v,
                                           params.value.alignment);
}

// Of a tile of queries, or output gradients: rows that see no key become zeros.
template <typename Config, int kWidth>
__device__ __forceinline__ void copy_query_rows(const BwdBlock<Config>& block, uint32_t tile,
                                                const Element16* operand, int64_t row_stride,
                                                BwdStep step, int width, int alignment) {
  const int row = step.row;
  if constexpr (Config::kIntervals) {
    const bool hides = Config::kDense && block.hides;
    if (hides || block.mask.dead_rows(row, row + Config::kRows)) {
      const auto is_live = [&](int row) {
        if constexpr (Config::kDense) {
          // Written by bwd_prepare: infinite where a row sees nothing.
          const float* const lse = block.row_lse + step.head * int64_t{block.padded_rows};
          if (lse[row] == __builtin_huge_valf()) return false;
        }
        const KeyInterval keys = block.mask.interval(row);
        return keys.first < keys.end;
      };
      copy_live_rows<Config::kRows, kWidth, Config::kThreads, Config::kWide>(
          tile, operand, row_stride, row, width, is_live);
    } else {
      TileCopy<Config::kRows, kWidth, Config::kThreads, Config::kWide>::copy(
          tile, operand, row_stride, row, block.mask.query_length, width, alignment);
    }
  } else {
    copy_valid_rows<Config::kRows, kWidth, Config::kThreads, Config::kWide>(
        tile, operand, row_stride, row, block.valid, width, alignment);
  }
}

// Queries, and lse and delta of the same rows.
template <typename Config>
__device__ __forceinline__ void copy_queries(const MhaBwdParams& params,
                                             const BwdBlock<Config>& block, uint32_t tiles,
                                             int stage, BwdStep step) {
  copy_query_rows<Config, Config::kHeadDim>(
      block, tiles + Config::kStageOffset + stage * Config::kStageBytes,
      block.query + step.head * params.query.head_stride, params.query.row_stride, step,
      params.head_dim, params.query.alignment);
  constexpr int kChunks = Config::kRows / 4;
  const int chunk = threadIdx.x;
  if (chunk < 2 * kChunks) {
    const float* const statistic = chunk < kChunks ? block.row_lse : block.row_delta;
    ptx::cp_async_16(tiles + Config::kRowStateOffset + stage * Config::kRowStateBytes + 16 * chunk,
                     statistic + int64_t{step.head} * bwd_padded_rows(params.query_length) +
                         step.row + chunk % kChunks * 4,
                     16);
  }
}

template <typename Config>
__device__ __forceinline__ void copy_douts(const MhaBwdParams& params,
                                           const BwdBlock<Config>& block, uint32_t tiles, int stage,
                                           BwdStep step) {
  const int width = params.head_dim_v;
  copy_query_rows<Config, Config::kHeadDimV>(
      block, tiles + Config::kStageOffset + stage * Config::kStageBytes + Config::kQueryBytes,
      block.dout + step.head * width, static_cast<int64_t>(params.heads) * width, step, width,
      width % 2 == 0 && reinterpret_cast<uintptr_t>(params.dout) % 4 == 0 ? 4 : 2);
}

}  // namespace jax_flash::sm80
