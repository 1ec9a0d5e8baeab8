// Soft cap, ALiBi and bias: what becomes of a scaled score before it is masked.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "host/params.h"
#include "ptx/math.cuh"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"

namespace jax_flash {

// A multiple of tanh without special functions, for |x| < 0.8: x P(x^2) with P of degree 4. The
// coefficients are a minimax fit of the relative error on that range. In f32 tanh has a relative
// error of 1.2e-6 and an absolute one of 7.7e-7 (a logit under a cap of 50: 3.9e-5), its derivative
// 1 - tanh^2 one of 1.1e-6. It is written in u = x / kStep, so that bit 30 of u^2 (2 and above,
// infinities and NaN) says that x is not in range: one OR for many of them.
struct TanhPolynomial {
  static constexpr float kStep = 0.565685425f;  // sqrt(0.32)

  float argument;    // u = argument * q.k
  float factors[5];  // of u, u^3, ...

  // Of factor * tanh(scale * q.k / softcap).
  static constexpr TanhPolynomial make(float scale, float softcap, float factor) {
    return {scale / softcap / kStep,
            {5.656849124e-1f * factor, -6.032620859e-2f * factor, 7.665879963e-3f * factor,
             -9.130783194e-4f * factor, 7.212670559e-5f * factor}};
  }

  static constexpr uint32_t kOutside = 1u << 30;
  static __device__ __forceinline__ bool holds(float u) { return u * u < 2.0f; }

  // What u is multiplied with. Bits of kOutside are set in `outside` if this does not hold.
  __device__ __forceinline__ float quotient(float u, uint32_t& outside) const {
    const float z = u * u;
    outside |= __float_as_uint(z);
    float sum = fmaf(z, factors[4], factors[3]);
    sum = fmaf(z, sum, factors[2]);
    sum = fmaf(z, sum, factors[1]);
    return fmaf(z, sum, factors[0]);
  }
};

// The same for |x| < 0.35, with P of degree 2, and straight from scores: three instructions instead
// of six for an element, beside the one that softmax has anyway. In f32 tanh has a relative error
// of 3e-6 and an absolute one of 1.0e-6, its derivative one of 7e-7.
struct SmallTanh {
  static constexpr float kLargest = 0.35f;

  float factors[3];  // of s, s^3, s^5, for scores s = q.k
  uint32_t limit;    // the bits of the smallest s^2 that it does not hold for

  // Of factor * tanh(scale * q.k / softcap). Holds for no score at all if that cannot be had in
  // f32.
  static constexpr SmallTanh make(float scale, float softcap, float factor) {
    const double argument = static_cast<double>(scale) / softcap;
    const double square = argument * argument;
    const double first = factor * argument;
    const double values[3] = {9.999971308e-1 * first, -3.329095411e-1 * first * square,
                              1.239503130e-1 * first * square * square};
    SmallTanh result{{0.0f, 0.0f, 0.0f}, 0};
    const double largest = kLargest * kLargest / square;
    constexpr double kHuge = std::numeric_limits<float>::max();
    constexpr double kTiny = std::numeric_limits<float>::min();
    for (const double value : {values[0], values[1], values[2], largest}) {
      const double size = value < 0 ? -value : value;
      if (!(size > kTiny && size < kHuge)) return result;
    }
    for (int i = 0; i < 3; ++i) result.factors[i] = static_cast<float>(values[i]);
    result.limit = std::bit_cast<uint32_t>(static_cast<float>(largest));
    return result;
  }

  // What a score with this square is multiplied with. third: factors[2], see not_before.
  __device__ __forceinline__ float quotient(float square, float third) const {
    return fmaf(square, fmaf(square, third, factors[1]), factors[0]);
  }

  // Of the bits of squares, NaN among them.
  __device__ __forceinline__ bool holds(uint32_t largest_square) const {
    return largest_square < limit;
  }
};

// x, which is the same as ever, but is not known before `sum`, which is not negative: so that
// instructions that need x are not scheduled before those that `sum` is made of.
__device__ __forceinline__ float not_before(float x, float sum) {
  return __uint_as_float(__float_as_uint(x) ^ (__float_as_uint(sum) & 0x80000000u));
}

// ALiBi where all keys of a tile are on one side of the key that a row is aligned with: linear in
// the key, so that it costs one multiplication and addition, with a constant for the key's column.
// `rate` is per key, positive slopes before the aligned key. With the row's term exact but for its
// last rounding, and its reference point in it, what is left is a number of the size of the
// exponent: where it matters it is small, however far away the key is. It differs from what
// ScoreOptions::biased gives by 2^-23 of the bias.
struct LinearBias {
  float rate;
  static __device__ __forceinline__ LinearBias make(float slope, bool before) {
    const float rate = slope * SoftmaxScale::kLog2e;
    return {before ? rate : -rate};
  }
  // Of a row `distance` after the first key; beside it stands `rest`.
  __device__ __forceinline__ float at_first(float distance, float rest) const {
    return fmaf(-rate, distance, rest);
  }
};

// Of one query head. All numbers are natural logits; a kernel whose scores went through here takes
// exponentials of them with a scale of 1.
struct ScoreOptions {
  float scale;    // of q.k
  float softcap;  // 0: none
  float slope;    // 0: none

  // Whether scores change at all; otherwise they stay q.k and the kernel scales them as ever.
  // kDense: there may be a bias.
  template <bool kDense = false>
  JAX_FLASH_HOST_DEVICE static bool any(const MhaParams& params) {
    return params.intervals.softcap != 0.0f || params.intervals.slopes != nullptr ||
           (kDense && params.intervals.bias.data != nullptr);
  }

  // Whether a row that has keys may yet see none of them.
  JAX_FLASH_HOST_DEVICE static bool hides(const MhaParams& params) {
    return params.intervals.mask.data != nullptr || params.intervals.bias.data != nullptr;
  }

  __device__ __forceinline__ static ScoreOptions make(const MhaParams& params, int batch,
                                                      int head) {
    const IntervalsView& view = params.intervals;
    float slope = 0.0f;
    if (view.slopes != nullptr) {
      slope = view.slopes[batch_offset(view.slope_strides, batch, params) + head];
    }
    return {params.scale.first * params.scale.second, view.softcap, slope};
  }

  // tanh(x) as 1 - 2 / (1 + e^(2 x)): 2^-22 of absolute error, where tanh.approx has 2^-11.
  static __device__ __forceinline__ float tanh(float x) {
    const float power = ptx::ex2_approx_ftz(2.0f * SoftmaxScale::kLog2e * x);
    return fmaf(-2.0f, ptx::rcp_approx_ftz(1.0f + power), 1.0f);
  }

  // The same with 2^-22 of relative error: of f32 small logits stay exact under a large cap. Where
  // x is small it is x + x^3 P(x^2), a minimax fit of the relative error.
  static __device__ __forceinline__ float precise_tanh(float x) {
    constexpr float kSmall = 0.55f;
    const float z = x * x;
    float sum = fmaf(z, 1.643760488e-2f, -5.267182558e-2f);
    sum = fmaf(z, sum, 1.332072524e-1f);
    sum = fmaf(z, sum, -3.333294664e-1f);
    return fabsf(x) < kSmall ? fmaf(x * z, sum, x) : tanh(x);
  }

  // 1 / softcap; 0 if there is none.
  __device__ __forceinline__ float inverse() const {
    return softcap == 0.0f ? 0.0f : ptx::rcp_approx_ftz(softcap);
  }

  // Where there is a soft cap: of scale * q.k. kF32: of operands of f32.
  template <bool kF32 = false>
  __device__ __forceinline__ float cap(float x, float inverse) const {
    return softcap * (kF32 ? precise_tanh(x * inverse) : tanh(x * inverse));
  }

  // The logit of a score q.k before ALiBi.
  template <bool kF32 = false>
  __device__ __forceinline__ float capped(float score) const {
    const float x = score * scale;
    return softcap == 0.0f ? x : cap<kF32>(x, inverse());
  }

  // With ALiBi, of a key `distance` away from the one that the row is aligned with.
  __device__ __forceinline__ float biased(float capped, float distance) const {
    return fmaf(-slope, fabsf(distance), capped);
  }

  template <bool kF32 = false>
  __device__ __forceinline__ float logit(float score, float distance) const {
    return biased(capped<kF32>(score), distance);
  }

  // The derivative of a logit by scale * q.k, from the logit before ALiBi.
  static __device__ __forceinline__ float derivative(float capped, float inverse) {
    const float ratio = capped * inverse;
    return fmaf(-ratio, ratio, 1.0f);
  }
};

}  // namespace jax_flash
