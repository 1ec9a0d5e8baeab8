// Adds up the partial results of a cluster whose thread blocks share the keys of one block of work.
//
// Each thread block leaves its unnormalised outputs, reference points and sums in its own shared
// memory; then each adds up a share of the rows, reading all ranks' parts. Ranks are added in order
// and a row's result does not depend on its neighbours: results are the same bits every time.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/cluster.cuh"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"
#include "sm90/fwd_softmax.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// The partial results in the memory of keys and values: f32 outputs by rows, then a float2 of
// reference point (in units of scores) and sum of each row.
template <typename Config>
struct PartialLayout {
  static constexpr int kRowBytes = 4 * Config::kHeadDimV;
  static constexpr int kOuts = Config::kKeyOffset;
  static constexpr int kRowStates = kOuts + Config::kRows * kRowBytes;
  static constexpr int kEnd = kRowStates + Config::kRows * 8;
  static_assert(kEnd <= Config::kStateOffset, "partial results fit where keys and values were");
  static_assert(kRowBytes % 128 == 0, "swizzled within 128 bytes");

  // 32-byte pieces XORed with the row's low two bits: no bank conflicts where a half warp writes 32
  // bytes of four rows, nor where eight lanes read 128 bytes of one.
  static constexpr __device__ uint32_t out(uint32_t row, uint32_t piece) {
    return kOuts + row * kRowBytes + piece / 4 * 128 + (((piece ^ row) & 3) << 5);
  }
  static constexpr __device__ uint32_t row_state(uint32_t row) { return kRowStates + 8 * row; }
};

// Writes this thread's part of the rows before `rows`.
template <typename Config>
__device__ __forceinline__ void store_partial(uint32_t tiles, int rows,
                                              const float (&out)[Config::kHeadDimV / 2],
                                              const RowSoftmax<Config>& softmax, int warpgroup) {
  using Layout = PartialLayout<Config>;
  const int first = 64 * warpgroup + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + fragment_row();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(softmax.sum[h]);
    const int row = first + 8 * h;
    if (row >= rows) continue;
    if (fragment_column() == 0) {
      ptx::st_shared_v2(tiles + Layout::row_state(row), softmax.reference[h], sum);
    }
#pragma unroll
    for (int j = 0; j < Config::kHeadDimV / 8; ++j) {
      ptx::st_shared_v2(tiles + Layout::out(row, j) + 4 * fragment_column(), out[4 * j + 2 * h],
                        out[4 * j + 2 * h + 1]);
    }
  }
}

// Adds up this thread block's share of the rows before `rows`, four columns at a time.
template <typename Config, int kSplits>
__device__ __forceinline__ void add_partials(const MhaFwdParams& params, const FwdPlan& plan,
                                             uint32_t tiles, const FwdBlock<Config>& block,
                                             int rows) {
  using Element = typename Config::Element;
  using Layout = PartialLayout<Config>;
  constexpr int kPieces = Config::kHeadDimV / 4;
  const int rank = ptx::cluster_ctarank();
  const int first_row = rows * rank / kSplits;
  const int count = (rows * (rank + 1) / kSplits - first_row) * kPieces;
  uint32_t parts[kSplits];
#pragma unroll
  for (int k = 0; k < kSplits; ++k) parts[k] = ptx::mapa(tiles, k);

#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += 128 * Config::kWarpgroups) {
    const int row = first_row + i / kPieces;
    const int piece = i % kPieces;
    if (4 * piece >= params.head_dim_v) continue;
    // The latency of another block's memory is paid once.
    float2 state[kSplits];
    float4 out[kSplits];
#pragma unroll
    for (int k = 0; k < kSplits; ++k) {
      state[k] = ptx::ld_cluster_v2(parts[k] + Layout::row_state(row));
    }
#pragma unroll
    for (int k = 0; k < kSplits; ++k) {
      out[k] = ptx::ld_cluster_v4(parts[k] + Layout::out(row, piece / 2) + piece % 2 * 16);
    }

    float reference = kMinusInfinity;
#pragma unroll
    for (int k = 0; k < kSplits; ++k) reference = fmaxf(reference, state[k].x);
    // A row that no key was seen by: exponents are -inf, not -inf + inf.
    if (reference == kMinusInfinity) reference = 0.0f;
    float sum = 0.0f;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int k = 0; k < kSplits; ++k) {
      const float weight = ptx::ex2_approx_ftz((state[k].x - reference) * params.scale.log2);
      sum = fmaf(weight, state[k].y, sum);
      total.x = fmaf(weight, out[k].x, total.x);
      total.y = fmaf(weight, out[k].y, total.y);
      total.z = fmaf(weight, out[k].z, total.z);
      total.w = fmaf(weight, out[k].w, total.w);
    }

    const int packed_row = block.first_row + row;
    const int position = packed_row >> plan.pack_shift;
    const int64_t head = packed_row & ((1 << plan.pack_shift) - 1);
    // Such a row gives 0 even if its accumulators hold 0 * infinity.
    const bool empty = sum == 0.0f || position >= block.mask.query_length;
    if (piece == 0) {
      block.lse[head * params.query_length + position] =
          empty ? kMinusInfinity : natural_lse(reference, sum, params.scale);
    }
    typename Config::Out* const target =
        block.out + (int64_t{position} * params.heads + head) * params.head_dim_v + 4 * piece;
    const float inverse = empty ? 0.0f : __fdividef(1.0f, sum);
    if constexpr (Config::kSplit) {
      if (empty) total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      *reinterpret_cast<float4*>(target) =
          make_float4(total.x * inverse, total.y * inverse, total.z * inverse, total.w * inverse);
      continue;
    }
    uint2 words = make_uint2(0, 0);
    if (!empty) {
      words.x = ptx::cvt_rn_x2<Element>(total.x * inverse, total.y * inverse);
      words.y = ptx::cvt_rn_x2<Element>(total.z * inverse, total.w * inverse);
    }
    *reinterpret_cast<uint2*>(target) = words;
  }
}

// Finishes the one block of work of this cluster. All consumer threads of all its thread blocks
// call it, those without tiles too, when their own products are done; other threads exit without
// touching the cluster's barrier. `tiles` is the shared address of the first query stage.
template <typename Config>
__device__ __forceinline__ void combine_splits(const MhaFwdParams& params, const FwdPlan& plan,
                                               uint32_t tiles, const FwdBlock<Config>& block,
                                               const float (&out)[Config::kHeadDimV / 2],
                                               const RowSoftmax<Config>& softmax, int warpgroup) {
  // Short queries fill few rows of a tile; the others neither travel nor count in the shares.
  const int rows = min(Config::kRows, (params.query_length << plan.pack_shift) - block.first_row);
  ptx::bar_sync(8, 128 * Config::kWarpgroups);  // no warpgroup reads keys or values any more
  store_partial<Config>(tiles, rows, out, softmax, warpgroup);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (plan.splits == 2) {
    add_partials<Config, 2>(params, plan, tiles, block, rows);
  } else if (plan.splits == 4) {
    add_partials<Config, 4>(params, plan, tiles, block, rows);
  } else {
    add_partials<Config, 8>(params, plan, tiles, block, rows);
  }
  // Others may still read this thread block's memory. Not a relaxed arrival, which could pass loads
  // whose values rows without keys do not use.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace jax_flash::sm90
