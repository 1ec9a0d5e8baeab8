// What the host hands to the kernels of csrc/ops.
#pragma once

#include <cstdint>

#include "host/fast_divisor.h"

namespace jax_flash::ops {

enum class Element : int32_t { kF32, kBf16, kF16 };

// Rows [groups, rows, columns] of an operand; a stride of 0 shares it along that dim. Strides are
// in elements.
struct Rows {
  const void* data;
  int64_t group_stride;
  int64_t row_stride;
};

// One row of the parameters of `sample`, as jax_flash/_src/sample_reference.py makes them.
struct SampleRow {
  uint32_t random_high;
  uint32_t random_low;
  float factor;       // units of 2^-20 bits for each unit of the logits
  uint32_t k;         // tokens that top-k keeps, at least 1
  uint32_t mass;      // that top-p keeps, in 2^-20; more than 2^20: all
  uint32_t distance;  // units by which min-p lets a token fall short of the best
};
static_assert(sizeof(SampleRow) == 24, "six words in Python");

struct SampleParams {
  Rows logits;      // [groups, rows, size]
  Rows table;       // SampleRow as uint32 [groups, rows, 6]
  Rows mask;        // bool [groups, rows, size], or null
  int32_t* tokens;  // [groups, rows]
  int32_t rows;     // of a group
  int32_t size;
};

struct TopKParams {
  Rows logits;       // [groups, rows, size]
  void* values;      // [groups, rows, k], in the type of the logits
  int32_t* indices;  // [groups, rows, k]
  int32_t rows;
  int32_t size;
  int32_t k;
};

struct RmsNormParams {
  Rows x;         // [groups, rows, columns]
  Rows residual;  // the same, or null
  Rows weight;    // [groups, columns]; row_stride is 0
  void* y;        // [groups, rows, columns], in x's type
  void* sum;      // the same, if there is a residual
  float* scale;   // [groups, rows]: 1 / rms
  int32_t groups;
  int32_t rows;
  int32_t columns;
  float eps;
  bool f32_weight;  // else it has x's type
};

struct RmsNormBwdParams {
  Rows x;        // [groups, rows, columns]: what was normalised
  Rows weight;   // [groups, columns]
  Rows scale;    // f32 [groups, rows]
  Rows dy;       // [groups, rows, columns]
  Rows dsum;     // the same, or null: added to dx
  void* dx;      // [groups, rows, columns], in x's type
  float* parts;  // [groups, blocks, columns]: each block's part of the gradient of the weight
  int32_t groups;
  int32_t rows;
  int32_t columns;
  int32_t blocks;
  bool f32_weight;
};

// Token t of a sequence of length n stands at position n + t. Strides are in elements; results and
// caches are row-major. A row of the caches is one token: page * page_size + place in the page,
// after those of the pools before. Without a page table each sequence is a page of the only pool.
struct RopeAppendParams {
  const void* query;          // [batch, tokens, heads, width]
  const void* key;            // [batch, tokens, kv_heads, width]
  const void* value;          // [batch, tokens, kv_heads, value_width]
  const int32_t* lengths;     // [batch], before the new tokens
  const float* inv_freq;      // [batch or 1, pairs]
  const int32_t* page_table;  // [batch, max_pages], or null
  void* out;                  // as query
  void* k_cache;              // [pools, pages, page_size, kv_heads, width]
  void* v_cache;              // [pools, pages, page_size, kv_heads, value_width]
  int64_t query_stride;       // from token to token
  int64_t key_stride;
  int64_t value_stride;
  int64_t inv_freq_stride;  // pairs, or 0 if all sequences share them
  int32_t batch;
  int32_t tokens;
  int32_t heads;
  int32_t kv_heads;
  int32_t width;
  int32_t value_width;
  int32_t pairs;           // the first elements of a head turn, two a pair
  int32_t pool_sequences;  // that write to a pool, one after another
  int32_t pages;           // of a pool
  int32_t page_size;
  int32_t max_pages;
  bool interleaved;  // whether neighbours are pairs, else elements of two halves

  // Set by the launch.
  int32_t pieces;        // of a head of queries or keys, what turns before the rest
  int32_t value_pieces;  // of all values of a token
  FastDivisor token_divisor;
  FastDivisor pool_divisor;
  FastDivisor page_divisor;
  FastDivisor piece_divisor;
};

}  // namespace jax_flash::ops
