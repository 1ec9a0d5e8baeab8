// RMSNorm of rows, with the residual added first: one kernel, every array read or written once.
//
// A row is held in registers, in its own type, by the threads of a block, or by a warp where it is
// short. docs/design/rms_norm.md has limits and choices.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "host/device.h"
#include "host/launch.h"
#include "ops/block.cuh"
#include "ops/params.h"
#include "ops/vector.cuh"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"

namespace jax_flash::ops {

// How the columns of a row are dealt to threads: vector v of a thread begins at column
// (v * threads_of_row + thread_of_row) * kVector.
struct RowTeam {
  int vectors;         // of each thread: 2 or 4
  int threads;         // of a row
  int rows_per_block;  // more than one only where a row has one warp

  static constexpr int kRowsOfWarps = 4;

  static constexpr int max_threads(int vectors) { return vectors == 2 ? 256 : 512; }

  // Fewer, each with the gradient of the weight in registers as well.
  static constexpr int max_bwd_threads(int vectors) { return vectors == 2 ? 256 : 384; }

  static RowTeam make(int columns, int vector) {
    const int count = (columns + vector - 1) / vector;
    const int vectors = count <= 2 * max_threads(2) ? 2 : 4;
    const int warps = std::max(1, (count + vectors * kWarp - 1) / (vectors * kWarp));
    return {vectors, warps * kWarp, warps == 1 ? kRowsOfWarps : 1};
  }
};

// The weights of a vector of columns as f32.
template <typename T, typename W>
__device__ __forceinline__ void load_weights(const W* weight, int first, int columns, bool wide,
                                             float (&w)[kVector<T>]) {
  constexpr int kPart = kVector<W>;
#pragma unroll
  for (int i = 0; i < kVector<T> / kPart; ++i) {
    float part[kPart];
    unpack<W>(load_vector(weight, first + i * kPart, columns, wide), part);
#pragma unroll
    for (int e = 0; e < kPart; ++e) w[i * kPart + e] = part[e];
  }
}

// Of a multiprocessor, with 40 registers for each thread or 64, where no more are needed.
template <typename T, typename W, int kVectors, bool kWide>
inline constexpr int kMinBlocks = sizeof(T) < sizeof(W) || !kWide ? 1
                                  : kVectors == 2                 ? 6
                                                                  : 2;

// kWide: all rows are whole vectors of 16 bytes.
template <typename T, typename W, int kVectors, bool kWide>
__global__ void __launch_bounds__(RowTeam::max_threads(kVectors),
                                  (kMinBlocks<T, W, kVectors, kWide>))
    rms_norm_kernel(const __grid_constant__ RmsNormParams params, int threads_of_row) {
  constexpr int kV = kVector<T>;
  // No division is on the way to the loads of the usual case.
  const bool warps_alone = threads_of_row == kWarp;
  const int in_block = warps_alone ? threadIdx.x / kWarp : 0;
  const int thread = threadIdx.x - in_block * threads_of_row;
  const int64_t row = int64_t{blockIdx.x} * (warps_alone ? RowTeam::kRowsOfWarps : 1) + in_block;
  // Only where a row has a warp of its own, which then leaves as a whole.
  if (row >= int64_t{params.groups} * params.rows) return;
  const int group = params.groups == 1 ? 0 : static_cast<int>(row / params.rows);
  const int in_group = static_cast<int>(row - int64_t{group} * params.rows);
  const int columns = params.columns;

  uint4 x[kVectors];
  uint4 residual[kVectors];
  const T* const x_row = row_of<T>(params.x, group, in_group);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v] = load_vector(x_row, (v * threads_of_row + thread) * kV, columns, kWide);
  }
  const bool has_residual = params.residual.data != nullptr;
  if (has_residual) {
    const T* const residual_row = row_of<T>(params.residual, group, in_group);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      residual[v] = load_vector(residual_row, (v * threads_of_row + thread) * kV, columns, kWide);
    }
    T* const sum_row = static_cast<T*>(params.sum) + row * columns;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float a[kV];
      float b[kV];
      unpack<T>(x[v], a);
      unpack<T>(residual[v], b);
#pragma unroll
      for (int e = 0; e < kV; ++e) a[e] += b[e];
      // What is normalised is the rounded sum.
      x[v] = pack<T>(a);
      store_vector(sum_row, (v * threads_of_row + thread) * kV, columns, kWide, x[v]);
    }
  }

  // Ahead of their use, which waits for the sum.
  constexpr int kParts = kV / kVector<W>;
  const W* const weight_row = row_of<W>(params.weight, group, 0);
  uint4 weight[kVectors][kParts];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int first = (v * threads_of_row + thread) * kV + i * kVector<W>;
      weight[v][i] = load_vector(weight_row, first, columns, kWide);
    }
  }

  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float a[kV];
    unpack<T>(x[v], a);
#pragma unroll
    for (int e = 0; e < kV; ++e) squares = fmaf(a[e], a[e], squares);
  }
  squares =
      row_sum(squares, threads_of_row / kWarp, thread / kWarp, reinterpret_cast<float*>(memory));
  const float scale = rsqrtf(squares / static_cast<float>(columns) + params.eps);
  if (thread == 0) params.scale[row] = scale;

  T* const y_row = static_cast<T*>(params.y) + row * columns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * threads_of_row + thread) * kV;
    float a[kV];
    unpack<T>(x[v], a);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float w[kVector<W>];
      unpack<W>(weight[v][i], w);
#pragma unroll
      for (int e = 0; e < kVector<W>; ++e) {
        a[i * kVector<W> + e] = a[i * kVector<W> + e] * scale * w[e];
      }
    }
    store_vector(y_row, first, columns, kWide, pack<T>(a));
  }
}

// Few rows, which leave most of the GPU idle: their time is that of one row. Every load is on its
// way before the first is needed; the weights go to shared memory, since the compiler would move
// their loads into registers down to where those are free. Rows of whole vectors of 16 bytes, one
// for each thread; weights in x's type.
inline constexpr int kFewRowThreads = 512;
inline constexpr int kFewRowsPerSm = 2;

// The sum over all warps of the block for each thread, in a fixed order, by reads of four at a
// time.
__device__ __forceinline__ float sum_of_few_warps(float x, float* partial) {
  constexpr int kMostWarps = kFewRowThreads / kWarp;
  const int thread = threadIdx.x;
  const int warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (thread % kWarp == 0) partial[thread / kWarp] = x;
  if (thread < kMostWarps - warps) partial[warps + thread] = 0.0f;
  // Orders the partial sums before their reads.
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMostWarps / 4; ++i) {
    const float4 four = reinterpret_cast<const float4*>(partial)[i];
    total += (four.x + four.y) + (four.z + four.w);
  }
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kFewRowThreads)
    rms_norm_few_kernel(const __grid_constant__ RmsNormParams params) {
  constexpr int kV = kVector<T>;
  const int group = params.groups == 1 ? 0 : static_cast<int>(blockIdx.x) / params.rows;
  const int in_group = static_cast<int>(blockIdx.x) - group * params.rows;
  const int64_t row = blockIdx.x;
  const int columns = params.columns;
  const int thread = threadIdx.x;
  const int first = thread * kV;
  uint4* const weight = reinterpret_cast<uint4*>(memory + kWarp * sizeof(float)) + thread;
  if (first < columns) {
    ptx::cp_async_16(ptx::shared_address(weight), row_of<T>(params.weight, group, 0) + first, 16);
  }
  ptx::cp_async_commit_group();
  const bool has_residual = params.residual.data != nullptr;
  uint4 x = load_vector(row_of<T>(params.x, group, in_group), first, columns, true);
  const uint4 residual = load_vector(row_of<T>(params.residual, group, in_group), first,
                                     has_residual ? columns : 0, true);
  float a[kV];
  unpack<T>(x, a);
  if (has_residual) {
    float b[kV];
    unpack<T>(residual, b);
#pragma unroll
    for (int e = 0; e < kV; ++e) a[e] += b[e];
    // What is normalised is the rounded sum.
    x = pack<T>(a);
    store_vector(static_cast<T*>(params.sum) + row * columns, first, columns, true, x);
    unpack<T>(x, a);
  }
  float squares = 0.0f;
#pragma unroll
  for (int e = 0; e < kV; ++e) squares = fmaf(a[e], a[e], squares);
  squares = sum_of_few_warps(squares, reinterpret_cast<float*>(memory));
  const float scale = rsqrtf(squares / static_cast<float>(columns) + params.eps);
  if (thread == 0) params.scale[row] = scale;
  ptx::cp_async_wait_group<0>();  // each thread reads its own
  if (first >= columns) return;
  float w[kV];
  unpack<T>(*weight, w);
#pragma unroll
  for (int e = 0; e < kV; ++e) a[e] = a[e] * scale * w[e];
  store_vector(static_cast<T*>(params.y) + row * columns, first, columns, true, pack<T>(a));
}

// Block `blockIdx.x % blocks` of a group takes every `blocks`-th of its rows, and keeps its part of
// the gradient of the weight in registers.
template <typename T, typename W, int kVectors>
__global__ void __launch_bounds__(RowTeam::max_bwd_threads(kVectors))
    rms_norm_bwd_kernel(const __grid_constant__ RmsNormBwdParams params, bool wide) {
  constexpr int kV = kVector<T>;
  const int thread = threadIdx.x;
  const int threads = blockDim.x;
  const int group = blockIdx.x / params.blocks;
  const int block = blockIdx.x - group * params.blocks;
  const int columns = params.columns;
  const W* const weight = row_of<W>(params.weight, group, 0);
  const bool has_sum = params.dsum.data != nullptr;

  float dweight[kVectors][kV] = {};
  int turn = 0;
#pragma unroll 1
  for (int row = block; row < params.rows; row += params.blocks, turn ^= 1) {
    uint4 x[kVectors];
    uint4 dy[kVectors];
    const T* const x_row = row_of<T>(params.x, group, row);
    const T* const dy_row = row_of<T>(params.dy, group, row);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = (v * threads + thread) * kV;
      x[v] = load_vector(x_row, first, columns, wide);
      dy[v] = load_vector(dy_row, first, columns, wide);
    }
    const float scale = *row_of<float>(params.scale, group, row);
    float along = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float a[kV];
      float d[kV];
      float w[kV];
      unpack<T>(x[v], a);
      unpack<T>(dy[v], d);
      load_weights<T, W>(weight, (v * threads + thread) * kV, columns, wide, w);
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        const float unit = a[e] * scale;
        along = fmaf(unit, d[e] * w[e], along);
        dweight[v][e] = fmaf(d[e], unit, dweight[v][e]);
      }
    }
    // Two buffers in turn: the barrier in between says that nobody reads the other any more.
    float* const partial = reinterpret_cast<float*>(memory) + turn * kWarp;
    along = row_sum(along, threads / kWarp, thread / kWarp, partial) / static_cast<float>(columns);

    const int64_t flat = int64_t{group} * params.rows + row;
    T* const dx_row = static_cast<T*>(params.dx) + flat * columns;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = (v * threads + thread) * kV;
      float a[kV];
      float d[kV];
      float w[kV];
      unpack<T>(x[v], a);
      unpack<T>(dy[v], d);
      load_weights<T, W>(weight, first, columns, wide, w);
#pragma unroll
      for (int e = 0; e < kV; ++e) a[e] = scale * (d[e] * w[e] - a[e] * scale * along);
      if (has_sum) {
        unpack<T>(load_vector(row_of<T>(params.dsum, group, row), first, columns, wide), d);
#pragma unroll
        for (int e = 0; e < kV; ++e) a[e] += d[e];
      }
      store_vector(dx_row, first, columns, wide, pack<T>(a));
    }
  }

  float* const parts = params.parts + int64_t{blockIdx.x} * columns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int first = (v * threads + thread) * kV;
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      if (first + e < columns) parts[first + e] = dweight[v][e];
    }
  }
}

// Whether all rows of an operand of `columns` elements of `bytes` bytes begin at multiples of 16.
inline bool rows_aligned(const void* data, int64_t columns, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns * bytes % 16 == 0;
}

template <typename T, typename W>
cudaError_t launch_rms_norm(const RmsNormParams& params, const DeviceInfo& device,
                            cudaStream_t stream) {
  const RowTeam team = RowTeam::make(params.columns, kVector<T>);
  const int64_t rows = int64_t{params.groups} * params.rows;
  const int64_t blocks = (rows + team.rows_per_block - 1) / team.rows_per_block;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  if (team.threads > RowTeam::max_threads(4)) return cudaErrorInvalidConfiguration;
  bool wide = params.columns % kVector<T> == 0;
  for (const void* data :
       {params.x.data, params.residual.data, params.weight.data, static_cast<const void*>(params.y),
        static_cast<const void*>(params.sum)}) {
    wide = wide && rows_aligned(data, params.columns, sizeof(T));
  }
  if constexpr (sizeof(T) == sizeof(W)) {
    // A warp's rows are short enough as they are.
    const int threads = (params.columns / kVector<T> + kWarp - 1) / kWarp * kWarp;
    const bool few = rows <= kFewRowsPerSm * device.multiprocessors;
    if (wide && few && team.rows_per_block == 1 && threads <= kFewRowThreads) {
      return launch_kernel(rms_norm_few_kernel<T>, dim3(static_cast<unsigned>(rows)), threads,
                           kWarp * sizeof(float) + threads * sizeof(uint4), stream, params);
    }
  }
  const auto kernel =
      team.vectors == 2 ? (wide ? rms_norm_kernel<T, W, 2, true> : rms_norm_kernel<T, W, 2, false>)
                        : (wide ? rms_norm_kernel<T, W, 4, true> : rms_norm_kernel<T, W, 4, false>);
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)),
                       team.threads * team.rows_per_block, kWarp * sizeof(float), stream, params,
                       team.threads);
}

template <typename T, typename W>
cudaError_t launch_rms_norm_bwd(const RmsNormBwdParams& params, cudaStream_t stream) {
  const RowTeam team = RowTeam::make(params.columns, kVector<T>);
  const int64_t blocks = int64_t{params.groups} * params.blocks;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  if (team.threads > RowTeam::max_bwd_threads(4)) return cudaErrorInvalidConfiguration;
  bool wide = params.columns % kVector<T> == 0;
  for (const void* data : {params.x.data, params.weight.data, params.dy.data, params.dsum.data,
                           static_cast<const void*>(params.dx)}) {
    wide = wide && rows_aligned(data, params.columns, sizeof(T));
  }
  const auto kernel =
      team.vectors == 2 ? rms_norm_bwd_kernel<T, W, 2> : rms_norm_bwd_kernel<T, W, 4>;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), team.threads,
                       2 * kWarp * sizeof(float), stream, params, wide);
}

}  // namespace jax_flash::ops
