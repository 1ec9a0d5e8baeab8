// Runs device code on the CPU, thread for thread.
//
// The headers beside this one stand in for those of CUDA and for csrc/ptx; everything else of the
// kernels is compiled as it is. Each thread of a thread block is a fiber that runs until it has to
// wait; thread blocks run one after another, in their order or in any other, those of a cluster by
// turns: each until all of its threads wait. Matrix products, and copies but for cp.async and those
// between the thread blocks of a cluster, are done when they are asked for, so this finds wrong
// logic (indices, masks, barriers that are never completed or arrived at too often), and neither
// races nor what a real machine does in the meantime. Every other cp.async or so is done when it is
// asked for, the rest when the thread waits for it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
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

struct Mbarrier {
  int expected;
  int pending;
  long bytes;
  uint32_t phase;
};

inline constexpr size_t kSharedBytes = 227 << 10;

struct Block {
  Warp warps[32];
  Barrier barriers[16];  // 0 is that of __syncthreads
  int votes[2];          // of threads that arrive there in an even or odd round
  int threads = 0;
  int left = 0;  // threads that have not ended
  Index index;
  int rank = 0;  // in its cluster
  std::map<uint32_t, Mbarrier> mbarriers;
  std::unique_ptr<unsigned char[]> memory;  // while another one of the cluster runs
};

// Asked for by cp.async and not done yet.
struct AsyncCopy {
  uint32_t shared;
  const void* global;
  int bytes;
  int valid_bytes;
};

struct Fiber {
  std::deque<std::vector<AsyncCopy>> copies{1};  // by group; the last one is still open
  ucontext_t start;
  jmp_buf place;  // where it waits
  bool started = false;
  Index thread;
  Block* block;
  int cluster_round = 0;  // of its last arrival
  bool done = false;
};

// The thread blocks that run together, and their barrier.
struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  int left = 0;  // threads that have not ended
};

inline Fiber* current;
inline Index threadIdx;  // of the fiber that runs
inline Index blockIdx;
inline Index gridDim;
inline Index blockDim;
inline jmp_buf scheduler;
inline long progress;  // changes when some fiber gets on
inline unsigned char* shared_memory;
inline Cluster* cluster;
inline int largest_cluster;                      // that was launched since this was set to 0
inline std::vector<std::function<void()>> late;  // copies that were asked for
inline unsigned order = 0;                       // of clusters: as numbered, or by this seed

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

// Of all threads of the cluster that have not ended, as they arrive and end.
inline void complete_cluster_barrier() {
  if (cluster->barrier.arrived == 0 || cluster->barrier.arrived < cluster->left) return;
  cluster->barrier.arrived = 0;
  ++cluster->barrier.round;
  ++progress;
}

// An address of shared memory: an offset, and above it 0 or 1 + the rank of another thread block.
inline uint32_t cluster_address(uint32_t address, int rank) {
  if (address >> 24 != 0 || rank >= static_cast<int>(cluster->blocks.size())) {
    fail("no shared memory in this cluster", rank);
  }
  return address | (rank + 1) << 24;
}
// Whose it is.
inline Block& block_of(uint32_t address) {
  if (address >> 24 == 0) return *current->block;
  Block& block = cluster->blocks[(address >> 24) - 1];
  if (block.left == 0) fail("shared memory of a thread block that has ended", address);
  return block;
}

inline void* shared_pointer(uint32_t address) {
  const uint32_t offset = address & 0xffffff;
  if (offset >= kSharedBytes) fail("shared address out of range", address);
  Block& block = block_of(address);
  return (&block == current->block ? shared_memory : block.memory.get()) + offset;
}

inline Mbarrier& mbarrier_at(uint32_t address) {
  const auto found = block_of(address).mbarriers.find(address & 0xffffff);
  if (found == block_of(address).mbarriers.end()) fail("no mbarrier there", address);
  return found->second;
}

inline uint32_t random_below(uint32_t end) {
  static uint32_t random = 1;
  random = 1664525 * random + 1013904223;
  return static_cast<uint32_t>(uint64_t{random} * end >> 32);
}

// Does `copy` now or, every other time or so, when nothing but such copies can be done.
inline void copy_some_time(std::function<void()> copy) {
  ++progress;
  if (random_below(2) == 0) {
    copy();
  } else {
    late.push_back(std::move(copy));
  }
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
  --current->block->left;
  --cluster->left;
  ++progress;
  complete_cluster_barrier();
  _longjmp(scheduler, 1);
}

// Lets the threads of a block, which `shared_memory` now belongs to, run until all of them wait.
inline void run_block(std::vector<Fiber>& fibers, const Block& block) {
  blockIdx = block.index;
  long before;
  do {
    before = progress;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      current = &fiber;
      threadIdx = fiber.thread;
      resume();
    }
  } while (progress != before && block.left > 0);
}

// Runs the thread blocks of one cluster by turns. fibers: of each.
inline void run_cluster(std::vector<std::vector<Fiber>>& fibers) {
  Block* active = &cluster->blocks[0];
  while (cluster->left > 0) {
    const long before = progress;
    for (Block& block : cluster->blocks) {
      if (block.left == 0) continue;
      if (&block != active) {
        std::memcpy(active->memory.get(), shared_memory, kSharedBytes);
        std::memcpy(shared_memory, block.memory.get(), kSharedBytes);
        active = &block;
      }
      run_block(fibers[block.rank], block);
    }
    if (progress != before) continue;
    if (late.empty()) fail("threads wait for each other; so many are left", cluster->left);
    const auto next = late.begin() + random_below(static_cast<uint32_t>(late.size()));
    const std::function<void()> copy = std::move(*next);
    late.erase(next);
    copy();
  }
  if (!late.empty()) fail("copies that nobody waits for", static_cast<long>(late.size()));
}

// Runs `kernel` for each thread of each thread block, `cluster_size` of which are a cluster.
inline void launch(int grid_x, int grid_y, int threads, int cluster_size, unsigned char* shared,
                   std::function<void()> kernel) {
  constexpr size_t kStack = 192 << 10;
  if (grid_x % cluster_size != 0) fail("a grid of no whole clusters", grid_x);
  largest_cluster = std::max(largest_cluster, cluster_size);
  body = std::move(kernel);
  gridDim = {grid_x, grid_y, 1};
  blockDim = {threads, 1, 1};
  shared_memory = shared;
  std::vector<std::unique_ptr<char[]>> stacks(threads * cluster_size);
  for (auto& stack : stacks) stack.reset(new char[kStack]);
  std::vector<int> clusters(grid_x * grid_y / cluster_size);
  std::iota(clusters.begin(), clusters.end(), 0);
  if (order != 0) std::shuffle(clusters.begin(), clusters.end(), std::mt19937(order));
  for (const int number : clusters) {
    const int id = number * cluster_size;
    Cluster together;
    cluster = &together;
    together.blocks = std::vector<Block>(cluster_size);
    together.left = threads * cluster_size;
    std::vector<std::vector<Fiber>> fibers(cluster_size);
    std::memset(shared, 0xab, kSharedBytes);
    for (int rank = 0; rank < cluster_size; ++rank) {
      Block& block = together.blocks[rank];
      block.threads = block.left = threads;
      block.index = {(id + rank) % grid_x, (id + rank) / grid_x, 0};
      block.rank = rank;
      if (cluster_size > 1) {
        block.memory.reset(new unsigned char[kSharedBytes]);
        std::memset(block.memory.get(), 0xab, kSharedBytes);
      }
      fibers[rank] = std::vector<Fiber>(threads);
      for (int t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[rank][t];
        fiber.thread = {t, 0, 0};
        fiber.block = &block;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks[rank * threads + t].get();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
      }
    }
    run_cluster(fibers);
  }
}

}  // namespace emulator
