// csrc/ptx/once.cuh for the emulator: plain loads and stores.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

inline uint64_t l2_evict_first() { return 1; }
inline uint64_t l2_evict_normal() { return 0; }

inline uint4 load_once(const void* address, uint64_t) {
  return *static_cast<const uint4*>(address);
}

inline void store_once(void* address, const uint4& value, uint64_t) {
  *static_cast<uint4*>(address) = value;
}

}  // namespace jax_flash::ptx
