// Outputs of float32, from the accumulators to global memory.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "sm90/fwd_block.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm90 {

// Of rows `row` and `row` + 8 of a block, normalised by `inverse`: four lanes write 32 bytes of
// either. A row without keys gives 0, even if its accumulators hold 0 * infinity.
template <typename Config>
__device__ __forceinline__ void store_floats(const MhaFwdParams& params, const FwdPlan& plan,
                                             const FwdBlock<Config>& block, int row,
                                             const float (&out)[Config::kHeadDimV / 2],
                                             const float (&inverse)[2]) {
  const int heads = (1 << plan.pack_shift) - 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int packed = block.first_row + row + 8 * h;
    const int position = packed >> plan.pack_shift;
    bool exists = position >= 0 && position < params.query_length;
    if (Config::kIntervals) exists = row + 8 * h < block.rows;
    const bool empty = inverse[h] == 0.0f;
    float* const target =
        block.out + (int64_t{position} * params.heads + (packed & heads)) * params.head_dim_v +
        fragment_column();
#pragma unroll
    for (int j = 0; j < Config::kHeadDimV / 8; ++j) {
      const float* const pair = out + 4 * j + 2 * h;
      if (exists && 8 * j < params.head_dim_v) {
        *reinterpret_cast<float2*>(target + 8 * j) =
            empty ? make_float2(0.0f, 0.0f)
                  : make_float2(pair[0] * inverse[h], pair[1] * inverse[h]);
      }
    }
  }
}

}  // namespace jax_flash::sm90
