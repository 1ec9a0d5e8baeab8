// The kernels that run before and after the main kernel of the backward, over rows of queries.
//
// bwd_prepare: what the main kernel needs of every row (lse in base 2, delta), and zeros where it
// adds up. bwd_finish: the gradient of the queries from its sum.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "host/launch.h"
#include "host/params.h"
#include "ptx/griddepcontrol.cuh"
#include "ptx/math.cuh"
#include "tile/copy.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/sequence.cuh"

namespace jax_flash {

inline constexpr int kBwdRowThreads = 256;

// Which rows of which head a thread block works on: heads first, as they lie in memory.
struct BwdRowGroup {
  int batch;
  int head;
  int64_t flat_head;  // batch * heads + head
  int row;            // the first
  int padded_rows;    // of a head
};

__device__ __forceinline__ BwdRowGroup bwd_row_group(const MhaBwdParams& params) {
  const int padded_rows = bwd_padded_rows(params.query_length);
  const int groups = padded_rows / kBwdRowGroup;
  const int upper = blockIdx.x / params.heads;
  const int head = blockIdx.x - upper * params.heads;
  const int batch = upper / groups;
  return {batch, head, int64_t{batch} * params.heads + head,
          (upper - batch * groups) * kBwdRowGroup, padded_rows};
}

// Thread blocks of one launch, or a number that no launch takes.
inline int64_t bwd_row_blocks(const MhaBwdParams& params) {
  const int64_t groups = bwd_padded_rows(params.query_length) / kBwdRowGroup;
  return groups * params.batch * params.heads;
}

__device__ __forceinline__ bool aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// This lane's part of sum(out * dout) over a row that eight lanes share.
template <typename Element>
__device__ __forceinline__ float partial_delta(const Element16* out, const Element16* dout,
                                               int width, bool wide, int lane) {
  float sum = 0.0f;
  if (wide) {
#pragma unroll 2
    for (int column = 8 * lane; column < width; column += 64) {
      const uint4 x = *reinterpret_cast<const uint4*>(out + column);
      const uint4 y = *reinterpret_cast<const uint4*>(dout + column);
      const uint32_t out_words[4] = {x.x, x.y, x.z, x.w};
      const uint32_t dout_words[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = ptx::unpack_x2<Element>(out_words[i]);
        const float2 b = ptx::unpack_x2<Element>(dout_words[i]);
        sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
      }
    }
  } else {
#pragma unroll 1
    for (int column = lane; column < width; column += 8) {
      sum = fmaf(ptx::unpack_x2<Element>(out[column]).x, ptx::unpack_x2<Element>(dout[column]).x,
                 sum);
    }
  }
  return sum;
}

// The same of f32.
__device__ __forceinline__ float partial_delta(const float* out, const float* dout, int width,
                                               bool wide, int lane) {
  float sum = 0.0f;
  if (wide) {
#pragma unroll 2
    for (int column = 4 * lane; column < width; column += 32) {
      const float4 x = *reinterpret_cast<const float4*>(out + column);
      const float4 y = *reinterpret_cast<const float4*>(dout + column);
      sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
    }
  } else {
#pragma unroll 1
    for (int column = lane; column < width; column += 8) {
      sum = fmaf(out[column], dout[column], sum);
    }
  }
  return sum;
}

// Zeros in rows of dquery_sum.
__device__ __forceinline__ void clear_sum(const MhaBwdParams& params, int64_t first_row, int width,
                                          int rows = kBwdRowGroup) {
  float4* const sum = reinterpret_cast<float4*>(params.dquery_sum + first_row * width);
  for (int i = threadIdx.x; i < rows * width / 4; i += kBwdRowThreads) {
    sum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

// Whether the first to add to the sum of a tile of rows stores instead, where nothing else says so:
// it pays where few add, as sm90/bwd_launch.cuh says, and those who add to many tiles at a time do
// not know who else does.
__device__ __forceinline__ bool first_stores(const RowTile& tile) {
  constexpr int kMaxKeys = 2048;
  return tile.end - tile.first <= kMaxKeys;
}

// The sum of a tile of rows that is in whole tiles, of `parts` parts, and their turns.
__device__ __forceinline__ void prepare_tile(const MhaBwdParams& params, const BwdRowGroup& group,
                                             const IntervalMask& mask, int width, int parts) {
  static_assert(kBwdRowGroup == kIntervalRows);
  const int tiles = interval_tiles(params.query_length);
  const int tile = group.row / kIntervalRows;
  if (tile >= tiles) return;
  const int64_t number = group.flat_head * tiles + tile;
  const bool stores = params.deterministic || first_stores(mask.row_tiles[tile]);
  if (!stores) clear_sum(params, number * kIntervalRows, width);
  if (static_cast<int>(threadIdx.x) < parts) {
    params.turns[number * parts + threadIdx.x] = stores ? 0 : kBwdStored;
  }
}

// Where the main kernel makes dquery of its sum: the sums of tiles that begin among these rows and
// to which one block of keys adds, which then finds zeros there. The sum is in whole tiles.
__device__ __forceinline__ void clear_single_tiles(const MhaBwdParams& params,
                                                   const BwdRowGroup& group, const RowMask& mask,
                                                   int width) {
  constexpr int kKeys = 128;  // of a block
  const int rows = params.finished_rows;
  const int tiles = (params.query_length + rows - 1) / rows;
#pragma unroll 1
  for (int tile = (group.row + rows - 1) / rows; tile * rows < group.row + kBwdRowGroup; ++tile) {
    const KeyInterval keys = mask.hull(tile * rows, (tile + 1) * rows);
    if (tile >= tiles || keys.first >= keys.end) continue;
    if (keys.first / kKeys != (keys.end - 1) / kKeys) continue;
    clear_sum(params, (group.flat_head * tiles + tile) * rows, width, rows);
  }
}

// A lane's part of zeros in a row of dquery, of 16 bits and whole 16 bytes, that eight lanes share.
__device__ __forceinline__ void clear_dquery(const MhaBwdParams& params, const BwdRowGroup& group,
                                             int row, int lane) {
  const int64_t first =
      (int64_t{group.batch} * params.query_length + row) * params.heads + group.head;
  Element16* const out = static_cast<Element16*>(params.dquery) + first * params.head_dim;
  for (int column = 8 * lane; column < params.head_dim; column += 64) {
    *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
  }
}

// `width`: floats of a row of dquery_sum. Mask: of the main kernel. parts: of a tile of 64 rows,
// where the main kernel has such and asks `turns` of each tile; or 0.
template <typename Element, typename Mask>
__global__ void __launch_bounds__(kBwdRowThreads)
    bwd_prepare_kernel(const __grid_constant__ MhaBwdParams params, int width, int parts) {
  const BwdRowGroup group = bwd_row_group(params);
  const int64_t padded_row = group.flat_head * group.padded_rows + group.row;
  const Mask mask = mask_of<Mask>(params, group.batch);

  bool prepared = false;
  if constexpr (std::is_same_v<Mask, IntervalMask>) {
    ptx::griddepcontrol_launch_dependents();  // the order of work needs nothing of this
    prepared = parts > 0;
    if (prepared) prepare_tile(params, group, mask, width, parts);
  }
  if (!prepared) {
    if (!params.first_stores) clear_sum(params, padded_row, width);
    if (threadIdx.x < kBwdRowGroup / kBwdTurnRows) {
      params.turns[padded_row / kBwdTurnRows + threadIdx.x] = 0;
    }
  }

  if constexpr (std::is_same_v<Mask, RowMask>) {
    if (params.finished_rows != 0) clear_single_tiles(params, group, mask, width);
  }

  if (blockIdx.x == 0 && threadIdx.x == 0) *params.queue = 0;
  const int64_t stride = int64_t{gridDim.x} * kBwdRowThreads;
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * kBwdRowThreads + threadIdx.x; i < params.zeroed_floats / 4;
       i += stride) {
    reinterpret_cast<float4*>(params.parts)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  constexpr int kChunk = 16 / sizeof(Element);
  const bool wide =
      params.head_dim_v % kChunk == 0 && aligned_16(params.out) && aligned_16(params.dout);
  const int lane = threadIdx.x % 8;
#pragma unroll 1
  for (int i = threadIdx.x / 8; i < kBwdRowGroup; i += kBwdRowThreads / 8) {
    const int row = group.row + i;
    const int64_t statistic = group.flat_head * params.query_length + row;
    const KeyInterval keys = mask.interval(row);
    float lse = -__builtin_huge_valf();
    float delta = 0.0f;
    if (row < params.query_length) {
      lse = params.lse[statistic];
      const int64_t offset =
          ((int64_t{group.batch} * params.query_length + row) * params.heads + group.head) *
          params.head_dim_v;
      if (params.finished_rows != 0 && keys.first >= keys.end) {
        clear_dquery(params, group, row, lane);
      }
      if constexpr (sizeof(Element) == 4) {
        delta = partial_delta(static_cast<const float*>(params.out) + offset,
                              static_cast<const float*>(params.dout) + offset, params.head_dim_v,
                              wide, lane);
      } else {
        delta = partial_delta<Element>(static_cast<const Element16*>(params.out) + offset,
                                       static_cast<const Element16*>(params.dout) + offset,
                                       params.head_dim_v, wide, lane);
      }
    }
    // Rows without keys may hold anything: read before that is known, but not used.
    const bool empty = keys.first >= keys.end || lse == -__builtin_huge_valf();
#pragma unroll
    for (int step = 4; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
    if (lane == 0) {
      if (!empty && params.dlse != nullptr) delta -= params.dlse[statistic];
      params.row_lse[padded_row + i] = empty ? __builtin_huge_valf() : SoftmaxScale::kLog2e * lse;
      params.row_delta[padded_row + i] = empty ? 0.0f : delta;
    }
  }
}

// SumOrder: `kWidth` floats a row, and load(sum of a head, row, chunk, x), which reads columns
// 8 * chunk.. of a row.
template <typename Element, typename SumOrder>
__global__ void __launch_bounds__(kBwdRowThreads)
    bwd_finish_kernel(const __grid_constant__ MhaBwdParams params) {
  constexpr int kChunks = SumOrder::kWidth / 8;
  const BwdRowGroup group = bwd_row_group(params);
  const float* const sum =
      params.dquery_sum + group.flat_head * group.padded_rows * SumOrder::kWidth;
  const int bytes = sizeof(Element) == 4 || params.f32_dquery ? 4 : 2;
  const bool wide = params.head_dim * bytes % 16 == 0 && aligned_16(params.dquery);
#pragma unroll 1
  for (int i = threadIdx.x; i < kBwdRowGroup * kChunks; i += kBwdRowThreads) {
    const int row = group.row + i / kChunks;
    const int column = i % kChunks * 8;
    if (row >= params.query_length || column >= params.head_dim) continue;
    float x[8];
    SumOrder::load(sum, row, column / 8, x);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= params.factor;
    const int64_t offset =
        ((int64_t{group.batch} * params.query_length + row) * params.heads + group.head) *
            params.head_dim +
        column;
    const int columns = params.head_dim - column;
    if (sizeof(Element) == 4 || params.f32_dquery) {
      float* const target = static_cast<float*>(params.dquery) + offset;
      // Of 16-byte rows only half a chunk may be left.
      if (wide) {
        *reinterpret_cast<float4*>(target) = make_float4(x[0], x[1], x[2], x[3]);
        if (columns > 4) {
          *reinterpret_cast<float4*>(target + 4) = make_float4(x[4], x[5], x[6], x[7]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e < columns) target[e] = x[e];
        }
      }
    } else if constexpr (sizeof(Element) == 2) {
      Element16* const target = static_cast<Element16*>(params.dquery) + offset;
      uint32_t words[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) words[e] = ptx::cvt_rn_x2<Element>(x[2 * e], x[2 * e + 1]);
      if (wide) {
        *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e < columns) target[e] = static_cast<Element16>(words[e / 2] >> (16 * (e % 2)));
        }
      }
    }
  }
}

// The launches are static: objects for one architecture and for others have the same kernels, and
// each has to launch its own.

// Writes row_lse, row_delta, and zeros to queue, turns, as much of `parts` as is asked for and,
// unless the first to add stores, dquery_sum. parts: see bwd_prepare_kernel.
template <typename Element, typename Mask = RowMask>
static cudaError_t launch_bwd_prepare(const MhaBwdParams& params, int width, cudaStream_t stream,
                                      int parts = 0) {
  const int64_t blocks = bwd_row_blocks(params);
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  return launch_kernel(bwd_prepare_kernel<Element, Mask>, dim3(static_cast<unsigned>(blocks)),
                       kBwdRowThreads, 0, stream, params, width, parts);
}

// Writes dquery.
template <typename Element, typename SumOrder>
static cudaError_t launch_bwd_finish(const MhaBwdParams& params, cudaStream_t stream) {
  const int64_t blocks = bwd_row_blocks(params);
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  return launch_kernel(bwd_finish_kernel<Element, SumOrder>, dim3(static_cast<unsigned>(blocks)),
                       kBwdRowThreads, 0, stream, params);
}

}  // namespace jax_flash
