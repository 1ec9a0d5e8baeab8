// Tiles of rows of which some are dead: nothing of them is read, and zeros stand in their place.
#pragma once

#include <cstdint>

#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "tile/copy.cuh"
#include "tile/swizzle.cuh"

namespace jax_flash {

// TileCopy::copy of the rows first_row.. for which is_live(row) holds. Few tiles are copied so:
// small code rather than fast code. Copies belong to the caller's group as those of TileCopy do.
template <int kRows, int kWidth, int kThreads, bool kWide, typename IsLive>
__device__ __forceinline__ void copy_live_rows(uint32_t tile, const Element16* operand,
                                               int64_t row_stride, int first_row, int width,
                                               IsLive is_live) {
  using Layout = TileLayout<kWidth>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * Layout::kChunks; i += kThreads) {
    const int row = i / Layout::kChunks;
    const int chunk = i % Layout::kChunks;
    const uint32_t target = tile + Layout::offset(row, chunk);
    const Element16* const source = operand + (first_row + row) * row_stride + 8 * chunk;
    const int columns = is_live(first_row + row) ? width - 8 * chunk : 0;
    if constexpr (kWide) {
      ptx::cp_async_16(target, source, columns > 0 ? 16 : 0);
    } else {
#pragma unroll 1
      for (int pair = 0; pair < 4; ++pair) {
        const uint32_t low = columns > 2 * pair ? source[2 * pair] : 0;
        const uint32_t high = columns > 2 * pair + 1 ? source[2 * pair + 1] : 0;
        ptx::st_shared(target + 4 * pair, low | high << 16);
      }
    }
  }
}

}  // namespace jax_flash
