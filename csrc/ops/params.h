// What the host hands to the kernels of csrc/ops.
#pragma once

#include <cstdint>

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

}  // namespace jax_flash::ops
