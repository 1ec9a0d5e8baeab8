// Shared-memory tiles of 16-bit elements: row-major, no padding, 16-byte chunks permuted in a row.
//
// A row of kWidth elements is kWidth / 8 chunks. Eight consecutive rows read at one chunk column
// (what ldmatrix does) must fall into eight different 16-byte bank groups of the 128-byte bank
// line. The row pitch of 2 * kWidth bytes already spreads them by its odd part; the low chunk bits
// that it leaves equal are XORed with the row bits that it does not use:
//   kWidth % 64 == 0: three chunk bits ^ row[0:3];  kWidth % 32 == 0: two bits ^ row[1:3];
//   kWidth % 16 == 0: one bit ^ row[2:3].
#pragma once

#include <cstdint>

namespace jax_flash {

template <int kWidth>
struct TileLayout {
  static_assert(kWidth % 16 == 0, "a tile row is a whole number of mma k-steps");
  static constexpr int kChunks = kWidth / 8;  // 16-byte chunks in a row
  static constexpr int kPitch = kWidth * 2;   // bytes from row to row
  static constexpr int kBits = kWidth % 64 == 0 ? 3 : kWidth % 32 == 0 ? 2 : 1;
  static constexpr uint32_t kMask = (1u << kBits) - 1;

  static constexpr __host__ __device__ uint32_t phase(uint32_t row) {
    return (row >> (3 - kBits)) & kMask;
  }

  // Byte offset of a chunk. Rows eight apart have equal phases.
  static constexpr __host__ __device__ uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kPitch + ((chunk ^ phase(row)) << 4);
  }

  // offset(row, chunk + step) from offset(row, chunk), where chunk and step have no bit in common
  // (chunk < 2 and step is even, say): the low bits of step toggle address bits (the phase is
  // already in them), the rest is added. With a compile-time step this is one XOR or nothing, and
  // an immediate.
  static __device__ __forceinline__ uint32_t advance(uint32_t address, uint32_t step) {
    return (address ^ ((step & kMask) << 4)) + ((step & ~kMask) << 4);
  }
};

// A tile in shared memory as TMA writes it and wgmma reads it: slabs of 64 columns, each row 128
// bytes, 16-byte chunks of a row XORed with the row's low three bits.
template <int kRows, int kWidth>
struct SlabLayout {
  static constexpr int kSlabs = (kWidth + 63) / 64;
  static constexpr int kSlabBytes = kRows * 128;
  static constexpr int kBytes = kSlabs * kSlabBytes;
  static constexpr int kChunks = kWidth / 8;  // 16-byte chunks in a row
  static constexpr int kPitch = 128;          // bytes from row to row

  static constexpr __host__ __device__ uint32_t phase(uint32_t row) { return row & 7; }

  // Byte offset of a 16-byte chunk.
  static constexpr __host__ __device__ uint32_t offset(uint32_t row, uint32_t chunk) {
    return chunk / 8 * kSlabBytes + row * 128 + ((chunk & 7 ^ phase(row)) << 4);
  }
};

}  // namespace jax_flash
