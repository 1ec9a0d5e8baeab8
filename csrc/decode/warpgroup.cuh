// One warp's 16 rows of a warpgroup's 64: the products by wgmma, the splits added in registers.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/parts.cuh"
#include "decode/plan.cuh"
#include "decode/warp.cuh"
#include "ptx/shared.cuh"
#include "ptx/wgmma.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::decode {

// Queries wait in shared memory, [rows][kWidth], to leave registers to the sum of a group's splits.
template <typename Config>
struct DecodeWarpgroup : DecodeRows<Config> {
  using Base = DecodeRows<Config>;
  using Element = typename Config::Element;
  using Layout = typename Config::Layout;
  using QueryLayout = typename Config::QueryLayout;
  using Base::kOutTiles;
  using Base::kScoreTiles;
  using Base::out;

  // The sum of a group's splits so far, where this thread block has had them all; else nothing.
  float held[kOutTiles][4];
  float held_maximum[2];
  float held_sum[2];

  __device__ __forceinline__ void hold_nothing() {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) held[j][e] = 0.0f;
    }
    held_maximum[0] = held_maximum[1] = kMinusInfinity;
    held_sum[0] = held_sum[1] = 0.0f;
  }

  // This warp's rows, the first one being `first_row`, to shared memory.
  static __device__ __forceinline__ void load_queries(const DecodeParams& params, int batch,
                                                      int kv_head, int first_row,
                                                      uint32_t queries) {
    constexpr int kRowsPerPass = 32 / QueryLayout::kChunks;
    const int rows = params.tokens * params.group;
    const int chunk = lane_id() % QueryLayout::kChunks;
#pragma unroll 4
    for (int i = lane_id() / QueryLayout::kChunks; i < 16; i += kRowsPerPass) {
      const int row = first_row + i;
      uint4 words = make_uint4(0, 0, 0, 0);
      if (row < rows && 8 * chunk < params.head_dim) {
        const Element16* const source = query_row(params, batch, kv_head, row) + 8 * chunk;
        words = *reinterpret_cast<const uint4*>(source);
      }
      const uint32_t values[4] = {words.x, words.y, words.z, words.w};
      ptx::st_shared_v4(queries + QueryLayout::offset(row % Config::kRows, chunk), values);
    }
  }

  // As that of a warp; by all warps of the warpgroup.
  __device__ __forceinline__ void attend(const DecodeParams& params, const RowPositions& rows,
                                         uint32_t queries, uint32_t tile, int key, int end) {
    float scores[kScoreTiles][4];
    multiply_keys(scores, queries, tile);
    this->weigh(scores, params, rows, key, end);
    multiply_values(scores, tile + Config::kTileBytes);
  }

  // Adds the split to what the thread block has of its group, and stores that as the result if it
  // is all of the sequence, else as a part; or keeps it for the group's next split.
  __device__ __forceinline__ void store(const DecodeParams& params, const GroupEnd& end,
                                        const Place& place, int first_row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = quad_sum(this->sum[h]);
      RowPart group = RowPart::empty();
#pragma unroll
      for (int j = 0; j < kOutTiles; j += 2) {
        const auto four = [&](const float (&x)[kOutTiles][4]) {
          return make_float4(x[j][2 * h], x[j][2 * h + 1], x[j + 1][2 * h], x[j + 1][2 * h + 1]);
        };
        group = {held_maximum[h], held_sum[h], four(held)};
        group.add({this->maximum[h], total, four(out)});
        held[j][2 * h] = group.out.x;
        held[j][2 * h + 1] = group.out.y;
        held[j + 1][2 * h] = group.out.z;
        held[j + 1][2 * h + 1] = group.out.w;
      }
      held_maximum[h] = group.maximum;
      held_sum[h] = group.sum;
    }
    if (end.holds) return;
    const int odd = lane_id() % 2;
    const int rows = params.tokens * params.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + fragment_row() + 8 * h;
      const int token = params.group_divisor.divide(row);
      const int head = place.kv_head * params.group + row - token * params.group;
      const int64_t row_place = partial_row(params, place.batch, place.kv_head, end.slot, row);
      float factor = 1.0f;
      if (row < rows && end.ends_alone) {
        const RowResult result =
            finish_row(params, place.batch, head, held_maximum[h], held_sum[h]);
        factor = result.factor;
        if (fragment_column() == 0) store_lse(params, place.batch, token, head, result);
      } else if (row < rows && fragment_column() == 0) {
        params.partial_state[row_place] = make_float2(held_maximum[h], held_sum[h]);
      }
#pragma unroll
      for (int j = 0; j < kOutTiles; j += 2) {
        // Neighbouring lanes exchange pairs, so that each has four neighbouring columns.
        const float* const left = held[j] + 2 * h;
        const float* const right = held[j + 1] + 2 * h;
        const float x = __shfl_xor_sync(0xffffffffu, odd != 0 ? left[0] : right[0], 1);
        const float y = __shfl_xor_sync(0xffffffffu, odd != 0 ? left[1] : right[1], 1);
        const float4 sum =
            odd != 0 ? make_float4(x, y, right[0], right[1]) : make_float4(left[0], left[1], x, y);
        const int column = 8 * (j + odd) + fragment_column() / 4 * 4;
        if (row >= rows || column >= params.head_dim_v) continue;
        if (end.ends_alone) {
          store_out<Config::kCache>(params, place.batch, token, head, column, sum, factor);
        } else {
          float* const partial = params.partial_out + row_place * params.head_dim_v + column;
          *reinterpret_cast<float4*>(partial) = sum;
        }
      }
    }
    hold_nothing();
  }

 private:
  static __device__ __forceinline__ void multiply_keys(float (&scores)[kScoreTiles][4],
                                                       uint32_t queries, uint32_t tile) {
    auto& accumulators = reinterpret_cast<float (&)[4 * kScoreTiles]>(scores);
    const uint64_t left = ptx::wgmma_descriptor(queries, 0);
    const uint64_t right = ptx::wgmma_descriptor(tile, 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kWidth / 16; ++step) {
      ptx::Wgmma<Element, Config::kKeys>::ss(accumulators,
                                             left + (QueryLayout::offset(0, 2 * step) >> 4),
                                             right + (Layout::offset(0, 2 * step) >> 4), step != 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
  }

  __device__ __forceinline__ void multiply_values(const float (&scores)[kScoreTiles][4],
                                                  uint32_t tile) {
    auto& accumulators = reinterpret_cast<float (&)[4 * kOutTiles]>(out);
    const uint64_t values = ptx::wgmma_descriptor(tile, Layout::kSlabBytes);
    uint32_t weights[kScoreTiles / 2][4];
#pragma unroll
    for (int step = 0; step < kScoreTiles / 2; ++step) {
      pack_a_operand<Element>(weights[step], scores[2 * step], scores[2 * step + 1]);
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kScoreTiles / 2; ++step) {
      ptx::Wgmma<Element, Config::kWidth>::rs(accumulators, weights[step],
                                              values + (16 * 128 * step >> 4), 1);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
  }
};

}  // namespace jax_flash::decode
