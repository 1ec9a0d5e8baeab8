// A sequence's mask from the arrays of a call with intervals: what RowMask is where the mask
// follows from numbers.
#pragma once

#include <type_traits>

#include "host/intervals.h"
#include "host/params.h"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"

namespace jax_flash {

// Row and key numbers are within the tiles of the arrays, which cover the rows and keys there are.
struct IntervalMask {
  const RowRecord* row_records;
  const RowTile* row_tiles;
  const int32_t* key_ids;
  const KeyTile* key_tiles;
  int query_length;  // rows of the arrays of queries; which of them are dead says `row`
  int key_length;

  __device__ __forceinline__ static IntervalMask make(const MhaParams& params, int batch) {
    const IntervalsView& view = params.intervals;
    const int64_t sequence = batch_offset(view.batch_strides, batch, params);
    const int64_t first_row_tile = sequence * interval_tiles(params.query_length);
    const int64_t first_key_tile = sequence * interval_tiles(params.key_length);
    return {view.rows + first_row_tile * kIntervalRows,
            view.row_tiles + first_row_tile,
            view.keys + first_key_tile * kIntervalKeys,
            view.key_tiles + first_key_tile,
            params.query_length,
            params.key_length};
  }

  __device__ __forceinline__ RowRecord row(int row) const {
    const int4 words = __ldg(reinterpret_cast<const int4*>(row_records + row));
    return {words.x, words.y, words.z, words.w};
  }

  // Of a row that exists: as `interval`.
  __device__ __forceinline__ KeyInterval keys_of(int row) const {
    const int2 words = __ldg(reinterpret_cast<const int2*>(row_records + row));
    return {words.x, words.y};
  }

  // -1 where a key is dead.
  __device__ __forceinline__ int id(int key) const {
    return key < interval_tiles(key_length) * kIntervalKeys ? __ldg(key_ids + key) : -1;
  }

  // Not all of these keys need be visible: ids count too.
  __device__ __forceinline__ KeyInterval interval(int row) const {
    if (row >= query_length) return {0, 0};
    const RowRecord record = this->row(row);
    return {record.first, record.end};
  }

  // The keys that some row of [row_begin, row_end) may see: at least those that it sees.
  __device__ __forceinline__ KeyInterval hull(int row_begin, int row_end) const {
    KeyInterval keys = {kMaxLength, 0};
    for (int i = row_begin / kIntervalRows; i * kIntervalRows < min_int(row_end, query_length);
         ++i) {
      const RowTile& tile = row_tiles[i];
      if (tile.first >= tile.end) continue;
      keys.first = min_int(keys.first, tile.first);
      keys.end = max_int(keys.end, tile.end);
    }
    return keys.end == 0 ? KeyInterval{0, 0} : keys;
  }

  // Keys that all rows of [row_begin, row_end) see, dead rows not counted: at most those.
  __device__ __forceinline__ KeyInterval core(int row_begin, int row_end) const {
    KeyInterval keys = {0, kMaxLength};
    for (int i = row_begin / kIntervalRows; i * kIntervalRows < min_int(row_end, query_length);
         ++i) {
      keys.first = max_int(keys.first, row_tiles[i].core_first);
      keys.end = min_int(keys.end, row_tiles[i].core_end);
    }
    return keys;
  }

  // The rows, in whole RowTiles, that may see some key of [key_begin, key_end): at least those that
  // do.
  __device__ __forceinline__ RowInterval rows(int key_begin, int key_end) const {
    RowInterval rows = {kMaxLength, 0};
    for (int i = key_begin / kIntervalKeys; i * kIntervalKeys < min_int(key_end, key_length); ++i) {
      const KeyTile& tile = key_tiles[i];
      if (tile.first >= tile.end) continue;
      rows.first = min_int(rows.first, tile.first);
      rows.end = max_int(rows.end, tile.end);
    }
    return rows.end == 0 ? RowInterval{0, 0} : rows;
  }

  // Whether some row (key) of the tiles that hold [begin, end) is dead.
  __device__ __forceinline__ bool dead_rows(int begin, int end) const {
    for (int i = begin / kIntervalRows; i * kIntervalRows < min_int(end, query_length); ++i) {
      if (row_tiles[i].dead != 0) return true;
    }
    return false;
  }
  __device__ __forceinline__ bool dead_keys(int begin, int end) const {
    for (int i = begin / kIntervalKeys; i * kIntervalKeys < min_int(end, key_length); ++i) {
      if (key_tiles[i].dead != 0) return true;
    }
    return false;
  }

  // The same for the tile of kKeys keys from `first`, some of which exist: a number that is not 0,
  // to which no branch leads that waits for memory.
  template <int kKeys>
  __device__ __forceinline__ int dead_keys(int first) const {
    static_assert(kKeys % kIntervalKeys == 0);
    const int last = (min_int(first + kKeys, key_length) - 1) / kIntervalKeys;
    int dead = 0;
#pragma unroll
    for (int i = 0; i <= kKeys / kIntervalKeys; ++i) {
      dead |= __ldg(&key_tiles[min_int(first / kIntervalKeys + i, last)].dead);
    }
    return dead;
  }

  // The record of kKeys keys from `first` on, some of which exist; found like that.
  template <int kKeys>
  __device__ __forceinline__ KeyTile key_tile(int first) const {
    static_assert(kKeys % kIntervalKeys == 0);
    const int last = interval_tiles(key_length) - 1;
    KeyTile keys = {kMaxLength, 0, 0, {}};
#pragma unroll
    for (int i = 0; i < kKeys / kIntervalKeys; ++i) {
      const int tile = min_int(first / kIntervalKeys + i, last);
      const int4 words = __ldg(reinterpret_cast<const int4*>(key_tiles + tile));
      keys.dead |= words.z;
      if (words.x >= words.y) continue;
      keys.first = min_int(keys.first, words.x);
      keys.end = max_int(keys.end, words.y);
    }
    return keys;
  }

  // Whether ids have to be compared where rows of [row_begin, row_end) are masked.
  __device__ __forceinline__ bool mixed(int row_begin, int row_end) const {
    for (int i = row_begin / kIntervalRows; i * kIntervalRows < min_int(row_end, query_length);
         ++i) {
      if (row_tiles[i].mixed != 0) return true;
    }
    return false;
  }

  // RowTile::hidden of all rows of [row_begin, row_end) together.
  __device__ __forceinline__ uint64_t hidden(int row_begin, int row_end) const {
    uint64_t all = ~uint64_t{0};
    for (int i = row_begin / kIntervalRows; i * kIntervalRows < min_int(row_end, query_length);
         ++i) {
      all &= hidden_of(row_tiles[i]);
    }
    return all;
  }
  static __device__ __forceinline__ uint64_t hidden_of(const RowTile& tile) {
    return uint64_t{tile.hidden[1]} << 32 | tile.hidden[0];
  }

  // Whether a boolean mask is known to hide keys [begin, end), some of which exist, from all rows
  // of `tile`.
  __device__ __forceinline__ bool hides(const RowTile& tile, int begin, int end) const {
    const uint64_t hidden = hidden_of(tile);
    if (hidden == 0) return false;
    const int shift = hidden_shift(key_length);
    const int last = min_int(end, key_length) - 1;
    const uint64_t parts =
        ~uint64_t{0} << (begin >> shift) & ~uint64_t{0} >> (63 - (last >> shift));
    return (hidden & parts) == parts;
  }
};

// The mask of a sequence, of the kind that a kernel has.
template <typename Mask>
__device__ __forceinline__ Mask mask_of(const MhaParams& params, int batch) {
  if constexpr (std::is_same_v<Mask, IntervalMask>) {
    return IntervalMask::make(params, batch);
  } else {
    return row_mask(params, batch);
  }
}

}  // namespace jax_flash
