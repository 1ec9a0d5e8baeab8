// Special registers.
#pragma once

namespace jax_flash::ptx {

// The thread's lane in its warp. Volatile: it is read again where it is needed, and what follows
// from it is computed there, because a register that holds it through a loop costs more.
__device__ __forceinline__ int laneid() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

}  // namespace jax_flash::ptx
