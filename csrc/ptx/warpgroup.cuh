// What threads of one block need to work in roles: named barriers (PTX ISA 9.7.13.1), register
// reallocation (9.7.19.5), warp-uniform values.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// Waits until `threads` threads have arrived at or wait for barrier `id`.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same where `arrives` holds for the whole warp, without a branch.
__device__ __forceinline__ void bar_arrive_if(bool arrives, int id, int threads) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.u32 arrives, %0, 0;\n"
      "@arrives bar.arrive %1, %2;\n"
      "}" ::"r"(static_cast<uint32_t>(arrives)),
      "r"(id), "r"(threads)
      : "memory");
}

// Nothing at run time: the compiler forgets what it knows of memory, and reads it again.
__device__ __forceinline__ void forget_memory() { asm volatile("" ::: "memory"); }

// All warps of a warpgroup take or give back registers: kCount each from here on.
template <int kCount>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace jax_flash::ptx
