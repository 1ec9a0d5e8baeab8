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

// A row, and what of it may be chosen. `kRanksAll`: top_k ranks NaN and -inf, sample never draws
// them.
template <typename T, bool kRanksAll>
struct LogitRow {
  const T* logits;
  const bool* mask;  // or null
  int size;

  using Element = T;
  static constexpr int kV = kVector<T>;

  // Whether logits and mask can be read a vector at a time.
  __device__ __forceinline__ bool wide() const {
    return size % kV == 0 && is_aligned(logits) && reinterpret_cast<uintptr_t>(mask) % kV == 0;
  }

  __device__ __forceinline__ int vectors() const { return (size + kV - 1) / kV; }

  __device__ __forceinline__ uint32_t key(float logit) const {
    const uint32_t key = key_of(logit);
    return kRanksAll || key > kKeyOfMinusInfinity ? key : 0;
  }

  // A vector, and a bit for each of its elements, at allowed_bit, that may be chosen.
  struct Loaded {
    uint4 raw;
    uint32_t allowed;
  };

  // A byte of a mask is 0 or 1, so two words of it fit in one.
  static __device__ __forceinline__ constexpr int allowed_bit(int e) {
    return e < 4 ? 8 * e : 8 * (e - 4) + 4;
  }

  __device__ __forceinline__ Loaded load_wide(int vector) const {
    const int first = vector * kV;
    Loaded loaded{*reinterpret_cast<const uint4*>(logits + first), ~0u};
    if (mask != nullptr) {
      if constexpr (kV == 4) {
        loaded.allowed = *reinterpret_cast<const uint32_t*>(mask + first);
      } else {
        const uint2 bytes = *reinterpret_cast<const uint2*>(mask + first);
        loaded.allowed = bytes.x | bytes.y << 4;
      }
    }
    return loaded;
  }

  __device__ __forceinline__ Loaded load(int vector) const {
    if (wide()) return load_wide(vector);
    const int first = vector * kV;
    Loaded loaded{load_vector(logits, first, size, false), 0};
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      const int index = first + e;
      const bool allowed = index < size && (mask == nullptr || mask[index]);
      loaded.allowed |= uint32_t{allowed} << allowed_bit(e);
    }
    return loaded;
  }

  // f(index, key) for the elements of a vector that may be chosen.
  template <typename F>
  __device__ __forceinline__ void visit(const Loaded& loaded, int vector, const F& f) const {
    float x[kV];
    unpack<T>(loaded.raw, x);
#pragma unroll
    for (int e = 0; e < kV; ++e) {
      const uint32_t key_here = (loaded.allowed >> allowed_bit(e) & 1) != 0 ? key(x[e]) : 0;
      if (key_here != 0) f(vector * kV + e, key_here);
    }
  }

  template <typename F>
  __device__ __forceinline__ void visit(int vector, const F& f) const {
    visit(load(vector), vector, f);
  }

  // f(index, key) for the elements of vectors first, first + kStep, ... below `end`; loads go ahead
  // of use where they are wide.
  template <int kStep, typename F>
  __device__ __forceinline__ void visit_all(int first, int end, const F& f) const {
    constexpr int kAhead = 4;
    int vector = first;
    if (wide()) {
#pragma unroll 1
      for (; vector + (kAhead - 1) * kStep < end; vector += kAhead * kStep) {
        Loaded loaded[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) loaded[i] = load_wide(vector + i * kStep);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) visit(loaded[i], vector + i * kStep, f);
      }
    }
#pragma unroll 1
    for (; vector < end; vector += kStep) visit(vector, f);
  }
};

// Vectors [first, end) of a row, dealt round to the threads of a block. kRing of a thread's vectors
// are a turn, `turns` of them a segment.
struct Slice {
  int first;
  int end;
  int turns;

  // That of block `rank` of 2^split_bits.
  template <typename Row>
  static __device__ __forceinline__ Slice of(const Row& row, int rank, int split_bits) {
    const int vectors = row.vectors();
    const int size = (vectors + (1 << split_bits) - 1) >> split_bits;
    constexpr int kOfSegments = kSegments * kRing * kSampleThreads;
    return {min(rank * size, vectors), min((rank + 1) * size, vectors),
            (size + kOfSegments - 1) / kOfSegments};
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
