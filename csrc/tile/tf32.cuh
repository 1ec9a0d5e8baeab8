// Products of f32 by m16n8k8 of tf32, whose mantissa has 10 bits. kProducts = 1 rounds both factors
// to it; kProducts = 3 writes a factor as high + low, two tf32, and leaves out low * low: relative
// errors of 2^-21 and less for each product.
//
// Who holds which element, for lane l with g = l / 4 and t = l % 4: A a[0] = (row g, k t),
// a[1] = (g + 8, t), a[2] = (g, t + 4), a[3] = (g + 8, t + 4); B b[0] = (k t, column g),
// b[1] = (t + 4, g); accumulators as in tile/fragment.cuh. In units of 32 bits these are the
// fragments of m16n8k16 in pairs of 16: ldmatrix and the addresses there serve both.
#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "ptx/mma.cuh"

namespace jax_flash::tf32 {

// A fragment of kCount registers. `low` is not used if kProducts is 1.
template <int kProducts, int kCount>
struct Fragment {
  uint32_t high[kCount];
  uint32_t low[kCount];

  __device__ __forceinline__ void set(int i, float x) {
    const float rounded = ptx::round_tf32(x);
    high[i] = __float_as_uint(rounded);
    if constexpr (kProducts == 3) low[i] = __float_as_uint(x - rounded);
  }
  // From a tile in shared memory, whose elements are rounded there if kProducts is 1.
  __device__ __forceinline__ void set_word(int i, uint32_t word) {
    if constexpr (kProducts == 1) {
      high[i] = word;
    } else {
      set(i, __uint_as_float(word));
    }
  }
};

// Adds a * b: the low products to `low`, which may be `high`.
template <int kProducts>
__device__ __forceinline__ void add_product(float (&high)[4], float (&low)[4],
                                            const Fragment<kProducts, 4>& a,
                                            const Fragment<kProducts, 2>& b) {
  if constexpr (kProducts == 3) {
    ptx::mma_m16n8k8_tf32(low, a.high, b.low[0], b.low[1]);
    ptx::mma_m16n8k8_tf32(low, a.low, b.high[0], b.high[1]);
  }
  ptx::mma_m16n8k8_tf32(high, a.high, b.high[0], b.high[1]);
}

}  // namespace jax_flash::tf32
