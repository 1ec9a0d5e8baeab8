// csrc/ptx/mma.cuh for the emulator.
#pragma once

#include <cstring>

#include "emulator.h"

namespace jax_flash::ptx {

// The matrix that lane l / 8 * 8.. of `all` give addresses for, as 16-bit elements of fragments.
inline uint16_t fragment_element(const emulator::Warp::Words& all, int matrix, int row,
                                 int column) {
  return static_cast<uint16_t>(all[row * 4 + column / 2][matrix] >> (16 * (column % 2)));
}

inline void store_matrices(uint32_t shared, const uint32_t (&r)[4], bool transposed) {
  if (shared % 16 != 0) emulator::fail("stmatrix is not aligned", shared);
  const uint64_t words[4] = {r[0], r[1], r[2], r[3]};
  auto& all = emulator::exchange(words, 4);
  const int matrix = emulator::lane() / 8;
  const int row = emulator::lane() % 8;
  uint16_t elements[8];
  for (int i = 0; i < 8; ++i) {
    elements[i] =
        transposed ? fragment_element(all, matrix, i, row) : fragment_element(all, matrix, row, i);
  }
  std::memcpy(emulator::shared_pointer(shared), elements, 16);
}
inline void stmatrix_x4(uint32_t shared, const uint32_t (&r)[4]) {
  store_matrices(shared, r, false);
}
inline void stmatrix_x4_trans(uint32_t shared, const uint32_t (&r)[4]) {
  store_matrices(shared, r, true);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t shared, bool transposed) {
  if (shared % 16 != 0) emulator::fail("ldmatrix is not aligned", shared);
  const uint64_t word = shared;
  auto& all = emulator::exchange(&word, 1);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      const int row = emulator::lane() / 4;
      const int column = emulator::lane() % 4 * 2 + e;
      const uint32_t place =
          static_cast<uint32_t>(all[8 * matrix + (transposed ? column : row)][0]);
      uint16_t element;
      std::memcpy(&element, emulator::shared_pointer(place + 2 * (transposed ? row : column)), 2);
      pair |= uint32_t{element} << (16 * e);
    }
    r[matrix] = pair;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) { load_matrices(r, shared, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) { load_matrices(r, shared, true); }

// The two elements of a register as floats: lanes exchange these, so that each converts its own.
template <typename T>
uint64_t pair_of_floats(uint32_t pair) {
  const auto bits = [&](int half) {
    const auto element = emulator::bit_cast<T>(pair >> (16 * half) & 0xffff);
    return emulator::bits_of(static_cast<float>(element));
  };
  return bits(0) | bits(1) << 32;
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t words[6] = {pair_of_floats<T>(a[0]), pair_of_floats<T>(a[1]),
                             pair_of_floats<T>(a[2]), pair_of_floats<T>(a[3]),
                             pair_of_floats<T>(b0),   pair_of_floats<T>(b1)};
  auto& all = emulator::exchange(words, 6);
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint64_t left = all[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + i / 2];
      const uint64_t right = all[column * 4 + k % 8 / 2][4 + k / 8];
      const int shift = k % 2 * 32;
      d[i] += emulator::bit_cast<float>(left >> shift & 0xffffffff) *
              emulator::bit_cast<float>(right >> shift & 0xffffffff);
    }
  }
}

inline uint32_t movmatrix_trans(uint32_t x) {
  const int lane = emulator::lane();
  uint32_t result = 0;
  for (int e = 0; e < 2; ++e) {
    const uint32_t word = __shfl_sync(0xffffffffu, x, (lane % 4 * 2 + e) * 4 + lane / 4 / 2);
    result |= (word >> 16 * (lane / 4 % 2) & 0xffff) << 16 * e;
  }
  return result;
}

}  // namespace jax_flash::ptx
