// Caches of 8-bit elements on their way to the tensor cores: always as f16, which holds every e4m3
// and int8 value exactly.
//
// A register of ldmatrix has four neighbouring bytes. They are taken apart into those with even and
// those with odd places, which costs less than neighbours: for keys that permutes the columns of a
// k-step, and the queries' in the same way; for values (transposed) it is two keys of one column,
// so that of two neighbouring output tiles the first has the even columns and the other the odd
// ones.
#pragma once

#include <cstdint>

#include "decode/params.h"
#include "ptx/math.cuh"

namespace jax_flash::decode {

// Two packed pairs of f16.
struct HalfPairs {
  uint32_t even;
  uint32_t odd;
};

// 1 / kUnit<type> times the elements of `word`.
template <CacheType kType>
__device__ __forceinline__ HalfPairs to_half(uint32_t word);

template <CacheType kType>
inline constexpr float kUnit = 1.0f;

#if __CUDA_ARCH__ >= 890

template <>
__device__ __forceinline__ HalfPairs to_half<CacheType::kE4m3>(uint32_t word) {
  const uint32_t sorted = __byte_perm(word, 0, 0x3120);
  return {ptx::cvt_rn_f16x2_e4m3x2(static_cast<uint16_t>(sorted)),
          ptx::cvt_rn_f16x2_e4m3x2(static_cast<uint16_t>(sorted >> 16))};
}

#else

// Moving exponent and mantissa to their places leaves the exponent 8 too low, since its bias is 7
// in e4m3 and 15 in f16. Subnormals stay right. The NaN (all bits set) becomes 480.
template <>
inline constexpr float kUnit<CacheType::kE4m3> = 256.0f;

template <>
__device__ __forceinline__ HalfPairs to_half<CacheType::kE4m3>(uint32_t word) {
  constexpr uint32_t kSign = 0x80008000u;
  constexpr uint32_t kRest = 0x3f803f80u;
  return {(word << 8 & kSign) | (word << 7 & kRest), (word & kSign) | (word >> 1 & kRest)};
}

#endif

// 0x6400 + u is the f16 1024 + u; u is the element plus 128.
template <>
__device__ __forceinline__ HalfPairs to_half<CacheType::kInt8>(uint32_t word) {
  constexpr uint32_t kBytes = 0x00ff00ffu;
  constexpr uint32_t kMagic = 0x64806480u;   // also turns the sign bit
  constexpr uint32_t kOffset = 0x64806480u;  // 1152
  return {ptx::sub_f16x2((word & kBytes) ^ kMagic, kOffset),
          ptx::sub_f16x2((word >> 8 & kBytes) ^ kMagic, kOffset)};
}

}  // namespace jax_flash::decode
