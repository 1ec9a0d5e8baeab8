// csrc/ptx/cp_async.cuh for the emulator: copies are done when they are asked for.
#pragma once

#include <cstring>

#include "emulator.h"

namespace jax_flash::ptx {

inline void copy_zero_filled(uint32_t shared, const void* global, int bytes, int valid_bytes) {
  const bool aligned = shared % bytes == 0 && reinterpret_cast<uintptr_t>(global) % bytes == 0;
  if (!aligned) emulator::fail("cp.async is not aligned", shared);
  std::memset(emulator::shared_pointer(shared), 0, bytes);
  if (valid_bytes > 0) std::memcpy(emulator::shared_pointer(shared), global, valid_bytes);
}
inline void cp_async_16(uint32_t shared, const void* global, int valid_bytes) {
  copy_zero_filled(shared, global, 16, valid_bytes);
}
inline void cp_async_4(uint32_t shared, const void* global, int valid_bytes) {
  copy_zero_filled(shared, global, 4, valid_bytes);
}
inline void cp_async_commit_group() {}
template <int kPending>
void cp_async_wait_group() {}

}  // namespace jax_flash::ptx
