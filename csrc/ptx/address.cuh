// Generic to shared address conversion. Shared addresses are 32-bit byte addresses.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace jax_flash::ptx
