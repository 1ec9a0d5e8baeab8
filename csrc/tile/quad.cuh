// Exchange among the four lanes that hold one row of an accumulator.
#pragma once

#include <cstdint>

namespace jax_flash {

// words[j] of lane t becomes words[t] of lane j, among four lanes. `lane`: of the four.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t given = upper ? words[j] : words[j + bit];
      const uint32_t taken = __shfl_xor_sync(0xffffffffu, given, bit);
      if (upper) {
        words[j] = taken;
      } else {
        words[j + bit] = taken;
      }
    }
  }
}

}  // namespace jax_flash
