// What a consumer of the backward makes of scores S^T, keys by queries, where the mask is one of
// intervals or where soft cap and ALiBi are still to be applied. In a tile that is clean all is
// linear or a polynomial.
#pragma once

#include <cstdint>

#include "host/intervals.h"
#include "host/params.h"
#include "ptx/math.cuh"
#include "sm90/bwd_block.cuh"
#include "tile/fragment.cuh"
#include "tile/score_options.cuh"

namespace jax_flash::sm90 {

// Which of its elements a lane sees: bit i is that of score i. rows: the records from its first
// column on; key: its first one, the other is 8 further; id: those of both, where ids count.
template <int kScores, bool kIds>
__device__ __forceinline__ uint32_t seen_scores(const RowRecord* rows, int key,
                                                const int (&ids)[2]) {
  static_assert(kScores == 32, "a bit for each");
  uint32_t seen = 0;
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const RowRecord row = rows[8 * j + e];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = key + 8 * h;
        if (k >= row.first && k < row.end && (!kIds || row.id == ids[h])) {
          seen |= 1u << (4 * j + 2 * h + e);
        }
      }
    }
  }
  return seen;
}

// Of one step, for one warpgroup, where scores have options.
template <typename Config>
struct OptionScores {
  using Element = typename Config::Element;
  static constexpr int kRows = Config::kRows;
  static constexpr int kScores = kRows / 2;
  static constexpr int kKeys = 64;  // of a warpgroup
  static_assert(kRows == 64, "two for each lane of a warp");

  const MhaBwdParams& params;
  const BwdPlan& plan;
  const RowRecord* records;  // of the step's queries
  float slope;
  int first_key;  // of the warpgroup

  // Whether all keys of the warpgroup are on one side of those that the queries are aligned with,
  // where that matters. All warps of the warpgroup find the same.
  __device__ __forceinline__ bool on_one_side() const {
    if (slope == 0.0f) return true;
    const int left = records[lane_id()].position - first_key;
    const int right = records[lane_id() + 32].position - first_key;
    return !__any_sync(0xffffffffu, min(left, right) < kKeys - 1) ||
           !__any_sync(0xffffffffu, max(left, right) > 0);
  }

  // P = 2^(S - lse), and P times the derivatives of the logits; s is used up. lse: from this lane's
  // first column on, of which `early` has the first.
  // seen: see seen_scores, unless the tile is clean.
  template <bool kClean, int kEarly>
  __device__ __forceinline__ void take(uint32_t (&p)[kScores / 2], uint32_t (&weights)[kScores / 2],
                                       float (&s)[kScores], const float2 (&early)[kEarly],
                                       const float* lse, uint32_t seen) const {
    if (params.intervals.softcap == 0.0f) {
      take_exponentials<kClean, false, true>(p, weights, s, early, lse, seen);
      return;
    }
    take_tanh(s);
    if (kClean && slope == 0.0f) {
      take_exponentials<kClean, true, false>(p, weights, s, early, lse, seen);
    } else {
      take_exponentials<kClean, true, true>(p, weights, s, early, lse, seen);
    }
  }

 private:
  // Scores become logits over softcap: by a polynomial, if that holds for all of the warp's.
  __device__ __forceinline__ void take_tanh(float (&s)[kScores]) const {
    float largest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] *= plan.tanh.argument;
      largest[i % 4] = fmaxf(largest[i % 4], fabsf(s[i]));
    }
    const float u = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
    if (__any_sync(0xffffffffu, !TanhPolynomial::holds(u))) [[unlikely]] {
#pragma unroll
      for (float& x : s) x = ScoreOptions::tanh(TanhPolynomial::kStep * x);
      return;
    }
#pragma unroll
    for (float& x : s) {
      uint32_t outside = 0;
      x *= plan.tanh.quotient(x, outside);
    }
  }

  // kCap: s holds what take_tanh gives.
  template <bool kClean, bool kCap, bool kBias, int kEarly>
  __device__ __forceinline__ void take_exponentials(uint32_t (&p)[kScores / 2],
                                                    uint32_t (&weights)[kScores / 2],
                                                    float (&s)[kScores],
                                                    const float2 (&early)[kEarly], const float* lse,
                                                    uint32_t seen) const {
    // In a clean tile all keys are on the side that the first one is on.
    const LinearBias bias = LinearBias::make(slope, !kClean || records[0].position > first_key);
    const int warp = static_cast<int>(ptx::fresh_address(threadIdx.x)) / 32 % 4;
    const int key = first_key + 16 * warp + fragment_row();
    const RowRecord* const rows = records + fragment_column();
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      // A tile that is not clean has no registers for early ones.
      const float2 x =
          kClean && j < kEarly ? early[j] : *reinterpret_cast<const float2*>(lse + 8 * j);
      float weight[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float rest = e == 0 ? -x.x : -x.y;
        float distance = 0.0f;
        if constexpr (kBias) {
          distance = static_cast<float>(rows[8 * j + e].position - key);
          if constexpr (kClean) rest = bias.at_first(distance, rest);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& score = s[4 * j + 2 * h + e];
          float other = rest;
          if constexpr (kBias && kClean) {
            if (h == 1) other = fmaf(bias.rate, 8.0f, rest);
          } else if constexpr (kBias) {
            other = bias.at_first(fabsf(h == 0 ? distance : distance - 8.0f), rest);
          }
          const float logit = score;
          score =
              ptx::ex2_approx_ftz(fmaf(logit, kCap ? plan.softcap_log2 : plan.logit_log2, other));
          if constexpr (!kClean) score = (seen & 1u << (4 * j + 2 * h + e)) != 0 ? score : 0.0f;
          if constexpr (kCap) weight[h][e] = score * fmaf(-logit, logit, 1.0f);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p[2 * j + h] = ptx::cvt_rn_x2<Element>(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]);
        weights[2 * j + h] =
            kCap ? ptx::cvt_rn_x2<Element>(weight[h][0], weight[h][1]) : p[2 * j + h];
      }
    }
  }
};

}  // namespace jax_flash::sm90
