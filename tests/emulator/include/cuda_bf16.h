// bfloat16 for the emulator.
#pragma once

#include "emulator.h"

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    const uint32_t word = static_cast<uint32_t>(emulator::bits_of(value));
    const bool nan = (word & 0x7fffffff) > 0x7f800000;
    bits = nan ? 0x7fff : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    return emulator::bit_cast<float>(static_cast<uint64_t>(bits) << 16);
  }
};
