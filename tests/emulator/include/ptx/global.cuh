// csrc/ptx/global.cuh for the emulator.
#pragma once

#include <cuda_runtime.h>

namespace jax_flash::ptx {

inline uint4 ld_global_nc_v4(const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) emulator::fail("a load is not aligned");
  return *static_cast<const uint4*>(source);
}

}  // namespace jax_flash::ptx
