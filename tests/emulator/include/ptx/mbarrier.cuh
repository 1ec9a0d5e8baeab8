// csrc/ptx/mbarrier.cuh for the emulator.
#pragma once

#include <map>

#include "emulator.h"

namespace jax_flash::ptx {

struct MbarrierState {
  int expected;
  int pending;
  long bytes;
  uint32_t phase;
};

inline std::map<uint32_t, MbarrierState> mbarriers;  // of the thread block that runs

inline void mbarrier_progress(MbarrierState& state) {
  ++emulator::progress;
  if (state.pending == 0 && state.bytes == 0) {
    state.pending = state.expected;
    state.phase ^= 1;
  }
}
inline void mbarrier_init(uint32_t barrier, int arrivals) {
  mbarriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  MbarrierState& state = mbarriers.at(barrier);
  if (--state.pending < 0) emulator::fail("too many arrivals at an mbarrier", barrier);
  state.bytes += bytes;
  mbarrier_progress(state);
}
inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
inline void mbarrier_arrive_if(bool arrives, uint32_t barrier) {
  if (arrives) mbarrier_arrive(barrier);
}
inline void mbarrier_complete(uint32_t barrier, uint32_t bytes) {
  MbarrierState& state = mbarriers.at(barrier);
  state.bytes -= bytes;
  mbarrier_progress(state);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  const MbarrierState& state = mbarriers.at(barrier);
  emulator::wait_until([&] { return state.phase != parity; });
}

}  // namespace jax_flash::ptx
