// Matrix products of one warp from tiles in shared memory.
#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/split_parts.cuh"

namespace jax_flash::sm80 {

__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

// 16x16 blocks of a tile that is read along its rows: A in [m][k], B in [n][k]. `address` is that
// of tile/fragment.cuh for the first block and the first k-step. With two parts the tile is that of
// split_tile, and every other chunk has the second ones.
template <typename Layout, int kPartsArg>
struct RowBlocks {
  static constexpr int kParts = kPartsArg;
  uint32_t address;

  __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step, int part) const {
    const uint32_t first = Layout::advance(address, 2 * kParts * step) ^ (part << 4);
    ptx::ldmatrix_x4(r, first + block * 16 * Layout::kPitch);
  }
};

// 16x16 blocks of a tile that is read along its columns: A in [k][m], B in [k][n]. Warps take the
// 16-column blocks in turn, a power of two of them, so that a block's chunks differ from those of
// the first in bits that are zero there: what TileLayout::advance needs.
template <typename Layout, int kWarps, int kPartsArg>
struct ColumnBlocks {
  static_assert((kWarps & (kWarps - 1)) == 0);
  static constexpr int kParts = kPartsArg;
  uint32_t address;

  __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step, int part) const {
    const uint32_t first = Layout::advance(address, 2 * kParts * kWarps * block) ^ (part << 4);
    ptx::ldmatrix_x4_trans(r, first + step * 16 * Layout::kPitch);
  }
};

// The lane addresses of such blocks; matrices come in the order that A or B wants them.
template <typename Layout, int kWarps, int kParts>
__device__ __forceinline__ ColumnBlocks<Layout, kWarps, kParts> a_columns(uint32_t tile, int warp) {
  const int lane = lane_id();
  const int chunk = kParts * (2 * warp + lane / 8 % 2);
  return {tile + Layout::offset(lane % 8 + lane / 16 * 8, chunk)};
}
template <typename Layout, int kWarps, int kParts>
__device__ __forceinline__ ColumnBlocks<Layout, kWarps, kParts> b_columns(uint32_t tile, int warp) {
  const int lane = lane_id();
  return {tile + Layout::offset(lane % 16, kParts * (2 * warp + lane / 16))};
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

// d += A B of one k-step of 16. Of two parts of each, what both low ones give is left out.
template <typename Element, int kBlocks, int kTiles, typename A, typename B>
__device__ __forceinline__ void multiply_step(float (&d)[kBlocks][kTiles][4], const A& a_blocks,
                                              const B& b_blocks, int step) {
  constexpr int kParts = A::kParts;
  uint32_t a[kParts][kBlocks][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) a_blocks.load(a[part][i], i, step, part);
  }
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {
    uint32_t b[kParts][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) b_blocks.load(b[part], j, step, part);
#pragma unroll
    for (int product = 2 * kParts - 2; product >= 0; --product) {
      const auto& left = a[product / 2];
      const auto& right = b[product % 2];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        ptx::mma_m16n8k16<Element>(d[i][2 * j], left[i], right[0], right[1]);
        ptx::mma_m16n8k16<Element>(d[i][2 * j + 1], left[i], right[2], right[3]);
      }
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

// d += A B, added up apart from d: the unit adds with truncation.
template <typename Element, int kSteps, int kBlocks, int kTiles, typename A, typename B>
__device__ __forceinline__ void add_product(float (&d)[kBlocks][kTiles][4], const A& a_blocks,
                                            const B& b_blocks) {
  float sum[kBlocks][kTiles][4];
  clear(sum);
  multiply<Element, kSteps>(sum, a_blocks, b_blocks);
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[i][j][e] += sum[i][j][e];
    }
  }
}

// What this thread has copied of a tile of f32, once its copies are done, becomes pairs of chunks:
// the high parts of eight columns and their low parts. All threads call it.
template <typename Config, int kRows, int kWidth>
__device__ __forceinline__ void split_tile(uint32_t tile) {
  static_assert(ChunkLanes<kWidth, Config::kThreads>::kLanes >= 2 &&
                    kRows % ChunkLanes<kWidth, Config::kThreads>::kRowsPerPass == 0,
                "neighbours share a row, and whole warps have rows");
  const bool odd = lane_id() % 2 != 0;  // the lane has the second half of eight columns
  TileCopy<kRows, kWidth, Config::kThreads, Config::kWide>::transform_chunks(tile, [&](uint4& x) {
    const float first = __uint_as_float(x.x);
    const float second = __uint_as_float(x.y);
    const float third = __uint_as_float(x.z);
    const float fourth = __uint_as_float(x.w);
    const uint32_t high[2] = {ptx::cvt_rn_x2<__nv_bfloat16>(first, second),
                              ptx::cvt_rn_x2<__nv_bfloat16>(third, fourth)};
    const uint32_t low[2] = {low_parts(first, second, high[0]), low_parts(third, fourth, high[1])};
    // The neighbour has the other half and gives the part that this lane keeps.
    uint32_t got[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) got[i] = __shfl_xor_sync(0xffffffffu, odd ? high[i] : low[i], 1);
    x = odd ? make_uint4(got[0], got[1], low[0], low[1])
            : make_uint4(high[0], high[1], got[0], got[1]);
  });
}

}  // namespace jax_flash::sm80
