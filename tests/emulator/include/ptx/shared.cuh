// csrc/ptx/shared.cuh for the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace jax_flash::ptx {

inline void st_shared(uint32_t address, uint32_t value) {
  std::memcpy(emulator::shared_pointer(address), &value, 4);
}
inline void st_shared_v2(uint32_t address, float x, float y) {
  const float values[2] = {x, y};
  std::memcpy(emulator::shared_pointer(address), values, 8);
}
inline void st_shared_v4(uint32_t address, const uint32_t (&values)[4]) {
  if (address % 16 != 0) emulator::fail("a store of 16 bytes is not aligned", address);
  std::memcpy(emulator::shared_pointer(address), values, 16);
}
inline float2 ld_shared_v2(uint32_t address) {
  if (address % 8 != 0) emulator::fail("a load of 8 bytes is not aligned", address);
  float2 value;
  std::memcpy(&value, emulator::shared_pointer(address), 8);
  return value;
}
inline uint32_t ld_shared_u32(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, emulator::shared_pointer(address), 4);
  return value;
}
inline float ld_shared_f32(uint32_t address) {
  float value;
  std::memcpy(&value, emulator::shared_pointer(address), 4);
  return value;
}
inline uint4 ld_shared_v4(uint32_t address) {
  uint4 value;
  std::memcpy(&value, emulator::shared_pointer(address), 16);
  return value;
}

}  // namespace jax_flash::ptx
