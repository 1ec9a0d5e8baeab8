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
#include "ptx/prefetch.cuh"

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

// Of dynamic shared memory: two buffers for what the warps of a row tell each other.
inline constexpr int kPartialBytes = 2 * kWarp * sizeof(float);

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

// Of a multiprocessor, with as few registers for each thread, where no more are needed.
template <typename T, typename W, int kVectors, bool kWide>
inline constexpr int kMinBlocks = sizeof(T) < sizeof(W) || !kWide ? 1
                                  : kVectors == 2                 ? 4
                                                                  : 2;

// Whether a thread block takes more than one row: of wide rows two are too much for the registers.
template <int kVectors>
inline constexpr bool kLoadsAhead = kVectors == 2;

// Thread blocks of a multiprocessor that share all rows. Each has its next row in flight while it
// adds up one, 64 KB together where a row of bf16 with a residual has 4096 columns.
inline constexpr int kBlocksPerSm = 4;

// What comes to the L2 cache of what is read next, while little memory is read here: what it takes
// about as long to read as a kernel of few rows takes. A thread block asks for kPrefetchPart.
inline constexpr int64_t kPrefetchBytes = 8 << 20;
inline constexpr int kPrefetchPart = 64 << 10;

// By a thread block beyond those with rows.
__device__ __forceinline__ void prefetch_part(const RmsNormParams& params, int part) {
  constexpr int kBytes = 2048;
  const int64_t at = int64_t{part} * kPrefetchPart + static_cast<int>(threadIdx.x) * kBytes;
  const int64_t end = params.prefetch_bytes;
  if (static_cast<int>(threadIdx.x) * kBytes >= kPrefetchPart || at >= end) return;
  const int64_t bytes = end - at < kBytes ? end - at : kBytes;
  ptx::bulk_prefetch_l2(static_cast<const char*>(params.prefetch) + at,
                        static_cast<uint32_t>(bytes));
}

// Block `blockIdx.x % blocks` of a group takes every `blocks`-th of its rows, or of fours of rows
// where each has a warp of its own. kWide: all rows are whole vectors of 16 bytes. `share`: that of
// one column.
template <typename T, typename W, int kVectors, bool kWide>
__global__ void __launch_bounds__(RowTeam::max_threads(kVectors),
                                  (kMinBlocks<T, W, kVectors, kWide>))
    rms_norm_kernel(const __grid_constant__ RmsNormParams params, int threads_of_row, int blocks,
                    float share) {
  constexpr int kV = kVector<T>;
  // Copied ahead of their use, so that no register waits for them; else loaded for each row.
  constexpr bool kSharedWeights = kWide && sizeof(T) == sizeof(W);
  constexpr bool kAhead = kLoadsAhead<kVectors>;
  if (params.prefetch_bytes > 0) {
    const int part = static_cast<int>(blockIdx.x) - params.groups * blocks;
    if (part >= 0) return prefetch_part(params, part);
  }
  const bool warps_alone = threads_of_row == kWarp;
  const int in_block = warps_alone ? threadIdx.x / kWarp : 0;
  const int thread = threadIdx.x - in_block * threads_of_row;
  const int columns = params.columns;
  // No division and no product of 64 bits is on the way to the loads of the usual case.
  const int group = params.groups == 1 ? 0 : static_cast<int>(blockIdx.x) / blocks;
  const uint32_t block = blockIdx.x - group * blocks;
  const T* x_rows = static_cast<const T*>(params.x.data);
  const T* residual_rows = static_cast<const T*>(params.residual.data);
  if (group > 0) {
    x_rows += group * params.x.group_stride;
    residual_rows += group * params.residual.group_stride;
  }
  // Unsigned: the one behind the last may not fit an int.
  const uint32_t rows = params.rows;
  uint32_t row = block * (warps_alone ? RowTeam::kRowsOfWarps : 1) + in_block;
  // Only where a row has a warp of its own, which then leaves as a whole.
  if (row >= rows) return;

  const int begin = thread * kV;
  const int step = threads_of_row * kV;
  const bool has_residual = params.residual.data != nullptr;
  uint4 x[kVectors];
  uint4 residual[kVectors];
  const auto load_row = [&] {
    const T* const x_row = x_rows + uint64_t{row} * static_cast<uint32_t>(params.x.row_stride);
    const T* const residual_row =
        residual_rows + uint64_t{row} * static_cast<uint32_t>(params.residual.row_stride);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load_vector(x_row, begin + v * step, columns, kWide);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      residual[v] = load_vector(residual_row, begin + v * step, has_residual ? columns : 0, kWide);
    }
  };
  load_row();

  const W* const weight_row = row_of<W>(params.weight, group, 0);
  uint4* const weights = reinterpret_cast<uint4*>(memory + kPartialBytes) + threadIdx.x;
  if constexpr (kSharedWeights) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = begin + v * step;
      if (first >= columns) continue;
      ptx::cp_async_16(ptx::shared_address(weights + v * blockDim.x), weight_row + first, 16);
    }
    ptx::cp_async_commit_group();
  }
  int turn = 0;
#pragma unroll 1
  do {
    uint4 sum[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float a[kV];
      float b[kV];
      unpack<T>(x[v], a);
      unpack<T>(residual[v], b);
#pragma unroll
      for (int e = 0; e < kV; ++e) a[e] += b[e];
      // What is normalised is the rounded sum.
      sum[v] = pack<T>(a);
    }
    const uint32_t now = row;
    const auto flat = [&] { return int64_t{group} * params.rows + now; };
    row += blocks * (warps_alone ? RowTeam::kRowsOfWarps : 1);
    if (kAhead && row < rows) load_row();

    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (has_residual) {
        store_vector(static_cast<T*>(params.sum) + flat() * columns, begin + v * step, columns,
                     kWide, sum[v]);
      }
      float a[kV];
      unpack<T>(sum[v], a);
#pragma unroll
      for (int e = 0; e < kV; ++e) squares = fmaf(a[e], a[e], squares);
    }
    // Two buffers in turn: the barrier in between says that nobody reads the other any more.
    squares = row_sum(squares, threads_of_row / kWarp, thread / kWarp,
                      reinterpret_cast<float*>(memory) + turn * kWarp);
    turn ^= 1;
    const float scale = rsqrtf(fmaf(squares, share, params.eps));
    if (begin == 0) params.scale[flat()] = scale;
    if constexpr (kSharedWeights) ptx::cp_async_wait_group<0>();  // each thread reads its own
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = begin + v * step;
      float a[kV];
      float w[kV];
      unpack<T>(sum[v], a);
      if constexpr (kSharedWeights) {
        unpack<W>(weights[v * blockDim.x], w);
      } else {
        load_weights<T, W>(weight_row, first, columns, kWide, w);
      }
#pragma unroll
      for (int e = 0; e < kV; ++e) a[e] = a[e] * scale * w[e];
      store_vector(static_cast<T*>(params.y) + flat() * columns, first, columns, kWide, pack<T>(a));
    }
  } while (kAhead && row < rows);
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
  if (team.threads > RowTeam::max_threads(4)) return cudaErrorInvalidConfiguration;
  const int64_t rows_of_call = int64_t{params.groups} * params.rows;
  const int needed = (params.rows - 1) / team.rows_per_block + 1;
  const int most = kBlocksPerSm * device.multiprocessors / params.groups;
  const bool ahead = team.vectors == 2 ? kLoadsAhead<2> : kLoadsAhead<4>;
  const int blocks = ahead ? std::clamp(most, 1, needed) : needed;
  // Where rows keep the memory busy, nothing is idle.
  const bool few = rows_of_call * params.columns * sizeof(T) <= kPrefetchBytes;
  RmsNormParams given = params;
  if (!few || !rows_aligned(params.prefetch, 16, 1)) given.prefetch_bytes = 0;
  given.prefetch_bytes = std::min(given.prefetch_bytes, kPrefetchBytes) / 16 * 16;
  const int64_t parts = (given.prefetch_bytes + kPrefetchPart - 1) / kPrefetchPart;
  const int64_t grid = int64_t{params.groups} * blocks + parts;
  if (grid > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  bool wide = params.columns % kVector<T> == 0;
  for (const void* data :
       {params.x.data, params.residual.data, params.weight.data, static_cast<const void*>(params.y),
        static_cast<const void*>(params.sum)}) {
    wide = wide && rows_aligned(data, params.columns, sizeof(T));
  }
  const auto kernel =
      team.vectors == 2 ? (wide ? rms_norm_kernel<T, W, 2, true> : rms_norm_kernel<T, W, 2, false>)
                        : (wide ? rms_norm_kernel<T, W, 4, true> : rms_norm_kernel<T, W, 4, false>);
  const int threads = team.threads * team.rows_per_block;
  const int weight_bytes = wide && sizeof(T) == sizeof(W) ? 16 * team.vectors * threads : 0;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(grid)), threads,
                       kPartialBytes + weight_bytes, stream, given, team.threads, blocks,
                       1.0f / static_cast<float>(params.columns));
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
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), team.threads, kPartialBytes,
                       stream, params, wide);
}

}  // namespace jax_flash::ops
