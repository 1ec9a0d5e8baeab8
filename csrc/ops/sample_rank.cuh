// The order of listed candidates, and the draw among the best of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/sample_row.cuh"

namespace jax_flash::ops {

// Each of `count` candidates is one team's, of as many threads as there are for it: a power of two
// up to a warp. A thread looks at every `threads`-th of the list.
struct Team {
  int count;
  int threads;
  int candidate;  // which may be past the last
  int thread;

  static __device__ __forceinline__ Team of(int count) {
    int bits = 0;
    while (bits < 5 && count << (bits + 1) <= kSampleThreads) ++bits;
    const int thread = threadIdx.x;
    return {count, 1 << bits, thread >> bits, thread & ((1 << bits) - 1)};
  }

  __device__ __forceinline__ bool leads() const { return thread == 0 && candidate < count; }

  template <typename T>
  __device__ __forceinline__ T sum(T x) const {
#pragma unroll 1
    for (int step = threads / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  __device__ __forceinline__ uint32_t largest(uint32_t x) const {
#pragma unroll 1
    for (int step = threads / 2; step > 0; step /= 2) {
      x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    return x;
  }
};

// How many of the list come before each team's candidate, and the largest key of all.
struct Rank {
  unsigned long long candidate;
  int rank;
  uint32_t best;

  static __device__ __forceinline__ Rank of(const Team& team) {
    const unsigned long long* const listed = sample_shared().listed;
    const unsigned long long own = team.candidate < team.count ? listed[team.candidate] : 0;
    int before = 0;
    uint32_t best = 0;
#pragma unroll 4
    for (int i = team.thread; i < team.count; i += team.threads) {
      before += listed[i] > own;
      best = max(best, key_of_candidate(listed[i]));
    }
    return {own, team.sum(before), team.largest(best)};
  }
};

// Draws among the best of the `count` candidates.
__device__ __forceinline__ void draw_ranked(const SampleRow& parameters, int count,
                                            int32_t* token) {
  SampleShared& shared = sample_shared();
  const Team team = Team::of(count);
  const Rank own = Rank::of(team);
  const Weigher weigher{logit_of(own.best), parameters.factor};
  const uint32_t distance = team.leads() ? weigher.distance(key_of_candidate(own.candidate)) : 0u;
  const bool among_k = team.leads() && own.rank < static_cast<int>(parameters.k);
  const uint32_t weight = among_k ? weight_of(distance) : 0;
  if (team.leads()) shared.weights[0][team.candidate] = weight;
  // Orders the weights before their reads.
  __syncthreads();

  unsigned long long before = 0;
  unsigned long long total = 0;
#pragma unroll 4
  for (int i = team.thread; i < count; i += team.threads) {
    const uint32_t other = shared.weights[0][i];
    total += other;
    before += shared.listed[i] > own.candidate ? other : 0;
  }
  before = team.sum(before);
  total = team.sum(total);
  const bool kept = among_k && distance <= parameters.distance &&
                    (parameters.mass > kAllMass || before < nucleus(total, parameters.mass));
  if (team.leads()) shared.weights[1][team.candidate] = kept ? weight : 0;
  // Orders the weights before their reads.
  __syncthreads();

  before = total = 0;
  const int index = index_of_candidate(own.candidate);
#pragma unroll 4
  for (int i = team.thread; i < count; i += team.threads) {
    const uint32_t other = shared.weights[1][i];
    total += other;
    before += index_of_candidate(shared.listed[i]) < index ? other : 0;
  }
  before = team.sum(before);
  total = team.sum(total);
  const uint64_t random = uint64_t{parameters.random_high} << 32 | parameters.random_low;
  const unsigned long long target = __umul64hi(random, total);
  if (kept && target >= before && target - before < weight) *token = index;
}

}  // namespace jax_flash::ops
