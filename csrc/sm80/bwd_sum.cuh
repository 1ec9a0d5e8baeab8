// The order of the sum of the gradients of queries in the workspace: as the matrix instruction
// leaves it, so that a warp adds whole lines.
//
// A head's rows are 16-row blocks of 8-column tiles, 128 floats each; in a tile, lane l and element
// e of the accumulator (tile/fragment.cuh) stand at 4 l + e where one instruction adds four floats,
// at 32 e + l where it adds one.
#pragma once

#include <cstdint>

#include "ptx/reduction.cuh"

namespace jax_flash::sm80 {

template <int kWidthArg>
struct DquerySum {
  static constexpr int kWidth = kWidthArg;

  // Of a tile, from the first float of its head. `row` is a multiple of 16.
  static __device__ __forceinline__ int64_t tile(int row, int column_tile) {
    return int64_t{row} * kWidth + column_tile * 128;
  }

  // Of a lane's element in a tile.
  static __device__ __forceinline__ int place(int lane, int element) {
#if __CUDA_ARCH__ >= 900
    return 4 * lane + element;
#else
    return 32 * element + lane;
#endif
  }

  // Adds one lane's part of a tile at `target`.
  static __device__ __forceinline__ void add(float* target, int lane, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
    ptx::red_add_v4(target + 4 * lane, x[0], x[1], x[2], x[3]);
#else
#pragma unroll
    for (int e = 0; e < 4; ++e) ptx::red_add(target + 32 * e + lane, x[e]);
#endif
  }

  // Columns 8 * chunk.. of a row.
  static __device__ __forceinline__ void load(const float* head, int row, int chunk,
                                              float (&x)[8]) {
    const float* const source = head + tile(row / 16 * 16, chunk);
    const int lane = row % 8 * 4;       // the first of four
    const int half = row % 16 / 8 * 2;  // its first element
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float2 pair = *reinterpret_cast<const float2*>(source + 4 * (lane + t) + half);
      x[2 * t] = pair.x;
      x[2 * t + 1] = pair.y;
    }
#else
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float4 four = *reinterpret_cast<const float4*>(source + 32 * (half + e) + lane);
      x[e] = four.x;
      x[2 + e] = four.y;
      x[4 + e] = four.z;
      x[6 + e] = four.w;
    }
#endif
  }
};

// The same where column tiles are those of f32::Columns: tile 4 * group + q of a row holds its
// columns 32 * group + 4 t + q, and at + 16 those of the second element.
template <int kWidth>
struct DqueryF32Sum : DquerySum<kWidth> {
  static __device__ __forceinline__ void load(const float* head, int row, int chunk,
                                              float (&x)[8]) {
    using Base = DquerySum<kWidth>;
    const int element = row % 16 / 8 * 2 + chunk % 4 / 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int lane = row % 8 * 4 + chunk % 2 * 2 + i / 4;
      x[i] = head[Base::tile(row / 16 * 16, chunk / 4 * 4 + i % 4) + Base::place(lane, element)];
    }
  }
};

}  // namespace jax_flash::sm80
