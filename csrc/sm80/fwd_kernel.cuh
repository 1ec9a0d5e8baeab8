// FlashAttention-2 forward (Dao 2023, arXiv:2307.08691) with mma.sync, for sm_80 and later.
//
// A thread block owns kRows queries of one head and walks over the keys that these rows see.
// Copies run kStages - 1 tiles ahead; one barrier a tile. docs/design/fwd_sm80.md has the limits,
// the schedule and what was tried.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "sm80/f32_products.cuh"
#include "sm80/fwd_config.cuh"
#include "sm80/interval_scores.cuh"
#include "tile/copy.cuh"
#include "tile/copy_live.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"
#include "tile/score_options.cuh"
#include "tile/sequence.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm80 {

// One warp's registers and the steps that work on them.
template <typename Config>
struct FwdWarp {
  using Element = typename Config::Element;
  static constexpr int kBlocks = Config::kBlocks;
  static constexpr int kKeySteps = Config::kHeadDim / 16;
  static constexpr int kScoreTiles = Config::kKeys / 8;
  static constexpr int kOutTiles = Config::kHeadDimV / Config::kUnits / 8;

  float out[kBlocks][kOutTiles][4];
  OnlineSoftmax<kBlocks> softmax;
  uint32_t query_address;  // of this lane, first k-step
  uint32_t query[Config::kQuerySteps > 0 ? Config::kQuerySteps : 1][kBlocks][4];

  __device__ __forceinline__ void init(uint32_t query_tile, int warp_row) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][j][e] = 0.0f;
      }
    }
    softmax.init();
    query_address = a_operand_address<typename Config::QueryLayout>(query_tile, warp_row);
  }

  __device__ __forceinline__ void load_query(uint32_t (&a)[kBlocks][4], int step) const {
    using Layout = typename Config::QueryLayout;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::ldmatrix_x4(a[i], Layout::advance(query_address, 2 * step) + i * 16 * Layout::kPitch);
    }
  }

  __device__ __forceinline__ void keep_queries() {
#pragma unroll
    for (int step = 0; step < Config::kQuerySteps; ++step) load_query(query[step], step);
  }

  __device__ __forceinline__ void query_operand(uint32_t (&a)[kBlocks][4], int step) const {
    if (step < Config::kQuerySteps) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = query[step][i][r];
      }
    } else {
      load_query(a, step);
    }
  }

  // scores = Q K^T
  __device__ __forceinline__ void multiply_keys(float (&scores)[kBlocks][kScoreTiles][4],
                                                uint32_t key_tile) const {
    using Layout = typename Config::KeyLayout;
    const uint32_t address = b_operand_address<Layout>(key_tile, 0);
    if constexpr (Config::kF32) {
      f32::multiply_rows<Config::kProducts, typename Config::QueryLayout, Layout, kKeySteps>(
          scores, query_address, address);
    } else {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[i][j][e] = 0.0f;
        }
      }
#pragma unroll
      for (int step = 0; step < kKeySteps; ++step) {
        uint32_t a[kBlocks][4];
        query_operand(a, step);
#pragma unroll
        for (int j = 0; j < kScoreTiles / 2; ++j) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, Layout::advance(address, 2 * step) + j * 16 * Layout::kPitch);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            ptx::mma_m16n8k16<Element>(scores[i][2 * j], a[i], b[0], b[1]);
            ptx::mma_m16n8k16<Element>(scores[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  // out += P V, P being the exponentials in `scores`
  __device__ __forceinline__ void multiply_values(const float (&scores)[kBlocks][kScoreTiles][4],
                                                  uint32_t value_tile) {
    using Layout = typename Config::ValueLayout;
    if constexpr (Config::kF32) {
      f32::add_weighted<Config::kProducts, Layout>(out, scores, value_tile);
    } else {
      const uint32_t address = b_operand_trans_address<Layout>(value_tile, 0);
#pragma unroll
      for (int step = 0; step < kScoreTiles / 2; ++step) {
        uint32_t a[kBlocks][4];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          pack_a_operand<Element>(a[i], scores[i][2 * step], scores[i][2 * step + 1]);
        }
#pragma unroll
        for (int j = 0; j < kOutTiles / 2; ++j) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, Layout::advance(address, 2 * j) + step * 16 * Layout::kPitch);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            ptx::mma_m16n8k16<Element>(out[i][2 * j], a[i], b[0], b[1]);
            ptx::mma_m16n8k16<Element>(out[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void apply_scale(float (&scores)[kBlocks][kScoreTiles][4],
                                                     float scale) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[i][j][e] *= scale;
      }
    }
  }

  // Keys outside a row's interval get a score of -inf. `row` is this lane's first row.
  static __device__ __forceinline__ void apply_mask(float (&scores)[kBlocks][kScoreTiles][4],
                                                    const typename Config::Mask& mask, int row,
                                                    int first_key) {
    const int first_column = first_key + fragment_column();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const KeyInterval keys = mask.interval(row + 16 * i + 8 * h);
        const int begin = keys.first - first_column;
        const int end = keys.end - first_column;
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * j + e;
            if (column < begin || column >= end) scores[i][j][2 * h + e] = kMinusInfinity;
          }
        }
      }
    }
    if constexpr (Config::kIntervals) {
      if (mask.mixed(row, row + 1)) mask_ids(scores, mask, row, first_column);
    }
  }
};

// The lse of a row of this block's head.
__device__ __forceinline__ float* lse_row(const MhaFwdParams& params, const BlockCoordinate& at,
                                          int row) {
  return params.lse +
         (static_cast<int64_t>(at.batch) * params.heads + at.head) * params.query_length + row;
}

// A warp's output rows: `valid_rows` of them from its shared rows, the rest of the sequence zeros.
template <typename Config>
__device__ __forceinline__ void store_out(const MhaFwdParams& params, const BlockCoordinate& at,
                                          int warp_row, uint32_t out_tile, int valid_rows) {
  const int width = params.head_dim_v;
  const int64_t row_stride = static_cast<int64_t>(params.heads) * width;
  Element16* const out =
      static_cast<Element16*>(params.out) +
      (static_cast<int64_t>(at.batch) * params.query_length + warp_row) * row_stride +
      at.head * width;
  TileStore<Config::kWarpRows, Config::kHeadDimV, Config::kWide>::store(
      out, row_stride, out_tile, valid_rows, params.query_length - warp_row, width);
}

__device__ __forceinline__ const Element16* operand(const TensorView& view, int batch, int head,
                                                    const MhaFwdParams& params) {
  return static_cast<const Element16*>(view.data) +
         batch_offset(view.batch_strides, batch, params) + head * view.head_stride;
}

// Keys that some row of a warp sees, and those that all its rows see.
struct WarpKeys {
  KeyInterval seen;
  KeyInterval unmasked;
};

// What is needed only now and then lives in shared memory; registers hold the accumulators.
template <typename Config>
struct BlockState {
  BlockCoordinate at;
  typename Config::Mask mask;
  const Element16* key;  // row 0 of this block's head
  const Element16* value;
  int end_key;  // of the keys that the block sees
  WarpKeys warp_keys[Config::kWarps];
  ScoreOptions options;  // of calls with intervals
  Dropout dropout;       // of calls with what is dense
};

// Of the exponentials.
template <typename Config>
__device__ __forceinline__ SoftmaxScale softmax_scale(const MhaFwdParams& params) {
  if constexpr (Config::kIntervals) {
    return exponent_scale<Config::kDense>(params);
  } else {
    return params.scale;
  }
}

template <typename Config>
__device__ __forceinline__ void store_empty(const MhaFwdParams& params, const BlockCoordinate& at,
                                            int warp_row) {
  store_out<Config>(params, at, warp_row, 0, 0);
  const int rows = min(Config::kWarpRows, params.query_length - warp_row);
  for (int row = lane_id(); row < rows; row += 32) {
    *lse_row(params, at, warp_row + row) = kMinusInfinity;
  }
}

// Normalises, and stores outputs and lse. Outputs go through the shared rows that held this warp's
// queries, which no other warp touches.
template <typename Config>
__device__ __forceinline__ void finish_warp(const MhaFwdParams& params,
                                            const BlockState<Config>& state, FwdWarp<Config>& warp,
                                            uint32_t query_tile) {
  using Layout = typename Config::OutLayout;
  const int warp_offset = threadIdx.x / 32 * Config::kWarpRows;
  const int warp_row = state.at.row_block * Config::kRows + warp_offset;
  const uint32_t out_tile = query_tile + warp_offset * Config::QueryLayout::kPitch;
  const int first_row = fragment_row();
  const int column_bytes = 2 * fragment_column();
  __syncwarp();  // other lanes' reads of the queries come before these writes
#pragma unroll
  for (int i = 0; i < Config::kBlocks; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 16 * i + 8 * h;
      bool dead = warp_row + row >= state.mask.query_length;
      float inverse = warp.softmax.finish(i, h);
      if constexpr (Config::kIntervals) {
        // Such a row's sums are anything, if there are tiles that all others see.
        const KeyInterval keys = state.mask.interval(warp_row + row);
        dead = keys.first >= keys.end;
        if constexpr (Config::kDense) inverse *= params.intervals.kept_scale;
        if (dead) {
          inverse = 0.0f;
#pragma unroll
          for (int j = 0; j < FwdWarp<Config>::kOutTiles; ++j) {
            warp.out[i][j][2 * h] = warp.out[i][j][2 * h + 1] = 0.0f;
          }
        }
      }
      if (column_bytes == 0 && warp_row + row < params.query_length) {
        *lse_row(params, state.at, warp_row + row) =
            dead ? kMinusInfinity : warp.softmax.lse(i, h, softmax_scale<Config>(params));
      }
      if constexpr (Config::kF32) {
        f32::store_row<Layout>(out_tile, row, warp.out[i], h, inverse);
      } else {
#pragma unroll
        for (int j = 0; j < FwdWarp<Config>::kOutTiles; ++j) {
          ptx::st_shared(out_tile + Layout::offset(row, j) + column_bytes,
                         ptx::cvt_rn_x2<typename Config::Element>(
                             warp.out[i][j][2 * h] * inverse, warp.out[i][j][2 * h + 1] * inverse));
        }
      }
    }
  }
  __syncwarp();  // and these writes before the other lanes' reads
  store_out<Config>(params, state.at, warp_row, out_tile, state.mask.query_length - warp_row);
}

// Copies tile `key` of keys or of values. Rows past the last key that the block sees become zeros:
// padding may hold anything, and 0 * NaN would reach the output.
template <typename Config>
__device__ __forceinline__ void copy_keys(const MhaFwdParams& params, const Element16* operand,
                                          uint32_t stage, int key, int end_key) {
  TileCopy<Config::kKeys, Config::kHeadDim, Config::kThreads, Config::kWide>::copy(
      stage, operand, params.key.row_stride, key, end_key, params.head_dim, params.key.alignment);
}
// Values of dead keys become zeros, too. The dead keys themselves need not: they are masked.
template <typename Config>
__device__ __forceinline__ void copy_values(const MhaFwdParams& params,
                                            const typename Config::Mask& mask,
                                            const Element16* operand, uint32_t stage, int key,
                                            int end_key) {
  if constexpr (Config::kIntervals) {
    if (mask.dead_keys(key, key + Config::kKeys)) [[unlikely]] {
      copy_live_rows<Config::kKeys, Config::kHeadDimV, Config::kThreads, Config::kWide>(
          stage + Config::kKeyBytes, operand, params.value.row_stride, key, params.head_dim_v,
          [&](int row) { return row < end_key && mask.key_ids[row] >= 0; });
      return;
    }
  }
  TileCopy<Config::kKeys, Config::kHeadDimV, Config::kThreads, Config::kWide>::copy(
      stage + Config::kKeyBytes, operand, params.value.row_stride, key, end_key, params.head_dim_v,
      params.value.alignment);
}

// Where a key tile and the values that go with it lie in shared memory.
template <typename Config>
__device__ __forceinline__ uint32_t stage_address(uint32_t query_tile, int key) {
  return query_tile + Config::kQueryBytes +
         key / Config::kKeys % Config::kStages * Config::kStageBytes;
}

// Finds this block's work, starts the first copies and writes down what is needed later. `key` is
// the first key tile; false if there is nothing left to do.
template <typename Config>
__device__ __forceinline__ bool start_block(const MhaFwdParams& params, BlockState<Config>& state,
                                            FwdWarp<Config>& warp, uint32_t query_tile, int& key) {
  constexpr int kStages = Config::kStages;
  const int warp_id = threadIdx.x / 32;
  const int warp_offset = warp_id * Config::kWarpRows;
  const BlockCoordinate at = block_coordinate(params);
  if (at.batch < 0) return false;
  const int block_row = at.row_block * Config::kRows;
  const int warp_row = block_row + warp_offset;
  const auto mask = mask_of<typename Config::Mask>(params, at.batch);
  const KeyInterval keys = mask.hull(block_row, block_row + Config::kRows);
  if (keys.first >= keys.end) [[unlikely]] {
    store_empty<Config>(params, at, warp_row);
    return false;
  }
  key = keys.first / Config::kKeys * Config::kKeys;

  // A tile is a cp.async group, empty past the last one; with one stage, keys and values are two.
  const int kv_head = params.group_divisor.divide(at.head);
  const Element16* const key_rows = operand(params.key, at.batch, kv_head, params);
  const Element16* const value_rows = operand(params.value, at.batch, kv_head, params);
  TileCopy<Config::kRows, Config::kHeadDim, Config::kThreads, Config::kWide>::copy(
      query_tile, operand(params.query, at.batch, at.head, params), params.query.row_stride,
      block_row, mask.query_length, params.head_dim, params.query.alignment);
  if constexpr (kStages == 1) {
    const uint32_t stage = stage_address<Config>(query_tile, key);
    copy_keys<Config>(params, key_rows, stage, key, keys.end);
    ptx::cp_async_commit_group();
    copy_values<Config>(params, mask, value_rows, stage, key, keys.end);
    ptx::cp_async_commit_group();
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    const int ahead = key + i * Config::kKeys;
    if (ahead < keys.end) {
      const uint32_t stage = stage_address<Config>(query_tile, ahead);
      copy_keys<Config>(params, key_rows, stage, ahead, keys.end);
      copy_values<Config>(params, mask, value_rows, stage, ahead, keys.end);
    }
    ptx::cp_async_commit_group();
  }

  // Read after the first barrier of the loop.
  if (threadIdx.x == 0) {
    state.at = at;
    state.mask = mask;
    state.key = key_rows;
    state.value = value_rows;
    state.end_key = keys.end;
    if constexpr (Config::kIntervals) {
      state.options = ScoreOptions::make(params, at.batch, at.head);
      if constexpr (Config::kDense) state.dropout = Dropout::make(params, at.batch, at.head);
    }
  }
  if (lane_id() == 0) {
    state.warp_keys[warp_id] = {mask.hull(warp_row, warp_row + Config::kWarpRows),
                                mask.core(warp_row, warp_row + Config::kWarpRows)};
  }
  warp.init(query_tile, warp_offset);
  return true;
}

// Walks over the block's key tiles from `key` on.
template <typename Config>
__device__ __forceinline__ void attend(const MhaFwdParams& params, const BlockState<Config>& state,
                                       FwdWarp<Config>& warp, uint32_t query_tile, int key) {
  using Warp = FwdWarp<Config>;
  constexpr int kStages = Config::kStages;
  const auto stage_of = [&](int key) { return stage_address<Config>(query_tile, key); };
  const int warp_id = threadIdx.x / 32;
  const auto this_row = [&] {  // this lane's first
    return state.at.row_block * Config::kRows + warp_id * Config::kWarpRows + fragment_row();
  };
  bool first = true;
  do {
    if (kStages == 1 && first) {
      ptx::cp_async_wait_group<1>();  // the first values may still be on their way
    } else {
      ptx::cp_async_wait_group<(kStages == 1 ? 0 : kStages - 2)>();
    }
    if constexpr (Config::kF32) {
      if (first) f32::round_tile<Config, Config::kRows, Config::kHeadDim>(query_tile);
      f32::round_tile<Config, Config::kKeys, Config::kHeadDim>(stage_of(key));
      if constexpr (kStages > 1) {
        f32::round_tile<Config, Config::kKeys, Config::kHeadDimV>(stage_of(key) +
                                                                  Config::kKeyBytes);
      }
    }
    // Orders this tile's copies by all threads before the reads below, and all warps' reads of the
    // previous tile before the copies that now overwrite it.
    __syncthreads();
    if (Config::kQuerySteps > 0 && first) warp.keep_queries();
    if constexpr (kStages == 1) {
      if (!first) {
        copy_values<Config>(params, state.mask, state.value, stage_of(key), key, state.end_key);
      }
    } else {
      const int ahead = key + (kStages - 1) * Config::kKeys;
      if (ahead < state.end_key) {
        copy_keys<Config>(params, state.key, stage_of(ahead), ahead, state.end_key);
        copy_values<Config>(params, state.mask, state.value, stage_of(ahead), ahead, state.end_key);
      }
    }
    first = false;
    ptx::cp_async_commit_group();

    const WarpKeys warp_keys = state.warp_keys[warp_id];
    bool active = key < warp_keys.seen.end && key + Config::kKeys > warp_keys.seen.first;
    if constexpr (Config::kDense) {
      static_assert(kIntervalRows % Config::kWarpRows == 0, "a warp's rows are of one record");
      const int row = state.at.row_block * Config::kRows + warp_id * Config::kWarpRows;
      active = active && !state.mask.hides(state.mask.row_tiles[row / kIntervalRows], key,
                                           key + Config::kKeys);
    }
    float scores[Warp::kBlocks][Warp::kScoreTiles][4];
    if (active) warp.multiply_keys(scores, stage_of(key));
    if constexpr (kStages == 1) {
      ptx::cp_async_wait_group<0>();
      if constexpr (Config::kF32) {
        f32::round_tile<Config, Config::kKeys, Config::kHeadDimV>(stage_of(key) +
                                                                  Config::kKeyBytes);
      }
      __syncthreads();  // the same for the values, and for the keys that are overwritten now
      const int ahead = key + Config::kKeys;
      if (ahead < state.end_key) {
        copy_keys<Config>(params, state.key, stage_of(ahead), ahead, state.end_key);
      }
      ptx::cp_async_commit_group();
    }
    if (active) {
      bool scaled = params.scale.first != 1.0f;
      if constexpr (Config::kIntervals) {
        if (ScoreOptions::any<Config::kDense>(params)) {
          apply_options<Config::kF32>(scores, state.options, state.mask, this_row(),
                                      key + fragment_column());
          if (Config::kDense && params.intervals.bias.data != nullptr) {
            add_bias(scores, BiasRows::make(params, state.at.batch, state.at.head), this_row(),
                     key + fragment_column());
          }
          scaled = false;
        }
      }
      if (scaled) [[unlikely]] {
        Warp::apply_scale(scores, params.scale.first);
      }
      if (key < warp_keys.unmasked.first || key + Config::kKeys > warp_keys.unmasked.end)
          [[unlikely]] {
        Warp::apply_mask(scores, state.mask, this_row(), key);
      }
      if constexpr (Config::kDense) {
        if (params.intervals.mask.data != nullptr) {
          for_hidden<Warp::kBlocks, Warp::kScoreTiles>(
              MaskRows::make(params, state.at.batch, state.at.head), this_row(),
              key + fragment_column(),
              [&](int i, int j, int h, int e) { scores[i][j][2 * h + e] = kMinusInfinity; });
        }
      }
      warp.softmax.update(scores, warp.out, softmax_scale<Config>(params));
      if constexpr (Config::kDense) {
        if (params.intervals.dropout != 0) drop(scores, state.dropout, this_row(), key);
      }
      warp.multiply_values(scores, stage_of(key) + Config::kKeyBytes);
    }
    key += Config::kKeys;
  } while (key < state.end_key);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    mha_fwd_kernel(const __grid_constant__ MhaFwdParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  BlockState<Config>& state = *reinterpret_cast<BlockState<Config>*>(shared);
  static_assert(sizeof(state) <= Config::kStateBytes);
  const uint32_t query_tile = ptx::shared_address(shared) + Config::kStateBytes;

  FwdWarp<Config> warp;
  int key;
  if (!start_block(params, state, warp, query_tile, key)) return;
  attend(params, state, warp, query_tile, key);
  finish_warp(params, state, warp, query_tile);
}

}  // namespace jax_flash::sm80
