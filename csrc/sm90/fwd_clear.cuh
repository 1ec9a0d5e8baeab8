// Values that may hold anything become zeros: 0 * NaN would reach the output.
#pragma once

#include <cstdint>

#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_block.cuh"

namespace jax_flash::sm90 {

// Zeroes the rows of a tile of values from `rows` on, by the 128 threads of a warpgroup, which meet
// at `barrier`.
template <typename Config>
__device__ __forceinline__ void clear_last_rows(uint32_t tile, int rows, int barrier) {
  using Layout = typename Config::ValueLayout;
  const uint32_t zeros[4] = {0, 0, 0, 0};
  const int thread = threadIdx.x % 128;
  for (int i = thread; i < (Config::kKeys - rows) * 8; i += 128) {
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::st_shared_v4(tile + slab * Layout::kSlabBytes + rows * 128 + 16 * i, zeros);
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(barrier, 128);
}

// Zeroes the rows of dead keys, anywhere in a tile that begins with `first_key`, likewise.
template <typename Config>
__device__ __forceinline__ void clear_dead_rows(uint32_t tile, const FwdBlock<Config>& block,
                                                int first_key, int barrier) {
  using Layout = typename Config::ValueLayout;
  const uint32_t zeros[4] = {0, 0, 0, 0};
  const int thread = threadIdx.x % 128;
  // Where there are no keys TMA has written zeros.
  const int rows = min(Config::kKeys, block.mask.key_length - first_key);
#pragma unroll 1
  for (int row = thread / 8; row < rows; row += 16) {
    if (__ldg(block.mask.key_ids + first_key + row) >= 0) continue;
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::st_shared_v4(tile + Layout::offset(row, 8 * slab + thread % 8), zeros);
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(barrier, 128);
}

}  // namespace jax_flash::sm90
