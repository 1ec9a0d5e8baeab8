// Online softmax of one warpgroup's rows in base 2, on wgmma accumulators.
//
// The reference point of a row need not be its maximum: f32 sums and bf16 (f16) probabilities keep
// their relative precision as long as exponentials stay in range. So maxima are taken, and
// reference points moved, only in a row's first tile and in tiles on the mask's border
// (`follow_maximum`). In all others the row's sum of exponentials over the tile tells whether it
// left the range, an overflow to infinity included; such a row takes its true maximum as the
// reference point, if need be from scores that are computed again (`recover`). In the next tile the
// maximum of such a row is taken beforehand: where scores grow from tile to tile, only the first
// jump is a surprise. Which rows move, and by how much, depends on that row's scores alone. Rows
// that have seen no key have reference point -inf and sum 0 and finish as output 0 and lse -inf.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "tile/fragment.cuh"
#include "tile/score_options.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// Scores s[4 j + 2 h + e]: row half h, column 8 j + 2 (lane % 4) + e.
template <typename Config>
struct RowSoftmax {
  using Element = typename Config::Element;
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kScores = kKeys / 2;
  // A row that has seen nothing but scores of -inf leaves the range with any other.
  static constexpr float kLowest = -3e38f;
  static constexpr int kChunk = 8;  // of capped_exponentials

  float reference[2];  // in units of scores
  float sum[2];        // this lane's part of the row's sum of exponentials
  bool watched[2];     // the row moved in the last tile, and may be about to move again
  bool watching;       // whether any row of the warp is watched

  __device__ __forceinline__ void init() {
    reference[0] = reference[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.0f;
    watched[0] = watched[1] = watching = false;
  }

  // Moves the reference points of rows (all of them, or those that are watched) whose maximum in
  // this tile passes theirs by more than the slack; true if some row of the warp did, by `factor`.
  template <bool kAll>
  __device__ __forceinline__ bool follow_maximum(const float (&s)[kScores],
                                                 const SoftmaxScale& scale, float (&factor)[2]) {
    float largest[2][2] = {{s[0], s[2]}, {s[1], s[3]}};
#pragma unroll
    for (int i = 4; i < kScores; ++i) {
      largest[i % 2][i / 2 % 2] = fmaxf(largest[i % 2][i / 2 % 2], s[i]);
    }
    const float lane_max[2] = {fmaxf(largest[0][0], largest[1][0]),
                               fmaxf(largest[0][1], largest[1][1])};
    bool leaves = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      leaves |= (kAll || watched[h]) && lane_max[h] > reference[h] + scale.slack;
    }
    const bool moved = __any_sync(0xffffffffu, leaves);
    if (moved) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float row_max = quad_max(lane_max[h]);
        const bool moves = (kAll || watched[h]) && row_max > reference[h] + scale.slack;
        move(h, row_max, moves, scale, factor[h]);
        if (!kAll) watched[h] = moves;
      }
    } else if (!kAll) {
      watched[0] = watched[1] = false;
    }
    return moved;
  }

  // Scores become exponentials; true if a row of the warp left the range, and then nothing else is
  // valid until `recover`. Adding the sums is left to the caller.
  // beside(i): what is done after score i.
  template <typename Beside>
  __device__ __forceinline__ bool exponentials(float (&s)[kScores], const SoftmaxScale& scale,
                                               float (&tile_sum)[2], Beside beside) const {
    const float shift[2] = {fmaxf(reference[0] * scale.log2, kLowest),
                            fmaxf(reference[1] * scale.log2, kLowest)};
    tile_sum[0] = tile_sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] = ptx::ex2_approx_ftz(fmaf(s[i], scale.log2, -shift[i / 2 % 2]));
      tile_sum[i / 2 % 2] += s[i];
      beside(i);
    }
    return __any_sync(0xffffffffu, tile_sum[0] > Config::kRange || tile_sum[1] > Config::kRange);
  }
  __device__ __forceinline__ bool exponentials(float (&s)[kScores], const SoftmaxScale& scale,
                                               float (&tile_sum)[2]) const {
    return exponentials(s, scale, tile_sum, [](int) {});
  }

  // The same of scores that a mask is still to be applied to.
  template <typename Mask>
  __device__ __forceinline__ bool masked_exponentials(float (&s)[kScores], const Mask& mask,
                                                      const SoftmaxScale& scale,
                                                      float (&tile_sum)[2]) const {
    const float shift[2] = {fmaxf(reference[0] * scale.log2, kLowest),
                            fmaxf(reference[1] * scale.log2, kLowest)};
    tile_sum[0] = tile_sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float score = mask.sees_score(i) ? s[i] : kMinusInfinity;
      s[i] = ptx::ex2_approx_ftz(fmaf(score, scale.log2, -shift[i / 2 % 2]));
      tile_sum[i / 2 % 2] += s[i];
    }
    return has_left(tile_sum, false);
  }

  // The largest absolute value of a lane's scores.
  static __device__ __forceinline__ float largest_size(const float (&s)[kScores]) {
    float largest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kScores; ++i) largest[i % 4] = fmaxf(largest[i % 4], fabsf(s[i]));
    return fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  }

  // Scores become logits in base 2. `outside`: see TanhPolynomial.
  static __device__ __forceinline__ void cap(float (&s)[kScores], const TanhPolynomial& capped,
                                             uint32_t& outside) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float u = s[i] * capped.argument;
      s[i] = u * capped.quotient(u, outside);
    }
  }

  // `exponentials` of scores that a soft cap is still to be applied to; true, too, if `small` does
  // not hold for one of the warp's: is_small, of each lane.
  //
  // Left to itself, ptxas has the polynomials of all scores come before most of the exponentials,
  // of which a warp can start one in 8 clocks. So scores go in chunks, and the polynomials of one
  // need a coefficient that is there when the sums of the chunk before the last are.
  __device__ __forceinline__ bool capped_exponentials(float (&s)[kScores], const SmallTanh& small,
                                                      float (&tile_sum)[2], bool& is_small) const {
    const float shift[2] = {shift_of(0), shift_of(1)};
    tile_sum[0] = tile_sum[1] = 0.0f;
    float before[2] = {0.0f, 0.0f};  // what tile_sum was
    uint32_t largest = 0;
#pragma unroll
    for (int chunk = 0; chunk < kScores; chunk += kChunk) {
      const float thirds[2] = {not_before(small.factors[2], before[0]),
                               not_before(small.factors[2], before[1])};
      before[0] = tile_sum[0];
      before[1] = tile_sum[1];
#pragma unroll
      for (int i = chunk; i < chunk + kChunk; i += 2) {
        const int h = i / 2 % 2;
        const float squares[2] = {s[i] * s[i], s[i + 1] * s[i + 1]};
        largest = ptx::max3(largest, __float_as_uint(squares[0]), __float_as_uint(squares[1]));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float quotient = small.quotient(squares[e], thirds[h]);
          s[i + e] = ptx::ex2_approx_ftz(fmaf(s[i + e], quotient, -shift[h]));
          tile_sum[h] += s[i + e];
        }
      }
    }
    is_small = small.holds(largest);
    return has_left(tile_sum, !is_small);
  }

  // `exponentials` of scores that ALiBi on one side is still to be applied to; a logit in base 2 is
  // log2 * score before that. `distance` of the two rows from this lane's first key. True, too, if
  // not `is_inside` in some lane.
  __device__ __forceinline__ bool biased_exponentials(float (&s)[kScores], float log2,
                                                      const LinearBias& bias,
                                                      const float (&distance)[2],
                                                      float (&tile_sum)[2], bool is_inside) const {
    const float first[2] = {bias.at_first(distance[0], -shift_of(0)),
                            bias.at_first(distance[1], -shift_of(1))};
    tile_sum[0] = tile_sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float column = static_cast<float>(i / 4 * 8 + i % 2);
      const float rest = fmaf(bias.rate, column, first[i / 2 % 2]);
      s[i] = ptx::ex2_approx_ftz(fmaf(s[i], log2, rest));
      tile_sum[i / 2 % 2] += s[i];
    }
    return has_left(tile_sum, !is_inside);
  }

  // Watching goes on as long as rows move.
  __device__ __forceinline__ void keep_watching() {
    watching = __any_sync(0xffffffffu, watched[0] || watched[1]);
  }

  // Brings rows that left the range back: their largest exponential becomes 1, so that it is exact
  // as in a softmax that takes all maxima. Where exponentials have overflowed, or are all invalid
  // (`invalid`, of the warp), scores are computed again. `query` and `key` are the tiles in shared
  // memory; logit(score, h, column) is what the softmax is taken of, `column` from this lane's
  // first.
  template <typename Logit>
  __device__ __forceinline__ void recover(float (&s)[kScores], float (&tile_sum)[2],
                                          float (&factor)[2], uint32_t query, uint32_t key,
                                          int warp_row, const SoftmaxScale& scale, bool invalid,
                                          Logit logit) {
    constexpr float kFinite = 1e36f;
    float largest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kScores; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
    bool lost[2];
    float back[2] = {1.0f, 1.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float row_max = quad_max(largest[h]);
      const bool left = invalid || quad_max(tile_sum[h]) > Config::kRange;
      lost[h] = invalid || (left && !(row_max < kFinite));
      watched[h] = watched[h] || left;
      if (left && !lost[h]) {
        back[h] = __fdividef(1.0f, row_max);
        reference[h] += __log2f(row_max) / scale.log2;
        factor[h] *= back[h];
        sum[h] *= back[h];
        tile_sum[h] *= back[h];
      }
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] *= back[i / 2 % 2];
    if (__any_sync(0xffffffffu, lost[0] || lost[1])) {
      recompute(s, tile_sum, factor, lost, query, key, warp_row, scale, logit);
    }
  }

  // Reduces the sums across lanes; returns 1 / sum (0 for an empty row) for the outputs.
  __device__ __forceinline__ float finish(int half) {
    sum[half] = quad_sum(sum[half]);
    return sum[half] == 0.0f ? 0.0f : __fdividef(1.0f, sum[half]);
  }

 private:
  // Of logits, in base 2.
  __device__ __forceinline__ float shift_of(int h) const {
    return fmaxf(reference[h] * SoftmaxScale::kLog2e, kLowest);
  }

  static __device__ __forceinline__ bool has_left(const float (&tile_sum)[2], bool outside) {
    return __any_sync(0xffffffffu,
                      tile_sum[0] > Config::kRange || tile_sum[1] > Config::kRange || outside);
  }

  // Exponentials of the rows in `lost` from scores computed again by mma.sync, which a warp can do
  // alone, and twice, because there are no registers for a second tile of scores.
  template <typename Logit>
  __device__ __forceinline__ void recompute(float (&s)[kScores], float (&tile_sum)[2],
                                            float (&factor)[2], const bool (&lost)[2],
                                            uint32_t query, uint32_t key, int warp_row,
                                            const SoftmaxScale& scale, Logit logit) {
    float largest[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll 1
    for (int j = 0; j < kKeys / 16; ++j) {
      float c[2][4];
      multiply(c, query, key, warp_row, j);
      make_logits(c, j, logit);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        largest[h] = fmaxf(fmaxf(fmaxf(c[0][2 * h], c[0][2 * h + 1]), largest[h]),
                           fmaxf(c[1][2 * h], c[1][2 * h + 1]));
      }
    }
    float shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float row_max = quad_max(largest[h]);
      // Invalid exponentials do not say that the row goes up.
      const bool moves = lost[h] && (!Config::kIntervals || row_max > reference[h]);
      move(h, row_max, moves, scale, factor[h]);
      shift[h] = reference[h] * scale.log2;
      if (lost[h]) tile_sum[h] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      float c[2][4];
      multiply(c, query, key, warp_row, j);
      make_logits(c, j, logit);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int h = e / 2;
          if (lost[h]) {
            const float p = ptx::ex2_approx_ftz(fmaf(c[n][e], scale.log2, -shift[h]));
            s[4 * (2 * j + n) + e] = p;
            tile_sum[h] += p;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void move(int h, float row_max, bool moves, const SoftmaxScale& scale,
                                       float& factor) {
    const float old = reference[h];
    const float change = moves ? ptx::ex2_approx_ftz((old - row_max) * scale.log2) : 1.0f;
    reference[h] = moves ? row_max : old;
    sum[h] *= change;
    factor *= change;
  }

  // What `multiply` gives becomes logits.
  template <typename Logit>
  static __device__ __forceinline__ void make_logits(float (&c)[2][4], int j, Logit logit) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[n][e] = logit(c[n][e], e / 2, static_cast<float>(16 * j + 8 * n + e % 2));
      }
    }
  }

  // Scores of this warp's 16 rows with keys 16 j.. of the tile, as two 8-column fragments.
  static __device__ __forceinline__ void multiply(float (&c)[2][4], uint32_t query, uint32_t key,
                                                  int warp_row, int j) {
    const int lane = lane_id();
#pragma unroll
    for (int e = 0; e < 4; ++e) c[0][e] = c[1][e] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < Config::kProducts; ++i) {
      const int left = Config::left_part(i) * Config::kHeadDim / 8 + lane / 16;
      const int right = Config::right_part(i) * Config::kHeadDim / 8 + lane / 8 % 2;
#pragma unroll 1
      for (int step = 0; step < Config::kHeadDim / 16; ++step) {
        uint32_t a[4];
        uint32_t b[4];
        ptx::ldmatrix_x4(
            a, query + Config::QueryLayout::offset(warp_row + lane % 16, left + 2 * step));
        ptx::ldmatrix_x4(b, key + Config::KeyLayout::offset(16 * j + lane % 8 + lane / 16 * 8,
                                                            right + 2 * step));
        ptx::mma_m16n8k16<Element>(c[0], a, b[0], b[1]);
        ptx::mma_m16n8k16<Element>(c[1], a, b[2], b[3]);
      }
    }
  }
};

}  // namespace jax_flash::sm90
