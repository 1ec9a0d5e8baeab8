// A block of work: at most kRows queries of one head, or of the heads that share a key head, and
// the key tiles that they see. The planner writes it to shared memory, the other roles read it
// there.
//
// Packed rows: where queries are short, the query heads of one key head are rows of the same tile;
// row r is position r >> pack_shift of head first_head + r % (1 << pack_shift).
#pragma once

#include <cuda.h>

#include <type_traits>

#include "host/params.h"
#include "ptx/warpgroup.cuh"
#include "sm90/row_blocks.cuh"
#include "sm90/section_order.h"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"
#include "tile/score_arrays.cuh"
#include "tile/score_options.cuh"
#include "tile/sequence.cuh"

namespace jax_flash::sm90 {

// What a launch adds to MhaFwdParams.
struct FwdPlan {
  CUtensorMap query;  // dims: width, head, row, two batch dims
  CUtensorMap key;    // dims: width, row, head, two batch dims
  CUtensorMap value;
  CUtensorMap out;     // dims: width, head, row, batch, 1
  int32_t pack_shift;  // log2 of the heads in a tile
  int32_t splits;      // thread blocks (a cluster) that share the keys of one block of work
  FastDivisor parts;   // MhaFwdParams::key_parts, 1 if there are none
  int32_t shares;      // splits * parts, one of which is 1: the tiles of rows are cut into so many
  int32_t front;       // rows before the first, of warpgroups that have no others; see front_rows

  FastDivisor inner_batch;  // size of the inner of two batch dims

  SectionOrder order;       // of blocks of rows, from the last to the first, or of row_blocks.cuh
  FastDivisor head_groups;  // packs of heads in a batch

  // Where softcap or slopes make logits, for which softmax has scale 1.
  float logit_scale;      // of q.k
  float logit_log2;       // the same in base 2
  TanhPolynomial capped;  // logits in base 2
  SmallTanh small;        // the same of small ones
};

// What a block with intervals has beside the others.
template <int kWarpgroups>
struct FwdBlockIntervals {
  float slope;    // with kOptions
  int first_key;  // of tile 0: the first that some row sees, or 0, if tiles are to be aligned
  // Of the rows of each warpgroup: hull and core of their keys, as in RowTile.
  KeyInterval hull[kWarpgroups];
  KeyInterval core[kWarpgroups];
  // Of int, so that addresses are those of other arrays: registers are few.
  int mixed[kWarpgroups];  // ids have to be compared
  int drops[kWarpgroups];  // some of its rows are dead, or not the block's
};

// And one with biases, a mask of bits or dropout.
struct FwdDenseBlock {
  Dropout dropout;
  const unsigned char* bias;  // of the head's row 0, or null
  const uint32_t* bits;       // the same of the mask
  uint64_t hidden;   // RowTile::hidden of all its rows; of tiles of two parts, both or none
  int hidden_shift;  // see hidden_shift()

  __device__ __forceinline__ void begin(const MhaFwdParams& params, int batch, int head) {
    ptx::forget_memory();  // the planner has few registers
    dropout = Dropout::make(params, batch, head);
    ptx::forget_memory();
    bias = BiasRows::make(params, batch, head).data;
    ptx::forget_memory();
    bits = MaskRows::make(params, batch, head).data;
    ptx::forget_memory();
  }
};

struct NoIntervals {};
struct NothingDense {};

template <typename Config>
struct FwdBlock
    : std::conditional_t<Config::kIntervals, FwdBlockIntervals<Config::kWarpgroups>, NoIntervals>,
      std::conditional_t<Config::kDense, FwdDenseBlock, NothingDense> {
  int tiles;       // key tiles to visit, last to first; negative: there are no more blocks
  int last_tile;   // number of the tile that is visited first; what is hidden between is not
  int value_rows;  // rows of that tile whose values exist; the others may hold anything
  int first_row;   // packed; negative in a block that starts with padding
  int rows;        // of which exist in the sequence, or are the block's; the others are padding
  int head;        // first query head
  int place;       // of its results: its sequence, or a part of that
  typename Config::Mask mask;
  // Per warpgroup: the tile that it visits first; it passes over those after it.
  int start[Config::kWarpgroups];
  // Per warpgroup: the tile that it visits last, and how many it passes over after that. One
  // without rows visits one tile, to store the outputs of the block before.
  int lowest[Config::kWarpgroups];
  int passed[Config::kWarpgroups];
  // Per warpgroup: each of its rows has seen some key of a tile visited before tiles [first, end),
  // and sees these in full. They take no mask and no maximum. With kMasksClean those before
  // `full_first` are among them, which take a mask.
  int clean_first[Config::kWarpgroups];
  int clean_end[Config::kWarpgroups];
  // Tiles [first, end) are seen in full by all its rows.
  int full_first[Config::kWarpgroups];
  int full_end[Config::kWarpgroups];
  float* lse;  // of position 0 of the first query head
  typename Config::Out* out;

  __device__ __forceinline__ int key_of(int tile) const {
    if constexpr (Config::kIntervals && !Config::kDense) {
      return this->first_key + tile * Config::kKeys;
    } else {
      return tile * Config::kKeys;
    }
  }
};

// The tile that is visited after `tile`; lowest - 1 after `lowest`, the last of all.
template <int kKeys>
__device__ __forceinline__ int next_seen(uint64_t hidden, int shift, int lowest, int tile) {
  if (tile-- == lowest) return tile;
  const int part = tile * kKeys >> shift;
  if ((hidden >> part & 1) == 0) return tile;
  const uint64_t seen = ~hidden & ((uint64_t{1} << part) - 1);
  if (seen == 0) return lowest;
  const int end = (64 - __clzll(static_cast<long long>(seen))) << shift;
  return max(lowest, (end - 1) / kKeys);
}

// Whether tiles between the first and the last are hidden.
template <typename Config>
__device__ __forceinline__ bool has_holes(const FwdBlock<Config>& block) {
  if constexpr (Config::kDense) {
    return __any_sync(0xffffffffu, block.hidden != 0);  // one register, not two
  } else {
    return false;
  }
}

// The same for a warpgroup.
template <typename Config>
__device__ __forceinline__ int next_tile(const FwdBlock<Config>& block, int warpgroup, int tile) {
  if constexpr (Config::kDense) {
    const int lowest = block.lowest[warpgroup];
    return next_seen<Config::kKeys>(block.hidden, block.hidden_shift, lowest, tile);
  } else {
    return tile - 1;
  }
}

// Which rows of which head block (or pair of blocks) `id` is; a negative batch where a section is
// padded. With parts, the batch is the place of the block's results.
template <typename Config>
__device__ __forceinline__ BlockCoordinate block_at(const MhaFwdParams& params, const FwdPlan& plan,
                                                    int id) {
  const SectionOrder::Place place = plan.order.place_of(id);
  if (place.block >= plan.order.blocks) return {0, 0, -1};
  const int batch = plan.head_groups.divide(place.head);
  return {plan.order.blocks - 1 - place.block,
          place.head - batch * static_cast<int>(plan.head_groups.divisor), batch};
}

// By a warp: what the intervals of the rows of a block say. Of a slot's description, lane 0 writes
// what make_block takes from there.
template <typename Config>
__device__ __forceinline__ void look_at_rows(const MhaFwdParams& params, const RowBlock& rows,
                                             int batch, FwdBlock<Config>& block) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kRows = Config::kRows;
  const IntervalMask mask = IntervalMask::make(params, batch);
  const int last = rows.first + rows.rows - 1;
  // All at once.
  int2 keys[kRows / 32];
  int mixed[Config::kWarpgroups];
#pragma unroll
  for (int i = 0; i < kRows / 32; ++i) {
    const int row = min(rows.first + 32 * i + lane_id(), last);
    keys[i] = __ldg(reinterpret_cast<const int2*>(mask.row_records + row));
  }
#pragma unroll
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    const int row = min(rows.first + 64 * w, last);
    mixed[w] = __ldg(&mask.row_tiles[row / kIntervalRows].mixed) |
               __ldg(&mask.row_tiles[min(row + 63, last) / kIntervalRows].mixed);
  }
#pragma unroll
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    KeyInterval hull = {kMaxLength, 0};
    KeyInterval core = {0, kMaxLength};
    bool dead = false;
#pragma unroll
    for (int i = 2 * w; i < 2 * w + 2; ++i) {
      if (32 * i + lane_id() >= rows.rows) continue;
      const KeyInterval own = {keys[i].x, keys[i].y};
      if (own.first < own.end) {
        hull = {min(hull.first, own.first), max(hull.end, own.end)};
        core = {max(core.first, own.first), min(core.end, own.end)};
      } else {
        dead = true;
      }
    }
    const auto least = [](int x) { return static_cast<int>(__reduce_min_sync(kAll, unsigned(x))); };
    const auto most = [](int x) { return static_cast<int>(__reduce_max_sync(kAll, unsigned(x))); };
    hull = {least(hull.first), most(hull.end)};
    core = {most(core.first), least(core.end)};
    dead = __any_sync(kAll, dead);
    if (lane_id() == 0) {
      block.hull[w] = hull;
      block.core[w] = mixed[w] != 0 ? KeyInterval{0, 0} : core;
      block.drops[w] = dead || rows.rows < 64 * (w + 1);
      block.mixed[w] = mixed[w] != 0;
    }
  }
  if (lane_id() == 0) {
    block.mask = mask;
    block.first_row = rows.first;
    block.rows = rows.rows;
  }
}

// The keys that rows of a block with intervals see. Its tiles begin with the first of them, unless
// ids have to be compared, or something has an entry for each query and key: what is read for eight
// or more keys at once begins with a multiple of that.
template <typename Config>
__device__ __forceinline__ KeyInterval begin_tiles(FwdBlock<Config>& block) {
  KeyInterval keys = {kMaxLength, 0};
  bool aligned = Config::kDense;
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    keys = {min(keys.first, block.hull[w].first), max(keys.end, block.hull[w].end)};
    aligned = aligned || block.mixed[w];
  }
  if (keys.first >= keys.end) keys = {0, 0};
  block.first_key = aligned ? 0 : keys.first;
  return {keys.first - block.first_key, keys.end - block.first_key};
}

// Describes the block at `at` (with intervals, that which look_at_rows has begun); false if it
// sees no keys. Its `tiles` are number `share` of `shares`; with splits they may be none. place: of
// its results.
template <typename Config>
__device__ __forceinline__ bool make_block(const MhaFwdParams& params, const FwdPlan& plan,
                                           const BlockCoordinate& at, int place, int share,
                                           FwdBlock<Config>& block) {
  const int pack_shift = plan.pack_shift;
  block.head = at.head << pack_shift;
  block.place = place;
  const int64_t head = int64_t{place} * params.heads + block.head;
  block.lse = params.lse + head * params.query_length;
  block.out =
      static_cast<typename Config::Out*>(params.out) +
      (int64_t{place} * params.query_length * params.heads + block.head) * params.head_dim_v;
  KeyInterval keys;
  if constexpr (Config::kIntervals) {
    if constexpr (Config::kOptions) {
      block.slope = ScoreOptions::make(params, at.batch, block.head).slope;
    }
    if constexpr (Config::kDense) block.begin(params, at.batch, block.head);
    keys = begin_tiles(block);
  } else {
    const int first_row = at.row_block * Config::kRows - plan.front;
    block.first_row = first_row;
    block.mask = row_mask(params, at.batch);
    block.rows = (block.mask.query_length << pack_shift) - first_row;
    ptx::forget_memory();  // the planner has few registers
    const int last_row = first_row + Config::kRows - 1;
    keys = block.mask.hull(max(first_row, 0) >> pack_shift, (last_row >> pack_shift) + 1);
  }
  const bool any = keys.first < keys.end;
  if constexpr (Config::kDense) {
    static_assert(Config::kKeys == 64 || Config::kKeys == 128);
    const int shift = hidden_shift(params.key_length);
    uint64_t hidden =
        block.mask.hidden(block.first_row, block.first_row + min(Config::kRows, block.rows));
    if (1 << shift < Config::kKeys) {
      constexpr uint64_t kEven = 0x5555555555555555u;
      hidden &= (hidden >> 1 & kEven) | (hidden & kEven) << 1;
    }
    block.hidden = hidden;
    block.hidden_shift = shift;
  }
  int first_tile = keys.first / Config::kKeys;
  int end_tile = any ? (keys.end + Config::kKeys - 1) / Config::kKeys : first_tile;
  if (plan.shares > 1) {
    const int most = (end_tile - first_tile + plan.shares - 1) / plan.shares;
    end_tile = min(end_tile, first_tile + (share + 1) * most);
    first_tile = min(end_tile, first_tile + share * most);
  }
  block.tiles = end_tile - first_tile;
  block.last_tile = end_tile - 1;
  if constexpr (!Config::kIntervals) {
    block.value_rows = min(Config::kKeys, block.mask.key_length - (end_tile - 1) * Config::kKeys);
  }
#pragma unroll 1
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    ptx::forget_memory();
    KeyInterval seen;
    KeyInterval core;
    bool padding;  // there are only rows whose results are dropped
    if constexpr (Config::kIntervals) {
      seen = {block.hull[w].first - block.first_key, block.hull[w].end - block.first_key};
      core = {max(0, block.core[w].first - block.first_key), block.core[w].end - block.first_key};
      padding = seen.first >= seen.end;
    } else {
      const int row = block.first_row + 64 * w;
      // Rows that exist, or none: padding before the first row is whole warpgroups.
      const int begin = row < 0 ? block.mask.query_length : row >> pack_shift;
      const int past = ((row + 63) >> pack_shift) + 1;
      core = block.mask.core(begin, past);
      padding = begin >= block.mask.query_length;
      if constexpr (Config::kSkips) seen = block.mask.hull(begin, past);
    }
    if (padding) core = {0, kMaxLength};
    // Any other scale goes through the careful path, which multiplies it in.
    bool none = params.scale.first != 1.0f;
    // So do options and biases where other tiles may have none.
    if constexpr (Config::kDense) none = none || ScoreOptions::any<!Config::kBiasClean>(params);
    // Where documents meet, no key is seen by all, but the last key of each row is none before the
    // first end. Where ids count, that is 0.
    if constexpr (!Config::kIntervals) none = none || core.first >= core.end;
    const int full_first = (core.first + Config::kKeys - 1) / Config::kKeys;
    block.full_first[w] = full_first;
    block.full_end[w] = core.first < core.end ? core.end / Config::kKeys : 0;
    // The first row's last key lies in the tile after `end`, or that tile was seen in full.
    const int end = none ? 0 : (core.end + Config::kKeys - 1) / Config::kKeys - 1;
    int start = block.last_tile;
    if constexpr (Config::kSkips) {
      // Meanwhile the values of the block before, and of the tiles, stay.
      start = max(max(first_tile, end_tile - Config::kValueStages),
                  min(start, (seen.end + Config::kKeys - 1) / Config::kKeys - 1));
    }
    block.start[w] = start;
    block.clean_end[w] = min(end, start);
    int lowest = padding ? start : first_tile;
    if constexpr (Config::kDense) {
      // Tiles that are passed over are counted by their numbers.
      if (block.hidden != 0) {
        block.start[w] = block.last_tile;
        lowest = first_tile;
      }
    }
    // With one stage of queries, the last tile must not need them after its product.
    block.lowest[w] = lowest;
    block.passed[w] = lowest - first_tile;
    block.clean_first[w] = lowest + (Config::kQueryStages == 1 ? 1 : 0);
    if (!Config::kMasksClean) block.clean_first[w] = max(block.clean_first[w], full_first);
  }
  return any && (plan.splits > 1 || block.tiles > 0);
}

}  // namespace jax_flash::sm90
