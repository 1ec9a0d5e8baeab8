// Additions to global memory and the order among thread blocks (PTX ISA 9.7.13).
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

// Four neighbouring f32, 16-byte aligned. sm_90.
__device__ __forceinline__ void red_add_v4(float* target, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(x), "f"(y),
               "f"(z), "f"(w)
               : "memory");
}

// Adds behind all that this thread has observed and written.
__device__ __forceinline__ void red_release_add(int32_t* target, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}

__device__ __forceinline__ int32_t ld_acquire(const int32_t* source) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

// Adds, and returns what was there; what follows comes after what others had released there.
__device__ __forceinline__ int32_t atom_acquire_add(int32_t* target, int32_t value) {
  int32_t before;
  asm volatile("atom.acquire.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(target), "r"(value)
               : "memory");
  return before;
}

// The same without an order.
__device__ __forceinline__ int32_t atom_relaxed_add(int32_t* target, int32_t value) {
  int32_t before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(target), "r"(value)
               : "memory");
  return before;
}

// Counts up, and from `last` on from zero again; returns what was there. It comes behind all that
// this thread has observed and written; what follows comes after what others did before theirs.
__device__ __forceinline__ uint32_t atom_inc(uint32_t* target, uint32_t last) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(target), "r"(last)
               : "memory");
  return before;
}

// The same for a sum: adds, and returns what was there.
__device__ __forceinline__ uint32_t atom_add(uint32_t* target, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(target), "r"(value)
               : "memory");
  return before;
}

__device__ __forceinline__ void red_add(int32_t* target, int32_t value) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}

__device__ __forceinline__ void red_add(float* target, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target), "f"(x) : "memory");
}

}  // namespace jax_flash::ptx
