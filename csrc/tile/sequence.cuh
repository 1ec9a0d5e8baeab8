// A sequence's lengths and mask, from the parameters of a call.
#pragma once

#include "host/params.h"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"

namespace jax_flash {

__device__ __forceinline__ int sequence_length(const LengthsView& lengths, int batch, int longest,
                                               const MhaParams& params) {
  if (lengths.data == nullptr) return longest;
  return max(0, min(longest, lengths.data[batch_offset(lengths.batch_strides, batch, params)]));
}

__device__ __forceinline__ RowMask row_mask(const MhaParams& params, int batch) {
  return RowMask::make(sequence_length(params.query_lengths, batch, params.query_length, params),
                       sequence_length(params.key_lengths, batch, params.key_length, params),
                       params.window_left, params.window_right, params.bottom_right);
}

}  // namespace jax_flash
