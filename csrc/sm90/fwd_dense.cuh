// What a consumer of the forward does with operands that have an entry for each query and key:
// biases and masks, of global memory; and with dropout.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/math.cuh"
#include "ptx/prefetch.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_block.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/quad.cuh"
#include "tile/score_arrays.cuh"

namespace jax_flash::sm90 {

// Of one thread, for one key tile. Where registers allow (kEarly), biases of 16 bits and bits of
// the mask are asked for before the wait for the scores, and otherwise where they are used, in
// small parts; biases of f32 always are.
template <typename Config, bool kDense>
struct FwdDense {
  static constexpr int kScores = Config::kKeys / 2;
  static constexpr int kGroups = Config::kKeys / 32;  // of 32 columns
  static constexpr bool kEarly = Config::kHeadDimV <= 128;

  uint4 biases[kEarly ? 2 * kGroups : 1];
  uint32_t bits[kEarly ? 2 * kGroups : 1];

  // row: this lane's first, of the head.
  __device__ __forceinline__ void load(const MhaFwdParams& params, const FwdDenseBlock& block,
                                       int row, int first_key) {
    const IntervalsView& view = params.intervals;
    const int ahead = first_key - 2 * Config::kKeys;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (view.bias.data != nullptr) {
        const unsigned char* const source = bias_row(params, block, row + 8 * h);
        // The tile after next comes to the L2 cache meanwhile.
        const int column = ahead + 16 * (lane_id() % 4);
        if (ahead >= 0) ptx::prefetch_l2(source + column * size(view));
        if (kEarly && view.bias.type != BiasType::kF32) {
#pragma unroll
          for (int i = 0; i < kGroups; ++i) {
            biases[kEarly ? h * kGroups + i : 0] = load_eight(params, source, first_key, i);
          }
        }
      }
      if (kEarly && view.mask.data != nullptr) {
        const uint32_t* const source = bit_row(params, block, row + 8 * h) + first_key / 32;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) bits[kEarly ? h * kGroups + i : 0] = __ldg(source + i);
      }
    }
  }

  // Scores of -inf where the mask has no bit; biases are added before.
  __device__ __forceinline__ void apply(float (&s)[kScores], const MhaFwdParams& params,
                                        const FwdDenseBlock& block, int row, int first_key) const {
    if (params.intervals.bias.data != nullptr) add_bias(s, params, block, row, first_key);
    if (params.intervals.mask.data != nullptr) hide(s, params, block, row, first_key);
  }

  // Zeros in place of the packed probabilities that dropout drops.
  static __device__ __forceinline__ void drop(uint32_t (&p)[kScores / 2],
                                              const MhaFwdParams& params,
                                              const FwdDenseBlock& block, int row, int first_key) {
    if (params.intervals.dropout == 0) return;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      ptx::forget_memory();  // one draw after the other: registers are few
      const Dropout dropout = block.dropout;
      uint32_t words[2][2];
      dropout.template draw<false>(words, row, first_key + 32 * i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int byte = Dropout::byte_of<false>(j % 2, j / 2 % 2);
        p[8 * i + j] &= Dropout::pair_mask(words[j / 4], byte);
      }
    }
  }

 private:
  __device__ __forceinline__ void add_bias(float (&s)[kScores], const MhaFwdParams& params,
                                           const FwdDenseBlock& block, int row,
                                           int first_key) const {
    const BiasView& view = params.intervals.bias;
    if (view.type == BiasType::kF32) {
      constexpr int kPart = kEarly ? 8 : 4;  // of two columns each, asked for together
#pragma unroll
      for (int i = 0; i < 8 * kGroups / kPart; ++i) {
        ptx::forget_memory();  // one after the other: registers are few
        const int h = i % 2;
        const float* const source = reinterpret_cast<const float*>(
            bias_row(params, block, row + 8 * h) + 4 * (first_key + fragment_column()));
        float2 pairs[kPart];
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          const int column = 8 * (i / 2 * kPart + j);
          pairs[j] = make_float2(0.0f, 0.0f);
          if (first_key + column < params.key_length) {
            pairs[j] = __ldg(reinterpret_cast<const float2*>(source + column));
          }
        }
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          float* const target = s + 4 * (i / 2 * kPart + j) + 2 * h;
          target[0] += pairs[j].x;
          target[1] += pairs[j].y;
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      const int h = i % 2;
      if constexpr (!kEarly) ptx::forget_memory();
      const uint4 eight =
          kEarly ? biases[h * kGroups + i / 2]
                 : load_eight(params, bias_row(params, block, row + 8 * h), first_key, i / 2);
      uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
      transpose_quad(words, lane_id() % 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack_bias(view.type, words[j]);
        float* const target = s + 16 * (i / 2) + 4 * j + 2 * h;
        target[0] += pair.x;
        target[1] += pair.y;
      }
    }
  }

  __device__ __forceinline__ void hide(float (&s)[kScores], const MhaFwdParams& params,
                                       const FwdDenseBlock& block, int row, int first_key) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (!kEarly) ptx::forget_memory();
      const uint32_t* const source = bit_row(params, block, row + 8 * h) + first_key / 32;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const uint32_t all = kEarly ? bits[h * kGroups + i] : __ldg(source + i);
        const uint32_t word = all >> fragment_column();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if ((word >> (k / 2 * 8 + k % 2) & 1) == 0) {
            s[16 * i + k / 2 * 4 + 2 * h + k % 2] = kMinusInfinity;
          }
        }
      }
    }
  }

  static __device__ __forceinline__ int size(const IntervalsView& view) {
    return view.bias.type == BiasType::kF32 ? 4 : 2;
  }

  // Rows past the last one are read as the last one.
  static __device__ __forceinline__ int place(const MhaFwdParams& params, int row) {
    // Computed anew where registers are few.
    if (!kEarly) row = static_cast<int>(ptx::fresh_address(static_cast<uint32_t>(row)));
    return min(max(row, 0), params.query_length - 1);
  }
  static __device__ __forceinline__ const unsigned char* bias_row(const MhaFwdParams& params,
                                                                  const FwdDenseBlock& block,
                                                                  int row) {
    const IntervalsView& view = params.intervals;
    return block.bias + place(params, row) * view.bias.row_stride * size(view);
  }
  // Of whole 16 bytes, so that every tile is there.
  static __device__ __forceinline__ const uint32_t* bit_row(const MhaFwdParams& params,
                                                            const FwdDenseBlock& block, int row) {
    return block.bits + place(params, row) * params.intervals.mask.row_stride;
  }
  // Of 32 columns, group `i` of the tile, this lane's eight of those that four lanes share.
  static __device__ __forceinline__ uint4 load_eight(const MhaFwdParams& params,
                                                     const unsigned char* row, int first_key,
                                                     int i) {
    const int column = first_key + 8 * (lane_id() % 4);
    if (column + 32 * i >= params.key_length) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(row + 2 * column) + 4 * i);
  }
};

// Without any of them.
template <typename Config>
struct FwdDense<Config, false> {
  static constexpr bool kEarly = true;
  static constexpr int kScores = Config::kKeys / 2;
  static constexpr int kWords = Config::kParts * kScores / 2;
  using Block = FwdBlock<Config>;
  __device__ __forceinline__ void load(const MhaFwdParams&, const Block&, int, int) const {}
  __device__ __forceinline__ void apply(float (&)[kScores], const MhaFwdParams&, const Block&, int,
                                        int) const {}
  __device__ __forceinline__ void drop(uint32_t (&)[kWords], const MhaFwdParams&, const Block&, int,
                                       int) const {}
};

}  // namespace jax_flash::sm90
