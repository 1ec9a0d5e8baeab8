// The operands of calls "with intervals": masks that are data, and options of the scores.
//
// jnp computes the arrays right before the call (jax_flash/_src/intervals.py, which is the one
// place that says what they hold); docs/design/intervals.md has the contract.
#pragma once

#include <cstdint>

namespace jax_flash {

// Rows of queries, and keys, that one record sums up.
inline constexpr int kIntervalRows = 64;
inline constexpr int kIntervalKeys = 64;

constexpr int interval_tiles(int length) { return (length + 63) / 64; }

// A row of queries. It sees the keys of [first, end) whose id is its own. No key: first >= end, and
// the row is dead: query and dout may hold anything there.
struct alignas(16) RowRecord {
  int32_t first;
  int32_t end;
  int32_t id;
  int32_t position;  // the key it is aligned with: ALiBi measures distances from there
};

// kIntervalRows rows. Dead rows count nowhere but in `dead`.
struct alignas(16) RowTile {
  int32_t first;  // hull of the keys that the rows see; (0, 0) if there are none
  int32_t end;
  // Keys that all the rows see, from the largest `first` of a row to the smallest `end`, which may
  // be less; (0, 0) if `mixed`; (0, kMaxLength) if all rows are dead.
  int32_t core_first;
  int32_t core_end;
  int32_t dead;   // whether there are dead rows; those past the last row are
  int32_t mixed;  // whether the interval of some row holds keys with another id than its own
  int32_t unused[2];
};

// kIntervalKeys keys.
struct alignas(16) KeyTile {
  // The rows, in whole RowTiles (`end` may pass the last row), whose hulls meet these keys, and
  // those between.
  int32_t first;
  int32_t end;
  // Rows that all see all of these keys, dead rows between them not counted; none if there are dead
  // keys.
  int32_t core_first;
  int32_t core_end;
  int32_t dead;  // whether there are dead keys; those past the last key are
  int32_t unused[3];
};

// The queue of the blocks of work of a call, which its kernels fill: the number of the next one,
// then the order of the blocks of each sequence, whatever the size of a block, at least 64 rows or
// keys.
inline constexpr int kQueueHeader = 4;

// In whole 16 bytes, so that what follows is aligned.
constexpr int64_t queue_size(int64_t sequences, int length) {
  return (kQueueHeader + sequences * interval_tiles(length) + 3) / 4 * 4;
}

// Device arrays, row-major. The four that describe the mask have one set of batch dims.
struct IntervalsView {
  const RowRecord* rows;     // [*batch, interval_tiles(query_length) * kIntervalRows]
  const RowTile* row_tiles;  // [*batch, interval_tiles(query_length)]
  const int32_t* keys;       // ids [*batch, interval_tiles(key_length) * kIntervalKeys]; dead: -1
  const KeyTile* key_tiles;  // [*batch, interval_tiles(key_length)]
  int64_t batch_strides[8];  // in sequences
  const float* slopes;       // f32 [*batch, heads], or null: 0
  int64_t slope_strides[8];  // of batch dims, in elements
  float softcap;             // bound of softcap * tanh(logits / softcap); 0: none
  int32_t* queue;            // [queue_size] of the query_length (backward: key_length); scratch
};

}  // namespace jax_flash
