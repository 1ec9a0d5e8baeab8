// Online softmax of one warp's rows, in base 2, with a maximum that follows lazily.
//
// The running reference point m of a row need not be its maximum: any m with max - slack <= m
// bounds every exponential, by 2^8 as host/params.h sets the slack, which f32 sums, bf16 and f16
// probabilities all hold at unchanged relative precision. So a tile first asks, per warp, whether
// any of its scores leaves that range; only then are maxima reduced across lanes and the
// accumulators rescaled. Which rows move, and by how much, depends on that row's scores alone, so a
// row's result does not depend on its neighbours.
//
// The empty set: a row that has seen no key has m = -inf and sum = 0; it finishes as output 0 and
// lse -inf. Milakov and Gimelshein 2018 (arXiv:1805.02867) for the online sum; Dao 2023
// (arXiv:2307.08691) for its place in attention.
#pragma once

#include <cuda_runtime.h>

#include "host/params.h"
#include "ptx/math.cuh"

namespace jax_flash {

inline constexpr float kMinusInfinity = -__builtin_huge_valf();

// The four lanes that share a row of an accumulator fragment.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Natural logarithm of a row's sum of exponentials, `sum` being relative to `reference`.
__device__ __forceinline__ float natural_lse(float reference, float sum,
                                             const SoftmaxScale& scale) {
  if (sum == 0.0f) return kMinusInfinity;
  return fmaf(reference, scale.second, logf(sum));
}

// State of 16 * kBlocks rows: per thread two rows a block (fragment_row() and + 8).
template <int kBlocks>
struct OnlineSoftmax {
  float reference[kBlocks][2];  // m of the row, in units of the scores given
  float sum[kBlocks][2];        // this lane's part of the row's sum of exponentials

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      reference[i][0] = reference[i][1] = kMinusInfinity;
      sum[i][0] = sum[i][1] = 0.0f;
    }
  }

  // Scores (in place) become exponentials 2^(scale.log2 * (score - m)); output accumulators are
  // rescaled where m moved.
  template <int kScoreTiles, int kOutTiles>
  __device__ __forceinline__ void update(float (&scores)[kBlocks][kScoreTiles][4],
                                         float (&out)[kBlocks][kOutTiles][4],
                                         const SoftmaxScale& scale) {
    float largest[kBlocks][2];
    bool leaves_range = false;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      largest[i][0] = largest[i][1] = kMinusInfinity;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          largest[i][h] = fmaxf(largest[i][h], fmaxf(scores[i][j][2 * h], scores[i][j][2 * h + 1]));
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) leaves_range |= largest[i][h] > reference[i][h] + scale.slack;
    }
    if (__any_sync(0xffffffffu, leaves_range)) move_reference(largest, out, scale);

#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // A row without any key so far: exponents are -inf, not -inf + inf.
        const float m = reference[i][h] == kMinusInfinity ? 0.0f : reference[i][h] * scale.log2;
        float partial = 0.0f;
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            scores[i][j][e] = ptx::ex2_approx_ftz(fmaf(scores[i][j][e], scale.log2, -m));
            partial += scores[i][j][e];
          }
        }
        sum[i][h] += partial;
      }
    }
  }

  // Reduces the sums across lanes; returns 1 / sum (0 for an empty row) for the outputs.
  __device__ __forceinline__ float finish(int block, int half) {
    sum[block][half] = quad_sum(sum[block][half]);
    return sum[block][half] == 0.0f ? 0.0f : __fdividef(1.0f, sum[block][half]);
  }

  // Natural logarithm of the sum of exponentials; call finish first.
  __device__ __forceinline__ float lse(int block, int half, const SoftmaxScale& scale) const {
    return natural_lse(reference[block][half], sum[block][half], scale);
  }

 private:
  template <int kOutTiles>
  __device__ __forceinline__ void move_reference(float (&largest)[kBlocks][2],
                                                 float (&out)[kBlocks][kOutTiles][4],
                                                 const SoftmaxScale& scale) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float row_max = quad_max(largest[i][h]);
        const float old = reference[i][h];
        const bool moves = row_max > old + scale.slack;
        const float factor = moves ? ptx::ex2_approx_ftz((old - row_max) * scale.log2) : 1.0f;
        reference[i][h] = moves ? row_max : old;
        sum[i][h] *= factor;
#pragma unroll
        for (int j = 0; j < kOutTiles; ++j) {
          out[i][j][2 * h] *= factor;
          out[i][j][2 * h + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace jax_flash
