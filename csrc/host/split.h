// How large the parts of float32 operands are, of which a kernel of type kSplit makes copies.
#pragma once

#include <cstdint>

#include "host/params.h"

namespace jax_flash {

// Sequences of an operand: those that share it count once.
inline int64_t own_sequences(const MhaParams& params, const TensorView& view) {
  int64_t count = 1;
  for (int dim = 0; dim < params.batch_dims; ++dim) {
    if (view.batch_strides[dim] != 0) count *= params.batch_sizes[dim];
  }
  return count;
}

// bf16 that the parts of all operands take, each padded to the kernel's width; plan.py in
// jax_flash/_src has the same.
inline int64_t split_elements(const MhaParams& params, int head_dim, int head_dim_v) {
  const int64_t query =
      own_sequences(params, params.query) * params.query_length * params.heads * head_dim;
  const int64_t keys = int64_t{params.key_length} * params.kv_heads;
  const int64_t key = own_sequences(params, params.key) * keys * head_dim;
  const int64_t value = own_sequences(params, params.value) * keys * head_dim_v;
  return 2 * (query + key + value);
}

}  // namespace jax_flash
