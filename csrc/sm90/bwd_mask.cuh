// The mask of a tile of scores of the backward, S^T: which queries see a key, as bits of a word.
#pragma once

#include <cstdint>

#include "tile/fragment.cuh"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// A lane holds two of each eight queries, for each of its keys: bit 2 j + e is query 8 j + e,
// counted from the lane's first. Those of [first, end), of a tile of kRows queries.
template <int kRows>
__device__ __forceinline__ uint32_t seen_word(int first, int end) {
  static_assert(kRows <= 128, "bits of a word");
  const auto below = [](int query) {
    const int within = min(max(query, 0), kRows);
    const int bits = within / 8 * 2 + min(within % 8, 2);
    return bits < 32 ? (1u << bits) - 1 : 0xffffffffu;
  };
  return below(end) & ~below(first);
}

// Probabilities of 0 where a query, from `first_row` on, does not see a key, of which `first_key`
// is the warpgroup's first. A key is seen by the queries of an interval.
template <int kRows>
__device__ __forceinline__ void mask_probabilities(float (&s)[kRows / 2], const RowMask& mask,
                                                   int first_key, int first_row) {
  const int key = first_key + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + fragment_row();
  const int column = first_row + fragment_column();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const RowInterval rows = mask.rows(key + 8 * h, key + 8 * h + 1);
    const uint32_t seen = seen_word<kRows>(rows.first - column, rows.end - column);
#pragma unroll
    for (int bit = 0; bit < kRows / 4; ++bit) {
      float& score = s[bit / 2 * 4 + 2 * h + bit % 2];
      if ((seen >> bit & 1) == 0) score = 0.0f;
    }
  }
}

}  // namespace jax_flash::sm90
