// Tiles whose first rows are zeros too.
#pragma once

#include <cstdint>

#include "ptx/shared.cuh"
#include "tile/copy.cuh"
#include "tile/mask.cuh"
#include "tile/swizzle.cuh"

namespace jax_flash {

// TileCopy::copy where only the rows `valid` are read. Rows before them are few (bottom-right masks
// with more queries than keys), so one tile of a head at most goes through the slow loop.
template <int kRows, int kWidth, int kThreads, bool kWide>
__device__ __forceinline__ void copy_valid_rows(uint32_t tile, const Element16* operand,
                                                int64_t row_stride, int first_row,
                                                RowInterval valid, int width, int alignment) {
  using Layout = TileLayout<kWidth>;
  if (first_row >= valid.first) [[likely]] {
    TileCopy<kRows, kWidth, kThreads, kWide>::copy(tile, operand, row_stride, first_row, valid.end,
                                                   width, alignment);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * Layout::kChunks; i += kThreads) {
    const int row = i / Layout::kChunks;
    const int chunk = i % Layout::kChunks;
    const bool exists = first_row + row >= valid.first && first_row + row < valid.end;
    const Element16* const source = operand + (first_row + row) * row_stride + 8 * chunk;
    const int columns = exists ? width - 8 * chunk : 0;
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t low = columns > 2 * pair ? source[2 * pair] : 0;
      const uint32_t high = columns > 2 * pair + 1 ? source[2 * pair + 1] : 0;
      ptx::st_shared(tile + Layout::offset(row, chunk) + 4 * pair, low | high << 16);
    }
  }
}

}  // namespace jax_flash
