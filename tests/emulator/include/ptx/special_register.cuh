// csrc/ptx/special_register.cuh for the emulator.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline int laneid() { return emulator::lane(); }

}  // namespace jax_flash::ptx
