// How a consumer warpgroup of the backward stores the gradients of keys and values.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "ptx/reduction.cuh"
#include "sm90/bwd_block.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/quad.cuh"

namespace jax_flash::sm90 {

// One gradient, keys by width, to its place in global memory.
template <typename Config, int kCount>
__device__ __forceinline__ void store_key_gradient(const float (&grad)[kCount], float factor,
                                                   void* out, bool f32, int width,
                                                   const BwdBlock<Config>& block,
                                                   const MhaBwdParams& params, int warpgroup) {
  using Element = typename Config::Element;
  const int lane = lane_id() % 4;
  const int first = block.first_key + Config::kKeyStep * warpgroup +
                    static_cast<int>(threadIdx.x / 32 % 4) * 16 + fragment_row();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first + 8 * h;
    const bool exists = key < params.key_length;
    const int64_t row =
        ((int64_t{block.batch} * params.key_length + key) * params.kv_heads + block.head) * width;
    if (f32) {
      float* const target = static_cast<float*>(out) + row + 2 * lane;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        if (exists && 8 * j < width) {
          *reinterpret_cast<float2*>(target + 8 * j) =
              make_float2(factor * grad[4 * j + 2 * h], factor * grad[4 * j + 2 * h + 1]);
        }
      }
      continue;
    }
    Element16* const target = static_cast<Element16*>(out) + row + 8 * lane;
#pragma unroll
    for (int group = 0; group < kCount / 16; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 16 * group + 4 * j + 2 * h;
        words[j] = ptx::cvt_rn_x2<Element>(factor * grad[i], factor * grad[i + 1]);
      }
      transpose_quad(words, lane);
      if (exists && 32 * group + 8 * lane < width) {
        *reinterpret_cast<uint4*>(target + 32 * group) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// The same to where parts of groups are added up (bwd_parts.cuh), as it lies in registers:
// a warp has 512 bytes beside each other. offset: of it in a chunk.
template <typename Config, int kCount>
__device__ __forceinline__ void add_key_gradient(const float (&grad)[kCount], float factor,
                                                 int offset, const BwdBlock<Config>& block,
                                                 const MhaBwdParams& params, int warpgroup) {
  const int first = block.first_key + Config::kKeyStep * warpgroup;
  if (first >= params.key_length) return;
  const int64_t head = int64_t{block.sum_batch} * params.kv_heads + block.head;
  const int64_t chunk = head * bwd_key_chunks(params) + first / kBwdKeyChunk;
  float* const target = params.parts +
                        chunk * (kBwdKeyChunk * (Config::kHeadDim + Config::kHeadDimV)) + offset +
                        4 * (threadIdx.x % 128);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 x = make_float4(factor * grad[i], factor * grad[i + 1], factor * grad[i + 2],
                                 factor * grad[i + 3]);
    if (adds_in_order<Config>(params)) {
      *reinterpret_cast<float4*>(target + 128 * i) = x;
    } else {
      ptx::red_add_v4(target + 128 * i, x.x, x.y, x.z, x.w);
    }
  }
}

}  // namespace jax_flash::sm90
