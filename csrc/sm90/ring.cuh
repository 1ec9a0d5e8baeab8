// Positions in rings of buffers in shared memory.
#pragma once

#include <cstdint>

namespace jax_flash::sm90 {

// A position in a ring of kStages buffers, and the parity of its current round. One register where
// the number of stages is a power of two, else two.
template <int kStages, bool kPowerOfTwo = (kStages & (kStages - 1)) == 0>
class RingIndex {
 public:
  __device__ __forceinline__ int stage() const { return count_ % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return count_ / kStages % 2; }
  __device__ __forceinline__ uint32_t count() const { return count_; }
  __device__ __forceinline__ void next() { ++count_; }

 private:
  uint32_t count_ = 0;
};

template <int kStages>
class RingIndex<kStages, false> {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void next() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_flash::sm90
