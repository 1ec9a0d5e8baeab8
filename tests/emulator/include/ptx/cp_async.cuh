// csrc/ptx/cp_async.cuh for the emulator: a copy is done when it is asked for or, as often, when it
// is waited for.
#pragma once

#include <cstring>

#include "emulator.h"
#include "ptx/mbarrier.cuh"

namespace jax_flash::ptx {

inline void copy_zero_filled(const emulator::AsyncCopy& copy) {
  std::memset(emulator::shared_pointer(copy.shared), 0, copy.bytes);
  if (copy.valid_bytes > 0) {
    std::memcpy(emulator::shared_pointer(copy.shared), copy.global, copy.valid_bytes);
  }
}
inline void cp_async(const emulator::AsyncCopy& copy) {
  const bool aligned =
      copy.shared % copy.bytes == 0 && reinterpret_cast<uintptr_t>(copy.global) % copy.bytes == 0;
  if (!aligned) emulator::fail("cp.async is not aligned", copy.shared);
  if (emulator::random_below(2) == 0) {
    copy_zero_filled(copy);
  } else {
    emulator::current->copies.back().push_back(copy);
  }
}
inline void cp_async_16(uint32_t shared, const void* global, int valid_bytes) {
  cp_async({shared, global, 16, valid_bytes});
}
inline void cp_async_4(uint32_t shared, const void* global, int valid_bytes) {
  cp_async({shared, global, 4, valid_bytes});
}
inline void cp_async_commit_group() { emulator::current->copies.emplace_back(); }
template <int kPending>
void cp_async_wait_group() {
  auto& copies = emulator::current->copies;
  while (copies.size() > kPending + 1) {
    for (const emulator::AsyncCopy& copy : copies.front()) copy_zero_filled(copy);
    copies.pop_front();
  }
}
inline void cp_async_mbarrier_arrive(uint32_t barrier) {
  for (auto& group : emulator::current->copies) {
    for (const emulator::AsyncCopy& copy : group) copy_zero_filled(copy);
    group.clear();
  }
  mbarrier_arrive(barrier);
}

}  // namespace jax_flash::ptx
