// What a consumer of the backward makes of scores S^T, keys by queries, where there are intervals:
// masks that are data, options of scores, dropout.
#pragma once

#include <cstdint>

#include "host/intervals.h"
#include "host/params.h"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/bwd_block.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/score_arrays.cuh"
#include "tile/score_options.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// How biases come to the scores: none, of 16 bits, of 32.
enum class Bias { kNone, k16, k32 };

// Of one step, for one thread.
template <typename Config>
struct IntervalScores {
  using Element = typename Config::Element;
  static constexpr int kRows = Config::kRows;
  static constexpr int kScores = kRows / 2;
  static constexpr int kBiasTiles = kScores / 4;  // of 8 by 8 biases, loaded together

  const MhaBwdParams& params;
  const BwdBlock<Config>& block;
  const BwdStep<Config>& step;
  const RowRecord* records;  // of the step's queries
  int first_key;             // this lane's

  // Where a tile is not clean or scores have options: P = 2^(S - lse), and P times the derivatives
  // of the logits. s is used up. kOptions: whether scores have options. lse: from this lane's first
  // column on, of which `early` has the first.
  template <bool kOptions, Bias kBias = Bias::kNone, int kEarly>
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
    uint32_t biases[kBiasTiles];
#pragma unroll
    for (float& score : s) score *= kOptions ? options.scale : params.scale.first;
    if (kOptions && options.softcap != 0.0f) {
#pragma unroll
      for (float& score : s) score = options.cap(score, inverse);
    }
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(lse + 8 * j);
      if constexpr (kBias == Bias::k16) {
        if (2 * j % kBiasTiles == 0) load_biases(biases, step.row + 8 * j);
      } else if (kBias == Bias::k32 && j % 2 == 0) {
        ptx::forget_memory();  // registers are few
      }
      float2 bias[2] = {make_float2(0.0f, 0.0f), make_float2(0.0f, 0.0f)};  // of the halves
      if constexpr (kBias != Bias::kNone) {
        const BiasRows all = bias_rows();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (kBias == Bias::k16) {
            bias[h] = all.unpack(biases[(2 * j + h) % kBiasTiles]);
          } else {
            const int row = step.row + fragment_column() + 8 * j;
            bias[h] = make_float2(all.load_f32(row, first_key + 8 * h),
                                  all.load_f32(row + 1, first_key + 8 * h));
          }
        }
      }
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
            if (kBias != Bias::kNone) score += e == 0 ? bias[h].x : bias[h].y;
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

  __device__ __forceinline__ BiasRows bias_rows() const {
    return BiasRows::make(params, block.batch, step.head);
  }

  // Of queries from `row` on, as p lies: rows of the bias are columns of the fragment.
  __device__ __forceinline__ void load_biases(uint32_t (&biases)[kBiasTiles], int row) const {
    ptx::forget_memory();  // not all of them at once: registers are few
    const BiasRows all = bias_rows();
    row += fragment_row();
    const int key = first_key - fragment_row() + fragment_column();
#pragma unroll
    for (int i = 0; i < kBiasTiles; ++i) {
      biases[i] = all.load_word(row + i / 2 * 8, key + i % 2 * 8);
    }
#pragma unroll
    for (uint32_t& pair : biases) pair = ptx::movmatrix_trans(pair);
  }

  // Zeros where the mask has no bit.
  __device__ __forceinline__ void hide(uint32_t (&p)[kScores / 2],
                                       uint32_t (&weights)[kScores / 2]) const {
    const MaskRows mask = MaskRows::make(params, block.batch, step.head);
    const int row = step.row + fragment_column();
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      // 16 keys of a warp lie in one word.
      const uint32_t left = mask.word(row + 8 * j, first_key) >> (first_key % 32);
      const uint32_t right = mask.word(row + 8 * j + 1, first_key) >> (first_key % 32);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t seen = (left >> 8 * h & 1) * 0xffffu + (right >> 8 * h & 1) * 0xffff0000u;
        p[2 * j + h] &= seen;
        weights[2 * j + h] &= seen;
      }
    }
  }

  // Gradients of the logits to where those of biases are added up: as take_score_gradients and
  // take_dropped_gradients have them, where there is no soft cap.
  template <int kEarly>
  __device__ __forceinline__ void add_bias_gradients(const uint32_t (&weights)[kScores / 2],
                                                     const float (&dp)[kScores],
                                                     const float2 (&early)[kEarly],
                                                     const float* delta) const {
    const BiasGradient gradient = BiasGradient::make(params, block.batch, step.head);
    const int row = step.row + fragment_column();
    float sums[2] = {0.0f, 0.0f};  // of all rows, where they share it
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t word = weights[2 * j + h];
        const float2 weight = ptx::unpack_x2<Element>(word & 0x7fff7fffu);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool dropped = word >> (16 * e + 15) & 1;
          const float kept = dropped ? 0.0f : dp[4 * j + 2 * h + e];
          const float change = fmaf(kept, params.intervals.kept_scale, e == 0 ? -x.x : -x.y);
          const float ds = (e == 0 ? weight.x : weight.y) * change;
          if (gradient.stride == 0) {
            sums[h] += ds;
          } else if (row + 8 * j + e < params.query_length &&
                     first_key + 8 * h < params.key_length) {
            gradient.add(row + 8 * j + e, first_key + 8 * h, ds);
          }
        }
      }
    }
    if (gradient.stride != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(sums[h]);
      if (fragment_column() == 0 && first_key + 8 * h < params.key_length) {
        gradient.add(0, first_key + 8 * h, sum);
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
