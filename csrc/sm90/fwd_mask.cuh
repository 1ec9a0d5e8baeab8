// Which keys of a tile the two rows of a lane see: a word of bits for each row.
#pragma once

#include <cstdint>

#include "host/intervals.h"
#include "sm90/fwd_block.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// Scores s[4 j + 2 h + e], of row half h and column 8 j + 2 (lane % 4) + e, have bit 2 j + e of
// word h.
template <int kKeys>
struct FwdMask {
  static constexpr int kScores = kKeys / 2;
  static_assert(kScores / 2 <= 32, "a bit for each score");

  uint32_t seen[2];

  // The intervals of the two rows, of which a lane's columns begin at `first_column`.
  static __device__ __forceinline__ FwdMask of(const KeyInterval (&rows)[2], int first_column) {
    FwdMask mask;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      mask.seen[h] = before(rows[h].end - first_column) & ~before(rows[h].first - first_column);
    }
    return mask;
  }

  // Takes away keys with another id than the row's. `key_ids`, of the whole sequence, ends with a
  // whole number of kIntervalKeys, the first that holds `key_length`.
  __device__ __forceinline__ void compare(const int32_t* key_ids, int key_length, int first_key,
                                          const int (&ids)[2]) {
    const int32_t* const first = key_ids + first_key + fragment_column();
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      // Keys past the array are outside all intervals.
      if (8 * j % kIntervalKeys == 0 && first_key + 8 * j >= key_length) break;
      const int2 keys = __ldg(reinterpret_cast<const int2*>(first + 8 * j));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (keys.x != ids[h]) seen[h] &= ~(1u << 2 * j);
        if (keys.y != ids[h]) seen[h] &= ~(2u << 2 * j);
      }
    }
  }

  // Of row half h; `column` counts from the lane's first.
  __device__ __forceinline__ bool sees(int h, int column) const {
    return (seen[h] >> (column / 8 * 2 + column % 8) & 1) != 0;
  }

  // Of score `i`.
  __device__ __forceinline__ bool sees_score(int i) const {
    return (seen[i / 2 % 2] & 1u << (i / 4 * 2 + i % 2)) != 0;
  }

  // Keys that are not seen get a score of -inf.
  __device__ __forceinline__ void apply(float (&s)[kScores]) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (!sees_score(i)) s[i] = kMinusInfinity;
    }
  }

 private:
  // The bits of the columns before `column`, which counts from the lane's first: any number.
  static __device__ __forceinline__ uint32_t before(int column) {
    const int count = 2 * (column >> 3) + min(column & 7, 2);
    return static_cast<uint32_t>((uint64_t{1} << min(max(count, 0), 32)) - 1);
  }
};

// What a tile that is masked needs, and with intervals of global memory: asked for before a wait,
// which plain loads are not moved across.
template <typename Config>
struct FwdMaskLoads {
  bool masked;          // there is something to mask
  int dead_keys;        // nonzero: there are some. With intervals
  KeyInterval keys[2];  // of the lane's rows. With intervals
  FwdMask<Config::kKeys> mask;

  // row: the lane's first. kMixed: as for `find`.
  template <bool kMixed>
  __device__ __forceinline__ void load(const FwdBlock<Config>& block, int tile, int warpgroup,
                                       int row) {
    ask(block, tile, warpgroup, row);
    find<kMixed>(block, tile, warpgroup, row);
  }
  __device__ __forceinline__ void ask(const FwdBlock<Config>& block, int tile, int warpgroup,
                                      int row) {
    masked = tile < block.full_first[warpgroup] || tile >= block.full_end[warpgroup];
    if (!masked) return;
    dead_keys = block.mask.template dead_keys<Config::kKeys>(block.key_of(tile));
    for (int h = 0; h < 2; ++h) keys[h] = block.mask.keys_of(existing(block, row + 8 * h));
  }

  // kMixed: ids may have to be compared, which they never have in clean tiles.
  template <bool kMixed>
  __device__ __forceinline__ void find(const FwdBlock<Config>& block, int tile, int warpgroup,
                                       int row) {
    if (!masked) return;
    const int first_key = block.key_of(tile);
    mask = FwdMask<Config::kKeys>::of(keys, first_key + fragment_column());
    if (kMixed && block.mixed[warpgroup]) {
      mask.compare(
          block.mask.key_ids, block.mask.key_length, first_key,
          {block.mask.row(existing(block, row)).id, block.mask.row(existing(block, row + 8)).id});
    }
  }

 private:
  // Rows past the block are dropped.
  static __device__ __forceinline__ int existing(const FwdBlock<Config>& block, int row) {
    return min(row, block.mask.query_length - 1);
  }
};

}  // namespace jax_flash::sm90
