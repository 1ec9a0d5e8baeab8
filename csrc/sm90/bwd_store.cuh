// How a consumer warpgroup of the backward stores the gradients of keys and values.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "sm90/bwd_block.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/quad.cuh"

namespace jax_flash::sm90 {

// Of the gradient of values: P of what dropout keeps is larger.
template <typename Config>
__device__ __forceinline__ float value_factor(const MhaBwdParams& params) {
  return Config::kDense ? params.intervals.kept_scale : 1.0f;
}

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
        ((int64_t{block.out_batch} * params.key_length + key) * params.kv_heads + block.head) *
        width;
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

}  // namespace jax_flash::sm90
