// What the threads of a block tell each other.
#pragma once

#include <cuda_runtime.h>

namespace jax_flash::ops {

// The dynamic shared memory of every kernel in csrc/ops.
extern __shared__ __align__(16) unsigned char memory[];

inline constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sum over `warps` warps of which this is number `warp`, in a fixed order, for each of their
// threads. `partial`: `warps` floats of shared memory, which nobody reads any more.
__device__ __forceinline__ float row_sum(float x, int warps, int warp, float* partial) {
  x = warp_sum(x);
  if (warps == 1) return x;
  if (threadIdx.x % kWarp == 0) partial[warp] = x;
  // Orders the partial sums before their reads.
  __syncthreads();
  float total = 0.0f;
#pragma unroll 1
  for (int i = 0; i < warps; ++i) total += partial[i];
  return total;
}

}  // namespace jax_flash::ops
