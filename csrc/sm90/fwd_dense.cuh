// What a consumer of the forward does with operands that have an entry for each query and key:
// biases and masks; and with dropout.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_shared.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/score_arrays.cuh"

namespace jax_flash::sm90 {

// Of one thread, for one key tile. Where registers allow (kEarly, tiles without a maximum), bits of
// the mask are asked for, and dropout is drawn, before the wait for the scores, and otherwise where
// they are used. Biases come to shared memory (FwdBiasLoader).
template <typename Config, bool kDense>
struct FwdDense {
  static constexpr int kScores = Config::kKeys / 2;
  static constexpr int kGroups = Config::kKeys / 32;  // of 32 columns
  static constexpr bool kEarly = Config::kHeadDimV <= 128;

  uint32_t bits[kEarly ? 8 : 1];              // four words of each row
  uint32_t kept[kEarly ? kGroups : 1][2][2];  // of dropout: see Dropout::draw

  // row: this lane's first, of the head. kClean: the tile takes no maximum.
  template <bool kClean>
  __device__ __forceinline__ void load(const MhaFwdParams& params, const FwdDenseBlock& block,
                                       int row, int first_key) {
    if constexpr (kEarly && kClean) {
      static_assert(kGroups == 4, "a tile's words of a row are one load");
      const IntervalsView& view = params.intervals;
      if (view.dropout != 0) {
        const Dropout dropout = block.dropout;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          dropout.template draw<false>(kept[i], row, first_key + 32 * i);
        }
      }
      if (view.mask.data != nullptr) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 words = __ldg(
              reinterpret_cast<const uint4*>(bit_row(params, block, row + 8 * h) + first_key / 32));
          bits[4 * h] = words.x;
          bits[4 * h + 1] = words.y;
          bits[4 * h + 2] = words.z;
          bits[4 * h + 3] = words.w;
        }
      }
    }
  }

  // Logits: scores times `factor`, and the bias that is in shared memory from `row` on, the warp's
  // first: of 16 bits.
  static __device__ __forceinline__ void add_bias(float (&s)[kScores], float factor, BiasType type,
                                                  uint32_t row) {
    const uint32_t source = row + lane_id() % 16 * Config::kBiasRowBytes + lane_id() / 16 * 16;
    if (type == BiasType::kBf16) {
      add_matrices<__nv_bfloat16>(s, factor, source);
    } else {
      add_matrices<__half>(s, factor, source);
    }
  }

  // The same of a bias of f32 for the first or second half of the tile's keys.
  template <int kHalf>
  static __device__ __forceinline__ void add_f32_bias(float (&s)[kScores], float factor,
                                                      uint32_t row) {
    const uint32_t source = row + fragment_row() * Config::kBiasRowBytes + 4 * fragment_column();
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const int h = i % 2;
      const float2 pair = ptx::ld_shared_v2(source + 8 * h * Config::kBiasRowBytes + i / 2 * 8 * 4);
      float* const target = s + kHalf * kScores / 2 + 4 * (i / 2) + 2 * h;
      target[0] = fmaf(target[0], factor, pair.x);
      target[1] = fmaf(target[1], factor, pair.y);
    }
  }

  // Scores of -inf where the mask has no bit. kClean: as for `load`.
  template <bool kClean>
  __device__ __forceinline__ void hide(float (&s)[kScores], const MhaFwdParams& params,
                                       const FwdDenseBlock& block, int row, int first_key) const {
    if (params.intervals.mask.data == nullptr) return;
    constexpr bool kLoaded = kEarly && kClean;
    if constexpr (kLoaded) {
      uint32_t all = bits[0];
#pragma unroll
      for (int i = 1; i < 2 * kGroups; ++i) all &= bits[i];
      if (!__any_sync(0xffffffffu, all != 0xffffffffu)) return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (!kLoaded) ptx::forget_memory();
      const uint32_t* const source = bit_row(params, block, row + 8 * h) + first_key / 32;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const uint32_t all = kLoaded ? bits[4 * h + i] : __ldg(source + i);
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

  // Whether the mask lets `row` see `key`.
  static __device__ __forceinline__ bool sees(const MhaFwdParams& params,
                                              const FwdDenseBlock& block, int row, int key) {
    if (params.intervals.mask.data == nullptr) return true;
    return (__ldg(bit_row(params, block, row) + key / 32) >> key % 32 & 1) != 0;
  }

  // Zeros in place of the packed probabilities that dropout drops. kClean: as for `load`.
  template <bool kClean>
  __device__ __forceinline__ void drop(uint32_t (&p)[kScores / 2], const MhaFwdParams& params,
                                       const FwdDenseBlock& block, int row, int first_key) const {
    if (params.intervals.dropout == 0) return;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      uint32_t words[2][2];
      if constexpr (kEarly && kClean) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j / 2][j % 2] = kept[i][j / 2][j % 2];
      } else {
        ptx::forget_memory();  // one draw after the other: registers are few
        const Dropout dropout = block.dropout;
        dropout.template draw<false>(words, row, first_key + 32 * i);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int byte = Dropout::byte_of<false>(j % 2, j / 2 % 2);
        p[8 * i + j] &= Dropout::pair_mask(words[j / 4], byte);
      }
    }
  }

 private:
  template <typename T>
  static __device__ __forceinline__ void add_matrices(float (&s)[kScores], float factor,
                                                      uint32_t source) {
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) {
      uint32_t words[4];  // of 16 columns: both row halves of the first eight, then of the others
      ptx::ldmatrix_x4(words, source + 32 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = ptx::unpack_x2<T>(words[j]);
        float* const target = s + 8 * i + 2 * j;
        target[0] = fmaf(target[0], factor, pair.x);
        target[1] = fmaf(target[1], factor, pair.y);
      }
    }
  }

  // Rows past the last one are read as the last one.
  static __device__ __forceinline__ int place(const MhaFwdParams& params, int row) {
    // Computed anew where registers are few.
    if (!kEarly) row = static_cast<int>(ptx::fresh_address(static_cast<uint32_t>(row)));
    return min(max(row, 0), params.query_length - 1);
  }
  // Of whole 16 bytes, so that every tile is there.
  static __device__ __forceinline__ const uint32_t* bit_row(const MhaFwdParams& params,
                                                            const FwdDenseBlock& block, int row) {
    return block.bits + place(params, row) * params.intervals.mask.row_stride;
  }
};

// Without any of them.
template <typename Config>
struct FwdDense<Config, false> {
  static constexpr bool kEarly = true;
  static constexpr int kScores = Config::kKeys / 2;
  static constexpr int kWords = Config::kParts * kScores / 2;
  using Block = FwdBlock<Config>;
  template <bool>
  __device__ __forceinline__ void load(const MhaFwdParams&, const Block&, int, int) const {}
  template <bool>
  __device__ __forceinline__ void hide(float (&)[kScores], const MhaFwdParams&, const Block&, int,
                                       int) const {}
  template <bool>
  __device__ __forceinline__ void drop(uint32_t (&)[kWords], const MhaFwdParams&, const Block&, int,
                                       int) const {}
};

}  // namespace jax_flash::sm90
