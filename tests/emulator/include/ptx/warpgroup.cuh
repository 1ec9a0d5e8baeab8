// csrc/ptx/warpgroup.cuh for the emulator.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline void bar_sync(int id, int threads) { emulator::barrier(id, threads, true); }
inline void bar_arrive(int id, int threads) { emulator::barrier(id, threads, false); }
inline void bar_arrive_if(bool arrives, int id, int threads) {
  if (arrives) bar_arrive(id, threads);
}
inline void forget_memory() {}
template <int kCount>
void setmaxnreg_inc() {}
template <int kCount>
void setmaxnreg_dec() {}

}  // namespace jax_flash::ptx
