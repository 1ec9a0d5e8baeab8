// csrc/ptx/mbarrier.cuh for the emulator.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline void mbarrier_progress(emulator::Mbarrier& state) {
  ++emulator::progress;
  if (state.pending == 0 && state.bytes == 0) {
    state.pending = state.expected;
    state.phase ^= 1;
  }
}
inline void mbarrier_init(uint32_t barrier, int arrivals) {
  emulator::current->block->mbarriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  emulator::Mbarrier& state = emulator::mbarrier_at(barrier);
  if (--state.pending < 0) emulator::fail("too many arrivals at an mbarrier", barrier);
  state.bytes += bytes;
  mbarrier_progress(state);
}
inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
inline void mbarrier_arrive_if(bool arrives, uint32_t barrier) {
  if (arrives) mbarrier_arrive(barrier);
}
inline void mbarrier_complete(uint32_t barrier, uint32_t bytes) {
  emulator::Mbarrier& state = emulator::mbarrier_at(barrier);
  state.bytes -= bytes;
  mbarrier_progress(state);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  const emulator::Mbarrier& state = emulator::mbarrier_at(barrier);
  emulator::wait_until([&] { return state.phase != parity; });
}

}  // namespace jax_flash::ptx
