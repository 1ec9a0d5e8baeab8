// How many thread blocks share the keys of one block of work where there are too few blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host/params.h"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// What the number of splits is chosen for. Not the count of the device at hand: the number decides
// how sums are grouped, and results should be the same bits on every device of this family.
inline constexpr int kSplitMultiprocessors = 132;
inline constexpr int kMaxSplits = 8;

// The most keys that one row block of `rows` rows can see.
inline int64_t most_keys_seen(const MhaFwdParams& params, int rows) {
  const int64_t left = params.window_left;
  const int64_t right = params.window_right;
  int64_t keys = params.key_length;
  if (left != kUnbounded && right != kUnbounded) {
    keys = std::min(keys, left + right + std::min(rows, params.query_length));
  }
  // One end of the window meets the end of the keys that queries are aligned with.
  if (params.bottom_right && left != kUnbounded) {
    keys = std::min(keys, left + params.query_length);
  }
  if (!params.bottom_right && right != kUnbounded) {
    keys = std::min(keys, right + params.query_length);
  }
  return keys;
}

// 1, 2, 4 or 8 thread blocks (a cluster) for each block of `rows` queries and tiles of `keys` keys.
// A function of one batch element's shapes: results do not depend on the size of the batch, nor on
// values of lengths. So a large batch is split as well, and that must not cost it much.
inline int fwd_splits(const MhaFwdParams& params, int64_t blocks_of_one_batch, int rows, int keys) {
  // Less is not worth the exchange of partial results and, in a large batch, the start of a thread
  // block.
  constexpr int64_t kTilesPerSplit = 4;
  // Prefill and training have batches, and unequal causal blocks, which persistent thread blocks
  // even out and clusters do not. Short queries on long contexts split.
  if (params.query_length > params.key_length / 4) return 1;

  const int64_t tiles = (most_keys_seen(params, rows) + keys - 1) / keys;
  int splits = 1;
  for (int more = 2; more <= kMaxSplits; more *= 2) {
    // A cluster lies within a processing cluster (GPC), mostly of 16 or 18 multiprocessors: larger
    // clusters than pairs leave some unused.
    const int64_t usable = more > 2 ? kSplitMultiprocessors / 16 * 16 : kSplitMultiprocessors;
    if (blocks_of_one_batch * more > usable || tiles < kTilesPerSplit * more) break;
    splits = more;
  }
  return splits;
}

}  // namespace jax_flash::sm90
