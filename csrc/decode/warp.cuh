// One warp's 16 rows: registers, and the two products with the softmax between them.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::decode {

// Where the rows of a unit stand: row r is token r / group, at position shift + r / group.
struct RowPositions {
  int shift;
  int warp_row;             // the warp's first row
  KeyInterval seen_by_all;  // keys, of those before the split's end
};

template <typename Config>
struct DecodeWarp {
  using Element = typename Config::Element;
  using Layout = typename Config::Layout;
  static constexpr int kSteps = Config::kWidth / 16;
  static constexpr int kScoreTiles = Config::kKeys / 8;
  static constexpr int kOutTiles = Config::kWidth / 8;

  uint32_t query[kSteps][4];
  float out[kOutTiles][4];
  float maximum[2];  // of the logits, base 2
  float sum[2];      // this lane's part

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] = 0.0f;
    }
    maximum[0] = maximum[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.0f;
  }

  // Queries go straight to the registers that the product reads: each is read once.
  __device__ __forceinline__ void load_queries(const DecodeParams& params, int batch, int kv_head,
                                               int first_row) {
    const int rows = params.tokens * params.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + fragment_row() + 8 * h;
      const int token = params.group_divisor.divide(row);
      const int head = kv_head * params.group + row - token * params.group;
      const Element16* const source =
          static_cast<const Element16*>(params.query) +
          ((int64_t{batch} * params.tokens + token) * params.heads + head) * params.head_dim;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * step + 8 * half + fragment_column();
          const bool valid = row < rows && column < params.head_dim;
          query[step][h + 2 * half] =
              valid ? *reinterpret_cast<const uint32_t*>(source + column) : 0u;
        }
      }
    }
  }

  // Takes the tile of keys at `tile`, the values behind it, into account. The first key of the tile
  // is `key`, none at or after `end` counts.
  __device__ __forceinline__ void attend(const DecodeParams& params, const RowPositions& rows,
                                         uint32_t tile, int key, int end) {
    float scores[kScoreTiles][4];
    multiply_keys(scores, tile);
    scale(scores, params);
    if (key < rows.seen_by_all.first || key + Config::kKeys > rows.seen_by_all.end) {
      mask(scores, params, rows, key, end);
    }
    soften(scores);
    multiply_values(scores, tile + Config::kTileBytes);
  }

 private:
  __device__ __forceinline__ void multiply_keys(float (&scores)[kScoreTiles][4],
                                                uint32_t tile) const {
    const uint32_t address = b_operand_address<Layout>(tile, 0);
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kScoreTiles / 2; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, Layout::advance(address, 2 * step) + j * 16 * Layout::kPitch);
        ptx::mma_m16n8k16<Element>(scores[2 * j], query[step], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(scores[2 * j + 1], query[step], b[2], b[3]);
      }
    }
  }

  // Scores become logits in base 2.
  static __device__ __forceinline__ void scale(float (&scores)[kScoreTiles][4],
                                               const DecodeParams& params) {
    constexpr float kLog2e = SoftmaxScale::kLog2e;
    if (params.softcap == 0.0f) {
      const float factor = params.scale * kLog2e;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[j][e] *= factor;
      }
      return;
    }
    const float inside = params.scale / params.softcap;
    const float outside = params.softcap * kLog2e;
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = outside * tanhf(scores[j][e] * inside);
    }
  }

  static __device__ __forceinline__ void mask(float (&scores)[kScoreTiles][4],
                                              const DecodeParams& params, const RowPositions& rows,
                                              int key, int end) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = rows.warp_row + fragment_row() + 8 * h;
      const int position = rows.shift + params.group_divisor.divide(row);
      const int first = params.window_left == kUnbounded ? 0 : position - params.window_left;
      const int last = min_int(position, end - 1);
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = key + 8 * j + fragment_column() + e;
          if (column < first || column > last) scores[j][2 * h + e] = kMinusInfinity;
        }
      }
    }
  }

  // Logits become exponentials relative to the maximum so far, by which the outputs are rescaled.
  __device__ __forceinline__ void soften(float (&scores)[kScoreTiles][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = kMinusInfinity;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        largest = fmaxf(largest, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
      }
      largest = fmaxf(quad_max(largest), maximum[h]);
      // A row without any key so far: exponents are -inf, not -inf + inf.
      const float shift = largest == kMinusInfinity ? 0.0f : largest;
      const float factor = ptx::ex2_approx_ftz(maximum[h] - shift);
      maximum[h] = largest;
      sum[h] *= factor;
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
        out[j][2 * h] *= factor;
        out[j][2 * h + 1] *= factor;
      }
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          scores[j][e] = ptx::ex2_approx_ftz(scores[j][e] - shift);
          sum[h] += scores[j][e];
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_values(const float (&scores)[kScoreTiles][4],
                                                  uint32_t tile) {
    const uint32_t address = b_operand_trans_address<Layout>(tile, 0);
#pragma unroll
    for (int step = 0; step < kScoreTiles / 2; ++step) {
      uint32_t a[4];
      pack_a_operand<Element>(a, scores[2 * step], scores[2 * step + 1]);
#pragma unroll
      for (int j = 0; j < kOutTiles / 2; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Layout::advance(address, 2 * j) + step * 16 * Layout::kPitch);
        ptx::mma_m16n8k16<Element>(out[2 * j], a, b[0], b[1]);
        ptx::mma_m16n8k16<Element>(out[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
};

}  // namespace jax_flash::decode
