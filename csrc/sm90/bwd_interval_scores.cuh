// What a consumer of the backward makes of scores S^T, keys by queries, where there are intervals:
// masks that are data, options of scores, dropout.
#pragma once

#include <cstdint>

#include "host/intervals.h"
#include "host/params.h"
#include "ptx/math.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/bwd_block.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/score_options.cuh"

namespace jax_flash::sm90 {

// Of one step, for one thread.
template <typename Config>
struct IntervalScores {
  using Element = typename Config::Element;
  static constexpr int kRows = Config::kRows;
  static constexpr int kScores = kRows / 2;

  const MhaBwdParams& params;
  const BwdBlock<Config>& block;
  const BwdStep<Config>& step;
  const RowRecord* records;  // of the step's queries
  int first_key;             // this lane's

  // Where a tile is not clean or scores have options: P = 2^(S - lse), and P times the derivatives
  // of the logits. s is used up. kOptions: whether scores have options. lse: from this lane's first
  // column on, of which `early` has the first.
  template <bool kOptions, int kEarly>
  __device__ __forceinline__ void take_exponentials(uint32_t (&p)[kScores / 2],
                                                    uint32_t (&weights)[kScores / 2],
                                                    float (&s)[kScores],
                                                    const float2 (&early)[kEarly],
                                                    const float* lse) const {
    const ScoreOptions options = {params.scale.first * params.scale.second,
                                  params.intervals.softcap, step.slope};
    const float inverse = options.inverse();
    const float log2 = kOptions ? SoftmaxScale::kLog2e : params.scale.log2;
    const bool mixed = step.mixed;
    const int ids[2] = {mixed ? block.mask.id(first_key) : 0,
                        mixed ? block.mask.id(first_key + 8) : 0};
    const RowRecord* const rows = records + fragment_column();
#pragma unroll
    for (float& score : s) score *= kOptions ? options.scale : params.scale.first;
    if (kOptions && options.softcap != 0.0f) {
#pragma unroll
      for (float& score : s) score = options.cap(score, inverse);
    }
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(lse + 8 * j);
      float probability[2][2];
      float weight[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const RowRecord row = rows[8 * j + e];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int key = first_key + 8 * h;
          float score = s[4 * j + 2 * h + e];
          float derivative = 1.0f;
          if constexpr (kOptions) {
            derivative = options.derivative(score, inverse);
            score = options.biased(score, row.position - key);
          }
          const float power = ptx::ex2_approx_ftz(fmaf(score, log2, e == 0 ? -x.x : -x.y));
          const bool seen = key >= row.first && key < row.end && ids[h] == (mixed ? row.id : 0);
          probability[h][e] = seen ? power : 0.0f;
          weight[h][e] = probability[h][e] * derivative;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p[2 * j + h] = ptx::cvt_rn_x2<Element>(probability[h][0], probability[h][1]);
        weights[2 * j + h] =
            kOptions ? ptx::cvt_rn_x2<Element>(weight[h][0], weight[h][1]) : p[2 * j + h];
      }
    }
  }

  // Dropout: zeros in p, and a sign in weights, which have none, for what is dropped.
  __device__ __forceinline__ void drop(uint32_t (&p)[kScores / 2],
                                       uint32_t (&weights)[kScores / 2]) const {
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
      ptx::forget_memory();  // one draw after the other: registers are few
      const Dropout dropout = Dropout::make(params, block.batch, step.head);
      uint32_t words[2][2];
      dropout.template draw<true>(words, first_key, step.row + 32 * i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int byte = Dropout::byte_of<true>(j % 2, j / 2 % 2);
        const uint32_t kept = Dropout::pair_mask(words[j / 4], byte);
        p[8 * i + j] &= kept;
        weights[8 * i + j] |= ~kept & 0x80008000u;
      }
    }
  }
};

// dS = P (kept_scale * dP - delta), or -P delta where dropout drops, with P times the derivatives
// of the logits, signed by IntervalScores::drop. delta: from this lane's first column on, of which
// `early` has the first.
template <typename Config, int kScores, int kEarly>
__device__ __forceinline__ void take_dropped_gradients(uint32_t (&ds)[kScores / 2],
                                                       const uint32_t (&weights)[kScores / 2],
                                                       const float (&dp)[kScores],
                                                       const float2 (&early)[kEarly],
                                                       const float* delta, float kept_scale) {
  using Element = typename Config::Element;
  static_assert(kScores == Config::kRows / 2);
#pragma unroll
  for (int j = 0; j < Config::kRows / 8; ++j) {
    const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t word = weights[2 * j + h];
      const float2 weight = ptx::unpack_x2<Element>(word & 0x7fff7fffu);
      const float left = word & 0x8000u ? 0.0f : dp[4 * j + 2 * h];
      const float right = word & 0x80000000u ? 0.0f : dp[4 * j + 2 * h + 1];
      ds[2 * j + h] = ptx::cvt_rn_x2<Element>(weight.x * fmaf(left, kept_scale, -x.x),
                                              weight.y * fmaf(right, kept_scale, -x.y));
    }
  }
}

}  // namespace jax_flash::sm90
