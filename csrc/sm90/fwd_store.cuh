// Outputs of 16 bits, from the accumulators to global or shared memory.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_softmax.cuh"
#include "tile/copy.cuh"
#include "tile/quad.cuh"
#include "tile/score_options.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// 16 columns for `stage_out`.
template <typename Config, typename Word>
__device__ __forceinline__ void stage_part(uint32_t tile, int row, int part, Word word) {
  const int j = 2 * part;
  const uint32_t words[4] = {word(4 * j), word(4 * j + 2), word(4 * j + 4), word(4 * j + 6)};
  ptx::stmatrix_x4(tile + Config::OutLayout::offset(row, j + lane_id() / 16), words);
}

// To a tile in shared memory, for TMA; the warp's row `row` of it. word(i): outputs i and i + 1 of
// the accumulators, normalised and packed.
template <typename Config, typename Word>
__device__ __forceinline__ void stage_out(uint32_t tile, int row, Word word) {
#pragma unroll
  for (int i = 0; i < Config::kHeadDimV / 16; ++i) stage_part<Config>(tile, row, i, word);
  ptx::fence_proxy_async_shared();
}

// `stage_out` among the exponentials of the next tile, RowSoftmax::exponentials. word(i, factor):
// of outputs multiplied by `factor`, which is `inverse`.
template <typename Config, typename Word>
__device__ __forceinline__ void stage_beside_exponentials(
    uint32_t tile, int row, const float (&inverse)[2], Word word, const RowSoftmax<Config>& softmax,
    float (&s)[Config::kKeys / 2], const SoftmaxScale& scale, float (&tile_sum)[2]) {
  static_assert(Config::kStaged);
  constexpr int kApart = Config::kKeys / 2 / (Config::kHeadDimV / 16);  // scores to a part
  float before = 0.0f;  // what a sum was, and not NaN
  softmax.exponentials(s, scale, tile_sum, [&](int i) {
    if (i % kApart != kApart - 1) return;
    const float factor[2] = {not_before(inverse[0], before), not_before(inverse[1], before)};
    before = fminf(tile_sum[0], 1.0f);
    stage_part<Config>(tile, row, i / kApart, [&](int j) { return word(j, factor); });
  });
  ptx::fence_proxy_async_shared();
}

// To global memory, of this lane's rows `row` and `row` + 8 of the head. Four lanes that share a
// row exchange words so that each holds eight neighbouring columns, 16 bytes, of every 32.
template <typename Config, typename Word>
__device__ __forceinline__ void store_direct(const MhaFwdParams& params, const FwdPlan& plan,
                                             const FwdBlock<Config>& block, int row, Word word) {
  const int lane = lane_id() % 4;
  const int heads = (1 << plan.pack_shift) - 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int position = (row + 8 * h) >> plan.pack_shift;
    Element16* const target =
        block.out +
        (int64_t{position} * params.heads + ((row + 8 * h) & heads)) * params.head_dim_v + 8 * lane;
    bool exists = position >= 0 && position < params.query_length;
    if (Config::kIntervals) exists = row + 8 * h < block.first_row + block.rows;
#pragma unroll
    for (int group = 0; group < Config::kHeadDimV / 32; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = word(16 * group + 4 * j + 2 * h);
      transpose_quad(words, lane);
      if (exists && 32 * group + 8 * lane < params.head_dim_v) {
        *reinterpret_cast<uint4*>(target + 32 * group) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

}  // namespace jax_flash::sm90
