// csrc/ptx/wgmma.cuh for the emulator: each thread computes its elements of the product.
#pragma once

#include <cstring>

#include "emulator.h"

namespace jax_flash::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit_group() {}
template <int kPending>
void wgmma_wait_group() {}

inline uint64_t wgmma_descriptor(uint32_t shared, uint32_t leading_bytes) {
  return uint64_t{leading_bytes >> 4} << 16 | (shared & 0x3ffff) >> 4;
}

template <typename T>
float swizzled_element(uint32_t place) {
  T value;
  std::memcpy(&value, emulator::shared_pointer(place ^ (place >> 3 & 0x70)), sizeof value);
  return static_cast<float>(value);
}
inline uint32_t descriptor_start(uint64_t descriptor) { return (descriptor & 0x3fff) << 4; }

// Element (row, k) of a K-major operand, element (k, column) of one that is M- or N-major.
template <typename T>
float k_major(uint64_t descriptor, int row, int k) {
  return swizzled_element<T>(descriptor_start(descriptor) + row * 128 + 2 * k);
}
template <typename T>
float k_minor(uint64_t descriptor, int k, int column) {
  const uint32_t slab = (descriptor >> 16 & 0x3fff) << 4;
  return swizzled_element<T>(descriptor_start(descriptor) + column / 64 * slab + k * 128 +
                             column % 64 * 2);
}

template <typename T, int kN>
struct Wgmma {
  template <int kTransposed = 0>
  static void ss(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
    float rows[2][16];
    for (int h = 0; h < 2; ++h) {
      const int row = emulator::warp() % 4 * 16 + emulator::lane() / 4 + 8 * h;
      for (int k = 0; k < 16; ++k) {
        rows[h][k] = kTransposed ? k_minor<T>(a, k, row) : k_major<T>(a, row, k);
      }
    }
    multiply(d, rows, [&](int k, int column) { return k_major<T>(b, column, k); }, accumulate);
  }

  static void rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b, int accumulate) {
    const uint64_t words[4] = {a[0], a[1], a[2], a[3]};
    auto& all = emulator::exchange(words, 4);
    float rows[2][16];
    for (int k = 0; k < 16; ++k) {
      for (int h = 0; h < 2; ++h) {
        const uint64_t word = all[emulator::lane() / 4 * 4 + k % 8 / 2][k / 8 * 2 + h];
        rows[h][k] = static_cast<float>(emulator::bit_cast<T>(word >> (16 * (k % 2))));
      }
    }
    multiply(d, rows, [&](int k, int column) { return k_minor<T>(b, k, column); }, accumulate);
  }

 private:
  template <typename Right>
  static void multiply(float (&d)[kN / 2], const float (&rows)[2][16], Right right,
                       int accumulate) {
    for (int i = 0; i < kN / 2; ++i) {
      const int column = i / 4 * 8 + emulator::lane() % 4 * 2 + i % 2;
      float sum = accumulate ? d[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += rows[i / 2 % 2][k] * right(k, column);
      d[i] = sum;
    }
  }
};

}  // namespace jax_flash::ptx
