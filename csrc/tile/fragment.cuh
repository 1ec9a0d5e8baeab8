// Who holds which element of mma.sync m16n8k16, for lane l with g = l / 4 and t = l % 4:
//   accumulator d[4] (16x8 f32): d[0], d[1] = (row g, columns 2t, 2t + 1); d[2], d[3] = row g + 8
//   A a[4] (16x16): a[0] = (g, 2t..), a[1] = (g + 8, 2t..); a[2], a[3] = the same at 2t + 8..
//
//   B b[2] (16x8, k by n): b[0] = (k 2t.., n g), b[1] = (k 2t + 8.., n g)
//
// So two neighbouring accumulators (columns 8j..8j+15) packed to 16 bits are one A fragment: the
// probabilities go from the first product to the second without leaving the registers.
#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/special_register.cuh"
#include "tile/swizzle.cuh"

namespace jax_flash {

__device__ __forceinline__ int lane_id() { return ptx::laneid(); }
__device__ __forceinline__ int fragment_row() { return lane_id() / 4; }
__device__ __forceinline__ int fragment_column() { return lane_id() % 4 * 2; }

// Lane address of ldmatrix.x4 for a 16x16 A block at rows row0.. of a tile, first k-step.
// Matrices in order: rows 0-7, rows 8-15, then the same rows at the second chunk.
// kParts: 2 where every other chunk has the low parts of the chunk before (tile/split_parts.cuh).
template <typename Layout, int kParts = 1>
__device__ __forceinline__ uint32_t a_operand_address(uint32_t tile, int row0) {
  const int lane = lane_id();
  return tile + Layout::offset(row0 + lane % 16, kParts * (lane / 16));
}

// The same for B where the tile is [n][k] (K in Q K^T): matrices n 0-7 k 0-7, n 0-7 k 8-15, then
// n 8-15; registers {0, 1} are the fragment of the first 8 columns, {2, 3} of the next.
template <typename Layout, int kParts = 1>
__device__ __forceinline__ uint32_t b_operand_address(uint32_t tile, int row0) {
  const int lane = lane_id();
  return tile + Layout::offset(row0 + lane % 8 + lane / 16 * 8, kParts * (lane / 8 % 2));
}

// The same for B where the tile is [k][n] (V in P V), read transposed: matrices k 0-7 n 0-7,
// k 8-15 n 0-7, then n 8-15.
template <typename Layout>
__device__ __forceinline__ uint32_t b_operand_trans_address(uint32_t tile, int row0) {
  return a_operand_address<Layout>(tile, row0);
}

// A fragment from two neighbouring accumulators.
template <typename T>
__device__ __forceinline__ void pack_a_operand(uint32_t (&a)[4], const float (&left)[4],
                                               const float (&right)[4]) {
  a[0] = ptx::cvt_rn_x2<T>(left[0], left[1]);
  a[1] = ptx::cvt_rn_x2<T>(left[2], left[3]);
  a[2] = ptx::cvt_rn_x2<T>(right[0], right[1]);
  a[3] = ptx::cvt_rn_x2<T>(right[2], right[3]);
}

}  // namespace jax_flash
