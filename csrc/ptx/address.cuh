// Generic to shared address conversion. Shared addresses are 32-bit byte addresses.
#pragma once

#include <cstdint>

namespace jax_flash::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same address, which the compiler takes for a new one: what follows from it is computed where
// it is needed, instead of being kept in registers through a loop.
__device__ __forceinline__ uint32_t fresh_address(uint32_t address) {
  asm volatile("" : "+r"(address));
  return address;
}

}  // namespace jax_flash::ptx
