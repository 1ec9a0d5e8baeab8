// Partial results of rows: how two are added, and what the last one becomes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "decode/params.h"
#include "ptx/math.cuh"
#include "tile/copy.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::decode {

// The end of a row: 1 / sum and lse, its sink counted. Base 2 in, natural logarithm out.
struct RowResult {
  float factor;
  float lse;
};

__device__ __forceinline__ RowResult finish_row(const DecodeParams& params, int batch, int head,
                                                float maximum, float sum) {
  if (sum == 0.0f) return {0.0f, kMinusInfinity};
  constexpr float kLog2e = SoftmaxScale::kLog2e;
  float factor = 1.0f;
  if (params.sinks != nullptr) {
    const float sink = params.sinks[int64_t{batch} * params.sink_stride + head] * kLog2e;
    const float larger = fmaxf(maximum, sink);
    factor = ptx::ex2_approx_ftz(maximum - larger);
    // A sink of +inf takes everything: not inf - inf.
    sum = sum * factor + (sink == larger ? 1.0f : ptx::ex2_approx_ftz(sink - larger));
    maximum = larger;
  }
  return {__fdividef(factor, sum), fmaf(maximum, 1.0f / kLog2e, logf(sum))};
}

template <typename Element>
__device__ __forceinline__ uint2 pack(float4 values) {
  return make_uint2(ptx::cvt_rn_x2<Element>(values.x, values.y),
                    ptx::cvt_rn_x2<Element>(values.z, values.w));
}

// Four neighbouring columns of a row.
template <CacheType kCache>
__device__ __forceinline__ void store_out(const DecodeParams& params, int batch, int token,
                                          int head, int column, float4 values, float factor) {
  const int64_t at =
      ((int64_t{batch} * params.tokens + token) * params.heads + head) * params.head_dim_v + column;
  const float4 finished =
      make_float4(values.x * factor, values.y * factor, values.z * factor, values.w * factor);
  if constexpr (kCache == CacheType::kF32) {
    *reinterpret_cast<float4*>(static_cast<float*>(params.out) + at) = finished;
    return;
  }
  Element16* const target = static_cast<Element16*>(params.out) + at;
  bool bf16 = kCache == CacheType::kBf16;
  if constexpr (kCache == CacheType::kE4m3 || kCache == CacheType::kInt8) {
    bf16 = params.query_bf16 != 0;
  }
  *reinterpret_cast<uint2*>(target) = bf16 ? pack<__nv_bfloat16>(finished) : pack<__half>(finished);
}

// Four columns of a row, not normalised, relative to the row's maximum; and the row's sum.
struct RowPart {
  float maximum;
  float sum;
  float4 out;

  static __device__ __forceinline__ RowPart empty() {
    return {kMinusInfinity, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
  }

  // Every addition of parts goes through here: what is added in one order has the same bits,
  // whoever does it.
  __device__ __forceinline__ void add(const RowPart& other) {
    const float larger = fmaxf(maximum, other.maximum);
    // Without any key so far: exponents are -inf, not -inf + inf.
    const float shift = larger == kMinusInfinity ? 0.0f : larger;
    const float mine = ptx::ex2_approx_ftz(maximum - shift);
    const float theirs = ptx::ex2_approx_ftz(other.maximum - shift);
    maximum = larger;
    sum = fmaf(theirs, other.sum, sum * mine);
    out.x = fmaf(theirs, other.out.x, out.x * mine);
    out.y = fmaf(theirs, other.out.y, out.y * mine);
    out.z = fmaf(theirs, other.out.z, out.z * mine);
    out.w = fmaf(theirs, other.out.w, out.w * mine);
  }

  __device__ __forceinline__ void become_if(const RowPart& other, bool does) {
    maximum = does ? other.maximum : maximum;
    sum = does ? other.sum : sum;
    out.x = does ? other.out.x : out.x;
    out.y = does ? other.out.y : out.y;
    out.z = does ? other.out.z : out.z;
    out.w = does ? other.out.w : out.w;
  }

  // Without a branch. What does not count may be anything.
  __device__ __forceinline__ void add_if(const RowPart& other, bool counts) {
    RowPart both = *this;
    both.add(other);
    become_if(both, counts);
  }

  __device__ __forceinline__ void multiply(float factor) {
    out.x *= factor;
    out.y *= factor;
    out.z *= factor;
    out.w *= factor;
  }
};

// Where a row of a split's partial result is.
__device__ __forceinline__ int64_t partial_row(const DecodeParams& params, int batch, int kv_head,
                                               int split, int row) {
  const int64_t at = (int64_t{batch} * params.kv_heads + kv_head) * params.splits + split;
  return at * params.tokens * params.group + row;
}

__device__ __forceinline__ void store_lse(const DecodeParams& params, int batch, int token,
                                          int head, const RowResult& result) {
  params.lse[(int64_t{batch} * params.heads + head) * params.tokens + token] = result.lse;
}

// Writes a row's columns of `out` and its lse.
template <CacheType kCache>
__device__ __forceinline__ void finish(const DecodeParams& params, int batch, int kv_head, int row,
                                       int piece, const RowPart& part) {
  const int token = params.group_divisor.divide(row);
  const int head = kv_head * params.group + row - token * params.group;
  const RowResult result = finish_row(params, batch, head, part.maximum, part.sum);
  store_out<kCache>(params, batch, token, head, 4 * piece, part.out, result.factor);
  if (piece == 0) store_lse(params, batch, token, head, result);
}

}  // namespace jax_flash::decode
