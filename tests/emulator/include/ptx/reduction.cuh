// csrc/ptx/reduction.cuh for the emulator.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace jax_flash::ptx {

inline void red_add_v4(float* target, float x, float y, float z, float w) {
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0) emulator::fail("a red.v4 is not aligned");
  target[0] += x;
  target[1] += y;
  target[2] += z;
  target[3] += w;
}
inline void red_add(float* target, float x) { *target += x; }
inline void red_add(int32_t* target, int32_t value) { *target += value; }
inline void red_release_add(int32_t* target, int32_t value) { *target += value; }
inline int32_t atom_acquire_add(int32_t* target, int32_t value) {
  const int32_t before = *target;
  *target += value;
  return before;
}
inline int32_t atom_relaxed_add(int32_t* target, int32_t value) {
  return atom_acquire_add(target, value);
}
inline uint32_t atom_inc(uint32_t* target, uint32_t last) {
  const uint32_t before = *target;
  *target = before >= last ? 0 : before + 1;
  return before;
}
inline uint32_t atom_add(uint32_t* target, uint32_t value) {
  const uint32_t before = *target;
  *target += value;
  return before;
}
// Whoever asks again lets others run; where thread blocks run one after another, what one waits for
// must have been done.
inline int32_t ld_acquire(const int32_t* source) {
  emulator::yield();
  return *source;
}

}  // namespace jax_flash::ptx
