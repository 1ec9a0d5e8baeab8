// A call as tests/emulator_test.py describes it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/params.h"

namespace jax_flash {

// As `Arguments` there. Batches share an operand whose batch stride is 0.
struct Arguments {
  const void* query;
  const void* key;
  const void* value;
  void* out;
  const void* dout;
  float* lse;
  const float* dlse;
  const int32_t* query_lengths;
  const int32_t* key_lengths;
  void* dquery;
  void* dkey;
  void* dvalue;
  float* workspace;
  const RowRecord* rows;  // these nine: of kernels with intervals
  const RowTile* row_tiles;
  const int32_t* keys;
  const KeyTile* key_tiles;
  const float* slopes;
  int32_t* queue;  // of a forward with intervals; that of a backward is in the workspace
  const uint32_t* seeds;
  const void* bias;
  const uint32_t* mask;
  float* dbias;
  float* dslopes;
  int64_t batch_strides[3];
  int64_t interval_stride;
  int64_t slope_stride;
  int64_t seed_stride;
  int64_t bias_strides[3];  // of batch, heads and rows, in elements; so are the next
  int64_t mask_strides[3];
  int64_t dbias_strides[3];
  int64_t part_floats;  // of the workspace, for parts of groups of heads
  int32_t batch;
  int32_t query_length;
  int32_t key_length;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t head_dim_v;
  int32_t window_left;
  int32_t window_right;
  int32_t bottom_right;
  int32_t f16;
  int32_t f32_results;
  int32_t deterministic;
  int32_t multiprocessors;
  int32_t parts;          // of the keys, in the forward
  int32_t tf32_products;  // of one of f32: 3 or 1; 0 where operands have 16 bits
  int32_t dropout;
  int32_t bias_type;
  int32_t dbias_shared;
  float scale;
  float softcap;
};

inline TensorView view(const void* data, int64_t batch_stride, int heads, int width, bool f32) {
  TensorView result{};
  result.data = data;
  result.batch_strides[0] = batch_stride;
  result.row_stride = int64_t{heads} * width;
  result.head_stride = width;
  const int bytes = width * (f32 ? 4 : 2);
  result.alignment = bytes % 16 == 0 ? 16 : bytes % 4 == 0 ? 4 : 2;
  return result;
}

inline void describe(const Arguments& from, MhaParams& to) {
  const bool f32 = from.tf32_products != 0;
  to.query = view(from.query, from.batch_strides[0], from.heads, from.head_dim, f32);
  to.key = view(from.key, from.batch_strides[1], from.kv_heads, from.head_dim, f32);
  to.value = view(from.value, from.batch_strides[2], from.kv_heads, from.head_dim_v, f32);
  to.query_lengths = {from.query_lengths, {1}};
  to.key_lengths = {from.key_lengths, {1}};
  to.batch_dims = 1;
  to.batch_sizes[0] = to.batch = from.batch;
  to.query_length = from.query_length;
  to.key_length = from.key_length;
  to.heads = from.heads;
  to.kv_heads = from.kv_heads;
  to.head_dim = from.head_dim;
  to.head_dim_v = from.head_dim_v;
  to.scale = SoftmaxScale::make(from.scale);
  to.window_left = from.window_left;
  to.window_right = from.window_right;
  to.bottom_right = from.bottom_right != 0;
  to.intervals = {from.rows,
                  from.row_tiles,
                  from.keys,
                  from.key_tiles,
                  {from.interval_stride},
                  from.slopes,
                  {from.slope_stride},
                  from.softcap,
                  from.queue,
                  from.seeds,
                  {from.seed_stride},
                  from.dropout,
                  dropout_scale(from.dropout)};
  const int64_t* strides = from.bias_strides;
  to.intervals.bias = {
      from.bias, {strides[0]}, strides[1], strides[2], static_cast<BiasType>(from.bias_type)};
  strides = from.mask_strides;
  to.intervals.mask = {from.mask, {strides[0]}, strides[1], strides[2]};
}

// Kernels of f32 are 64 or 128 wide.
inline bool is_narrow(const Arguments& from) {
  return std::max(from.head_dim, from.head_dim_v) <= 64;
}

inline MhaFwdParams forward_params(const Arguments& from) {
  MhaFwdParams to{};
  describe(from, to);
  to.out = from.out;
  to.lse = from.lse;
  return to;
}

// `width`: of the sum of the gradient of queries in the workspace.
inline MhaBwdParams backward_params(const Arguments& from, int width) {
  MhaBwdParams to{};
  describe(from, to);
  to.factor = from.scale;
  to.out = from.out;
  to.dout = from.dout;
  to.lse = from.lse;
  to.dlse = from.dlse;
  to.dquery = from.dquery;
  to.dkey = from.dkey;
  to.dvalue = from.dvalue;
  to.f32_dquery = to.f32_dkey = to.f32_dvalue = from.f32_results != 0;
  to.deterministic = from.deterministic != 0;
  const int64_t* const strides = from.dbias_strides;
  to.dbias = {from.dbias, {strides[0]}, strides[1], strides[2], from.dbias_shared != 0};
  to.dslopes = from.dslopes;
  const int64_t rows = int64_t{from.batch} * from.heads * bwd_padded_rows(from.query_length);
  to.dquery_sum = from.workspace;
  to.row_lse = to.dquery_sum + rows * width;
  to.row_delta = to.row_lse + rows;
  to.turns = reinterpret_cast<int32_t*>(to.row_delta + rows);
  to.queue = to.turns + rows / kBwdTurnRows;
  to.intervals.queue = to.queue + kBwdQueueEntries;
  const int64_t order = from.rows == nullptr ? 0 : queue_size(from.batch, from.key_length);
  to.parts = reinterpret_cast<float*>(to.intervals.queue + order);
  to.part_floats = from.part_floats;
  return to;
}

}  // namespace jax_flash
