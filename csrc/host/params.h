// What the host hands to a kernel. Plain structs, passed by value as __grid_constant__ parameters,
// so that a captured CUDA graph holds everything a launch needs.
#pragma once

#include <cstdint>

#include "host/fast_divisor.h"
#include "host/intervals.h"

namespace jax_flash {

// Leading batch dims that stay apart after neighbours with equal strides were merged.
inline constexpr int kMaxBatchDims = 8;

// A read-only operand. Strides are in elements; a stride of 0 along a batch dim shares the operand.
struct TensorView {
  const void* data;
  int64_t batch_strides[kMaxBatchDims];
  int64_t row_stride;   // from position to position
  int64_t head_stride;  // from head to head
  int32_t alignment;    // bytes that every row's address is a multiple of: 16, 4 or 2
};

// int32 [batch], or absent (null).
struct LengthsView {
  const int32_t* data;
  int64_t batch_strides[kMaxBatchDims];
};

// The scale of the logits, split so that the kernel compares and exponentiates scores with a
// positive factor; any other scale goes into the scores first.
struct SoftmaxScale {
  float first;   // multiplied into q.k; 1 (and then skipped) for every scale of practice
  float second;  // > 0: natural logits = second * score
  float log2;    // second * log2(e)
  float slack;   // how far, in scores, a row's maximum may pass its reference point

  // Exponentials stay at or below 2^kSlackLog2: far from f16's 65504, sums far from f32's limit.
  static constexpr float kSlackLog2 = 8.0f;
  static constexpr float kLog2e = 1.4426950408889634f;

  static constexpr SoftmaxScale make(float scale) {
    const bool direct = scale > 1e-20f;
    const float second = direct ? scale : 1.0f;
    return {direct ? 1.0f : scale, second, second * kLog2e, kSlackLog2 / (second * kLog2e)};
  }
};

// What forward and backward have in common: the operands of attention and its mask.
struct MhaParams {
  TensorView query;           // [batch, query_length, heads, head_dim]
  TensorView key;             // [batch, key_length, kv_heads, head_dim]
  TensorView value;           // [batch, key_length, kv_heads, head_dim_v]
  LengthsView query_lengths;  // valid queries of each sequence
  LengthsView key_lengths;    // valid keys of each sequence

  int32_t batch_dims;
  int32_t batch_sizes[kMaxBatchDims];
  int32_t batch;  // product of batch_sizes
  int32_t query_length;
  int32_t key_length;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t head_dim_v;

  SoftmaxScale scale;    // natural logits = scale * q.k
  int32_t window_left;   // -1: unbounded
  int32_t window_right;  // -1: unbounded
  bool bottom_right;     // align the last valid query with the last valid key

  // Of kernels with intervals, for which it replaces lengths, windows and alignment.
  IntervalsView intervals;
};

struct MhaFwdParams : MhaParams {
  void* out;   // [batch, query_length, heads, head_dim_v], row-major
  float* lse;  // [batch, heads, query_length], row-major

  // More than 1: the keys that rows see are cut into so many parts, each of which has results of
  // its own, so that out and lse are [batch, key_parts, ...]: sm90/fwd_parts.h adds them up.
  // Kernels for sm_90 without intervals do so for operands of 16 bits, no other does.
  int32_t key_parts;

  // Where kernels of the type kSplit have room for the parts of query, key and value, else null:
  // see sm90/fwd_split.cuh.
  void* parts;

  // Set by the launch, for tile/schedule.cuh.
  FastDivisor head_divisor;     // heads
  FastDivisor group_divisor;    // heads / kv_heads
  FastDivisor section_divisor;  // (batch, head) pairs whose keys and values share the L2 at a time
  FastDivisor row_blocks;       // row blocks of a head
  int32_t missing_heads;        // by which batch * heads is short of whole sections
};

// Rows of queries for which `turns` has an entry.
inline constexpr int kBwdTurnRows = 16;

// What the entry of a part of dQ in `turns` is at least when the part is there to be added to,
// where sums have no order.
inline constexpr int kBwdStored = 1 << 20;

// Entries of 4 bytes that the workspace has for `queue`, so that what follows is aligned.
inline constexpr int kBwdQueueEntries = 4;

// Rows that a thread block of bwd_rows.cuh works on.
inline constexpr int kBwdRowGroup = 64;

// Rows that the workspace of the backward has for the queries of a sequence: whole tiles of 80 and
// of 128, whichever the kernel has (64 fit with the latter).
constexpr int bwd_padded_rows(int query_length) {
  const int small = (query_length + 79) / 80 * 80;
  const int large = (query_length + 127) / 128 * 128;
  return ((small > large ? small : large) + kBwdRowGroup - 1) / kBwdRowGroup * kBwdRowGroup;
}

// Width of the sum of the gradient of queries, for a kernel of width `head_dim`: whole parts.
constexpr int bwd_sum_width(int head_dim) { return (head_dim + 63) / 64 * 64; }

// f32, where the gradient of a bias is added up: as BiasView, but for rows of key_length, and zeros
// before. Null: it is not wanted.
struct BiasGradientView {
  float* data;
  int64_t batch_strides[kMaxBatchDims];
  int64_t head_stride;
  int64_t row_stride;
  bool shared;  // some dim shares it
};

// Of the keys of the gradient of a slope: warps that work on the same ones have each its own.
inline constexpr int kSlopeParts = 4;

struct MhaBwdParams : MhaParams {
  float factor;  // of the logits, as called: natural logits = factor * q.k

  // Row-major over the full batch: out and dout [batch, query_length, heads, head_dim_v],
  // lse and dlse f32 [batch, heads, query_length]. dlse may be null: 0.
  const void* out;
  const void* dout;
  const float* lse;
  const float* dlse;

  // Row-major over the full batch, each in the operands' type, or f32 if its flag says so.
  void* dquery;  // [batch, query_length, heads, head_dim]
  void* dkey;    // [batch, key_length, kv_heads, head_dim]
  void* dvalue;  // [batch, key_length, kv_heads, head_dim_v]
  bool f32_dquery;
  bool f32_dkey;
  bool f32_dvalue;
  BiasGradientView dbias;
  // f32 [batch, heads, kSlopeParts, key_length] over the full batch, zeroed, or null: the sum over
  // all parts and keys is the gradient of minus the slope of a head.
  float* dslopes;
  bool deterministic;

  // Whether gradients of what is added to the logits are wanted. That is done after the soft cap,
  // so its derivative counts as 1: if there is a cap, dquery and dkey are not those of the call.
  constexpr bool takes_cap_for_linear() const {
    return dbias.data != nullptr || dslopes != nullptr;
  }

  // Workspace, written by the kernel that runs first. Rows are padded to bwd_padded_rows, widths
  // to bwd_sum_width.
  float* dquery_sum;  // [batch, heads, padded rows, padded width], in the order the kernel likes
  float* row_lse;     // [batch, heads, padded rows]: log2(e) * lse; +inf in rows without keys
  float* row_delta;   // [batch, heads, padded rows]: sum(out * dout) - dlse; 0 in such rows
  int32_t* turns;     // [batch, heads, padded rows / kBwdTurnRows]: who has added; zeroed
  int32_t* queue;     // how many blocks of work have been taken, where they are; zeroed
  // Where blocks of work may have some of a group's query heads only: sums of their parts of dkey
  // and dvalue, in the order the kernel likes, and for how many there is room. The call's shape
  // says how many parts pay, and how much of this has to be zeros.
  float* parts;
  int64_t part_floats;
  int64_t zeroed_floats;

  // Whether the first to add to a part of dquery_sum stores instead, and there are no zeros before;
  // a part to which nothing was added has an entry of 0 in `turns`.
  bool first_stores;

  // Rows of a tile if the main kernel makes dquery of its sum, else 0. What bwd_prepare writes
  // then: zeros in the rows of dquery that see no key, and in the sum of tiles to which one block
  // adds.
  int32_t finished_rows;
};

// Whether a backward takes the kernels for what is_dense says. They have the gradient of slopes,
// too.
constexpr bool is_dense(const MhaBwdParams& params) {
  return is_dense(params.intervals) || params.dslopes != nullptr;
}

}  // namespace jax_flash
