// What a consumer of the backward makes of S^T and dP^T, keys by queries, where scores have no
// options.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_mask.cuh"

namespace jax_flash::sm90 {

// P = 2^(S - lse); s is used up. lse: from this lane's first column on, of which `early` has the
// first. first_row: of the step's queries. seen: with intervals, see seen_scores, unless the tile
// is clean.
template <typename Config, bool kClean, int kScores, int kEarly>
__device__ __forceinline__ void plain_probabilities(uint32_t (&p)[kScores / 2], float (&s)[kScores],
                                                    const float2 (&early)[kEarly], const float* lse,
                                                    const MhaBwdParams& params,
                                                    const BwdBlock<Config>& block, int warpgroup,
                                                    int first_row, uint32_t seen) {
  if (!kClean && params.scale.first != 1.0f) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] *= params.scale.first;
  }
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
    const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& score = s[4 * j + e];
      score = ptx::ex2_approx_ftz(fmaf(score, params.scale.log2, e % 2 == 0 ? -x.x : -x.y));
    }
  }
  if constexpr (Config::kIntervals && !kClean) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = (seen & 1u << i) != 0 ? s[i] : 0.0f;
  } else if constexpr (!kClean) {
    mask_probabilities<Config::kRows>(s, block.mask, block.first_key + Config::kKeyStep * warpgroup,
                                      first_row);
  }
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    p[i] = ptx::cvt_rn_x2<typename Config::Element>(s[2 * i], s[2 * i + 1]);
  }
}

// Two neighbouring weights, packed or not.
template <typename Element, int kWords>
__device__ __forceinline__ float2 weights_of(const uint32_t (&weights)[kWords], int i) {
  return ptx::unpack_x2<Element>(weights[i]);
}
template <typename Element, int kScores>
__device__ __forceinline__ float2 weights_of(const float (&weights)[kScores], int i) {
  return make_float2(weights[2 * i], weights[2 * i + 1]);
}

// dS = weights (dP - delta): the weights are P times the derivatives of the logits. delta: from
// this lane's first column on, of which `early` has the first.
template <typename Config, typename Weights, int kScores, int kEarly>
__device__ __forceinline__ void score_gradients(uint32_t (&ds)[kScores / 2], const Weights& weights,
                                                const float (&dp)[kScores],
                                                const float2 (&early)[kEarly], const float* delta) {
  using Element = typename Config::Element;
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
    const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 weight = weights_of<Element>(weights, 2 * j + h);
      ds[2 * j + h] = ptx::cvt_rn_x2<Element>(weight.x * (dp[4 * j + 2 * h] - x.x),
                                              weight.y * (dp[4 * j + 2 * h + 1] - x.y));
    }
  }
}

}  // namespace jax_flash::sm90
