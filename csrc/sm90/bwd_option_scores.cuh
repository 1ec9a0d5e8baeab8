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

// What is to be known for ALiBi.
struct BwdBias {
  float slope;   // 0 if there are none
  int distance;  // from the warpgroup's first key to the one the first query is aligned with
};

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
  const BwdStep& step;
  const BwdBlock<Config>& block;
  int warpgroup;

  // What comes from shared memory is read where it is needed, or before products are issued: beside
  // them it takes long to come.
  __device__ __forceinline__ int first_key() const {
    return block.first_key + Config::kKeyStep * warpgroup;
  }
  __device__ __forceinline__ BwdBias bias() const {
    return {step.slope, records[0].position - first_key()};
  }

  // Whether all keys of the warpgroup are on one side of those that the queries are aligned with,
  // and these follow each other, where that matters. All warps of the warpgroup find the same.
  __device__ __forceinline__ bool on_one_side() const {
    if (step.slope == 0.0f) return true;
    const int lane = lane_id();
    const int distance = bias().distance;
    const int expected = records[0].position + lane;
    const bool follow =
        records[lane].position == expected && records[lane + 32].position == expected + 32;
    if (__any_sync(0xffffffffu, !follow)) return false;
    return distance >= kKeys - 1 || distance <= 1 - kRows;
  }

  // P = 2^(S - lse), and in s and in weights P times the derivatives of the logits. lse: from this
  // lane's first column on, of which `early` has the first.
  // seen: see seen_scores, unless the tile is clean; bias: if it is.
  template <bool kClean, int kEarly>
  __device__ __forceinline__ void take(uint32_t (&p)[kScores / 2], uint32_t (&weights)[kScores / 2],
                                       float (&s)[kScores], const float2 (&early)[kEarly],
                                       const float* lse, uint32_t seen, const BwdBias& bias) const {
    if (params.intervals.softcap == 0.0f) {
      take_exponentials<kClean, false, true>(p, weights, s, early, lse, seen, bias);
      return;
    }
    const float largest = largest_size(s);
    if (kClean && params.intervals.slopes == nullptr) {
      const bool is_small = plan.small.holds(__float_as_uint(largest * largest));
      if (!__any_sync(0xffffffffu, !is_small)) {
        take_small(p, weights, s, early, lse);
      } else {
        take_tanh(s, largest);
        take_exponentials<kClean, true, false>(p, weights, s, early, lse, seen, bias);
      }
    } else {
      take_tanh(s, largest);
      take_exponentials<kClean, true, true>(p, weights, s, early, lse, seen, bias);
    }
  }

 private:
  static __device__ __forceinline__ float largest_size(const float (&s)[kScores]) {
    float largest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kScores; ++i) largest[i % 4] = fmaxf(largest[i % 4], fabsf(s[i]));
    return fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  }

  // The lse of columns 8 j and 8 j + 1 from this lane's first.
  template <bool kClean, int kEarly>
  static __device__ __forceinline__ float2 lse_of(const float2 (&early)[kEarly], const float* lse,
                                                  int j) {
    // A tile that is not clean has no registers for early ones.
    return kClean && j < kEarly ? early[j] : *reinterpret_cast<const float2*>(lse + 8 * j);
  }

  static __device__ __forceinline__ uint32_t packed(const float (&s)[kScores], int j, int h) {
    return ptx::cvt_rn_x2<Element>(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]);
  }

  // What `take` does in a clean tile of small scores with a soft cap alone. As in the forward's
  // RowSoftmax::capped_exponentials, the polynomials of a chunk come after the exponentials of the
  // chunk before the last.
  template <int kEarly>
  __device__ __forceinline__ void take_small(uint32_t (&p)[kScores / 2],
                                             uint32_t (&weights)[kScores / 2], float (&s)[kScores],
                                             const float2 (&early)[kEarly],
                                             const float* lse) const {
    constexpr int kChunk = 2;  // of 4 scores
    float before[2] = {0.0f, 0.0f};
    float last[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      if (j % kChunk == 0) {
        before[0] = last[0];
        before[1] = last[1];
      }
      const float2 x = lse_of<true>(early, lse, j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float third = not_before(plan.small.factors[2], before[h]);
        float probability[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[4 * j + 2 * h + e];
          const float tanh = score * plan.small.quotient(score * score, third);
          probability[e] = ptx::ex2_approx_ftz(fmaf(tanh, plan.softcap_log2, e == 0 ? -x.x : -x.y));
          score = probability[e] * fmaf(-tanh, tanh, 1.0f);
        }
        p[2 * j + h] = ptx::cvt_rn_x2<Element>(probability[0], probability[1]);
        weights[2 * j + h] = packed(s, j, h);
        if (j % kChunk == kChunk - 1) last[h] = probability[1];
      }
    }
  }

  // Scores become logits over softcap: by a polynomial, if that holds for all of the warp's, of
  // which `largest` is a lane's largest.
  __device__ __forceinline__ void take_tanh(float (&s)[kScores], float largest) const {
#pragma unroll
    for (float& x : s) x *= plan.tanh.argument;
    if (__any_sync(0xffffffffu, !TanhPolynomial::holds(largest * plan.tanh.argument)))
        [[unlikely]] {
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
                                                    uint32_t seen, const BwdBias& bias) const {
    const int warp = static_cast<int>(ptx::fresh_address(threadIdx.x)) / 32 % 4;
    const int row = 16 * warp + fragment_row();
    const int key = kBias && !kClean ? first_key() + row : 0;
    const RowRecord* const rows = records + fragment_column();
    // In a clean tile all keys are on the side that the first one is on.
    const LinearBias linear =
        LinearBias::make(kClean ? bias.slope : step.slope, !kClean || bias.distance > 0);
    const float first_distance = static_cast<float>(bias.distance + fragment_column() - row);
    float before[2] = {0.0f, 0.0f};  // exponentials of the row before the last, and of the last one
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = lse_of<kClean>(early, lse, j);
      const float nearest = not_before(first_distance, before[0]);
      before[0] = before[1];
      float probability[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float rest = e == 0 ? -x.x : -x.y;
        float distance = 0.0f;
        if constexpr (kBias && kClean) {
          rest = linear.at_first(nearest + static_cast<float>(8 * j + e), rest);
        } else if constexpr (kBias) {
          distance = static_cast<float>(rows[8 * j + e].position - key);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& score = s[4 * j + 2 * h + e];
          float other = rest;
          if constexpr (kBias && kClean) {
            if (h == 1) other = fmaf(linear.rate, 8.0f, rest);
          } else if constexpr (kBias) {
            other = linear.at_first(fabsf(h == 0 ? distance : distance - 8.0f), rest);
          }
          const float logit = score;
          score =
              ptx::ex2_approx_ftz(fmaf(logit, kCap ? plan.softcap_log2 : plan.logit_log2, other));
          if constexpr (!kClean) score = (seen & 1u << (4 * j + 2 * h + e)) != 0 ? score : 0.0f;
          probability[h][e] = score;
          if constexpr (kCap) score *= fmaf(-logit, logit, 1.0f);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p[2 * j + h] = ptx::cvt_rn_x2<Element>(probability[h][0], probability[h][1]);
        weights[2 * j + h] = kCap ? packed(s, j, h) : p[2 * j + h];
      }
      before[1] = probability[1][1];
    }
  }
};

}  // namespace jax_flash::sm90
