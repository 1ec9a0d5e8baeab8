// Products of f32 matrices by tile/tf32.cuh, for one warp.
//
// With kProducts = 1 factors in shared memory are rounded there, once for all warps. The unit adds
// with truncation, so what is nearly as large as the result is added up in few steps: low products
// apart from the high ones, and a tile's share of the outputs apart from the outputs.
#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/tf32.cuh"

namespace jax_flash::sm80::f32 {

using tf32::add_product;
using tf32::Fragment;

// d = A B^T over kSteps steps of 8. A is read along its rows at `a_address`, B at `b_address`:
// those of tile/fragment.cuh for their first step.
template <int kProducts, typename ALayout, typename BLayout, int kSteps, int kBlocks, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&d)[kBlocks][kTiles][4], uint32_t a_address,
                                              uint32_t b_address) {
  static_assert(kSteps % 4 == 0 && ALayout::kBits == 3 && BLayout::kBits == 3);
  constexpr int kUnrolled = kProducts == 1 ? kSteps / 4 : 1;  // registers are full otherwise
  float low[kBlocks][kTiles][4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[i][j][e] = low[i][j][e] = 0.0f;
    }
  }
#pragma unroll kUnrolled
  for (int outer = 0; outer < kSteps; outer += 4, a_address += 128, b_address += 128) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      Fragment<kProducts, 4> a[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        uint32_t words[4];
        ptx::ldmatrix_x4(words, ALayout::advance(a_address, 2 * step) + i * 16 * ALayout::kPitch);
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i].set_word(r, words[r]);
      }
#pragma unroll
      for (int j = 0; j < kTiles / 2; ++j) {
        uint32_t words[4];
        ptx::ldmatrix_x4(words, BLayout::advance(b_address, 2 * step) + j * 16 * BLayout::kPitch);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Fragment<kProducts, 2> b;
          b.set_word(0, words[2 * half]);
          b.set_word(1, words[2 * half + 1]);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            add_product<kProducts>(d[i][2 * j + half], low[i][2 * j + half], a[i], b);
          }
        }
      }
    }
  }
  if constexpr (kProducts == 3) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) d[i][j][e] += low[i][j][e];
      }
    }
  }
}

// out += P V, P being accumulators [row][key] and V the tile [key][column].
//
// Both orders are free, k of a step and columns of a group of 32, and chosen so that nothing moves
// between lanes and a lane reads 16 bytes at a time without bank conflicts: k t is key 2t, k t + 4
// is key 2t + 1, and column g of the group's tile q is column 4g + q. So a lane's accumulators of
// a group are 8 neighbouring columns, from 8t on: see store_row.
template <int kProducts, typename Layout, int kBlocks, int kKeyTiles, int kOutTiles>
__device__ __forceinline__ void add_weighted(float (&out)[kBlocks][kOutTiles][4],
                                             const float (&p)[kBlocks][kKeyTiles][4],
                                             uint32_t value_tile) {
  constexpr int kSteps = kKeyTiles < 2 ? kKeyTiles : 2;  // whose sum is formed apart
  static_assert(kKeyTiles % kSteps == 0 && kOutTiles % 4 == 0);
  const int g = lane_id() / 4;
  const int t = lane_id() % 4;
  const uint32_t even_key = value_tile + Layout::offset(2 * t, g);
  const uint32_t odd_key = value_tile + Layout::offset(2 * t + 1, g);
#pragma unroll
  for (int first = 0; first < kKeyTiles; first += kSteps) {
    Fragment<kProducts, 4> a[kBlocks][kSteps];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float (&x)[4] = p[i][first + step];
        a[i][step].set(0, x[0]);
        a[i][step].set(1, x[2]);
        a[i][step].set(2, x[1]);
        a[i][step].set(3, x[3]);
      }
    }
#pragma unroll
    for (int group = 0; group < kOutTiles / 4; ++group) {
      float sum[kBlocks][4][4];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[i][q][e] = kProducts == 1 ? out[i][4 * group + q][e] : 0.0f;
          }
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int offset = 8 * (first + step) * Layout::kPitch + 128 * group;
        const uint4 even = ptx::ld_shared_v4(even_key + offset);
        const uint4 odd = ptx::ld_shared_v4(odd_key + offset);
        const uint32_t words[4][2] = {
            {even.x, odd.x}, {even.y, odd.y}, {even.z, odd.z}, {even.w, odd.w}};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          Fragment<kProducts, 2> b;
          b.set_word(0, words[q][0]);
          b.set_word(1, words[q][1]);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            add_product<kProducts>(sum[i][q], sum[i][q], a[i][step], b);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if constexpr (kProducts == 1) {
              out[i][4 * group + q][e] = sum[i][q][e];
            } else {
              out[i][4 * group + q][e] += sum[i][q][e];
            }
          }
        }
      }
    }
  }
}

// Rows `half` of a block of outputs, times `factor`, to row `row` of a tile in shared memory.
template <typename Layout, int kOutTiles>
__device__ __forceinline__ void store_row(uint32_t tile, int row, const float (&out)[kOutTiles][4],
                                          int half, float factor) {
  const int t = lane_id() % 4;
#pragma unroll
  for (int group = 0; group < kOutTiles / 4; ++group) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t words[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        words[q] = __float_as_uint(out[4 * group + q][2 * half + e] * factor);
      }
      ptx::st_shared_v4(tile + Layout::offset(row, 8 * group + 2 * t + e), words);
    }
  }
}

// A tile that is read along its columns, as A in [k][m] or B in [k][n], in groups of 32 columns.
//
// k t of a step is row t and k t + 4 is row t + 4, as ldmatrix has it. Column g of the group's
// tile q (rows g and g + 8 of its A blocks are tiles) is column 4 * chunk(g) + q, so that a lane
// reads 16 bytes at a time and eight lanes read from different banks.
template <typename Layout>
struct Columns {
  uint32_t first;  // rows t of the first group
  uint32_t second;

  static __device__ __forceinline__ int chunk(int g) { return g % 2 * 4 + g / 2; }

  static __device__ __forceinline__ Columns at(uint32_t tile) {
    const int g = lane_id() / 4;
    const int t = lane_id() % 4;
    return {tile + Layout::offset(t, chunk(g)), tile + Layout::offset(t + 4, chunk(g))};
  }

  // For each tile of a group the elements at k t and k t + 4.
  __device__ __forceinline__ void load(uint32_t (&words)[4][2], int group, int step) const {
    const int offset = 8 * step * Layout::kPitch + 128 * group;
    const uint4 x = ptx::ld_shared_v4(first + offset);
    const uint4 y = ptx::ld_shared_v4(second + offset);
    words[0][0] = x.x, words[1][0] = x.y, words[2][0] = x.z, words[3][0] = x.w;
    words[0][1] = y.x, words[1][1] = y.y, words[2][1] = y.z, words[3][1] = y.w;
  }
};

// A read along its columns; groups from `group` on, kStride apart, are two blocks of 16 each.
template <typename Layout, int kStride>
struct ColumnBlocks {
  Columns<Layout> columns;
  int group;

  template <int kProducts, int kBlocks>
  __device__ __forceinline__ void load(Fragment<kProducts, 4> (&a)[kBlocks], int step) const {
#pragma unroll
    for (int i = 0; i < kBlocks / 2; ++i) {
      uint32_t words[4][2];
      columns.load(words, group + i * kStride, step);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        a[2 * i + q / 2].set_word(q % 2, words[q][0]);
        a[2 * i + q / 2].set_word(q % 2 + 2, words[q][1]);
      }
    }
  }
};

// A read along its rows; `address` as for multiply_rows.
template <typename Layout>
struct RowBlocks {
  uint32_t address;

  template <int kProducts, int kBlocks>
  __device__ __forceinline__ void load(Fragment<kProducts, 4> (&a)[kBlocks], int step) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      uint32_t words[4];
      ptx::ldmatrix_x4(words, Layout::advance(address, 2 * step) + i * 16 * Layout::kPitch);
#pragma unroll
      for (int r = 0; r < 4; ++r) a[i].set_word(r, words[r]);
    }
  }
};

// d += A B over kSteps steps of 8, B read along its columns: groups from `group` on, kStride apart.
template <int kProducts, int kSteps, int kStride, typename Layout, typename A, int kBlocks,
          int kTiles>
__device__ __forceinline__ void add_columns(float (&d)[kBlocks][kTiles][4], const A& a_blocks,
                                            const Columns<Layout>& b_columns, int group) {
  static_assert(kTiles % 4 == 0);
  float sum[kBlocks][kTiles][4];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][j][e] = kProducts == 1 ? d[i][j][e] : 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Fragment<kProducts, 4> a[kBlocks];
    a_blocks.load(a, step);
#pragma unroll
    for (int j = 0; j < kTiles / 4; ++j) {
      uint32_t words[4][2];
      b_columns.load(words, group + j * kStride, step);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        Fragment<kProducts, 2> b;
        b.set_word(0, words[q][0]);
        b.set_word(1, words[q][1]);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          add_product<kProducts>(sum[i][4 * j + q], sum[i][4 * j + q], a[i], b);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        d[i][j][e] = kProducts == 1 ? sum[i][j][e] : d[i][j][e] + sum[i][j][e];
      }
    }
  }
}

// Rounds what this thread has copied to a tile, if products take it rounded: the same chunks in
// whichever way a tile was copied.
template <typename Config, int kRows, int kWidth>
__device__ __forceinline__ void round_tile(uint32_t tile) {
  if constexpr (Config::kProducts == 1) {
    TileCopy<kRows, kWidth, Config::kThreads, Config::kWide>::transform(tile, [](uint32_t word) {
      return __float_as_uint(ptx::round_tf32(__uint_as_float(word)));
    });
  }
}

// What a product takes from shared memory, of a number that is computed: see Fragment::set_word.
template <int kProducts>
__device__ __forceinline__ float stored(float x) {
  return kProducts == 1 ? ptx::round_tf32(x) : x;
}

}  // namespace jax_flash::sm80::f32
