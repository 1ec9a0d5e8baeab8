// Runs device code on the CPU, thread for thread.
//
// The headers beside this one stand in for those of CUDA and for csrc/ptx; everything else of the
// kernels is compiled as it is. Each thread of a thread block is a fiber that runs until it has to
// wait; thread blocks run one after another. Copies and matrix products are done when they are
// asked for, so this finds wrong logic (indices, masks, barriers that are never completed or
// arrived at too often), and neither races nor what a real machine does in the meantime.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emulator {

struct Index {
  int x = 0, y = 0, z = 0;
};

[[noreturn]] inline void fail(const char* what, long value = 0) {
  std::fprintf(stderr, "emulator: %s (%ld)\n", what, value);
  std::abort();
}

// Where the lanes of a warp exchange words.
struct Warp {
  static constexpr int kWords = 6;
  using Words = uint64_t[32][kWords];
  int arrived = 0;
  int round = 0;
  Words words[2];
};

struct Barrier {
  int arrived = 0;
  int round = 0;
};

struct Block {
  Warp warps[32];
  Barrier barriers[16];  // 0 is that of __syncthreads
  int votes[2];          // of threads that arrive there in an even or odd round
  int threads = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it waits
  bool started = false;
  Index thread;
  Block* block;
  bool done = false;
};

inline Fiber* current;
inline Index threadIdx;  // of the fiber that runs
inline Index blockIdx;
inline Index gridDim;
inline Index blockDim;
inline jmp_buf scheduler;
inline long progress;  // changes when some fiber gets on
inline unsigned char* shared_memory;

inline int lane() { return current->thread.x % 32; }
inline int warp() { return current->thread.x / 32; }

// Lets the other fibers run. Jumps, which unlike swapcontext make no system call; _FORTIFY_SOURCE
// would take those from stack to stack for errors.
[[gnu::noinline]] inline void yield() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

// Runs `current` until it yields or ends.
[[gnu::noinline]] inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->start);
}

template <typename Ready>
void wait_until(Ready ready) {
  while (!ready()) yield();
  ++progress;
}

// All lanes of the warp give `count` words and see everybody's.
inline Warp::Words& exchange(const uint64_t* words, int count) {
  Warp& warp = current->block->warps[emulator::warp()];
  const int round = warp.round;
  Warp::Words& all = warp.words[round % 2];
  for (int i = 0; i < count; ++i) all[lane()][i] = words[i];
  ++progress;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.round;
  } else {
    wait_until([&] { return warp.round != round; });
  }
  return all;
}

inline void barrier(int id, int threads, bool waits) {
  Barrier& barrier = current->block->barriers[id];
  const int round = barrier.round;
  ++progress;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.round;
  } else if (waits) {
    wait_until([&] { return barrier.round != round; });
  }
}

// The barrier of all threads; how many of them voted for.
inline int vote(bool is_for) {
  Barrier& barrier = current->block->barriers[0];
  int& votes = current->block->votes[barrier.round % 2];
  if (barrier.arrived == 0) votes = 0;
  votes += is_for;
  emulator::barrier(0, current->block->threads, true);
  return votes;
}

inline void* shared_pointer(uint32_t address) {
  if (address >= 227 * 1024) fail("shared address out of range", address);
  return shared_memory + address;
}

template <typename T>
T bit_cast(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

inline std::function<void()> body;

inline void run_fiber() {
  body();
  current->done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

// Runs `kernel` for each thread of each thread block.
inline void launch(int grid_x, int grid_y, int threads, unsigned char* shared,
                   std::function<void()> kernel) {
  constexpr size_t kStack = 192 << 10;
  body = std::move(kernel);
  gridDim = {grid_x, grid_y, 1};
  blockDim = {threads, 1, 1};
  shared_memory = shared;
  std::vector<std::unique_ptr<char[]>> stacks(threads);
  for (auto& stack : stacks) stack.reset(new char[kStack]);
  for (int id = 0; id < grid_x * grid_y; ++id) {
    Block block;
    block.threads = threads;
    blockIdx = {id % grid_x, id / grid_x, 0};
    std::memset(shared, 0xab, 227 * 1024);
    std::vector<Fiber> fibers(threads);
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.thread = {t, 0, 0};
      fiber.block = &block;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = stacks[t].get();
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, run_fiber, 0);
    }
    for (int left = threads; left > 0;) {
      const long before = progress;
      for (Fiber& fiber : fibers) {
        if (fiber.done) continue;
        current = &fiber;
        threadIdx = fiber.thread;
        resume();
        left -= fiber.done;
      }
      if (progress == before) fail("threads wait for each other; so many are left", left);
    }
  }
}

}  // namespace emulator
