// 2^x on the FMA pipe, for some of the exponentials where the unit that makes them is the limit.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "ptx/math.cuh"

namespace jax_flash::sm90 {

// 2^x = 2^n 2^f with a whole n and |f| <= 1/2: 2^f is a polynomial that is 1 at 0, and n is added to
// its exponent. First comes y = (128 - x) / 255, limited to [0, 1], which limits x to [-127, 128]:
// -127 gives 0, as -inf does, and 128 infinity, as NaN does, which takes its row out of the range. x
// is off by up to 2^-17.
//
// The polynomial's relative error is at most 1.0e-4 (mean 4e-5) for bf16, whose rounding has up to
// 2^-9 = 2.0e-3, and 2.9e-6 for f16, whose rounding has up to 4.9e-4.
template <typename Element>
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
    float p;
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
      p = fmaf(f, fmaf(f, 0.0550089329f, 0.242210969f), 0.693282902f);
    } else {
      p = fmaf(f, fmaf(f, fmaf(f, 0.00958538242f, 0.0559066273f), 0.240240380f), 0.693124175f);
    }
    p = fmaf(f, p, 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(whole) << 23));
  }
};

}  // namespace jax_flash::sm90
