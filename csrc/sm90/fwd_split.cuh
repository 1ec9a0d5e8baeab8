// Query, key and value of float32 become arrays of bf16, [own sequences, length, heads, 2, padded
// width]: of each row the high parts, then the low ones (split_parts.cuh), zeros where there is
// padding.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/fast_divisor.h"
#include "host/launch.h"
#include "host/params.h"
#include "host/split.h"
#include "tile/split_parts.cuh"

namespace jax_flash::sm90 {

// One operand and where its parts go.
struct SplitOperand {
  const float* from;
  uint4* to;
  int64_t outer_stride;  // of `from`, in elements, as the next three
  int64_t inner_stride;
  int64_t row_stride;
  int64_t head_stride;
  FastDivisor inner;  // own sequences of the inner batch dim
  FastDivisor length;
  FastDivisor heads;
  int32_t rows;    // of all heads and sequences
  int32_t width;   // a multiple of 8
  int32_t chunks;  // of 8 columns in the padded width
};

struct SplitOperands {
  SplitOperand operands[3];
};

inline constexpr int kSplitThreads = 256;

// One block of threads and the next ones work on blockIdx.y's operand, 8 columns a thread.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    mha_split_kernel(const __grid_constant__ SplitOperands all) {
  const SplitOperand& operand = all.operands[blockIdx.y];
  const int64_t count = int64_t{operand.rows} * operand.chunks;
  const int64_t step = int64_t{kThreads} * gridDim.x;
  for (int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x; i < count; i += step) {
    const int number = static_cast<int>(i / operand.chunks);
    const int chunk = static_cast<int>(i - int64_t{number} * operand.chunks);
    const int position = operand.heads.divide(number);
    const int head = number - position * static_cast<int>(operand.heads.divisor);
    const int sequence = operand.length.divide(position);
    const int row = position - sequence * static_cast<int>(operand.length.divisor);
    const int outer = operand.inner.divide(sequence);
    const int inner = sequence - outer * static_cast<int>(operand.inner.divisor);
    float4 x[2] = {};
    if (8 * chunk < operand.width) {
      const auto* const from = reinterpret_cast<const float4*>(
          operand.from + outer * operand.outer_stride + inner * operand.inner_stride +
          row * operand.row_stride + head * operand.head_stride + 8 * chunk);
      x[0] = __ldg(from);
      x[1] = __ldg(from + 1);
    }
    uint32_t high[4];
    uint32_t low[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      high[2 * j] = ptx::cvt_rn_x2<__nv_bfloat16>(x[j].x, x[j].y);
      high[2 * j + 1] = ptx::cvt_rn_x2<__nv_bfloat16>(x[j].z, x[j].w);
      low[2 * j] = low_parts(x[j].x, x[j].y, high[2 * j]);
      low[2 * j + 1] = low_parts(x[j].z, x[j].w, high[2 * j + 1]);
    }
    uint4* const to = operand.to + (2 * int64_t{number} * operand.chunks + chunk);
    to[0] = make_uint4(high[0], high[1], high[2], high[3]);
    to[operand.chunks] = make_uint4(low[0], low[1], low[2], low[3]);
  }
}

// Of `view` [batch, length, heads, width], parts of which go to `to`; the view becomes that of the
// parts.
inline SplitOperand split_operand(const MhaParams& params, int length, int heads, int width,
                                  int padded, uint4* to, TensorView* view) {
  const int last = params.batch_dims - 1;
  const auto own = [&](int dim) {
    return view->batch_strides[dim] == 0 ? 1 : params.batch_sizes[dim];
  };
  const int inner = own(last);
  SplitOperand operand{};
  operand.from = static_cast<const float*>(view->data);
  operand.to = to;
  operand.outer_stride = last > 0 ? view->batch_strides[0] : 0;
  operand.inner_stride = view->batch_strides[last];
  operand.row_stride = view->row_stride;
  operand.head_stride = view->head_stride;
  operand.inner = FastDivisor::make(static_cast<uint32_t>(inner));
  operand.length = FastDivisor::make(static_cast<uint32_t>(length));
  operand.heads = FastDivisor::make(static_cast<uint32_t>(heads));
  operand.rows = static_cast<int32_t>(own_sequences(params, *view) * length * heads);
  operand.width = width;
  operand.chunks = padded / 8;

  view->data = to;
  view->head_stride = 2 * padded;
  view->row_stride = heads * view->head_stride;
  const int64_t sequence = length * view->row_stride;
  if (last > 0 && view->batch_strides[0] != 0) view->batch_strides[0] = inner * sequence;
  if (view->batch_strides[last] != 0) view->batch_strides[last] = sequence;
  view->alignment = 16;
  return operand;
}

// Splits the operands of `params`, which become the parts.
template <int kHeadDim, int kHeadDimV>
cudaError_t split_operands(MhaFwdParams* params, const DeviceInfo& device, cudaStream_t stream) {
  auto* const query = static_cast<uint4*>(params->parts);
  const int64_t keys = int64_t{params->key_length} * params->kv_heads;
  uint4* const key = query + own_sequences(*params, params->query) * params->query_length *
                                 params->heads * (2 * kHeadDim / 8);
  uint4* const value = key + own_sequences(*params, params->key) * keys * (2 * kHeadDim / 8);
  const SplitOperands all = {{split_operand(*params, params->query_length, params->heads,
                                            params->head_dim, kHeadDim, query, &params->query),
                              split_operand(*params, params->key_length, params->kv_heads,
                                            params->head_dim, kHeadDim, key, &params->key),
                              split_operand(*params, params->key_length, params->kv_heads,
                                            params->head_dim_v, kHeadDimV, value, &params->value)}};
  int64_t most = 1;
  for (const SplitOperand& operand : all.operands) {
    most = std::max(most, int64_t{operand.rows} * operand.chunks);
  }
  const int64_t blocks = (most + kSplitThreads - 1) / kSplitThreads;
  const int64_t room = int64_t{16} * device.multiprocessors;
  return launch_kernel(mha_split_kernel<kSplitThreads>,
                       dim3(static_cast<unsigned>(std::min(blocks, room)), 3), kSplitThreads, 0,
                       stream, all);
}

}  // namespace jax_flash::sm90
