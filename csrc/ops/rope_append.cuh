// Rotary embedding of queries and of new keys, which go to a cache with the new values: one kernel.
//
// A thread moves one piece of a token: two vectors of a head whose elements are pairs, or one of
// elements that stay as they are. docs/design/rope.md has the choices.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "host/fast_divisor.h"
#include "host/launch.h"
#include "ops/block.cuh"
#include "ops/params.h"
#include "ops/vector.cuh"

namespace jax_flash::ops {

inline constexpr int kRopeThreads = 128;

// Vectors of kV elements: 16 bytes, or one element where rows do not allow for more.
template <typename T, int kV>
using RopeVector = std::conditional_t<kV == 1, T, uint4>;

template <typename T, int kV>
__device__ __forceinline__ void widen(const RopeVector<T, kV>& raw, float (&x)[kV]) {
  if constexpr (kV == 1) {
    x[0] = static_cast<float>(raw);
  } else {
    unpack<T>(raw, x);
  }
}

template <typename T, int kV>
__device__ __forceinline__ RopeVector<T, kV> rounded(const float (&x)[kV]) {
  if constexpr (kV == 1) {
    return static_cast<T>(x[0]);
  } else {
    return pack<T>(x);
  }
}

// kV floats of shared memory, which begin at a multiple of as many.
template <int kV>
__device__ __forceinline__ void load_factors(const float* source, float (&x)[kV]) {
  if constexpr (kV == 1) {
    x[0] = *source;
  } else {
#pragma unroll
    for (int i = 0; i < kV / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(source)[i];
      x[4 * i] = four.x;
      x[4 * i + 1] = four.y;
      x[4 * i + 2] = four.z;
      x[4 * i + 3] = four.w;
    }
  }
}

// Turns the pairs of two vectors. Of halves the first vector has the first elements of kV pairs and
// the second one the others; of neighbours both have whole pairs.
template <typename T, int kV, bool kInterleaved>
__device__ __forceinline__ void turn(const float* cosines, const float* sines,
                                     RopeVector<T, kV>* first, RopeVector<T, kV>* second) {
  float x[2][kV];
  float c[kV];
  float s[kV];
  widen<T, kV>(*first, x[0]);
  widen<T, kV>(*second, x[1]);
  load_factors<kV>(cosines, c);
  load_factors<kV>(sines, s);
#pragma unroll
  for (int i = 0; i < kV; ++i) {
    float& a = kInterleaved ? x[2 * i / kV][2 * i % kV] : x[0][i];
    float& b = kInterleaved ? x[(2 * i + 1) / kV][(2 * i + 1) % kV] : x[1][i];
    const float turned = a * c[i] - b * s[i];
    b = a * s[i] + b * c[i];
    a = turned;
  }
  *first = rounded<T, kV>(x[0]);
  *second = rounded<T, kV>(x[1]);
}

// The row of the caches that a token at `position` of a sequence has, -1 for none.
__device__ __forceinline__ int64_t cache_row(const RopeAppendParams& params, int sequence,
                                             int length, int position) {
  // Behind the largest number positions are negative.
  if (length < 0 || position < 0) return -1;
  const int slot = params.page_divisor.divide(position);
  if (slot >= params.max_pages) return -1;
  const int page = params.page_table == nullptr
                       ? sequence
                       : params.page_table[int64_t{sequence} * params.max_pages + slot];
  if (page < 0 || page >= params.pages) return -1;
  const int pool = params.pool_divisor.divide(sequence);
  return (int64_t{pool} * params.pages + page) * params.page_size +
         (position - slot * params.page_size);
}

template <typename T, int kV, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads)
    rope_append_kernel(const __grid_constant__ RopeAppendParams params) {
  using Vector = RopeVector<T, kV>;
  const int thread = threadIdx.x;
  const int token = blockIdx.x;
  const int sequence = params.token_divisor.divide(token);
  const int length = params.lengths[sequence];
  const int pairs = params.pairs;
  const float* const inv_freq = params.inv_freq + int64_t{sequence} * params.inv_freq_stride;
  // Every load but that of the page table is on its way before the length is needed.
  const float own_inv_freq = thread < pairs ? inv_freq[thread] : 0.0f;

  const int begin = blockIdx.y * kRopeThreads;
  const int item = begin + thread;
  const int of_heads = (params.heads + params.kv_heads) * params.pieces;
  const bool is_value = item >= of_heads;
  const bool is_idle = item >= of_heads + params.value_pieces;
  const int head = params.piece_divisor.divide(is_value ? 0 : item);
  const bool is_query = !is_value && head < params.heads;
  const int kv_head = head - params.heads;
  const int piece = item - head * params.pieces;
  const int turning = pairs / kV;
  const bool turns = !is_value && piece < turning;

  const T* source;
  int offset;    // of the first vector in the head, or in all heads of a value
  int step = 0;  // from there to the second one
  if (is_value) {
    source = static_cast<const T*>(params.value) + token * params.value_stride;
    offset = (item - of_heads) * kV;
  } else {
    source = is_query ? static_cast<const T*>(params.query) + token * params.query_stride +
                            int64_t{head} * params.width
                      : static_cast<const T*>(params.key) + token * params.key_stride +
                            int64_t{kv_head} * params.width;
    offset = turns ? (kInterleaved ? 2 : 1) * piece * kV : 2 * pairs + (piece - turning) * kV;
    step = kInterleaved ? kV : pairs;
  }
  Vector first{};
  Vector second{};
  if (!is_idle) first = *reinterpret_cast<const Vector*>(source + offset);
  if (turns) second = *reinterpret_cast<const Vector*>(source + offset + step);

  // As int32 adds up elsewhere, past the largest number too.
  const int in_sequence = token - sequence * params.tokens;
  const int position =
      static_cast<int>(static_cast<uint32_t>(length) + static_cast<uint32_t>(in_sequence));
  const int64_t row = is_query || is_idle ? -1 : cache_row(params, sequence, length, position);

  // Blocks of values alone need no angles.
  if (begin < of_heads) {
    float* const cosines = reinterpret_cast<float*>(memory);
    float* const sines = cosines + pairs;
    const float at = static_cast<float>(position);
#pragma unroll 1
    for (int i = thread; i < pairs; i += kRopeThreads) {
      const float angle = at * (i == thread ? own_inv_freq : inv_freq[i]);
      sincosf(angle, &sines[i], &cosines[i]);
    }
    // Orders them before their reads.
    __syncthreads();
    if (turns) {
      turn<T, kV, kInterleaved>(cosines + piece * kV, sines + piece * kV, &first, &second);
    }
  }

  if (is_idle || (!is_query && row < 0)) return;
  T* target;
  if (is_value) {
    target = static_cast<T*>(params.v_cache) + row * params.kv_heads * params.value_width;
  } else if (is_query) {
    target = static_cast<T*>(params.out) + (int64_t{token} * params.heads + head) * params.width;
  } else {
    target = static_cast<T*>(params.k_cache) + (row * params.kv_heads + kv_head) * params.width;
  }
  *reinterpret_cast<Vector*>(target + offset) = first;
  if (turns) *reinterpret_cast<Vector*>(target + offset + step) = second;
}

// Whether every vector of 16 bytes of a call begins at a multiple of as many, and has no pairs or
// heads in part.
template <typename T>
bool has_whole_vectors(const RopeAppendParams& params) {
  constexpr int kV = kVector<T>;
  for (const int64_t elements :
       {int64_t{params.width}, int64_t{params.pairs}, params.query_stride, params.key_stride,
        params.value_stride, int64_t{params.kv_heads} * params.value_width}) {
    if (elements % kV != 0) return false;
  }
  for (const void* data :
       {params.query, params.key, params.value, static_cast<const void*>(params.out),
        static_cast<const void*>(params.k_cache), static_cast<const void*>(params.v_cache)}) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  }
  return true;
}

template <typename T, int kV>
cudaError_t launch_rope_append_vectors(RopeAppendParams params, cudaStream_t stream) {
  params.pieces = params.pairs / kV + (params.width - 2 * params.pairs) / kV;
  params.value_pieces = params.kv_heads * params.value_width / kV;
  params.token_divisor = FastDivisor::make(static_cast<uint32_t>(params.tokens));
  params.pool_divisor = FastDivisor::make(static_cast<uint32_t>(params.pool_sequences));
  params.page_divisor = FastDivisor::make(static_cast<uint32_t>(params.page_size));
  params.piece_divisor = FastDivisor::make(static_cast<uint32_t>(params.pieces));
  const int64_t tokens = int64_t{params.batch} * params.tokens;
  const int64_t items =
      (int64_t{params.heads} + params.kv_heads) * params.pieces + params.value_pieces;
  const int64_t blocks = (items + kRopeThreads - 1) / kRopeThreads;
  constexpr int64_t kMostBlocks = 65535;  // of the second dimension of a grid
  if (tokens > std::numeric_limits<int32_t>::max() || blocks > kMostBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  const auto kernel =
      params.interleaved ? rope_append_kernel<T, kV, true> : rope_append_kernel<T, kV, false>;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(blocks)),
                       kRopeThreads, 2 * params.pairs * sizeof(float), stream, params);
}

template <typename T>
cudaError_t launch_rope_append(const RopeAppendParams& params, cudaStream_t stream) {
  return has_whole_vectors<T>(params) ? launch_rope_append_vectors<T, kVector<T>>(params, stream)
                                      : launch_rope_append_vectors<T, 1>(params, stream);
}

}  // namespace jax_flash::ops
