// Rows of a shared tile that hold what may not be read: 0 * NaN would reach a sum.
#pragma once

#include <cstdint>

#include "ptx/shared.cuh"

namespace jax_flash::sm90 {

// By the 128 threads of a warpgroup: zeroes rows [first, end).
template <typename Layout>
__device__ __forceinline__ void clear_rows(uint32_t tile, int first, int end) {
  const uint32_t zeros[4] = {0, 0, 0, 0};
  for (int i = threadIdx.x % 128; i < (end - first) * 8; i += 128) {
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::st_shared_v4(tile + slab * Layout::kSlabBytes + first * 128 + 16 * i, zeros);
    }
  }
}

// The same for those of `rows` rows of which is_dead(row) holds.
template <typename Layout, typename IsDead>
__device__ __forceinline__ void clear_rows_if(uint32_t tile, int rows, IsDead is_dead) {
  const uint32_t zeros[4] = {0, 0, 0, 0};
  for (int i = threadIdx.x % 128; i < rows * 8; i += 128) {
    if (!is_dead(i / 8)) continue;
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::st_shared_v4(tile + slab * Layout::kSlabBytes + 16 * i, zeros);
    }
  }
}

}  // namespace jax_flash::sm90
