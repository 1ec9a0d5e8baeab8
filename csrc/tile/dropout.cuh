// Dropout: which probabilities are kept, drawn for the fragments of a warp.
//
// docs/design/dropout.md says what is drawn for which row and key; jax_flash/_src/dropout.py is the
// same in jnp. The generator is Philox4x32 with 7 rounds (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "tile/fragment.cuh"
#include "tile/schedule.cuh"

namespace jax_flash {

// Of one query head.
struct Dropout {
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

  static __device__ __forceinline__ void philox(uint32_t (&x)[4], uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t first = uint64_t{0xD2511F53u} * x[0];
      const uint64_t second = uint64_t{0xCD9E8D57u} * x[2];
      x[0] = static_cast<uint32_t>(second >> 32) ^ x[1] ^ k0;
      x[1] = static_cast<uint32_t>(second);
      x[2] = static_cast<uint32_t>(first >> 32) ^ x[3] ^ k1;
      x[3] = static_cast<uint32_t>(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

  // The highest bit of each byte: whether it keeps.
  __device__ __forceinline__ uint32_t keeps(uint32_t bytes) const {
    // Averages, rounded up, with 255 - threshold.
    const uint32_t other = (255u - static_cast<uint32_t>(threshold)) * 0x01010101u;
    return (bytes | other) - (((bytes ^ other) & 0xfefefefeu) >> 1);
  }

  // For kCount (1 or 2) neighbouring 16 x 16 tiles of accumulators: words[tile][e] is about the
  // columns with e = column % 2; whether an element is kept says the highest bit of byte
  // `byte_of`. `row` is this lane's first, `column` the first of the tiles. kKeysDown: rows of the
  // fragment are keys and its columns queries; otherwise it is the other way round.
  template <bool kKeysDown, int kCount>
  __device__ __forceinline__ void draw(uint32_t (&words)[kCount][2], int row, int column) const {
    uint32_t x[4];
    begin<kKeysDown, kCount>(x, row, column);
    finish<kKeysDown>(words, x, row);
  }

  // The two parts of `draw`: what this lane draws itself, and what lanes give each other. Where
  // draws are to run beside each other, all begin before the first one's finish.
  template <bool kKeysDown, int kCount>
  __device__ __forceinline__ void begin(uint32_t (&x)[4], int row, int column) const {
    static_assert(kCount == 1 || kCount == 2);
    // Two lanes, of an even row and the odd one after it, need halves of the same draws: each makes
    // those of one tile.
    const bool odd = row % 2 != 0;
    const uint32_t down = static_cast<uint32_t>(row) / 16 * 4 + static_cast<uint32_t>(row) / 2 % 4;
    const uint32_t across =
        (static_cast<uint32_t>(column) / 16 + (kCount == 2 && odd ? 1 : 0)) * 4 +
        static_cast<uint32_t>(lane_id()) % 4;
    x[0] = kKeysDown ? down : across;
    x[1] = kKeysDown ? across : down;
    x[2] = x[3] = 0;
    philox(x, seed[0], seed[1]);
  }
  template <bool kKeysDown, int kCount>
  __device__ __forceinline__ void finish(uint32_t (&words)[kCount][2], const uint32_t (&x)[4],
                                         int row) const {
    const bool odd = row % 2 != 0;
    const uint32_t of_even[2] = {x[0], kKeysDown ? x[2] : x[1]};
    const uint32_t of_odd[2] = {kKeysDown ? x[1] : x[2], x[3]};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t own = odd ? of_odd[e] : of_even[e];
      if constexpr (kCount == 1) {
        words[0][e] = keeps(own);
      } else {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? of_even[e] : of_odd[e], 4);
        words[0][e] = keeps(odd ? got : own);
        words[1][e] = keeps(odd ? own : got);
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
};

}  // namespace jax_flash
