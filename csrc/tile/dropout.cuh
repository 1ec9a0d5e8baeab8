// Dropout: which probabilities are kept, drawn for the fragments of a warp.
//
// docs/design/dropout.md says what is drawn for which row and key, and why by this generator;
// jax_flash/_src/dropout.py is the same in jnp.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "tile/fragment.cuh"
#include "tile/schedule.cuh"

namespace jax_flash {

// Of one query head.
struct Dropout {
  // What a group of 16 rows or keys adds to the place that is hashed, and of the hash's last
  // multiplication those of the group's four words.
  static constexpr uint32_t kRowStep = 0x165667b1u;
  static constexpr uint32_t kKeyStep = 0x27d4eb2fu;
  static constexpr uint32_t kMultipliers[4] = {0x31848babu, 0x9e3779b1u, 0xc2b2ae3du, 0x85ebca77u};

  uint32_t seed[2];
  int threshold;  // random bytes below it drop; 0: there is no dropout

  __device__ __forceinline__ static Dropout make(const MhaParams& params, int batch, int head) {
    const IntervalsView& view = params.intervals;
    if (view.dropout == 0) return {{0, 0}, 0};
    const uint32_t* const seed =
        view.seeds + batch_offset(view.seed_strides, batch, params) + 2 * head;
    return {{__ldg(seed), __ldg(seed + 1)}, view.dropout};
  }

  // The same, of a call that has dropout. seeds: of the sequence's heads.
  __device__ __forceinline__ static Dropout of_head(const MhaParams& params, const uint32_t* seeds,
                                                    int head) {
    return {{__ldg(seeds + 2 * head), __ldg(seeds + 2 * head + 1)}, params.intervals.dropout};
  }

  // The highest bit of each byte: whether it keeps, which it does from the threshold on.
  __device__ __forceinline__ uint32_t keeps(uint32_t bytes) const {
    const bool is_high = threshold > 128;
    const uint32_t rest = static_cast<uint32_t>((is_high ? 256 : 128) - threshold) * 0x01010101u;
    // Whether the lower bits reach those of the threshold. With its highest bit, a byte's own has
    // to be set, too; without, that suffices.
    const uint32_t lower = (bytes & 0x7f7f7f7fu) + rest;
    return is_high ? bytes & lower : bytes | lower;
  }

  // For kCount neighbouring 16 x 16 tiles of accumulators: words[tile][e] is about the columns with
  // e = column % 2; whether an element is kept says the highest bit of byte `byte_of`. `row` is
  // this lane's first, `column` the first of the tiles. kKeysDown: rows of the fragment are keys
  // and its columns queries; otherwise it is the other way round.
  template <bool kKeysDown, int kCount>
  __device__ __forceinline__ void draw(uint32_t (&words)[kCount][2], int row, int column) const {
    constexpr uint32_t kDownStep = kKeysDown ? kKeyStep : kRowStep;
    constexpr uint32_t kAcrossStep = kKeysDown ? kRowStep : kKeyStep;
    const auto down = static_cast<uint32_t>(row) / 16 * 4 + static_cast<uint32_t>(row) / 2 % 4;
    const auto across =
        static_cast<uint32_t>(column) / 16 * 4 + static_cast<uint32_t>(lane_id()) % 4;
    const uint32_t first = seed[0] + down * kDownStep + across * kAcrossStep;
    // Of words 2 * (query % 2) + key % 2.
    constexpr uint32_t kBothEven = kMultipliers[0];
    constexpr uint32_t kDownOdd = kMultipliers[kKeysDown ? 1 : 2];
    constexpr uint32_t kAcrossOdd = kMultipliers[kKeysDown ? 2 : 1];
    constexpr uint32_t kBothOdd = kMultipliers[3];
    const bool odd = row % 2 != 0;
    const uint32_t multipliers[2] = {odd ? kDownOdd : kBothEven, odd ? kBothOdd : kAcrossOdd};
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) {
      const uint32_t mixed = mix(first + 4 * tile * kAcrossStep);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t x = mixed * multipliers[e];
        words[tile][e] = keeps(x ^ x >> 14);
      }
    }
  }

  // The byte of the element in row half `down` (0, or 1 for the row 8 further) and column half
  // `across` of a tile.
  template <bool kKeysDown>
  static constexpr __device__ __forceinline__ int byte_of(int down, int across) {
    return kKeysDown ? 2 * across + down : 2 * down + across;
  }

  // All bits of those 16 that are kept, for two neighbouring elements packed in a word.
  static __device__ __forceinline__ uint32_t pair_mask(const uint32_t (&words)[2], int byte) {
    // Each byte of the result repeats the highest bit of a byte of the two words.
    return ptx::prmt(words[0], words[1], (8 + byte) * 0x11 + (12 + byte) * 0x1100);
  }
  static __device__ __forceinline__ bool kept(uint32_t word, int byte) {
    return (word >> (8 * byte + 7)) & 1;
  }

 private:
  __device__ __forceinline__ uint32_t mix(uint32_t place) const {
    uint32_t x = place ^ place >> 17;
    x = x * 0xed5ad4bbu + seed[1];
    x ^= x >> 11;
    x *= 0xac4c1b51u;
    return x ^ x >> 15;
  }
};

}  // namespace jax_flash
