// The one mask of the package: every query row sees an interval of keys.
//
// Causal (both alignments), sliding windows and lengths all reduce to [first, end). Rows of one
// sequence have intervals whose two ends never decrease with the row, so the keys that a block of
// rows needs, and the keys that all its rows see, follow from its first and last row alone.
// jax_flash/_src/mask.py holds the same formula for jnp; tests compare the two.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JAX_FLASH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_FLASH_HOST_DEVICE inline
#endif

namespace jax_flash {

// Keys [first, end); first >= end means that the row sees nothing.
struct KeyInterval {
  int first;
  int end;
};

// Query rows [first, end), of which there may be none.
struct RowInterval {
  int first;
  int end;
};

inline constexpr int kUnbounded = -1;
// Sequences are shorter than this. Also what an unbounded or larger window is cut to: it reaches
// every key from every position, and all sums below stay within 32 bits.
inline constexpr int kMaxLength = 1 << 30;

JAX_FLASH_HOST_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
JAX_FLASH_HOST_DEVICE int max_int(int a, int b) { return a > b ? a : b; }

// One sequence's mask. A query row r stands at position r + shift among the keys and sees the
// keys from window_left before it to window_right after it, both inclusive.
struct RowMask {
  int query_length;  // rows at and after it are padding and see nothing
  int key_length;    // keys at and after it are seen by no row
  int window_left;   // 0..kMaxLength
  int window_right;  // 0..kMaxLength; causal is 0
  int shift;  // position of row 0: 0 for top-left, key_length - query_length for bottom-right

  // Windows may be kUnbounded.
  JAX_FLASH_HOST_DEVICE static RowMask make(int query_length, int key_length, int window_left,
                                            int window_right, bool bottom_right) {
    return {query_length, key_length, cut_window(window_left), cut_window(window_right),
            bottom_right ? key_length - query_length : 0};
  }

  JAX_FLASH_HOST_DEVICE KeyInterval interval(int row) const {
    if (row >= query_length) return {0, 0};
    const int position = row + shift;
    const int first = min_int(max_int(position - window_left, 0), key_length);
    const int end = min_int(position + window_right + 1, key_length);
    return {first, max_int(end, first)};
  }

  // The rows that see every key of [key_begin, key_end), which is not empty.
  JAX_FLASH_HOST_DEVICE RowInterval rows_of_all(int key_begin, int key_end) const {
    if (key_end > key_length) return {0, 0};
    const int first = max_int(key_end - 1 - window_right - shift, 0);
    const int end = min_int(key_begin - shift, query_length - 1 - window_left) + window_left + 1;
    return {first, max_int(end, first)};
  }

  // The rows that see some key of [key_begin, key_end).
  JAX_FLASH_HOST_DEVICE RowInterval rows(int key_begin, int key_end) const {
    const int last = min_int(key_end, key_length) - 1;
    if (key_begin > last) return {0, 0};
    const int first = min_int(max_int(key_begin - window_right - shift, 0), query_length);
    const int end = min_int(last - shift, query_length - 1 - window_left) + window_left + 1;
    return {first, max_int(end, first)};
  }

  // The keys that some row of [row_begin, row_end) sees.
  JAX_FLASH_HOST_DEVICE KeyInterval hull(int row_begin, int row_end) const {
    const int last = min_int(row_end, query_length) - 1;
    if (row_begin > last) return {0, 0};
    return {interval(row_begin).first, interval(last).end};
  }

  // The keys that every row of [row_begin, row_end) sees, padding rows not counted.
  JAX_FLASH_HOST_DEVICE KeyInterval core(int row_begin, int row_end) const {
    const int last = min_int(row_end, query_length) - 1;
    if (row_begin > last) return {0, 0};
    return {interval(last).first, interval(row_begin).end};
  }

 private:
  JAX_FLASH_HOST_DEVICE static int cut_window(int window) {
    return window == kUnbounded ? kMaxLength : min_int(window, kMaxLength);
  }
};

}  // namespace jax_flash
