// Division by a number known before the launch: a multiplication instead of about a hundred cycles.
#pragma once

#include <cstdint>

namespace jax_flash {

// For dividends below 2^31. With shift = ceil(log2(divisor)) the multiplier
// ceil(2^(31 + shift) / divisor) fits 32 bits and the quotient is exact (Granlund and Montgomery
// 1994, "Division by invariant integers using multiplication").
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 1u << 31;
  uint32_t shift = 0;

  static FastDivisor make(uint32_t divisor) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t numerator = uint64_t{1} << (31 + shift);
    return {divisor, static_cast<uint32_t>((numerator + divisor - 1) / divisor), shift};
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ int divide(int dividend) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(dividend)) * multiplier) >>
                            (31 + shift));
  }
  __device__ __forceinline__ int remainder(int dividend) const {
    return dividend - divide(dividend) * static_cast<int>(divisor);
  }
#endif
};

}  // namespace jax_flash
