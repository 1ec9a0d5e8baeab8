// Approximate arithmetic and packed conversions, one instruction each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flash::ptx {

// 2^x to 2 ulp, subnormal results flushed to zero; ex2(-inf) = 0.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp, subnormal numbers taken for zeros.
__device__ __forceinline__ float rcp_approx_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same word, which the compiler takes for a new one: what follows from it is computed where it
// is needed, instead of being kept in registers through a loop.
__device__ __forceinline__ uint32_t fresh_word(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Bits by a table: bit 4 * x + 2 * y + z of kTable is the result for those bits. Of constants 0xf0,
// 0xcc and 0xaa for x, y and z the table is what one makes of the operands.
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(x), "r"(y), "r"(z), "n"(kTable));
  return r;
}

// The largest of three.
__device__ __forceinline__ uint32_t max3(uint32_t x, uint32_t y, uint32_t z) {
  return __vimax3_u32(x, y, z);  // one instruction on sm_90
}

// x rounded to the nearest of 10 bits of mantissa, the lower 13 bits being 0; NaN stays NaN.
__device__ __forceinline__ float round_tf32(float x) {
  uint32_t r;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));  // one instruction; that of sm_80 is four
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
#endif
  return __uint_as_float(r);
}

// Two f32 to one packed 16-bit pair, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t cvt_rn_x2(float low, float high);

template <>
__device__ __forceinline__ uint32_t cvt_rn_x2<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <>
__device__ __forceinline__ uint32_t cvt_rn_x2<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

#if __CUDA_ARCH__ >= 890
// Two e4m3 to a packed f16 pair, exactly. sm_89 and later.
__device__ __forceinline__ uint32_t cvt_rn_f16x2_e4m3x2(uint16_t pair) {
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
#endif

// Four bytes out of the eight of x (0 to 3) and y (4 to 7): a nibble of `selector` for each, with 8
// added for one that repeats the byte's highest bit.
__device__ __forceinline__ uint32_t prmt(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(selector));
  return r;
}

// x - y of two packed f16 pairs.
__device__ __forceinline__ uint32_t sub_f16x2(uint32_t x, uint32_t y) {
  uint32_t r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return r;
}

// The two f32 of a packed 16-bit pair.
template <typename T>
__device__ __forceinline__ float2 unpack_x2(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack_x2<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack_x2<__half>(uint32_t pair) {
  return __half22float2(__halves2half2(__ushort_as_half(static_cast<unsigned short>(pair)),
                                       __ushort_as_half(static_cast<unsigned short>(pair >> 16))));
}

}  // namespace jax_flash::ptx
