// The last kernel of the backward: dQ from its sum, and dK and dV from their parts, if they have
// any.
//
// The sum lies in chunks of kRows queries by 64 columns, as the warpgroups hold them: for thread t
// and register i of product K^T dS^T, element 512 (i / 4) + 4 t + i % 4 of the chunk is column 16
// (t / 32) + t % 32 / 4 + 8 (i % 4 / 2), query 8 (i / 4) + 2 (t % 4) + i % 2. Chunks of one head
// follow each other by rows, then by columns.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "sm90/bwd_parts.cuh"
#include "tile/copy.cuh"

namespace jax_flash::sm90 {

inline constexpr int kBwdFinishThreads = 128;
inline constexpr int kBwdFinishPitch = 65;  // of a chunk's rows: not a multiple of the banks
template <int kRows>
inline constexpr int kBwdFinishSharedBytes = kRows * kBwdFinishPitch * 4;

// One thread block for each chunk: flat number of (head, chunk of rows) by x from the last to the
// first, y = chunk of columns. The main kernel went through the heads in order, so the L2 still has
// sums of the last ones. Thread blocks from `chunks` on have units of `sums`. kRows: of a chunk.
template <typename Element, int kRows>
__global__ void __launch_bounds__(kBwdFinishThreads)
    mha_bwd_finish_kernel(const __grid_constant__ MhaBwdParams params,
                          const __grid_constant__ BwdKeySums sums, int row_chunks, int chunks) {
  constexpr int kPitch = kBwdFinishPitch;
  extern __shared__ __align__(1024) unsigned char memory[];
  float* const chunk = reinterpret_cast<float*>(memory);
  const int row_chunk = chunks - 1 - static_cast<int>(blockIdx.x);
  const int row_head = row_chunk / row_chunks;
  const int first_row = (row_chunk - row_head * row_chunks) * kRows;
  const int first_column = blockIdx.y * 64;
  const int thread = threadIdx.x;
  if (row_chunk < 0) {
    const int64_t block = (int64_t{blockIdx.x} - chunks) * gridDim.y + blockIdx.y;
#pragma unroll
    for (int i = 0; i < kBwdBlockUnits; ++i) {
      finish_key_unit<Element>(params, sums, kBwdBlockUnits * block + i);
    }
    return;
  }
  const int64_t number = int64_t{row_chunk} * gridDim.y + blockIdx.y;
  // Nobody may have been there to store.
  const bool none = params.first_stores && params.turns[number] == 0;
  const float* const sum = params.dquery_sum + number * (64 * kRows) + 4 * thread;
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    const float4 x = none ? make_float4(0.0f, 0.0f, 0.0f, 0.0f)
                          : *reinterpret_cast<const float4*>(sum + 512 * i);
    const int column = thread / 32 * 16 + thread % 32 / 4;
    float* const row = chunk + (8 * i + thread % 4 * 2) * kPitch + column;
    row[0] = params.factor * x.x;
    row[kPitch] = params.factor * x.y;
    row[8] = params.factor * x.z;
    row[kPitch + 8] = params.factor * x.w;
  }
  __syncthreads();

  const int batch = row_head / params.heads;
  const int head = row_head - batch * params.heads;
  const int column = thread % 8 * 8;
  if (first_column + column >= params.head_dim) return;
  for (int r = thread / 8; r < kRows && first_row + r < params.query_length;
       r += kBwdFinishThreads / 8) {
    const int64_t at =
        ((int64_t{batch} * params.query_length + first_row + r) * params.heads + head) *
            params.head_dim +
        first_column + column;
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = chunk[r * kPitch + column + j];
    if (params.f32_dquery) {
      float4* const target = reinterpret_cast<float4*>(static_cast<float*>(params.dquery) + at);
      target[0] = make_float4(x[0], x[1], x[2], x[3]);
      target[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
      *reinterpret_cast<uint4*>(static_cast<Element16*>(params.dquery) + at) =
          make_uint4(ptx::cvt_rn_x2<Element>(x[0], x[1]), ptx::cvt_rn_x2<Element>(x[2], x[3]),
                     ptx::cvt_rn_x2<Element>(x[4], x[5]), ptx::cvt_rn_x2<Element>(x[6], x[7]));
    }
  }
}

}  // namespace jax_flash::sm90
