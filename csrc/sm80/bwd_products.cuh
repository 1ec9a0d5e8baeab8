// Matrix products of one warp from tiles in shared memory.
#pragma once

#include <cstdint>

#include "ptx/mma.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm80 {

// 16x16 blocks of a tile that is read along its rows: A in [m][k], B in [n][k]. `address` is that
// of tile/fragment.cuh for the first block and the first k-step.
template <typename Layout>
struct RowBlocks {
  uint32_t address;

  __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step) const {
    ptx::ldmatrix_x4(r, Layout::advance(address, 2 * step) + block * 16 * Layout::kPitch);
  }
};

// 16x16 blocks of a tile that is read along its columns: A in [k][m], B in [k][n]. Warps take the
// 16-column blocks in turn, a power of two of them, so that a block's chunks differ from those of
// the first in bits that are zero there: what TileLayout::advance needs.
template <typename Layout, int kWarps>
struct ColumnBlocks {
  static_assert((kWarps & (kWarps - 1)) == 0);
  uint32_t address;

  __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step) const {
    ptx::ldmatrix_x4_trans(
        r, Layout::advance(address, 2 * kWarps * block) + step * 16 * Layout::kPitch);
  }
};

// The lane addresses of such blocks; matrices come in the order that A or B wants them.
template <typename Layout, int kWarps>
__device__ __forceinline__ ColumnBlocks<Layout, kWarps> a_columns(uint32_t tile, int warp) {
  const int lane = lane_id();
  return {tile + Layout::offset(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2)};
}
template <typename Layout, int kWarps>
__device__ __forceinline__ ColumnBlocks<Layout, kWarps> b_columns(uint32_t tile, int warp) {
  const int lane = lane_id();
  return {tile + Layout::offset(lane % 16, 2 * warp + lane / 16)};
}

template <int kBlocks, int kTiles>
__device__ __forceinline__ void clear(float (&d)[kBlocks][kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[i][j][e] = 0.0f;
    }
  }
}

// d += A B of one k-step of 16.
template <typename Element, int kBlocks, int kTiles, typename A, typename B>
__device__ __forceinline__ void multiply_step(float (&d)[kBlocks][kTiles][4], const A& a_blocks,
                                              const B& b_blocks, int step) {
  uint32_t a[kBlocks][4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) a_blocks.load(a[i], i, step);
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {
    uint32_t b[4];
    b_blocks.load(b, j, step);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::mma_m16n8k16<Element>(d[i][2 * j], a[i], b[0], b[1]);
      ptx::mma_m16n8k16<Element>(d[i][2 * j + 1], a[i], b[2], b[3]);
    }
  }
}

// The same over kSteps k-steps, each followed by after(step).
template <typename Element, int kSteps, int kBlocks, int kTiles, typename A, typename B, typename F>
__device__ __forceinline__ void multiply(float (&d)[kBlocks][kTiles][4], const A& a_blocks,
                                         const B& b_blocks, F after) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_step<Element>(d, a_blocks, b_blocks, step);
    after(step);
  }
}
template <typename Element, int kSteps, int kBlocks, int kTiles, typename A, typename B>
__device__ __forceinline__ void multiply(float (&d)[kBlocks][kTiles][4], const A& a_blocks,
                                         const B& b_blocks) {
  multiply<Element, kSteps>(d, a_blocks, b_blocks, [](int) {});
}

}  // namespace jax_flash::sm80
