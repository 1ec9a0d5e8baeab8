// Scores of calls with intervals, in the fragments of one warp: options, and ids that differ.
//
// `row` and `key` are this lane's first in all of these.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/reduction.cuh"
#include "ptx/warpgroup.cuh"
#include "tile/dropout.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/score_arrays.cuh"
#include "tile/score_options.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm80 {

// Of the exponentials.
template <bool kDense>
__device__ __forceinline__ SoftmaxScale exponent_scale(const MhaParams& params) {
  return ScoreOptions::any<kDense>(params) ? SoftmaxScale::make(1.0f) : params.scale;
}

// Scores q.k become logits.
template <bool kF32, int kBlocks, int kTiles>
__device__ __forceinline__ void apply_options(float (&scores)[kBlocks][kTiles][4],
                                              const ScoreOptions& options, const IntervalMask& mask,
                                              int row, int key) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int distance = mask.row(row + 16 * i + 8 * h).position - key;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[i][j][2 * h + e];
          score = options.logit<kF32>(score, static_cast<float>(distance - (8 * j + e)));
        }
      }
    }
  }
}

// Adds the biases of a head.
template <int kBlocks, int kTiles>
__device__ __forceinline__ void add_bias(float (&scores)[kBlocks][kTiles][4], const BiasRows& bias,
                                         int row, int key) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 x = bias.load_pair(row + 16 * i + 8 * h, key + 8 * j);
        scores[i][j][2 * h] += x.x;
        scores[i][j][2 * h + 1] += x.y;
      }
    }
  }
}

// Calls f(i, j, h, e) for what the mask hides.
template <int kBlocks, int kTiles, typename F>
__device__ __forceinline__ void for_hidden(const MaskRows& mask, int row, int key, F f) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int column = key + 8 * j;
        const uint32_t bits = mask.word(row + 16 * i + 8 * h, column) >> (column % 32);
        if ((bits & 1) == 0) f(i, j, h, 0);
        if ((bits & 2) == 0) f(i, j, h, 1);
      }
    }
  }
}

// Keys with another id than the row's get a score of -inf.
template <int kBlocks, int kTiles>
__device__ __forceinline__ void mask_ids(float (&scores)[kBlocks][kTiles][4],
                                         const IntervalMask& mask, int row, int key) {
  int row_ids[kBlocks][2];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) row_ids[i][h] = mask.row(row + 16 * i + 8 * h).id;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int2 key_ids = *reinterpret_cast<const int2*>(mask.key_ids + key + 8 * j);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (key_ids.x != row_ids[i][h]) scores[i][j][2 * h] = kMinusInfinity;
        if (key_ids.y != row_ids[i][h]) scores[i][j][2 * h + 1] = kMinusInfinity;
      }
    }
  }
}

// What is kept of the 16 rows from `row` on, for all 8-column tiles of a fragment, keys from
// `first_key` on.
template <int kTiles>
struct KeptScores {
  // Of 16 x 16 tiles drawn together.
  static constexpr int kCount = kTiles % 8 == 0 ? 4 : kTiles % 4 == 0 ? 2 : 1;
  DropoutLevel level;
  uint32_t reached[kTiles / 2][2];

  __device__ __forceinline__ void draw(const Dropout& dropout, int row, int first_key) {
    level = DropoutLevel::make(dropout.threshold);
#pragma unroll
    for (int i = 0; i < kTiles / 2; i += kCount) {
      ptx::forget_memory();  // one draw after the other: registers are few
      const uint32_t hash = dropout.hash<false, kCount>(row, first_key + 16 * i);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          reached[i + k][e] = level.reached(Dropout::word<false>(hash, k, e));
        }
      }
    }
  }

  // Whether the element in column `e` of tile `j` and row half `h` is.
  __device__ __forceinline__ bool operator()(int j, int h, int e) const {
    return level.kept(reached[j / 2][e], Dropout::byte_of<false>(h, j % 2));
  }
};

// Zeros in place of the probabilities that dropout drops.
template <int kBlocks, int kTiles>
__device__ __forceinline__ void drop(float (&scores)[kBlocks][kTiles][4], const Dropout& dropout,
                                     int row, int first_key) {
  constexpr int kPart = kTiles % 4 == 0 ? 4 : 2;  // drawn together: registers are few
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int first = 0; first < kTiles; first += kPart) {
      KeptScores<kPart> kept;
      kept.draw(dropout, row + 16 * i, first_key + 8 * first);
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!kept(j, e / 2, e % 2)) scores[i][first + j][e] = 0.0f;
        }
      }
    }
  }
}

// Score gradients times distances, summed up over this warp's rows, to its part of the gradient of
// a slope. No two threads have the same keys of a part, so that sums have an order.
template <int kBlocks, int kTiles>
__device__ __forceinline__ void add_slope_gradients(float* part, const IntervalMask& mask,
                                                    const float (&dscores)[kBlocks][kTiles][4],
                                                    int row, int key, int keys) {
  float columns[kTiles][2] = {};
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int distance = mask.row(row + 16 * i + 8 * h).position - key;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float own = fabsf(static_cast<float>(distance - 8 * j - e));
          columns[j][e] = fmaf(own, dscores[i][j][2 * h + e], columns[j][e]);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = columns[j][e];
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
      const int column = key + 8 * j + e;
      if (lane_id() < 4 && column < keys) ptx::red_add(part + column, x);
    }
  }
}

}  // namespace jax_flash::sm80
