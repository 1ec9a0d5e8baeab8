// What the mask of a call with intervals says of its rows and keys by numbers alone: offsets,
// lengths and windows.
#pragma once

#include <cstdint>

#include "ops/block.cuh"
#include "ops/intervals.h"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"

namespace jax_flash::ops {

// A place in a packed dimension: offsets[sequence] <= place < offsets[sequence + 1].
struct PackedPlace {
  int sequence;  // -1: before the first; the number of sequences: after the last
  bool inside;
};

__device__ __forceinline__ PackedPlace find_place(const int32_t* offsets, int count, int size,
                                                  int place) {
  int begin = 0;  // offsets before it are at most `place`
  int end = count;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (min(max(offsets[middle], 0), size) <= place) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return {begin - 1, begin > 0 && begin < count};
}

// Where a sequence begins and ends; a range beyond the offsets reaches to the end of the dimension.
__device__ __forceinline__ KeyInterval sequence_range(const int32_t* offsets, int count, int size,
                                                      int sequence) {
  const int first = sequence >= 0 ? min(max(offsets[sequence], 0), size) : 0;
  const int end = sequence + 1 < count ? min(max(offsets[sequence + 1], 0), size) : size;
  return {first, max(first, end)};
}

// One sequence of the mask.
struct IntervalSource {
  const IntervalsParams& params;
  int sequence;
  int rows;
  int keys;
  const int32_t* row_offsets;  // of packed sequences, in any memory
  const int32_t* key_offsets;

  __device__ __forceinline__ static IntervalSource make(const IntervalsParams& params,
                                                        int sequence) {
    const int64_t first = int64_t{sequence} * params.offsets;
    return {params,
            sequence,
            __ldg(params.sizes),
            __ldg(params.sizes + 1),
            params.row_offsets + first,
            params.key_offsets + first};
  }

  __device__ __forceinline__ int given_id(int key) const {
    return __ldg(params.key_ids + int64_t{sequence} * keys + key);
  }

  // The id of a key as the kernels see it: -1 if it is dead.
  __device__ __forceinline__ int key_id(int key) const {
    if (key >= keys) return -1;
    int id = 0;
    if (params.key_ids != nullptr) id = max(given_id(key), -1);
    if (params.key_lengths != nullptr && key >= __ldg(params.key_lengths + sequence)) id = -1;
    if (params.key_offsets != nullptr) {
      const PackedPlace place = find_place(key_offsets, params.offsets, keys, key);
      const KeyInterval range = sequence_range(key_offsets, params.offsets, keys, place.sequence);
      const bool some =
          place.inside && key - range.first < min(range.end - range.first, params.most_keys);
      if (!some) id = -1;
    }
    return id;
  }

  // Rows and keys that belong together: a packed sequence, or all of them.
  struct Part {
    int row;  // the first
    int key;
    int query_length;
    int key_length;
    int shift;  // of a row's position in the part against its number there
  };

  // number: of a packed sequence. With offsets, rows outside all of them are in none.
  __device__ __forceinline__ Part part(int number) const {
    Part part = {0, 0, rows, keys, 0};
    if (params.row_offsets != nullptr) {
      const KeyInterval queries = sequence_range(row_offsets, params.offsets, rows, number);
      const KeyInterval columns = sequence_range(key_offsets, params.offsets, keys, number);
      const bool inside = number >= 0 && number + 1 < params.offsets;
      part.row = queries.first;
      part.key = columns.first;
      part.query_length = inside ? min(queries.end - queries.first, params.most_queries) : 0;
      part.key_length = min(columns.end - columns.first, params.most_keys);
    } else {
      if (params.query_lengths != nullptr) {
        part.query_length = min(max(__ldg(params.query_lengths + sequence), 0), rows);
      }
      if (params.key_lengths != nullptr) {
        part.key_length = min(max(__ldg(params.key_lengths + sequence), 0), keys);
      }
    }
    if (params.bottom_right) part.shift = part.key_length - part.query_length;
    return part;
  }

  // Of the rows of a part, from 0, those that see some key, without regard to ids or a boolean
  // mask.
  __device__ __forceinline__ RowInterval live_rows(const Part& part) const {
    RowInterval live = {0, part.query_length};
    if (params.window_right != kUnbounded) {
      live.first = max(live.first, -part.shift - params.window_right);
    }
    if (params.window_left != kUnbounded) {
      live.end = min(live.end, part.key_length + params.window_left - part.shift);
    }
    return part.key_length > 0 ? live : RowInterval{0, 0};
  }

  // The record of a row without regard to the ids of keys; empty: first >= end.
  __device__ __forceinline__ RowRecord row(int row) const {
    int number = 0;
    if (params.row_offsets != nullptr) {
      number = find_place(row_offsets, params.offsets, rows, row).sequence;
    }
    const Part part = this->part(number);
    const int place = row - part.row;
    const int start = part.key;
    const int key_length = part.key_length;
    const int position = place + part.shift;
    int first = 0;
    int end = key_length;
    if (params.window_left != kUnbounded) first = max(first, position - params.window_left);
    if (params.window_right != kUnbounded) end = min(end, position + params.window_right + 1);
    if (place >= part.query_length) first = end = 0;
    int id = 0;
    if (params.row_ids != nullptr) {
      id = row < rows ? __ldg(params.row_ids + int64_t{sequence} * rows + row) : -1;
      if (id < 0) first = end = 0;
    }
    first = min(max(start + first, 0), keys);
    end = min(max(start + end, 0), keys);
    if (params.row_ranges != nullptr && row < rows) {
      const int32_t* const range = params.row_ranges + 2 * (int64_t{sequence} * rows + row);
      first = max(first, min(__ldg(range), keys));
      end = min(end, __ldg(range + 1));
    }
    return {first, end, id, start + position};
  }
};

// The tiles of rows whose hulls meet the keys of a tile, from its first key on, without regard to
// ids or a boolean mask, by a warp. Later rows that see some key begin with later keys and end with
// later ones, or with the same. So those tiles are the one of the first row that sees some key and
// ends after this tile's first, the one of the last row that begins before its end, and all
// between, or there are none.
__device__ __forceinline__ RowInterval tiles_that_meet(const IntervalSource& source, int key) {
  constexpr unsigned kAll = 0xffffffffu;
  const IntervalsParams& params = source.params;
  const int key_end = key + kIntervalKeys;
  const int parts = params.offsets - 1;  // that are packed; the others have no rows
  int numbers[2] = {0, 0};               // of the parts of the first and the last key
  if (params.row_offsets != nullptr) {
    const int own = lane_id() < kWarp / 2 ? key : key_end - 1;
    const int found = find_place(source.key_offsets, params.offsets, source.keys, own).sequence;
    numbers[0] = __shfl_sync(kAll, found, 0);
    numbers[1] = __shfl_sync(kAll, found, kWarp / 2);
  }
  int first = -1;  // rows; -1: there is none
  int last = -1;
  {
    const IntervalSource::Part part = source.part(numbers[0]);
    const RowInterval live = source.live_rows(part);
    int place = live.first;
    if (params.window_right != kUnbounded) {
      place = max(place, key - part.key - params.window_right - part.shift);
    }
    if (place < live.end && key - part.key < part.key_length) first = part.row + place;
  }
  {
    const IntervalSource::Part part = source.part(numbers[1]);
    const RowInterval live = source.live_rows(part);
    int end = live.end;
    if (params.window_left != kUnbounded) {
      end = min(end, key_end - part.key + params.window_left - part.shift);
    }
    if (live.first < end) last = part.row + end - 1;
  }
  // Otherwise the next part that has such a row, or the one before, 32 at a time.
#pragma unroll 1
  for (int next = numbers[0] + 1; first < 0 && next < parts; next += kWarp) {
    const int own = next + lane_id();
    const IntervalSource::Part part = source.part(min(own, parts - 1));
    const RowInterval live = source.live_rows(part);
    const uint32_t some = __ballot_sync(kAll, own < parts && live.first < live.end);
    if (some != 0) first = __shfl_sync(kAll, part.row + live.first, __ffs(some) - 1);
  }
#pragma unroll 1
  for (int next = min(numbers[1], parts) - 1; last < 0 && next >= 0; next -= kWarp) {
    const int own = next - lane_id();
    const IntervalSource::Part part = source.part(max(own, 0));
    const RowInterval live = source.live_rows(part);
    const uint32_t some = __ballot_sync(kAll, own >= 0 && live.first < live.end);
    if (some != 0) last = __shfl_sync(kAll, part.row + live.end - 1, __ffs(some) - 1);
  }
  if (first < 0 || last < 0) return {0, 0};
  const RowInterval tiles = {first / kIntervalRows, last / kIntervalRows + 1};
  return tiles.first < tiles.end ? tiles : RowInterval{0, 0};
}

}  // namespace jax_flash::ops
