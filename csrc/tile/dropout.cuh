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
  // What a group of rows or keys adds to the place that is hashed.
  static constexpr uint32_t kRowStep = 0x165667b1u;
  static constexpr uint32_t kKeyStep = 0x27d4eb2fu;
  // What an odd row multiplies the hash by, one in an odd 16 of them, and one in an odd 32.
  struct Factors {
    uint32_t odd, odd_16, odd_32;
  };
  static constexpr Factors kRowFactors = {0x752de713u, 0xfe0aafc3u, 0xfe3662d1u};
  static constexpr Factors kKeyFactors = {0x3c7d16c7u, 0x76f2d33fu, 0xf97bb491u};

  uint32_t seed[2];
  int threshold;  // of DropoutLevel; 0: there is no dropout

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

  // What `word` makes words of, for an accumulator of kCount neighbouring tiles of 16 x 16 that
  // begin at a multiple of 16 * kCount columns. `row` is this lane's first, `column` the first of
  // the tiles. kKeysDown: rows of the fragment are keys and its columns queries; otherwise it is
  // the other way round.
  template <bool kKeysDown, int kCount>
  __device__ __forceinline__ uint32_t hash(int row, int column) const {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);
    constexpr Factors kDown = kKeysDown ? kKeyFactors : kRowFactors;
    constexpr Factors kAcross = kKeysDown ? kRowFactors : kKeyFactors;
    const uint32_t down = group(row, row / 2) * (kKeysDown ? kKeyStep : kRowStep);
    const uint32_t across = group(column, lane_id()) * (kKeysDown ? kRowStep : kKeyStep);
    uint32_t x = mix(seed[0] + down + across) * factor(kDown, row % 2, row / 16);
    if constexpr (kCount < 4) x *= factor(kAcross, 0, column / 16 & ~(kCount - 1));
    return x;
  }

  // Of tile number `tile` the word about the columns with `odd` = column % 2.
  template <bool kKeysDown>
  static __device__ __forceinline__ uint32_t word(uint32_t hash, int tile, int odd) {
    constexpr Factors kAcross = kKeysDown ? kRowFactors : kKeyFactors;
    return hash * factor(kAcross, odd, tile);
  }

  // The byte of the element in row half `down` (0, or 1 for the row 8 further) and column half
  // `across` of a tile.
  template <bool kKeysDown>
  static constexpr __device__ __forceinline__ int byte_of(int down, int across) {
    return kKeysDown ? 2 * across + down : 2 * down + across;
  }

 private:
  static __device__ __forceinline__ uint32_t group(int x, int pair) {
    return static_cast<uint32_t>(x) / 64 * 4 + static_cast<uint32_t>(pair) % 4;
  }

  // tile: x / 16.
  static __device__ __forceinline__ uint32_t factor(Factors factors, int odd, int tile) {
    return (odd != 0 ? factors.odd : 1) * ((tile & 1) != 0 ? factors.odd_16 : 1) *
           ((tile & 2) != 0 ? factors.odd_32 : 1);
  }

  __device__ __forceinline__ uint32_t mix(uint32_t place) const {
    uint32_t x = place ^ place >> 17;
    x = x * 0xed5ad4bbu + seed[1];
    x ^= x >> 11;
    x *= 0xac4c1b51u;
    return x ^ x >> 15;
  }
};

// Which bytes of a word keep: those from the threshold on, of which at most half do not; with a
// larger one, those that 256 less the threshold is above.
struct DropoutLevel {
  uint32_t rest;     // of each byte: what its lower bits lack to reach the highest one
  uint32_t flipped;  // all bits, if bytes from `rest` on drop

  __device__ __forceinline__ static DropoutLevel make(int threshold) {
    const bool flips = threshold > 128;
    const int least = flips ? 256 - threshold : threshold;
    return {static_cast<uint32_t>(128 - least) * 0x01010101u, flips ? ~0u : 0u};
  }

  // In the highest bits of the bytes of `word`, less `flipped`.
  __device__ __forceinline__ uint32_t reached(uint32_t word) const {
    const uint32_t other = word >> 14;
    const uint32_t lower = ptx::lop3<(0xf0 ^ 0xcc) & 0xaa>(word, other, 0x7f7f7f7fu) + rest;
    return ptx::lop3<(0xf0 ^ 0xcc) | 0xaa>(word, other, lower);
  }

  // All bits of those of two neighbouring elements packed in a word that are kept, by what their
  // words reached.
  __device__ __forceinline__ uint32_t pair_mask(const uint32_t (&reached)[2], int byte) const {
    // Each byte of the result repeats the highest bit of a byte of the two words.
    return ptx::prmt(reached[0], reached[1], (8 + byte) * 0x11 + (12 + byte) * 0x1100) ^ flipped;
  }
  __device__ __forceinline__ bool kept(uint32_t reached, int byte) const {
    return ((reached ^ flipped) >> (8 * byte + 7)) & 1;
  }
};

}  // namespace jax_flash
