// csrc/ptx/prefetch.cuh for the emulator: nothing happens.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

inline void prefetch_l2(const void*) {}

inline void bulk_prefetch_l2(const void*, uint32_t) {}

}  // namespace jax_flash::ptx
