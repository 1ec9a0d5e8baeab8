// What a consumer of the forward does where masks are data, with biases and with dropout; and
// values that may hold anything.
#pragma once

#include <cstdint>

#include "ptx/address.cuh"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_block.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/score_arrays.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// Scores of a tile lie in fragments, `row` being this lane's first.
template <int kScores>
__device__ __forceinline__ void add_bias(float (&s)[kScores], const BiasRows& bias, int row,
                                         int first_key) {
#pragma unroll
  for (int i = 0; i < kScores / 16; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[8];
      bias.load(x, row + 8 * h, first_key + 32 * i);
#pragma unroll
      for (int k = 0; k < 8; ++k) s[16 * i + k / 2 * 4 + 2 * h + k % 2] += x[k];
    }
  }
}

// Scores of -inf where the mask has no bit.
template <int kScores>
__device__ __forceinline__ void apply_bits(float (&s)[kScores], const MaskRows& mask, int row,
                                           int first_key) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < kScores / 16; ++i) {
      const uint32_t word = mask.word(row + 8 * h, first_key + 32 * i) >> fragment_column();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if ((word >> (k / 2 * 8 + k % 2) & 1) == 0) {
          s[16 * i + k / 2 * 4 + 2 * h + k % 2] = kMinusInfinity;
        }
      }
    }
  }
}

// Zeros in place of the packed probabilities that dropout drops. row: in the block.
template <typename Block, int kWords>
__device__ __forceinline__ void drop(uint32_t (&p)[kWords], const Block& block, int row,
                                     int first_key) {
#pragma unroll
  for (int i = 0; i < kWords / 8; ++i) {
    ptx::forget_memory();  // one draw after the other: registers are few
    const Dropout dropout = block.dropout;
    uint32_t words[2][2];
    dropout.template draw<false>(words, block.first_row + row, first_key + 32 * i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int byte = Dropout::byte_of<false>(j % 2, j / 2 % 2);
      p[8 * i + j] &= Dropout::pair_mask(words[j / 4], byte);
    }
  }
}

// Zeroes the rows of a tile of values from `rows` on, by the 128 threads of a warpgroup, which meet
// at `barrier`.
template <typename Config>
__device__ __forceinline__ void clear_rows_from(uint32_t tile, int rows, int barrier) {
  using Layout = typename Config::ValueLayout;
  const uint32_t zeros[4] = {0, 0, 0, 0};
  const int thread = threadIdx.x % 128;
  for (int i = thread; i < (Config::kKeys - rows) * 8; i += 128) {
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::st_shared_v4(tile + slab * Layout::kSlabBytes + rows * 128 + 16 * i, zeros);
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(barrier, 128);
}

// The same for those of dead keys, anywhere in a tile of values that begins with `first_key`.
template <typename Config>
__device__ __forceinline__ void clear_dead_rows(uint32_t tile, const FwdBlock<Config>& block,
                                                int first_key, int barrier) {
  using Layout = typename Config::ValueLayout;
  const uint32_t zeros[4] = {0, 0, 0, 0};
  const int thread = threadIdx.x % 128;
  // Where there are no keys TMA has written zeros.
  const int rows = min(Config::kKeys, block.mask.key_length - first_key);
#pragma unroll 1
  for (int row = thread / 8; row < rows; row += 16) {
    if (__ldg(block.mask.key_ids + first_key + row) >= 0) continue;
#pragma unroll
    for (int slab = 0; slab < Layout::kSlabs; ++slab) {
      ptx::st_shared_v4(tile + Layout::offset(row, 8 * slab + thread % 8), zeros);
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(barrier, 128);
}

}  // namespace jax_flash::sm90
