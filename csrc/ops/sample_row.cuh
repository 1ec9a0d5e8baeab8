// One row of logits as `sample` and `top_k` see it: keys in the order of the logits, weights in
// integers. jax_flash/_src/sample_reference.py is the specification, to the last bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/block.cuh"
#include "ops/params.h"
#include "ops/sample_shared.cuh"
#include "ops/vector.cuh"

namespace jax_flash::ops {

inline constexpr int kUnitBits = 20;
inline constexpr float kMaxDistance = 2147483520.0f;  // the largest f32 below 2^31
inline constexpr uint32_t kAllMass = 1u << kUnitBits;

// Larger for larger logits, equal for equal ones; NaN comes below -inf. Never 0, which is the key
// of what takes no part.
__device__ __forceinline__ uint32_t key_of(float logit) {
  constexpr uint32_t kSign = 0x80000000u;
  uint32_t bits = __float_as_uint(logit);
  if (bits == kSign) bits = 0;
  if ((bits & ~kSign) > 0x7f800000u) return 1;
  return (bits >= kSign ? ~bits : bits | kSign) + 1;
}
inline constexpr uint32_t kKeyOfMinusInfinity = 0x00800000u;

__device__ __forceinline__ float logit_of(uint32_t key) {
  constexpr uint32_t kSign = 0x80000000u;
  const uint32_t ordered = key - 1;
  return __uint_as_float(ordered >= kSign ? ordered & ~kSign : ~ordered);
}

// 2^30 * 2^-distance.
__device__ __forceinline__ uint32_t weight_of(uint32_t distance) {
  const uint32_t fraction = distance << (32 - kUnitBits);
  uint32_t value = 19817794u - __umulhi(fraction, 2048773u);
  value = 118791696u - __umulhi(fraction, value);
  value = 515797037u - __umulhi(fraction, value);
  value = 1488516314u - __umulhi(fraction, value);
  value = (1u << 31) - __umulhi(fraction, value);
  const uint32_t octaves = distance >> kUnitBits;
  return octaves < 31 ? value >> (octaves + 1) : 0;
}

// A row, and what of it may be chosen.
template <typename T>
struct LogitRow {
  const T* logits;
  const bool* mask;  // or null
  int size;
  bool wide;       // whether the row can be read 16 bytes at a time
  bool ranks_all;  // top_k ranks NaN and -inf, sample never draws them

  static constexpr int kV = kVector<T>;

  __device__ __forceinline__ int vectors() const { return (size + kV - 1) / kV; }

  __device__ __forceinline__ uint32_t key(float logit) const {
    const uint32_t key = key_of(logit);
    return ranks_all || key > kKeyOfMinusInfinity ? key : 0;
  }

  __device__ __forceinline__ uint32_t key(int index, float logit) const {
    return index >= size || (mask != nullptr && !mask[index]) ? 0 : key(logit);
  }

  // f(index, key) for the elements of vector number `vector`; nothing past the end.
  template <typename F>
  __device__ __forceinline__ void visit(int vector, const F& f) const {
    float x[kV];
    unpack<T>(load_vector(logits, vector * kV, size, wide), x);
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      const int index = vector * kV + e;
      const uint32_t key_here = key(index, x[e]);
      if (key_here != 0) f(index, key_here);
    }
  }

  // f(index, key) for the elements of vectors first, first + kSampleThreads, ... below `end`; loads
  // go ahead of use.
  template <typename F>
  __device__ __forceinline__ void visit_all(int first, int end, const F& f) const {
    constexpr int kAhead = 4;
#pragma unroll 1
    for (int vector = first; vector < end; vector += kAhead * kSampleThreads) {
      uint4 raw[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int v = vector + i * kSampleThreads;
        raw[i] = load_vector(logits, v * kV, v < end ? size : 0, wide);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int v = vector + i * kSampleThreads;
        if (v >= end) continue;
        float x[kV];
        unpack<T>(raw[i], x);
#pragma unroll
        for (int e = 0; e < kV; ++e) {
          const uint32_t key_here = key(v * kV + e, x[e]);
          if (key_here != 0) f(v * kV + e, key_here);
        }
      }
    }
  }

  // f(index, key) for all elements, each thread of the block its share.
  template <typename F>
  __device__ __forceinline__ void visit_all(const F& f) const {
    visit_all(threadIdx.x, vectors(), f);
  }
};

// Weights relative to the best logit of the row.
struct Weigher {
  float best;
  float factor;

  __device__ __forceinline__ uint32_t distance(uint32_t key) const {
    const float logit = logit_of(key);
    // The best itself may be infinite, and so may the factor.
    if (logit == best) return 0;
    const float units = (best - logit) * factor;
    return static_cast<uint32_t>(units < kMaxDistance ? units : kMaxDistance);
  }

  __device__ __forceinline__ uint32_t weight(uint32_t key) const {
    return weight_of(distance(key));
  }
};

// What selections have kept: keys above `key`, and of those equal to it the first, up to `last`.
struct Cut {
  uint32_t key;
  int last;

  __device__ __forceinline__ bool keeps(int index, uint32_t key_here) const {
    return key_here > key || (key_here == key && index <= last);
  }
};

// max(1, floor(mass * total / 2^20)), total < 2^50.
__device__ __forceinline__ uint64_t nucleus(uint64_t total, uint32_t mass) {
  const uint64_t upper = uint64_t{mass} * (total >> kUnitBits);
  const uint64_t lower = uint64_t{mass} * (total & (kAllMass - 1));
  const uint64_t limit = upper + (lower >> kUnitBits);
  return limit == 0 ? 1 : limit;
}

}  // namespace jax_flash::ops
