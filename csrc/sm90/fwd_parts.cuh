// Adds up the results of parts of the keys, each normalised and rounded to 16 bits. Parts are added
// in order, by one thread for eight columns of a row: a row's bits depend on its parts alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>

#include "host/fast_divisor.h"
#include "host/launch.h"
#include "ptx/griddepcontrol.cuh"
#include "ptx/math.cuh"
#include "sm90/fwd_parts.h"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

inline constexpr int kFwdPartsThreads = 128;

// Divisors of the number of a thread, from the fastest.
struct FwdPartsPlan {
  FastDivisor chunks;  // of 8 columns in a row
  FastDivisor heads;
  FastDivisor query_length;
  int32_t count;  // of chunks of all rows
};

template <typename Element>
__global__ void __launch_bounds__(kFwdPartsThreads)
    mha_fwd_parts_kernel(const __grid_constant__ FwdParts params,
                         const __grid_constant__ FwdPartsPlan plan) {
  ptx::griddepcontrol_wait();
  const int number = static_cast<int>(blockIdx.x) * kFwdPartsThreads + threadIdx.x;
  if (number >= plan.count) return;
  const int row = plan.chunks.divide(number);  // of all sequences, positions, heads
  const int chunk = number - row * static_cast<int>(plan.chunks.divisor);
  const int place = plan.heads.divide(row);
  const int head = row - place * params.heads;
  const int batch = plan.query_length.divide(place);
  const int position = place - batch * params.query_length;

  // All loads at once.
  const int64_t rows = int64_t{params.query_length} * params.heads;  // of a part
  const int64_t first = int64_t{batch} * params.parts * rows;
  const float* const part_lse = params.part_lse + first + head * params.query_length + position;
  const auto* const part_out = static_cast<const uint4*>(params.part_out) +
                               (first + position * params.heads + head) * plan.chunks.divisor +
                               chunk;
  const int64_t step = rows * plan.chunks.divisor;
  float lse[kMaxKeyParts];
  uint4 out[kMaxKeyParts];
#pragma unroll
  for (int i = 0; i < kMaxKeyParts; ++i) {
    const bool exists = i < params.parts;
    lse[i] = exists ? part_lse[i * rows] : kMinusInfinity;
    out[i] = exists ? part_out[i * step] : make_uint4(0, 0, 0, 0);
  }

  float largest = kMinusInfinity;
#pragma unroll
  for (int i = 0; i < kMaxKeyParts; ++i) largest = fmaxf(largest, lse[i]);
  float sum = 0.0f;
  float total[8] = {};
#pragma unroll
  for (int i = 0; i < kMaxKeyParts; ++i) {
    // Whose outputs may be anything.
    if (lse[i] == kMinusInfinity) continue;
    const float weight = ptx::ex2_approx_ftz((lse[i] - largest) * SoftmaxScale::kLog2e);
    sum += weight;
    const uint32_t words[4] = {out[i].x, out[i].y, out[i].z, out[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = ptx::unpack_x2<Element>(words[j]);
      total[2 * j] = fmaf(weight, pair.x, total[2 * j]);
      total[2 * j + 1] = fmaf(weight, pair.y, total[2 * j + 1]);
    }
  }

  if (chunk == 0) {
    params.lse[(int64_t{batch} * params.heads + head) * params.query_length + position] =
        sum == 0.0f ? kMinusInfinity : largest + logf(sum);
  }
  const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    words[j] = ptx::cvt_rn_x2<Element>(total[2 * j] * inverse, total[2 * j + 1] * inverse);
  }
  static_cast<uint4*>(params.out)[number] = make_uint4(words[0], words[1], words[2], words[3]);
}

inline cudaError_t launch_fwd_parts(const FwdParts& parts, cudaStream_t stream) {
  const int64_t count = int64_t{parts.batch} * parts.query_length * parts.heads * (parts.width / 8);
  if (parts.parts > kMaxKeyParts || count > std::numeric_limits<int32_t>::max() / 2) {
    return cudaErrorInvalidValue;
  }
  FwdPartsPlan plan{};
  plan.chunks = FastDivisor::make(static_cast<uint32_t>(parts.width / 8));
  plan.heads = FastDivisor::make(static_cast<uint32_t>(parts.heads));
  plan.query_length = FastDivisor::make(static_cast<uint32_t>(parts.query_length));
  plan.count = static_cast<int32_t>(count);
  const auto kernel =
      parts.bf16 ? mha_fwd_parts_kernel<__nv_bfloat16> : mha_fwd_parts_kernel<__half>;
  const int64_t blocks = (count + kFwdPartsThreads - 1) / kFwdPartsThreads;
  return launch_dependent_kernel(kernel, dim3(static_cast<unsigned>(blocks)), kFwdPartsThreads, 0,
                                 stream, parts, plan);
}

}  // namespace jax_flash::sm90
