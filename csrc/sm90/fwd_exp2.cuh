// 2^x on the FMA pipe, for some of the exponentials where the unit that makes them is the limit.
#pragma once

#include <cstdint>

#include "ptx/math.cuh"

namespace jax_flash::sm90 {

// 2^x = 2^n 2^f with a whole n and |f| <= 1/2: 2^f is a polynomial that is 1 at 0, and n is added
// to its exponent. First comes y = (128 - x) / 255, limited to [0, 1], which limits x to [-127,
// 128]: -127 gives 0, as -inf does, and 128 infinity, as NaN does, which takes its row out of the
// range.
//
// The relative error of the polynomial is at most 2.9e-6 (mean 3e-7), and x is off by up to 2^-16 +
// 2^-23 |x|, 1.1e-5 of a result near 1: far less than what rounding to bf16 (2.0e-3) or f16
// (4.9e-4) adds.
struct Exp2Polynomial {
  // With x = score * log2 - reference * log2, y is score * rate + first.
  float rate;
  float first;

  // A row that has seen nothing but scores of -inf has that as its reference, too: any other score
  // is then past all limits.
  static __device__ __forceinline__ Exp2Polynomial of_row(float reference, float log2) {
    const float rate = log2 * (-1.0f / 255.0f);
    return {rate, fmaxf(fmaf(-reference, rate, 128.0f / 255.0f), -1e36f)};
  }

  __device__ __forceinline__ float operator()(float score) const {
    // A sum with this is rounded to whole numbers, and its lowest bits are n.
    constexpr float kWhole = 12582912.0f + 128.0f;
    const float y = ptx::fma_rn_sat(score, rate, first);
    const float whole = fmaf(y, -255.0f, kWhole);
    const float f = fmaf(y, -255.0f, kWhole - whole);
    float p = fmaf(f, fmaf(f, 0.00958538242f, 0.0559066273f), 0.240240380f);
    p = fmaf(f, fmaf(f, p, 0.693124175f), 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(whole) << 23));
  }
};

}  // namespace jax_flash::sm90
