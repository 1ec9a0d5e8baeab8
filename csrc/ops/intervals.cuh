// The arrays of calls with intervals: what jax_flash/_src/intervals.py says, number for number.
//
// Tiles of rows ask for ids of all keys, and tiles of keys for all rows, so there are three
// kernels: ids of keys, with the smallest and the largest of each tile; rows and their tiles; tiles
// of keys. Each is started while the one before still runs, for whose results it waits. Without ids
// the first two are one, and without a boolean mask all are: what rows see follows from numbers.
// A warp looks for the keys of an id among the tiles of keys, 32 at a time, and reads ids of those
// alone that may hold it. If keys of one id follow each other, that is all for all rows of a tile
// that have this id. Otherwise a warp looks for the keys of one row after the other. What the row
// before has found is where the next one begins; ids in no order take more steps.
#pragma once

#include <cstdint>

#include "host/launch.h"
#include "ops/block.cuh"
#include "ops/interval_source.cuh"
#include "ops/intervals.h"
#include "ptx/griddepcontrol.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"

namespace jax_flash::ops {

// The smallest and the largest id of a tile of keys lie where its record has no field until
// interval_key_tiles_kernel writes it.
__device__ __forceinline__ int2 id_range(const KeyTile* tiles, int tile) {
  const int32_t* const unused = tiles[tile].unused;
  return make_int2(unused[0], unused[1]);
}

// A warp for each tile of keys.
inline constexpr int kKeyThreads = 128;

// With ids.
__global__ void __launch_bounds__(kKeyThreads)
    interval_keys_kernel(const __grid_constant__ IntervalsParams params) {
  // In this order: the next kernel reads what this one reads, too.
  ptx::griddepcontrol_wait();
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
    if (key >= source.keys) continue;
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

// So many offsets of packed sequences are read at once, rather than in the steps of a search.
inline constexpr int kSharedOffsets = 256;

struct IntervalRowsShared {
  RowRecord records[kIntervalRows];
  bool mixed[kIntervalRows];
  int32_t row_offsets[kSharedOffsets];
  int32_t key_offsets[kSharedOffsets];
  // What follows is not there if there are no ids.
  KeyInterval found[kIntervalRows];  // what is left of the interval of a row
  bool pending[kIntervalRows];       // unless it has to be looked for row by row
  int2 ranges[kIdRanges];
};

__device__ __forceinline__ KeySearch key_search(const IntervalSource& source,
                                                const IntervalRowsShared& shared) {
  const IntervalsParams& params = source.params;
  return {source, params.key_tiles + int64_t{source.sequence} * params.key_count,
          params.key_count <= kIdRanges ? shared.ranges : nullptr};
}

// Ids of a tile of rows for which a warp looks once.
inline constexpr int kRowIds = 32;

// Narrows the records of all rows whose id is one of the first kRowIds of the tile, if the keys
// with that id follow each other. Returns whether rows of this warp's ids are left.
__device__ __forceinline__ bool narrow_ids(const IntervalSource& source,
                                           IntervalRowsShared& shared) {
  constexpr unsigned kAll = 0xffffffffu;
  static_assert(kIntervalRows == 2 * kWarp);
  const KeySearch search = key_search(source, shared);
  const int warp = threadIdx.x / kWarp;
  RowRecord rows[2];  // of this lane
  uint32_t left[2];   // rows that are still to be seen
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows[i] = shared.records[i * kWarp + lane_id()];
    left[i] = __ballot_sync(kAll, rows[i].first < rows[i].end);
  }
  bool pending = false;
#pragma unroll 1
  for (int number = 0; (left[0] | left[1]) != 0; ++number) {
    const bool low = left[0] != 0;
    const int id =
        __shfl_sync(kAll, low ? rows[0].id : rows[1].id, __ffs(low ? left[0] : left[1]) - 1);
    bool own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[i] = (left[i] >> lane_id() & 1) != 0 && (number >= kRowIds || rows[i].id == id);
      left[i] &= ~__ballot_sync(kAll, own[i]);
    }
    if (number % (kRowThreads / kWarp) != warp) continue;
    // All keys of the id that some row looks at.
    unsigned first = kMaxLength;
    unsigned end = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!own[i]) continue;
      first = min(first, static_cast<unsigned>(rows[i].first));
      end = max(end, static_cast<unsigned>(rows[i].end));
    }
    const int least = static_cast<int>(__reduce_min_sync(kAll, first));
    const int most = static_cast<int>(__reduce_max_sync(kAll, end));
    KeyInterval keys = {0, 0};
    bool apart = number >= kRowIds;
    if (!apart) {
      const auto matches = [id](int other) { return other == id; };
      const auto may_match = [id](int2 range) { return range.x <= id && id <= range.y; };
      keys.first = search.find<false>(least, most, matches, may_match);
      keys.end = search.find<true>(keys.first, most, matches, may_match) + 1;
      apart = keys.end > search.find<false>(
                             keys.first, keys.end, [id](int other) { return other != id; },
                             [id](int2 range) { return range.x != id || range.y != id; });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!own[i]) continue;
      const int row = i * kWarp + lane_id();
      shared.found[row] = {max(rows[i].first, keys.first), min(rows[i].end, keys.end)};
      shared.pending[row] = apart;
    }
    pending = pending || apart;
  }
  return pending;
}

// Narrows the records of those of `count` rows, from the first, that are left.
__device__ __forceinline__ void narrow_rows(const IntervalSource& source,
                                            IntervalRowsShared& shared, int first_row, int count) {
  const KeySearch search = key_search(source, shared);
  RowRecord before = {0, 0, -1, 0};  // of the last row that sees a key, as it was asked for
  int before_first = 0;              // and what was found
  int before_last = 0;
  bool before_mixed = false;
#pragma unroll 1
  for (int i = first_row; i < first_row + count; ++i) {
    if (!shared.pending[i]) continue;
    const RowRecord row = shared.records[i];
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

// The keys of a tile and its record, without ids, by a thread block of a thread for each key. With
// a boolean mask interval_key_tiles_kernel finds the rows.
__device__ __forceinline__ void write_key_tile(const IntervalSource& source, int tile,
                                               int first_key) {
  const IntervalsParams& params = source.params;
  const int id = source.key_id(first_key + threadIdx.x);
  params.keys[int64_t{tile} * kIntervalKeys + threadIdx.x] = id;
  if (params.row_ranges != nullptr) return;
  RowInterval rows = {0, 0};
  if (threadIdx.x < kWarp) rows = tiles_that_meet(source, first_key);
  const bool dead = __syncthreads_count(id < 0) != 0;
  if (threadIdx.x != 0) return;
  params.key_tiles[tile] = {
      rows.first * kIntervalRows, rows.end * kIntervalRows, dead ? 1 : 0, {0, 0, 0, 0, 0}};
}

// A thread block for each tile of rows, and without ids one for each tile of keys after those.
__global__ void __launch_bounds__(kRowThreads)
    interval_rows_kernel(const __grid_constant__ IntervalsParams params) {
  IntervalRowsShared& shared = *reinterpret_cast<IntervalRowsShared*>(memory);
  const bool has_ids = params.key_ids != nullptr;
  // Without ids this is the first kernel. Otherwise it starts when what the one before reads, and
  // this one, is there.
  if (!has_ids) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int row_tiles = params.sequences * params.row_count;
  const bool is_rows = static_cast<int>(blockIdx.x) < row_tiles;
  const int tile = is_rows ? blockIdx.x : blockIdx.x - row_tiles;
  const int count = is_rows ? params.row_count : params.key_count;
  const int sequence = tile / count;
  const int thread = threadIdx.x;
  IntervalSource source = IntervalSource::make(params, sequence);
  if (params.row_offsets != nullptr && params.offsets <= kSharedOffsets) {
    for (int i = thread; i < params.offsets; i += blockDim.x) {
      shared.row_offsets[i] = __ldg(source.row_offsets + i);
      shared.key_offsets[i] = __ldg(source.key_offsets + i);
    }
    source.row_offsets = shared.row_offsets;
    source.key_offsets = shared.key_offsets;
    // Orders offsets before they are read.
    __syncthreads();
  }
  static_assert(kIntervalRows == kIntervalKeys, "so many threads there are without ids");
  const int first = (tile - sequence * count) * kIntervalRows;
  if (!is_rows) {
    write_key_tile(source, tile, first);
    return;
  }
  if (thread < kIntervalRows) {
    const RowRecord record = source.row(first + thread);
    shared.records[thread] = record;
    shared.mixed[thread] = false;
    if (has_ids) {
      shared.found[thread] = {record.first, record.end};
      shared.pending[thread] = false;
    }
  }
  if (has_ids) {
    ptx::griddepcontrol_wait();
    if (params.key_count <= kIdRanges) {
      const KeyTile* const tiles = params.key_tiles + int64_t{sequence} * params.key_count;
      for (int i = thread; i < params.key_count; i += kRowThreads) {
        shared.ranges[i] = id_range(tiles, i);
      }
    }
  }
  // Orders records and ranges before they are narrowed or read.
  __syncthreads();
  if (has_ids) {
    const int left = __syncthreads_count(narrow_ids(source, shared));
    if (thread < kIntervalRows && !shared.pending[thread]) {
      shared.records[thread].first = shared.found[thread].first;
      shared.records[thread].end = shared.found[thread].end;
    }
    if (left != 0) {
      const int own = kIntervalRows / (kRowThreads / kWarp);
      narrow_rows(source, shared, thread / kWarp * own, own);
    }
    // Orders what was found before it is read.
    __syncthreads();
  }
  if (thread >= kIntervalRows) return;
  RowRecord record = shared.records[thread];
  const bool live = record.first < record.end;
  if (!live) record = {0, 0, -1, 0};
  params.rows[int64_t{tile} * kIntervalRows + thread] = record;
  if (thread < kWarp) write_row_tile(params, shared, tile);
}

// A warp for each tile of keys, with ids or a boolean mask.
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
