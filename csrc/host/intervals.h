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
  // Of 64 parts of all keys, 1 << hidden_shift each, the lowest bit first: whether a boolean mask
  // hides them from all the rows, for every head. 0: nothing is known.
  uint32_t hidden[2];
};

constexpr int hidden_shift(int key_length) {
  int shift = 6;  // kIntervalKeys
  while ((key_length - 1) >> shift >= 64) ++shift;
  return shift;
}

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

// The factor of what is kept where `threshold` in 256 are dropped, on average.
constexpr float dropout_scale(int threshold) {
  return 256.0f / static_cast<float>(256 - threshold);
}

// Words of 32 bits for a row of the mask: whole 16 bytes.
constexpr int mask_words(int key_length) { return (key_length + 127) / 128 * 4; }

enum class BiasType : int32_t { kBf16, kF16, kF32 };

// [*batch, heads, query_length, key_length in whole eights], or null: none. Strides are in
// elements, 0 along what shares it.
struct BiasView {
  const void* data;
  int64_t batch_strides[8];
  int64_t head_stride;
  int64_t row_stride;
  BiasType type;
};

// Bits [*batch, heads, query_length, mask_words(key_length)], 1 = attend, or null: none.
struct MaskView {
  const uint32_t* data;
  int64_t batch_strides[8];
  int64_t head_stride;
  int64_t row_stride;
};

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
  const uint32_t* seeds;     // of dropout, [*batch, heads, 2]; null if there is none
  int64_t seed_strides[8];   // of batch dims, in elements
  int32_t dropout;           // random bytes below it drop a probability; 0: none
  float kept_scale;          // of a probability that is kept: dropout_scale(dropout)
  BiasView bias;
  MaskView mask;
};

// Whether there is anything with an entry for each query and key, which has kernels of its own.
constexpr bool is_dense(const IntervalsView& view) {
  return view.bias.data != nullptr || view.mask.data != nullptr || view.dropout != 0;
}

}  // namespace jax_flash
