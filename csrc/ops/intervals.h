// The arrays of calls with intervals (host/intervals.h), computed from ids, lengths, offsets and
// windows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "host/intervals.h"

namespace jax_flash::ops {

// Device arrays, row-major; those that there are not are null.
struct IntervalsParams {
  const int32_t* sizes;          // [3]: rows T, keys S, 0
  const int32_t* row_ids;        // [sequences, T]; there are these two, or neither
  const int32_t* key_ids;        // [sequences, S]
  const int32_t* query_lengths;  // [sequences]
  const int32_t* key_lengths;    // [sequences]
  const int32_t* row_offsets;    // [sequences, offsets], never falling; both or neither
  const int32_t* key_offsets;    // [sequences, offsets]
  const int32_t* row_ranges;     // [sequences, T, 2]: keys first and end that a boolean mask leaves
  const int32_t* row_hidden;  // [sequences, row_count, 2]: RowTile::hidden of it; both or neither
  int32_t offsets;
  int32_t window_left;   // up to kMaxLength; -1: unbounded
  int32_t window_right;  // the same
  int32_t most_queries;  // of a packed sequence; kMaxLength: unbounded
  int32_t most_keys;     // the same
  bool bottom_right;

  RowRecord* rows;
  RowTile* row_tiles;
  int32_t* keys;
  KeyTile* key_tiles;
  int32_t sequences;
  int32_t row_count;  // of row_tiles of a sequence
  int32_t key_count;  // of key_tiles of a sequence
};

cudaError_t launch_intervals(const IntervalsParams& params, cudaStream_t stream);

}  // namespace jax_flash::ops
