// The arrays of calls with intervals: what jax_flash/_src/intervals.py says, number for number.
//
// Three kernels, because tiles of rows ask for ids of all keys, and tiles of keys for all rows:
// ids of keys, with the smallest and the largest of each tile; rows and their tiles; tiles of keys.
// Each is started while the one before still runs, for whose results it waits.
// A warp looks for the keys of a row among the tiles of keys, 32 at a time, and reads ids of those
// alone that may hold the row's. What the row before has found is where the next one begins, so
// that documents, sorted or not, take few steps a row; ids in no order take more.
#pragma once

#include <cstdint>

#include "host/launch.h"
#include "ops/block.cuh"
#include "ops/intervals.h"
#include "ptx/griddepcontrol.cuh"
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
    if (min(max(__ldg(offsets + middle), 0), size) <= place) {
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
  const int first = sequence >= 0 ? min(max(__ldg(offsets + sequence), 0), size) : 0;
  const int end = sequence + 1 < count ? min(max(__ldg(offsets + sequence + 1), 0), size) : size;
  return {first, max(first, end)};
}

// One sequence of the mask.
struct IntervalSource {
  const IntervalsParams& params;
  int sequence;
  int rows;
  int keys;

  __device__ __forceinline__ static IntervalSource make(const IntervalsParams& params,
                                                        int sequence) {
    return {params, sequence, __ldg(params.sizes), __ldg(params.sizes + 1)};
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
      const int32_t* const offsets = params.key_offsets + int64_t{sequence} * params.offsets;
      const PackedPlace place = find_place(offsets, params.offsets, keys, key);
      const KeyInterval range = sequence_range(offsets, params.offsets, keys, place.sequence);
      const bool some =
          place.inside && key - range.first < min(range.end - range.first, params.most_keys);
      if (!some) id = -1;
    }
    return id;
  }

  // The record of a row without regard to the ids of keys; empty: first >= end.
  __device__ __forceinline__ RowRecord row(int row) const {
    int query_length = rows;
    int key_length = keys;
    int start = 0;
    int place = row;
    if (params.row_offsets != nullptr) {
      const int64_t first = int64_t{sequence} * params.offsets;
      const PackedPlace found = find_place(params.row_offsets + first, params.offsets, rows, row);
      const KeyInterval queries =
          sequence_range(params.row_offsets + first, params.offsets, rows, found.sequence);
      const KeyInterval columns =
          sequence_range(params.key_offsets + first, params.offsets, keys, found.sequence);
      place = row - queries.first;
      start = columns.first;
      query_length = found.inside ? min(queries.end - queries.first, params.most_queries) : 0;
      key_length = min(columns.end - columns.first, params.most_keys);
    } else {
      if (params.query_lengths != nullptr) {
        query_length = min(max(__ldg(params.query_lengths + sequence), 0), rows);
      }
      if (params.key_lengths != nullptr) {
        key_length = min(max(__ldg(params.key_lengths + sequence), 0), keys);
      }
    }
    const int position = place + (params.bottom_right ? key_length - query_length : 0);
    int first = 0;
    int end = key_length;
    if (params.window_left != kUnbounded) first = max(first, position - params.window_left);
    if (params.window_right != kUnbounded) end = min(end, position + params.window_right + 1);
    if (place >= query_length) first = end = 0;
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

// The smallest and the largest id of a tile of keys lie where its record has no field until
// interval_key_tiles_kernel writes it.
__device__ __forceinline__ int2 id_range(const KeyTile* tiles, int tile) {
  const int32_t* const unused = tiles[tile].unused;
  return make_int2(unused[0], unused[1]);
}

// A warp for each tile of keys.
inline constexpr int kKeyThreads = 128;

__global__ void __launch_bounds__(kKeyThreads)
    interval_keys_kernel(const __grid_constant__ IntervalsParams params) {
  ptx::griddepcontrol_launch_dependents();
  const int tile = blockIdx.x * (kKeyThreads / kWarp) + threadIdx.x / kWarp;
  if (tile >= params.sequences * params.key_count) return;
  const int sequence = tile / params.key_count;
  const IntervalSource source = IntervalSource::make(params, sequence);
  const int first_key = (tile - sequence * params.key_count) * kIntervalKeys;
  int smallest = INT32_MAX;
  int largest = INT32_MIN;
#pragma unroll
  for (int i = 0; i < kIntervalKeys; i += kWarp) {
    const int key = first_key + i + lane_id();
    params.keys[int64_t{tile} * kIntervalKeys + i + lane_id()] = source.key_id(key);
    if (params.key_ids == nullptr || key >= source.keys) continue;
    smallest = min(smallest, source.given_id(key));
    largest = max(largest, source.given_id(key));
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    smallest = min(smallest, __shfl_xor_sync(0xffffffffu, smallest, step));
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  if (lane_id() == 0) {
    params.key_tiles[tile].unused[0] = smallest;
    params.key_tiles[tile].unused[1] = largest;
  }
}

// A warp looks for the keys of rows that follow each other.
struct KeySearch {
  const IntervalSource& source;
  const KeyTile* tiles;  // of the sequence
  const int2* ranges;    // their id ranges in shared memory, or null

  __device__ __forceinline__ int2 range_of(int tile) const {
    return ranges != nullptr ? ranges[tile] : id_range(tiles, tile);
  }

  // Bit 32 * i + lane: whether the key tile * 64 + that is of [first, end) and `matches`.
  template <typename Matches>
  __device__ __forceinline__ uint64_t keys_of(int tile, int first, int end, Matches matches) const {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = tile * kIntervalKeys + i * kWarp + lane_id();
      words[i] =
          __ballot_sync(0xffffffffu, key >= first && key < end && matches(source.given_id(key)));
    }
    return uint64_t{words[1]} << 32 | words[0];
  }

  // The first key of [first, end) that matches, `end` if there is none; or with kLast the last one,
  // first - 1 if there is none. may_match: whether a tile with ids of a range may hold one.
  template <bool kLast, typename Matches, typename MayMatch>
  __device__ __forceinline__ int find(int first, int end, Matches matches,
                                      MayMatch may_match) const {
    if (first >= end) return kLast ? first - 1 : end;
    const int first_tile = first / kIntervalKeys;
    const int tiles_of = (end - 1) / kIntervalKeys - first_tile + 1;
#pragma unroll 1
    for (int base = 0; base < tiles_of; base += kWarp) {
      const int step = base + lane_id();
      const int own = kLast ? first_tile + tiles_of - 1 - step : first_tile + step;
      uint32_t left = __ballot_sync(0xffffffffu, step < tiles_of && may_match(range_of(own)));
#pragma unroll 1
      for (; left != 0; left &= left - 1) {
        const int found_step = base + __ffs(left) - 1;
        const int tile = kLast ? first_tile + tiles_of - 1 - found_step : first_tile + found_step;
        const uint64_t keys = keys_of(tile, first, end, matches);
        if (keys != 0) {
          return tile * kIntervalKeys + (kLast ? 63 - __clzll(keys) : __ffsll(keys) - 1);
        }
      }
    }
    return kLast ? first - 1 : end;
  }
};

// A thread block for each tile of rows; more warps where ids are looked for.
inline constexpr int kRowThreads = 512;

// Of so many tiles of keys the id ranges are read once, all together.
inline constexpr int kIdRanges = 2048;

struct IntervalRowsShared {
  RowRecord records[kIntervalRows];
  bool mixed[kIntervalRows];
  int2 ranges[kIdRanges];  // not there if there are no ids
};

// Narrows the records of `count` rows, from the first, to the keys of their ids.
__device__ __forceinline__ void narrow_rows(const IntervalSource& source,
                                            IntervalRowsShared& shared, int first_row, int count) {
  const IntervalsParams& params = source.params;
  const KeySearch search = {source, params.key_tiles + int64_t{source.sequence} * params.key_count,
                            params.key_count <= kIdRanges ? shared.ranges : nullptr};
  RowRecord before = {0, 0, -1, 0};  // of the last row that sees a key, as it was asked for
  int before_first = 0;              // and what was found
  int before_last = 0;
  bool before_mixed = false;
#pragma unroll 1
  for (int i = first_row; i < first_row + count; ++i) {
    const RowRecord row = shared.records[i];
    if (row.first >= row.end) continue;
    const int id = row.id;
    const auto matches = [id](int other) { return other == id; };
    const auto may_match = [id](int2 range) { return range.x <= id && id <= range.y; };
    const bool like = before.id == id && before_last >= before_first;
    // Keys before what another row has found are none of this id.
    int first = row.first;
    if (!like || before.first > first || before_first < first) {
      first = search.find<false>(row.first, row.end, matches, may_match);
    } else {
      first = min(before_first, row.end);
    }
    int last = before_last;
    if (!like || before.end != row.end || last < first) {
      last = search.find<true>(first, row.end, matches, may_match);
    }
    bool mixed = false;
    if (first <= last) {
      const int known =
          like && !before_mixed && before_first <= first ? max(first, before_last + 1) : first;
      const int other = search.find<false>(
          known, last, [id](int other) { return other != id; },
          [id](int2 range) { return range.x != id || range.y != id; });
      mixed = other < last;
      before = row;
      before_first = first;
      before_last = last;
      before_mixed = mixed;
    }
    __syncwarp();
    if (lane_id() == 0) {
      shared.records[i].first = first;
      shared.records[i].end = last + 1;
      shared.mixed[i] = mixed;
    }
  }
}

// The record of a tile of rows, by a warp.
__device__ __forceinline__ void write_row_tile(const IntervalsParams& params,
                                               const IntervalRowsShared& shared, int tile) {
  RowTile sum = {kMaxLength, 0, 0, kMaxLength, 0, 0, {0, 0}};
#pragma unroll
  for (int i = lane_id(); i < kIntervalRows; i += kWarp) {
    const RowRecord& row = shared.records[i];
    if (row.first >= row.end) {
      sum.dead = 1;
      continue;
    }
    sum.first = min(sum.first, row.first);
    sum.end = max(sum.end, row.end);
    sum.core_first = max(sum.core_first, row.first);
    sum.core_end = min(sum.core_end, row.end);
    sum.mixed |= shared.mixed[i];
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const auto other = [step](int x) { return __shfl_xor_sync(0xffffffffu, x, step); };
    sum.first = min(sum.first, other(sum.first));
    sum.end = max(sum.end, other(sum.end));
    sum.core_first = max(sum.core_first, other(sum.core_first));
    sum.core_end = min(sum.core_end, other(sum.core_end));
    sum.dead |= other(sum.dead);
    sum.mixed |= other(sum.mixed);
  }
  if (sum.end == 0) sum.first = 0;
  // Where ids count, a row need not see what lies in its interval.
  if (sum.mixed != 0) sum.core_first = sum.core_end = 0;
  if (params.row_hidden != nullptr) {
    for (int i = 0; i < 2; ++i) {
      sum.hidden[i] = static_cast<uint32_t>(__ldg(params.row_hidden + 2 * tile + i));
    }
  }
  if (lane_id() == 0) params.row_tiles[tile] = sum;
}

__global__ void __launch_bounds__(kRowThreads)
    interval_rows_kernel(const __grid_constant__ IntervalsParams params) {
  IntervalRowsShared& shared = *reinterpret_cast<IntervalRowsShared*>(memory);
  const int tile = blockIdx.x;
  const int sequence = tile / params.row_count;
  const IntervalSource source = IntervalSource::make(params, sequence);
  const int thread = threadIdx.x;
  ptx::griddepcontrol_launch_dependents();
  if (thread < kIntervalRows) {
    shared.records[thread] =
        source.row((tile - sequence * params.row_count) * kIntervalRows + thread);
    shared.mixed[thread] = false;
  }
  // Without ids nothing of the kernel before is needed, but by the one after it.
  if (params.key_ids != nullptr) ptx::griddepcontrol_wait();
  if (params.key_ids != nullptr && params.key_count <= kIdRanges) {
    const KeyTile* const tiles = params.key_tiles + int64_t{sequence} * params.key_count;
    for (int i = thread; i < params.key_count; i += kRowThreads) {
      shared.ranges[i] = id_range(tiles, i);
    }
  }
  // Orders records and ranges before they are narrowed or read.
  __syncthreads();
  if (params.key_ids != nullptr) {
    const int count = kIntervalRows / (kRowThreads / kWarp);
    narrow_rows(source, shared, thread / kWarp * count, count);
    // Orders what was found before it is read.
    __syncthreads();
  }
  if (thread >= kIntervalRows) return;
  RowRecord record = shared.records[thread];
  const bool live = record.first < record.end;
  if (!live) record = {0, 0, -1, 0};
  params.rows[int64_t{tile} * kIntervalRows + thread] = record;
  if (thread < kWarp) write_row_tile(params, shared, tile);
  ptx::griddepcontrol_wait();
}

// A warp for each tile of keys.
__global__ void __launch_bounds__(kKeyThreads)
    interval_key_tiles_kernel(const __grid_constant__ IntervalsParams params) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int number = blockIdx.x * (kKeyThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= params.sequences * params.key_count) return;
  const int sequence = number / params.key_count;
  const int key = (number - sequence * params.key_count) * kIntervalKeys;
  const RowTile* const tiles = params.row_tiles + int64_t{sequence} * params.row_count;
  const int32_t* const ids = params.keys + int64_t{number} * kIntervalKeys;
  const bool dead = __any_sync(0xffffffffu, ids[lane_id()] < 0 || ids[kWarp + lane_id()] < 0);
  int first = params.row_count;
  int end = 0;
  constexpr int kTogether = 4;  // loads of a lane that are under way at a time
#pragma unroll 1
  for (int base = 0; base < params.row_count; base += kTogether * kWarp) {
    bool meets[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const RowTile* const rows = tiles + min(base + i * kWarp + lane_id(), params.row_count - 1);
      const int2 hull = *reinterpret_cast<const int2*>(&rows->first);
      meets[i] = hull.x < hull.y && hull.x < key + kIntervalKeys && hull.y > key;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int tile = base + i * kWarp;
      const uint32_t met =
          __ballot_sync(0xffffffffu, meets[i] && tile + lane_id() < params.row_count);
      if (met != 0) {
        first = min(first, tile + __ffs(met) - 1);
        end = tile + 32 - __clz(met);
      }
    }
  }
  if (lane_id() != 0) return;
  if (end == 0) first = 0;
  params.key_tiles[number] = {
      first * kIntervalRows, end * kIntervalRows, dead ? 1 : 0, {0, 0, 0, 0, 0}};
}

}  // namespace jax_flash::ops
