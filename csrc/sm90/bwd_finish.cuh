// The last kernel of the backward: dQ from its sum, and dK and dV from the sums of their parts, if
// they have any.
//
// The sum lies in chunks of kRows queries by 64 columns, as the warpgroups hold them: for thread t
// and register i of product K^T dS^T, element 512 (i / 4) + 4 t + i % 4 of the chunk is column 16
// (t / 32) + t % 32 / 4 + 8 (i % 4 / 2), query 8 (i / 4) + 2 (t % 4) + i % 2. Chunks of one head
// follow each other by rows, then by columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "sm90/bwd_parts.cuh"
#include "tile/copy.cuh"

namespace jax_flash::sm90 {

inline constexpr int kBwdFinishThreads = 128;  // ten of these on a multiprocessor
inline constexpr int kBwdFinishPitch = 65;     // of a chunk's rows: not a multiple of the banks
template <int kRows>
inline constexpr int kBwdFinishSharedBytes = std::max(kRows, kBwdKeyChunk) * kBwdFinishPitch * 4;

// Rows of a result that a thread block has in shared memory, 64 columns of them.
struct BwdFinishRows {
  void* out;  // [batch, length, heads, width]
  bool f32;
  int heads;
  int width;
  int64_t first;  // row of all
  int count;
  int first_column;
};

// A thread's part of the sum of `copies` pieces, `stride` floats apart, to rows in shared memory.
// kLoads: of 8 columns each, at a time. count: how many there are, 4 or 8.
template <int kLoads>
__device__ __forceinline__ void add_key_copies(const float* source, int64_t stride, int copies,
                                               int count, float* row) {
  static_assert(kBwdKeyChunk == 64);
#pragma unroll
  for (int first = 0; first < 8; first += kLoads) {
    if (first >= count) break;
    float4 x[kLoads] = {};
#pragma unroll 1
    for (int copy = 0; copy < copies; ++copy) {
      float4 y[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const float* const from = source + copy * stride + 512 * (first + i);
        y[i] = first + i < count ? *reinterpret_cast<const float4*>(from)
                                 : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        x[i] = make_float4(x[i].x + y[i].x, x[i].y + y[i].y, x[i].z + y[i].z, x[i].w + y[i].w);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int column = 8 * (first + i);
      row[column] = x[i].x;
      row[column + 1] = x[i].y;
      row[8 * kBwdFinishPitch + column] = x[i].z;
      row[8 * kBwdFinishPitch + column + 1] = x[i].w;
    }
  }
}

// A piece of the sums of dK and dV, to shared memory. piece: of a chunk.
__device__ __forceinline__ BwdFinishRows load_key_piece(const MhaBwdParams& params,
                                                        const BwdKeySums& sums, int chunk,
                                                        int piece, float* rows) {
  const int thread = threadIdx.x;
  const bool is_key = piece < sums.key_pieces();
  const int first_column = 64 * (is_key ? piece : piece - sums.key_pieces());
  const int width = is_key ? params.head_dim : params.head_dim_v;
  const int kernel_width = is_key ? sums.key_width : sums.value_width;
  const float* const source =
      params.parts + int64_t{chunk} * kBwdKeyChunk * (sums.key_width + sums.value_width) +
      kBwdKeyChunk * (first_column + (is_key ? 0 : sums.key_width)) + 4 * thread;
  // Kernels' widths are multiples of 32: of a piece there is one half or both.
  const bool both = first_column + 32 < kernel_width;
  float* const row = rows + (thread / 32 * 16 + thread % 32 / 4) * kBwdFinishPitch + thread % 4 * 2;
  if (sums.copies == 1) {
    add_key_copies<8>(source, 0, 1, both ? 8 : 4, row);
  } else {
    add_key_copies<4>(source, sums.floats(), sums.copies, both ? 8 : 4, row);
  }
  const int head_chunks = bwd_key_chunks(params);
  const int flat_head = chunk / head_chunks;
  const int batch = flat_head / params.kv_heads;
  const int first_key = (chunk - flat_head * head_chunks) * kBwdKeyChunk;
  return {is_key ? params.dkey : params.dvalue,
          is_key ? params.f32_dkey : params.f32_dvalue,
          params.kv_heads,
          width,
          (int64_t{batch} * params.key_length + first_key) * params.kv_heads + flat_head -
              batch * params.kv_heads,
          min(kBwdKeyChunk, params.key_length - first_key),
          first_column};
}

// A chunk of the sum of dQ, to shared memory. chunk: number of (head, chunk of rows); column_chunk:
// which of its 64 columns.
template <int kRows>
__device__ __forceinline__ BwdFinishRows load_query_chunk(const MhaBwdParams& params,
                                                          int row_chunks, int chunk,
                                                          int column_chunk, int column_chunks,
                                                          float* rows) {
  const int thread = threadIdx.x;
  const int64_t number = int64_t{chunk} * column_chunks + column_chunk;
  // Nobody may have been there to store.
  const bool none = params.first_stores && params.turns[number] == 0;
  const float* const sum = params.dquery_sum + number * (64 * kRows) + 4 * thread;
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    const float4 x = none ? make_float4(0.0f, 0.0f, 0.0f, 0.0f)
                          : *reinterpret_cast<const float4*>(sum + 512 * i);
    const int column = thread / 32 * 16 + thread % 32 / 4;
    float* const row = rows + (8 * i + thread % 4 * 2) * kBwdFinishPitch + column;
    row[0] = params.factor * x.x;
    row[kBwdFinishPitch] = params.factor * x.y;
    row[8] = params.factor * x.z;
    row[kBwdFinishPitch + 8] = params.factor * x.w;
  }
  const int row_head = chunk / row_chunks;
  const int first_row = (chunk - row_head * row_chunks) * kRows;
  const int batch = row_head / params.heads;
  return {params.dquery,
          params.f32_dquery,
          params.heads,
          params.head_dim,
          (int64_t{batch} * params.query_length + first_row) * params.heads + row_head -
              batch * params.heads,
          min(kRows, params.query_length - first_row),
          64 * column_chunk};
}

// First the thread blocks of pieces of `sums`, if there are any: each reads several copies. Then
// one thread block for each of the `chunks`: flat number of (head, chunk of rows) by x from the
// last to the first, y = chunk of columns. The main kernel went through the heads in order, so the
// L2 still has sums of the last ones. kRows: of a chunk.
template <typename Element, int kRows>
__global__ void __launch_bounds__(kBwdFinishThreads, 10)
    mha_bwd_finish_kernel(const __grid_constant__ MhaBwdParams params,
                          const __grid_constant__ BwdKeySums sums, int row_chunks, int chunks) {
  extern __shared__ __align__(1024) unsigned char memory[];
  float* const chunk = reinterpret_cast<float*>(memory);
  const int query_chunk = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  BwdFinishRows rows;
  if (query_chunk < chunks) {
    rows = load_query_chunk<kRows>(params, row_chunks, query_chunk, blockIdx.y, gridDim.y, chunk);
  } else {
    const int number = static_cast<int>(blockIdx.x * gridDim.y + blockIdx.y);
    const int key_chunk = number / sums.pieces();
    if (key_chunk >= sums.chunks) return;
    rows = load_key_piece(params, sums, key_chunk, number - key_chunk * sums.pieces(), chunk);
  }
  __syncthreads();

  const int column = threadIdx.x % 8 * 8;
  if (rows.first_column + column >= rows.width) return;
  for (int r = threadIdx.x / 8; r < rows.count; r += kBwdFinishThreads / 8) {
    const int64_t at =
        (rows.first + int64_t{r} * rows.heads) * rows.width + rows.first_column + column;
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = chunk[r * kBwdFinishPitch + column + j];
    if (rows.f32) {
      float4* const target = reinterpret_cast<float4*>(static_cast<float*>(rows.out) + at);
      target[0] = make_float4(x[0], x[1], x[2], x[3]);
      target[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
      *reinterpret_cast<uint4*>(static_cast<Element16*>(rows.out) + at) =
          make_uint4(ptx::cvt_rn_x2<Element>(x[0], x[1]), ptx::cvt_rn_x2<Element>(x[2], x[3]),
                     ptx::cvt_rn_x2<Element>(x[4], x[5]), ptx::cvt_rn_x2<Element>(x[6], x[7]));
    }
  }
}

}  // namespace jax_flash::sm90
