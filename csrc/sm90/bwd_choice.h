// How blocks of keys add to dQ: the choices of a launch of the sm_90 backward.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/params.h"
#include "sm90/bwd_block.cuh"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// Whether the first to add to a part of dQ stores. Where sums have an order it knows that it is
// the first. Where not it has to ask, and others may have to wait for it: worth it while the sums
// are a large part of the work and few add to the same part at a time. Over width 128 each adds in
// more pieces, and waits for each.
inline bool bwd_first_stores(const MhaBwdParams& params) {
  if (params.deterministic) return true;
  const bool diagonal = params.window_right != kUnbounded;
  const int64_t left = params.window_left == kUnbounded ? kMaxLength : params.window_left;
  const int64_t right = diagonal ? params.window_right : kMaxLength;
  const int64_t seen = std::min<int64_t>(params.query_length, left + right + 1);
  if (diagonal) return seen <= (params.head_dim <= 128 ? 16384 : 2048);
  return seen <= (params.head_dim <= 64 ? 4096 : 2048);
}

// Thread blocks of a launch of the order's, each of which has a place of its own among the `blocks`
// of a head; 0: that would leave too many multiprocessors idle.
inline int64_t bwd_whole_heads(int64_t blocks, int64_t heads, int64_t multiprocessors) {
  if (blocks * heads <= multiprocessors) return blocks * heads;
  const int64_t whole = multiprocessors / blocks * blocks;
  return whole >= 0.9 * multiprocessors ? whole : 0;
}

// How blocks add to the sum of dQ.
struct BwdWay {
  bool ordered;   // the first to add to a tile knows it, and has its place; so has the last
  bool strict;    // all have
  bool ring;      // BwdOrderedBlock
  bool finishes;  // the last to add to a tile makes its dQ
};

// Blocks of a ring wait for each other, so all blocks of a head have to run at once.
inline bool bwd_may_ring(const MhaBwdParams& params, int rows, int keys, int64_t multiprocessors) {
  const int64_t blocks = bwd_key_blocks(params.key_length, keys);
  const int64_t tiles = (int64_t{params.query_length} + rows - 1) / rows;
  return tiles >= blocks && tiles < BwdTileRange::kMax &&
         bwd_whole_heads(blocks, int64_t{params.batch} * params.kv_heads, multiprocessors) > 0;
}

// Whether query heads of groups are no reason to look for more blocks of work (bwd_parts.cuh).
inline bool bwd_has_work(const MhaBwdParams& params, int keys, int64_t multiprocessors) {
  const int64_t blocks = bwd_key_blocks(params.key_length, keys);
  return params.heads == params.kv_heads ||
         params.batch * params.kv_heads * blocks >= 4 * multiprocessors;
}

// For kernels that do not finish. Sums have an order if that is asked for, or where it is faster:
// the first to add knows it, instead of asking.
inline BwdWay bwd_plain_way(const MhaBwdParams& params, bool has_intervals,
                            int64_t multiprocessors) {
  const bool pays = !has_intervals && params.window_right == kUnbounded &&
                    params.window_left == kUnbounded &&
                    bwd_has_work(params, 128, multiprocessors) &&
                    std::max(params.query_length, params.key_length) <= 2048;
  const bool ordered = params.deterministic || pays;
  return {ordered, ordered, false, false};
}

// The same for widths up to 128. rows, keys: of a tile and a block.
inline BwdWay bwd_way(const MhaBwdParams& params, int rows, int keys, int64_t multiprocessors) {
  const bool diagonal = params.window_right != kUnbounded;
  const bool window = params.window_left != kUnbounded;
  const int64_t length = std::max(params.query_length, params.key_length);
  const bool is_short = length <= 2048;
  const int64_t blocks =
      int64_t{params.batch} * params.heads * bwd_key_blocks(params.key_length, keys);
  const bool fills = params.heads == params.kv_heads && blocks >= 8 * multiprocessors;
  const bool may_finish = !params.f32_dquery && params.head_dim % 8 == 0 &&
                          reinterpret_cast<uintptr_t>(params.dquery) % 16 == 0 &&
                          params.query_length / rows < BwdTileRange::kMax - 1;
  BwdWay way{params.deterministic, params.deterministic, false, false};
  if (!diagonal && !window) {
    // At width 64 the last of a ring waits longer than a tile takes: the block of the first keys is
    // the last for all tiles there. Of few blocks that takes too long, of many it saves little.
    const bool narrow = params.head_dim <= 64;
    const bool many = params.key_length >= 1024 && length <= 8192;
    way.ring = !way.ordered && !narrow && bwd_has_work(params, keys, multiprocessors) &&
               bwd_may_ring(params, rows, keys, multiprocessors);
    way.finishes = may_finish && (way.ring || (!way.ordered && narrow && many && fills));
    way.ordered |= way.ring || way.finishes;
  } else if (diagonal && !window) {
    // The last for all tiles is the longest block, and the last to be taken.
    way.ordered |= is_short && fills;
    way.finishes = may_finish && way.ordered && is_short;
  } else if (diagonal && int64_t{params.window_left} + params.window_right < 4096) {
    way.ordered = true;  // few add to the same part
  }
  return way;
}

}  // namespace jax_flash::sm90
