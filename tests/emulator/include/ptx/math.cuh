// csrc/ptx/math.cuh for the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

namespace jax_flash::ptx {

inline float ex2_approx_ftz(float x) { return std::exp2(x); }
inline float rcp_approx_ftz(float x) { return 1.0f / x; }

inline uint32_t fresh_word(uint32_t x) { return x; }

inline uint32_t max3(uint32_t x, uint32_t y, uint32_t z) { return std::max(std::max(x, y), z); }

inline float round_tf32(float x) {
  if (!std::isfinite(x)) return x;
  const auto bits = static_cast<uint32_t>(emulator::bits_of(x));
  const uint32_t to_even = 0xfff + (bits >> 13 & 1);
  return emulator::bit_cast<float>((bits + to_even) & 0xffffe000u);
}

template <typename T>
uint32_t cvt_rn_x2(float low, float high) {
  return static_cast<uint32_t>(emulator::bits_of(T(low)) | emulator::bits_of(T(high)) << 16);
}

template <int kTable>
uint32_t lop3(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i) {
    if ((kTable >> i & 1) == 0) continue;
    r |= ((i & 4) != 0 ? x : ~x) & ((i & 2) != 0 ? y : ~y) & ((i & 1) != 0 ? z : ~z);
  }
  return r;
}

inline uint32_t prmt(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    const uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
    result |= (nibble < 8 ? byte : byte < 128 ? 0 : 255) << 8 * i;
  }
  return result;
}
inline uint32_t sub_f16x2(uint32_t x, uint32_t y) {
  const auto half = [&](int shift) {
    return static_cast<float>(emulator::bit_cast<__half>(x >> shift & 0xffff)) -
           static_cast<float>(emulator::bit_cast<__half>(y >> shift & 0xffff));
  };
  return cvt_rn_x2<__half>(half(0), half(16));
}
template <typename T>
float2 unpack_x2(uint32_t pair) {
  return make_float2(static_cast<float>(emulator::bit_cast<T>(pair & 0xffff)),
                     static_cast<float>(emulator::bit_cast<T>(pair >> 16)));
}

}  // namespace jax_flash::ptx
