// Query heads of a group among several blocks of work: how many, and the sum afterwards.
//
// A block of work has the query heads of a whole group, so that dK and dV are summed in registers.
// Where that makes too few blocks for the multiprocessors, each has a part of the group: its dK and
// dV go to a workspace in f32, and the last kernel adds the parts up, always in the same order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host/params.h"
#include "ptx/math.cuh"
#include "sm90/order.h"
#include "tile/copy.cuh"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// What blocks of `keys` keys and `query_heads` query heads cost, from the first, in tiles of `rows`
// queries.
inline std::vector<float> bwd_block_costs(const MhaBwdParams& params, int rows, int keys,
                                          int64_t query_heads) {
  // What a block costs beside its tiles.
  constexpr float kBlockCost = 3.0f;
  const RowMask mask = RowMask::make(params.query_length, params.key_length, params.window_left,
                                     params.window_right, params.bottom_right);
  std::vector<float> costs;
  for (int64_t first = 0; first < params.key_length; first += keys) {
    const int first_key = static_cast<int>(first);
    const RowInterval seen = mask.rows(first_key, first_key + keys);
    const int tiles = seen.first < seen.end ? (seen.end + rows - 1) / rows - seen.first / rows : 0;
    costs.push_back(kBlockCost + static_cast<float>(query_heads * tiles));
  }
  return costs;
}

// Of a part of a key head: queries, their output gradients and the sum of their gradients.
inline double bwd_head_bytes(const MhaBwdParams& params, int64_t query_heads) {
  return (2.0 + 2.0 + 4.0) * query_heads * params.query_length * params.head_dim;
}

// Sections of the order of blocks where they are unequal. heads: parts of key heads.
inline Sections bwd_sections(const MhaBwdParams& params, int64_t heads, int64_t query_heads,
                             const std::vector<float>& costs, int64_t multiprocessors,
                             int64_t l2_bytes) {
  return best_sections(heads, costs, bwd_head_bytes(params, query_heads), multiprocessors, l2_bytes,
                       {section_turn(multiprocessors)});
}

// Rows of dK, and of dV.
JAX_FLASH_HOST_DEVICE int64_t bwd_gradient_rows(const MhaBwdParams& params) {
  return int64_t{params.batch} * params.kv_heads * params.key_length;
}
// Floats of both that one part has.
inline int64_t bwd_part_floats(const MhaBwdParams& params) {
  return bwd_gradient_rows(params) * (params.head_dim + params.head_dim_v);
}

// Into how many parts the query heads of a key head are split. rows, keys: of a tile and a block.
inline int64_t bwd_parts(const MhaBwdParams& params, int rows, int keys, int64_t multiprocessors,
                         int64_t l2_bytes) {
  const int64_t group = params.heads / params.kv_heads;
  const int64_t key_heads = int64_t{params.batch} * params.kv_heads;
  const int64_t floats = bwd_part_floats(params);
  // Of a step's time: what f32 gradients take longer to store, and how many are added up meanwhile.
  constexpr double kStoreCost = 1.0;
  constexpr double kAdded = 1.9e6;
  const auto time = [&](int64_t parts) {
    const int64_t heads = key_heads * parts;
    const int64_t query_heads = group / parts;
    std::vector<float> costs = bwd_block_costs(params, rows, keys, query_heads);
    if (parts > 1) {
      for (float& cost : costs) cost += kStoreCost;
    }
    const double sums = parts == 1 ? 0.0 : static_cast<double>(parts * floats) / kAdded;
    if (params.window_right == kUnbounded) {
      const int64_t blocks = heads * static_cast<int64_t>(costs.size());
      const int64_t rounds = (blocks + multiprocessors - 1) / multiprocessors;
      return sums + static_cast<double>(rounds) * *std::max_element(costs.begin(), costs.end());
    }
    const Sections sections =
        bwd_sections(params, heads, query_heads, costs, multiprocessors, l2_bytes);
    double total = 0.0;
    for (const float cost : costs) total += static_cast<double>(cost) * heads;
    return sums + total / (section_use(heads, sections, costs, multiprocessors) * multiprocessors);
  };
  int64_t best = 1;
  double least = 0.0;
  for (int64_t parts = 2; parts <= group; ++parts) {
    if (group % parts != 0 || parts * floats > params.part_floats) continue;
    // Parts have to be better by a margin.
    if (least == 0.0) least = 0.95 * time(1);
    const double taken = time(parts);
    if (taken < least) {
      best = parts;
      least = taken;
    }
  }
  return best;
}

// A thread's piece of the sum of parts, eight columns of a row: dK's pieces first, then dV's.
template <typename Element>
__device__ __forceinline__ void add_bwd_parts(const MhaBwdParams& params, int parts,
                                              int64_t piece) {
  const int64_t rows = bwd_gradient_rows(params);
  const int64_t key_pieces = rows * params.head_dim / 8;
  const int64_t all = key_pieces + rows * params.head_dim_v / 8;
  if (piece >= all) return;
  const bool is_key = piece < key_pieces;
  const int64_t stride = 8 * (is_key ? key_pieces : all - key_pieces);  // from part to part
  const int64_t at = 8 * (is_key ? piece : piece - key_pieces);
  const float* source = params.parts + (is_key ? 0 : 8 * key_pieces * parts) + at;
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4 y = x;
#pragma unroll 4
  for (int part = 0; part < parts; ++part, source += stride) {
    const float4 a = reinterpret_cast<const float4*>(source)[0];
    const float4 b = reinterpret_cast<const float4*>(source)[1];
    x = make_float4(x.x + a.x, x.y + a.y, x.z + a.z, x.w + a.w);
    y = make_float4(y.x + b.x, y.y + b.y, y.z + b.z, y.w + b.w);
  }
  void* const out = is_key ? params.dkey : params.dvalue;
  if (is_key ? params.f32_dkey : params.f32_dvalue) {
    float4* const target = reinterpret_cast<float4*>(static_cast<float*>(out) + at);
    target[0] = x;
    target[1] = y;
  } else {
    *reinterpret_cast<uint4*>(static_cast<Element16*>(out) + at) =
        make_uint4(ptx::cvt_rn_x2<Element>(x.x, x.y), ptx::cvt_rn_x2<Element>(x.z, x.w),
                   ptx::cvt_rn_x2<Element>(y.x, y.y), ptx::cvt_rn_x2<Element>(y.z, y.w));
  }
}

// Thread blocks of `threads` threads, in rows of `columns`, that take all pieces.
inline int64_t bwd_part_blocks(const MhaBwdParams& params, int threads, int columns) {
  const int64_t pieces = bwd_part_floats(params) / 8;
  const int64_t per_row = int64_t{threads} * columns;
  return (pieces + per_row - 1) / per_row;
}

}  // namespace jax_flash::sm90
