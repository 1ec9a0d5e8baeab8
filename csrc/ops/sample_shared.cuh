// What the threads of a block share while they sample.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/block.cuh"
#include "ops/params.h"

namespace jax_flash::ops {

inline constexpr int kSampleThreads = 512;
inline constexpr int kSampleWarps = kSampleThreads / kWarp;

// Tokens that are put in order one against another; more are found by histograms.
inline constexpr int kMaxRanked = 256;
// Candidates for them that a block may find, and that it may rank or send to another one.
inline constexpr int kMaxListed = 4096;
inline constexpr int kMaxCandidates = kSampleThreads;
// Blocks that a row may be spread over.
inline constexpr int kMaxSplits = 8;

inline constexpr int kSegments = 8;
inline constexpr int kBins = 2048;
inline constexpr int kTallies = 256;
inline constexpr int kSlots = 8;

// Vectors of 16 bytes in flight for each thread while a row streams by.
inline constexpr int kRing = 8;

struct SampleShared {
  union {
    // What is in flight, each thread's own.
    uint4 ring[kRing][kSampleThreads];
    // Afterwards:
    struct {
      unsigned long long bins[kBins];         // while a histogram of the row is made
      unsigned long long listed[kMaxListed];  // candidates: make_candidate
      // Segments that may hold candidates, as thread and segment.
      uint16_t items[kSegments * kSampleThreads];
      uint32_t weights[2][kMaxCandidates];
    };
  };
  uint32_t segments[kSegments][kSampleThreads];  // the largest key in each of each thread's share
  alignas(16) int tallies[kTallies];             // zeros between the calls of lower_bound
  unsigned long long sums[kSampleWarps];
  unsigned long long chunk_sums[2][kSampleWarps];
  unsigned long long said[kSlots];  // to the other blocks of the row
  unsigned long long rest;
  // Of a draw, here since registers are scarce across calls of `select`:
  SampleRow parameters;
  int32_t* token;
  uint32_t lowest[kSampleWarps];
  uint32_t highest[kSampleWarps];
  uint32_t bin;
  int tally_bin;
  int tally_rest;
  int tally_count;
  int found;
  int item_count;
  int listed_count;
};

__device__ __forceinline__ SampleShared& sample_shared() {
  return *reinterpret_cast<SampleShared*>(memory);
}

// An element as one number, the larger the earlier in the order: by key, of equal ones the lower
// index first. Never 0.
__device__ __forceinline__ unsigned long long make_candidate(int index, uint32_t key) {
  return static_cast<unsigned long long>(key) << 32 | static_cast<uint32_t>(~index);
}
__device__ __forceinline__ uint32_t key_of_candidate(unsigned long long candidate) {
  return static_cast<uint32_t>(candidate >> 32);
}
__device__ __forceinline__ int index_of_candidate(unsigned long long candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}

}  // namespace jax_flash::ops
