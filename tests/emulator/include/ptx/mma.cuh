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

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t words[5] = {a[0], a[1] | uint64_t{a[2]} << 32, a[3], b0, b1};
  auto& all = emulator::exchange(words, 5);
  const int lane = emulator::lane();
  const auto element = [](uint64_t word, int half) {
    return static_cast<float>(emulator::bit_cast<T>(word >> (16 * half) & 0xffff));
  };
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint64_t* const from = all[lane / 4 * 4 + k % 8 / 2];
      const int part = k / 8 * 2 + i / 2;  // of a
      const uint64_t left = part == 0   ? from[0]
                            : part == 3 ? from[2]
                                        : from[1] >> (32 * (part - 1));
      d[i] += element(left, k % 2) * element(all[column * 4 + k % 8 / 2][3 + k / 8], k % 2);
    }
  }
}

}  // namespace jax_flash::ptx
