// The two products of a consumer warpgroup's step, each one product of 16-bit operands or, of split
// ones, three (FwdConfig::kSplit).
#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/fwd_config.cuh"
#include "tile/split_parts.cuh"

namespace jax_flash::sm90 {

// s = Q K^T, of tiles at shared addresses `query_tile` and `key_tile`.
template <typename Config>
__device__ __forceinline__ void multiply_scores(float (&s)[Config::kKeys / 2], uint32_t query_tile,
                                                uint32_t key_tile) {
  const uint64_t query = ptx::wgmma_descriptor(query_tile, 0);
  const uint64_t key = ptx::wgmma_descriptor(key_tile, 0);
#pragma unroll
  for (int i = 0; i < Config::kProducts; ++i) {
#pragma unroll
    for (int k = 0; k < Config::kHeadDim / 16; ++k) {
      const int left = Config::left_part(i) * Config::kHeadDim / 8 + 2 * k;
      const int right = Config::right_part(i) * Config::kHeadDim / 8 + 2 * k;
      ptx::Wgmma<typename Config::Element, Config::kKeys>::ss(
          s, query + (Config::QueryLayout::offset(0, left) >> 4),
          key + (Config::KeyLayout::offset(0, right) >> 4), i + k != 0);
    }
  }
}

// out = P V, or out += P V.
template <typename Config>
__device__ __forceinline__ void multiply_values(
    float (&out)[Config::kHeadDimV / 2], const uint32_t (&p)[Config::kParts * Config::kKeys / 4],
    uint32_t value_tile, bool accumulate) {
  const uint64_t value = ptx::wgmma_descriptor(value_tile, Config::ValueLayout::kSlabBytes);
#pragma unroll
  for (int i = 0; i < Config::kProducts; ++i) {
    const uint32_t* const left = p + Config::left_part(i) * Config::kKeys / 4;
    const uint32_t right =
        Config::ValueLayout::offset(0, Config::right_part(i) * Config::kHeadDimV / 8);
#pragma unroll
    for (int k = 0; k < Config::kKeys / 16; ++k) {
      ptx::Wgmma<typename Config::Element, Config::kHeadDimV>::rs(
          out, left + 4 * k, value + ((right + 16 * 128 * k) >> 4), accumulate || i + k > 0);
    }
  }
}

// Weights become the left operand of the second product.
template <typename Config>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[Config::kParts * Config::kKeys / 4],
                                             const float (&s)[Config::kKeys / 2]) {
  constexpr int kWords = Config::kKeys / 4;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    p[i] = ptx::cvt_rn_x2<typename Config::Element>(s[2 * i], s[2 * i + 1]);
    if constexpr (Config::kSplit) p[kWords + i] = low_parts(s[2 * i], s[2 * i + 1], p[i]);
  }
}

}  // namespace jax_flash::sm90
