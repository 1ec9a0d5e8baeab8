// Tiles of rows between global memory and swizzled shared memory. Widths are padded and cut here
// and nowhere else.
#pragma once

#include <cstdint>

#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "ptx/special_register.cuh"
#include "tile/swizzle.cuh"

namespace jax_flash {

// Elements are 16 bits wide and only moved, so their type does not matter here.
using Element16 = uint16_t;

// How kThreads threads share the 16-byte chunks of a tile: a power of two of them on a row, so that
// what a thread needs to know is its first row and its first chunk.
template <int kWidth, int kThreads>
struct ChunkLanes {
  static constexpr int lanes_per_row() {
    int lanes = 1;
    while (lanes < 32 && TileLayout<kWidth>::kChunks % (2 * lanes) == 0) lanes *= 2;
    return lanes;
  }
  static constexpr int kLanes = lanes_per_row();
  static constexpr int kRowsPerPass = kThreads / kLanes;
};

// Copies tiles of kRows rows. It keeps no state: addresses are cheap next to the registers that
// they would hold through the matrix products.
// kWide: all rows start at multiples of 16 bytes. Others are rare: small code rather than fast
// code.
template <int kRows, int kWidth, int kThreads, bool kWide>
class TileCopy {
  using Layout = TileLayout<kWidth>;
  static constexpr int kLanes = ChunkLanes<kWidth, kThreads>::kLanes;
  static constexpr int kRowsPerPass = ChunkLanes<kWidth, kThreads>::kRowsPerPass;
  static_assert(kRows % kRowsPerPass == 0 || kRowsPerPass % kRows == 0);

 public:
  // The tile is rows first_row.. of `operand`, those at and after end_row and columns at and after
  // `width` being zero. Strides in elements; `alignment` is what every row's address is a multiple
  // of, in bytes: 16, 4 or 2.
  static __device__ __forceinline__ void copy(uint32_t tile, const Element16* operand,
                                              int64_t row_stride, int first_row, int end_row,
                                              int width, int alignment) {
    if (kRows < kRowsPerPass && row0() >= kRows) return;
    const int row = first_row + row0();
    const Element16* source = operand + row * row_stride + 8 * chunk0();
    if constexpr (kWide) {
      copy_wide(tile, source, row_stride, end_row - row, width);
    } else {
      copy_narrow(tile, source, row_stride, end_row - row, width, alignment);
    }
  }

  // Applies f to each 32-bit word that this thread copied to a tile, once its copies are done.
  template <typename F>
  static __device__ __forceinline__ void transform(uint32_t tile, F f) {
    transform_chunks(tile, [&](uint4& x) { x = make_uint4(f(x.x), f(x.y), f(x.z), f(x.w)); });
  }

  // The same with chunks: of two neighbouring lanes those of a pair.
  template <typename F>
  static __device__ __forceinline__ void transform_chunks(uint32_t tile, F f) {
    if (kRows < kRowsPerPass && row0() >= kRows) return;
#pragma unroll 4
    for (int pass = 0; pass < kRows; pass += kRowsPerPass) {
#pragma unroll
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kLanes) {
        const uint32_t address = tile + Layout::offset(row0() + pass, chunk0() + chunk);
        uint4 data = ptx::ld_shared_v4(address);
        f(data);
        const uint32_t words[4] = {data.x, data.y, data.z, data.w};
        ptx::st_shared_v4(address, words);
      }
    }
  }

 private:
  static __device__ __forceinline__ int row0() { return threadIdx.x / kLanes; }
  static __device__ __forceinline__ int chunk0() { return threadIdx.x % kLanes; }

  // `source` is this thread's first chunk, `rows` counts from its first row.
  static __device__ __forceinline__ void copy_wide(uint32_t tile, const Element16* source,
                                                   int64_t row_stride, int rows, int width) {
#pragma unroll
    for (int pass = 0; pass < kRows; pass += kRowsPerPass) {
#pragma unroll
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kLanes) {
        const bool valid = pass < rows && 8 * chunk < width - 8 * chunk0();
        ptx::cp_async_16(tile + Layout::offset(row0() + pass, chunk0() + chunk), source + 8 * chunk,
                         valid ? 16 : 0);
      }
      source += kRowsPerPass * row_stride;
    }
  }

  static __device__ __forceinline__ void copy_narrow(uint32_t tile, const Element16* source,
                                                     int64_t row_stride, int rows, int width,
                                                     int alignment) {
#pragma unroll 1
    for (int pass = 0; pass < kRows; pass += kRowsPerPass) {
#pragma unroll 1
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kLanes) {
        const int valid = pass < rows ? width - 8 * (chunk0() + chunk) : 0;
        copy_chunk(tile + Layout::offset(row0() + pass, chunk0() + chunk), source + 8 * chunk,
                   valid, alignment);
      }
      source += kRowsPerPass * row_stride;
    }
  }

  // Eight elements, of which the first `valid` exist.
  static __device__ __forceinline__ void copy_chunk(uint32_t target, const Element16* source,
                                                    int valid, int alignment) {
    if (alignment == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::cp_async_4(target + 4 * i, source + 2 * i, valid > 2 * i ? 4 : 0);
      }
    } else {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = valid > 2 * i ? source[2 * i] : 0;
        const uint32_t high = valid > 2 * i + 1 ? source[2 * i + 1] : 0;
        words[i] = low | high << 16;
      }
      ptx::st_shared_v4(target, words);
    }
  }
};

// A warp stores kRows rows of a shared tile.
template <int kRows, int kWidth, bool kWide>
class TileStore {
  using Layout = TileLayout<kWidth>;
  static constexpr int kLanes = ChunkLanes<kWidth, 32>::kLanes;
  static constexpr int kRowsPerPass = ChunkLanes<kWidth, 32>::kRowsPerPass;
  static_assert(kRows % kRowsPerPass == 0);

 public:
  // Rows [0, valid_rows) come from the tile, [valid_rows, rows) are zeros.
  static __device__ __forceinline__ void store(Element16* target, int64_t row_stride, uint32_t tile,
                                               int valid_rows, int rows, int width) {
    const int row0 = ptx::laneid() / kLanes;
    const int chunk0 = ptx::laneid() % kLanes;
    target += row0 * row_stride + 8 * chunk0;
#pragma unroll 4
    for (int pass = 0; pass < kRows; pass += kRowsPerPass) {
#pragma unroll
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kLanes) {
        const int columns = width - 8 * (chunk0 + chunk);
        if (row0 + pass < rows && columns > 0) {
          uint4 data = make_uint4(0, 0, 0, 0);
          if (row0 + pass < valid_rows) {
            data = ptx::ld_shared_v4(tile + Layout::offset(row0 + pass, chunk0 + chunk));
          }
          if constexpr (kWide) {
            *reinterpret_cast<uint4*>(target + 8 * chunk) = data;
          } else {
            store_part(target + 8 * chunk, data, columns);
          }
        }
      }
      target += kRowsPerPass * row_stride;
    }
  }

 private:
  // The first `columns` of eight elements.
  static __device__ __forceinline__ void store_part(Element16* target, uint4 data, int columns) {
    const uint32_t words[4] = {data.x, data.y, data.z, data.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < columns) target[i] = static_cast<Element16>(words[i / 2] >> (16 * (i % 2)));
    }
  }
};

}  // namespace jax_flash
