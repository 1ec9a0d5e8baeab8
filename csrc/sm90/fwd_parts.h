// The sum of the parts of a forward with MhaFwdParams::key_parts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_flash::sm90 {

inline constexpr int kMaxKeyParts = 16;  // the plan asks for no more

// What the forward has left, and where the sums go: all row-major, out of 16 bits.
struct FwdParts {
  const void* part_out;   // [batch, parts, query_length, heads, width]
  const float* part_lse;  // [batch, parts, heads, query_length]
  void* out;              // [batch, query_length, heads, width]
  float* lse;             // [batch, heads, query_length]
  int32_t batch;
  int32_t parts;  // up to kMaxKeyParts
  int32_t query_length;
  int32_t heads;
  int32_t width;  // a multiple of 8
  bool bf16;      // else f16
};

// Enqueues one kernel, behind that forward.
cudaError_t add_fwd_parts(const FwdParts& parts, cudaStream_t stream);

}  // namespace jax_flash::sm90
