// csrc/ptx/address.cuh for the emulator: an address is an offset in the shared memory.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulator::shared_memory);
}

inline uint32_t fresh_address(uint32_t address) { return address; }

}  // namespace jax_flash::ptx
