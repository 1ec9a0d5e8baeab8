// Query heads of a group among several blocks of work: how many, and the sum afterwards.
//
// A block of work has the query heads of a whole group, so that dK and dV are summed in registers.
// Where that makes too few blocks for the multiprocessors, each has a part of the group: its dK and
// dV are added to sums in f32, which the last kernel converts. Where sums have an order each part
// stores what is its own instead, and the last kernel adds these up, always in the same order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host/params.h"
#include "sm90/bwd_block.cuh"
#include "sm90/order.h"
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
  // Sums that leave the L2 are read and written again.
  constexpr double kSpillCost = 0.09;
  return best_sections(heads, costs, bwd_head_bytes(params, query_heads), kSpillCost,
                       multiprocessors, l2_bytes, {section_turn(multiprocessors)});
}

// The sums of dK and dV of parts: for each key head of each sequence chunks of kBwdKeyChunk keys as
// a warpgroup holds them, dK, then dV: for its thread t and register i, element 512 (i / 4) + 4 t +
// i % 4 of either is key 16 (t / 32) + t % 32 / 4 + 8 (i % 4 / 2), column 8 (i / 4) + 2 (t % 4) +
// i % 2.
struct BwdKeySums {
  int32_t copies;  // one for each part where sums have an order, else one
  int32_t chunks;  // of all sequences and key heads
  int32_t key_width;
  int32_t value_width;

  template <typename Config>
  static BwdKeySums make(const MhaBwdParams& params) {
    const int heads = params.batch * params.kv_heads;
    return {1, heads * bwd_key_chunks(params), Config::kHeadDim, Config::kHeadDimV};
  }
  // Of a copy.
  JAX_FLASH_HOST_DEVICE int64_t floats() const {
    return int64_t{chunks} * kBwdKeyChunk * (key_width + value_width);
  }
  // Pieces of 64 columns, dK's first.
  JAX_FLASH_HOST_DEVICE int key_pieces() const { return (key_width + 63) / 64; }
  JAX_FLASH_HOST_DEVICE int pieces() const { return key_pieces() + (value_width + 63) / 64; }
};

// Into how many parts the query heads of a key head are split. rows, keys: of a tile and a block.
// floats: of a copy of the sums.
inline int64_t bwd_parts(const MhaBwdParams& params, int64_t floats, int rows, int keys,
                         int64_t multiprocessors, int64_t l2_bytes) {
  const int64_t group = params.heads / params.kv_heads;
  const int64_t key_heads = int64_t{params.batch} * params.kv_heads;
  // Of a step's time: what f32 gradients take longer to store, and how many are read meanwhile.
  constexpr double kStoreCost = 1.0;
  constexpr double kRead = 1.9e6;
  const auto copies = [&](int64_t parts) { return params.deterministic ? parts : 1; };
  const auto time = [&](int64_t parts) {
    const int64_t heads = key_heads * parts;
    const int64_t query_heads = group / parts;
    std::vector<float> costs = bwd_block_costs(params, rows, keys, query_heads);
    if (parts > 1) {
      for (float& cost : costs) cost += kStoreCost;
    }
    // Zeros are written before, where they are wanted.
    const int64_t passes = copies(parts) + (params.deterministic ? 0 : 1);
    const double sums = parts == 1 ? 0.0 : static_cast<double>(passes * floats) / kRead;
    const double longest = *std::max_element(costs.begin(), costs.end());
    if (params.window_right == kUnbounded) {
      const int64_t blocks = heads * static_cast<int64_t>(costs.size());
      const int64_t rounds = (blocks + multiprocessors - 1) / multiprocessors;
      return sums + static_cast<double>(rounds) * longest;
    }
    double total = 0.0;
    for (const float cost : costs) total += static_cast<double>(cost) * heads;
    if (params.deterministic) {
      // The longest blocks come last, and end up to one of them apart.
      return sums + total / multiprocessors + 0.5 * longest;
    }
    const Sections sections =
        bwd_sections(params, heads, query_heads, costs, multiprocessors, l2_bytes);
    return sums + total / (section_use(heads, sections, costs, multiprocessors) * multiprocessors);
  };
  int64_t best = 1;
  double least = 0.0;
  for (int64_t parts = 2; parts <= group; ++parts) {
    if (group % parts != 0 || copies(parts) * floats > params.part_floats) continue;
    // Parts have to be better by a margin.
    if (least == 0.0) least = (params.deterministic ? 0.97 : 0.95) * time(1);
    const double taken = time(parts);
    if (taken < least) {
      best = parts;
      least = taken;
    }
  }
  return best;
}

}  // namespace jax_flash::sm90
