// A block of work of the backward: kKeys keys of one key head, and the queries that see them, of
// all or some of its query heads. Of a pair of thread blocks both have the queries that see any of
// the keys of both.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "host/params.h"
#include "ptx/warpgroup.cuh"
#include "sm90/bwd_config.cuh"
#include "sm90/ring.cuh"
#include "sm90/section_order.h"
#include "sm90/work_order.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"
#include "tile/score_arrays.cuh"
#include "tile/score_options.cuh"

namespace jax_flash::sm90 {

// Blocks of `keys` keys of a head. Lengths are below kMaxLength, so that nothing overflows.
JAX_FLASH_HOST_DEVICE int bwd_key_blocks(int key_length, int keys) {
  return (key_length + keys - 1) / keys;
}

// Of keys, as a warpgroup holds their gradients.
inline constexpr int kBwdKeyChunk = 64;
// Of a sequence.
JAX_FLASH_HOST_DEVICE int bwd_key_chunks(const MhaBwdParams& params) {
  return (params.key_length + kBwdKeyChunk - 1) / kBwdKeyChunk;
}

// Whether thread blocks add to sums in an order.
template <typename Config>
__device__ __forceinline__ bool adds_in_order(const MhaBwdParams& params) {
  if constexpr (Config::kIntervals) return params.deterministic;
  return Config::kDeterministic;
}

// What a launch adds to MhaBwdParams.
struct BwdPlan {
  CUtensorMap query;  // dims: width, row, head, two batch dims
  CUtensorMap key;
  CUtensorMap value;
  CUtensorMap dout;    // dims: width, row, head, batch, 1
  CUtensorMap dquery;  // the same, where blocks that are the last to add to a tile make it

  FastDivisor inner_batch;  // size of the inner of two batch dims
  FastDivisor kv_heads;
  FastDivisor parts;  // into which the query heads of a key head are split

  int32_t query_heads;  // of a part
  int32_t tiles;        // of queries of a head
  int32_t padded_rows;  // of a head's lse and delta

  SectionOrder order;  // of blocks of keys; its heads are the parts of key heads
  FastDivisor groups;  // thread blocks, or pairs of them
  bool first_to_last;  // which it starts with
  bool queued;         // thread blocks take the next that nobody has taken, not one of the order's
  bool ring;           // each block begins with tiles of its own: see BwdOrderedBlock
  bool strict;         // where blocks add in an order, all of them have their place

  // Where softcap or slopes make logits.
  float logit_log2;     // of q.k, in base 2
  float softcap_log2;   // of what `tanh` gives, in base 2
  TanhPolynomial tanh;  // of logits over softcap
  SmallTanh small;      // the same
};

// With intervals.
struct BwdIntervalBlock {
  const float* slopes;  // of the sequence's query heads, or null
  bool dead_keys;       // whether there are keys that may hold anything
  bool copied;          // its keys, as the producer notes for itself
  // Where it is in the rings of blocks and of keys: consumers have no registers to count.
  RingIndex<2> slot;
  uint32_t key_copies;
};

// Whether a warpgroup has steps of its own for tiles that see none of its keys. Without intervals
// the producer has no registers left at width 64 to find them; with what is dense, the consumers.
template <typename Config>
inline constexpr bool kBwdPassesUnseen =
    Config::kKeyStep > 0 && !Config::kDense && (Config::kHeadDim > 64 || Config::kIntervals);

// Without. Per warpgroup: where kBwdPassesUnseen, tiles [first, end) some of whose queries see some
// of its keys; tiles whose queries, those that exist, see all of its keys, and whose rows are all
// live.
struct BwdPlainBlock {
  int seen_first[2];
  int seen_end[2];
  int clean_first[2];
  int clean_end[2];

  __device__ __forceinline__ bool sees(int warpgroup, int tile) const {
    return tile >= seen_first[warpgroup] && tile < seen_end[warpgroup];
  }
};

// With what is dense, of the sequence: first entries, or null. Heads are added in the steps.
struct BwdDenseBlock {
  const unsigned char* bias;
  const uint32_t* bits;
  const uint32_t* seeds;
  float* dbias;
  bool skips;  // tiles that a mask hides; with an order of sums every tile of a hull has its turn

  __device__ __forceinline__ void begin(const MhaBwdParams& params, int batch) {
    ptx::forget_memory();  // the producer has few registers
    bias = BiasRows::make(params, batch, 0).data;
    ptx::forget_memory();
    bits = MaskRows::make(params, batch, 0).data;
    ptx::forget_memory();
    seeds = params.intervals.seeds;
    if (seeds != nullptr) seeds += batch_offset(params.intervals.seed_strides, batch, params);
    ptx::forget_memory();
    dbias = BiasGradient::make(params, batch, 0).data;
    ptx::forget_memory();
    skips = bits != nullptr && !params.deterministic;
  }
};
struct NothingDense {};

// Tiles [first, end) below kMax, in one register.
struct BwdTileRange {
  static constexpr int kMax = 1 << 16;
  uint32_t bits;

  __device__ __forceinline__ static BwdTileRange of(int first, int end) {
    return {static_cast<uint32_t>(end) << 16 | static_cast<uint32_t>(first)};
  }
  __device__ __forceinline__ bool has(int tile) const {
    return tile >= static_cast<int>(bits & 0xffff) && tile < static_cast<int>(bits >> 16);
  }
};

// Where the first and the last block that add to dQ of a tile have their place, or all of them.
//
// In a ring, which has no mask, block b of the `ring` blocks of a head that have keys begins with
// tile b tiles / ring of its queries, goes on to the last and then from the first on: so a tile
// sees them from block to block downwards, each a share of the tiles after the one before, and all
// of them start and end at a time.
struct BwdOrderedBlock {
  int ring;             // 0: there is none
  int start_tile;       // which a head begins with
  BwdTileRange store;   // in a ring: tiles that it is the first for
  BwdTileRange finish;  // tiles that it is the last for, if it makes their dQ
};
struct BwdUnorderedBlock {};

// The producer writes it to shared memory, the consumers read it there.
template <typename Config>
struct BwdBlock : std::conditional_t<Config::kIntervals, BwdIntervalBlock, BwdPlainBlock>,
                  std::conditional_t<Config::kDense, BwdDenseBlock, NothingDense>,
                  std::conditional_t<Config::kFinishes, BwdOrderedBlock, BwdUnorderedBlock> {
  // Of queries, for each query head; negative: there are no more blocks. With intervals some of
  // them may be passed over.
  int tiles;
  int first_tile;   // of them
  int steps;        // of all query heads together
  int first_head;   // of its query heads
  int query_heads;  // how many
  int in_sum;       // number of the first tile of the first head in the sum for dQ
  int next_head;    // from the last tile of a head to the first of the next, there
  int first_key;
  int keys;  // of which exist in the sequence; the others are padding. Not with intervals.
  int head;  // key head
  int batch;
  int sum_batch;  // in the sums of the gradients of keys and values of parts, all copies of them
  typename Config::Mask mask;
  RowInterval live;  // rows that see any key; the others may hold anything. Not with intervals.

  // The tile that a head begins with.
  __device__ __forceinline__ int start() const {
    if constexpr (Config::kFinishes) return this->start_tile;
    return first_tile;
  }
  __device__ __forceinline__ int after(int tile) const {
    return tile + 1 == first_tile + tiles ? first_tile : tile + 1;
  }
  // Whether this block makes dQ of a tile, or of the one that it comes to before this one.
  __device__ __forceinline__ bool finishes_at(int tile) const {
    if constexpr (Config::kFinishes) return this->finish.has(tile);
    return false;
  }
  __device__ __forceinline__ bool finishes_before(int tile) const {
    if constexpr (Config::kFinishes) {
      return this->finish.has(tile == first_tile ? first_tile + tiles - 1 : tile - 1);
    }
    return false;
  }
  // In a loop and with what is there forgotten: the producer has few registers.
  __device__ __forceinline__ void begin_order(bool in_ring, bool may_finish, int number) {
    this->start_tile = first_tile;
    // Without a ring it is the last for all tiles or for none.
    const bool is_last = may_finish && number == 0;
    this->finish = BwdTileRange::of(first_tile, is_last ? first_tile + tiles : 0);
    this->ring = in_ring ? bwd_key_blocks(mask.key_length, Config::kKeys) : 0;
    if (this->ring == 0) return;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      ptx::forget_memory();
      const int b = i == 0 ? number : number == 0 ? this->ring - 1 : number - 1;
      const int first = first_tile + b * tiles / this->ring;
      ptx::forget_memory();
      const int end = first_tile + (b + 1) * tiles / this->ring;
      const BwdTileRange share = BwdTileRange::of(first, end);
      if (i == 0) {
        this->store = share;
        this->start_tile = first;
      } else if (may_finish) {
        this->finish = share;
      }
    }
  }

  // With intervals: whether this block adds to the gradient of a tile of queries.
  __device__ __forceinline__ bool meets(int tile) const {
    const RowTile& keys = mask.row_tiles[tile];
    bool meets = keys.first < first_key + Config::kKeys && first_key < keys.end;
    if constexpr (Config::kDense) {
      if (meets && this->skips) meets = !mask.hides(keys, first_key, first_key + Config::kKeys);
    }
    return meets;
  }
};

// What consumers know of a step, with intervals; the others follow from the block.
struct alignas(8) BwdStep {
  static constexpr uint32_t kMeets = 1;       // the block adds to the gradient of these queries
  static constexpr uint32_t kDead = 2;        // some of them may hold anything
  static constexpr uint32_t kMixed = 4;       // ids count
  static constexpr uint32_t kFirstClean = 8;  // for the first warpgroup; then for the other
  // None of them sees a key of the first warpgroup; then of the other.
  static constexpr uint32_t kFirstUnseen = 32;

  uint32_t flags;
  float slope;  // of the query head

  __device__ __forceinline__ bool dead() const { return (flags & kDead) != 0; }
  __device__ __forceinline__ bool mixed() const { return (flags & kMixed) != 0; }
  __device__ __forceinline__ bool clean(int warpgroup) const {
    return (flags & kFirstClean << warpgroup) != 0;
  }
  __device__ __forceinline__ bool unseen(int warpgroup) const {
    return (flags & kFirstUnseen << warpgroup) != 0;
  }
};

// The same with what is dense: the query head, and the first query.
struct BwdDenseStep {
  int head;
  int row;
};

// The flags of a tile of queries of the block. It is clean for a warpgroup if all of its rows are
// live and see all of the warpgroup's keys. A scale that is no positive number goes through the
// careful path, which multiplies it in.
template <typename Config>
__device__ __forceinline__ uint32_t step_flags(const BwdBlock<Config>& block, int tile,
                                               bool may_be_clean) {
  if (!block.meets(tile)) return 0;
  const RowTile& rows = block.mask.row_tiles[tile];
  uint32_t flags = BwdStep::kMeets;
  if (rows.mixed != 0) flags |= BwdStep::kMixed;
  if (rows.dead != 0) flags |= BwdStep::kDead;
#pragma unroll
  for (int w = 0; w < Config::kWarpgroups; ++w) {
    const int first = block.first_key + Config::kKeyStep * w;
    if (kBwdPassesUnseen<Config> && (rows.first >= first + 64 || rows.end <= first)) {
      flags |= BwdStep::kFirstUnseen << w;
    }
    const bool clean = rows.dead == 0 && rows.core_first <= first && first + 64 <= rows.core_end;
    if (may_be_clean && clean) flags |= BwdStep::kFirstClean << w;
  }
  return flags;
}

// Block `id`, for the thread block `rank_in_cluster`; false where a section is padded.
template <typename Config>
__device__ __forceinline__ bool make_block(const MhaBwdParams& params, const BwdPlan& plan, int id,
                                           int rank_in_cluster, BwdBlock<Config>& block) {
  constexpr int kRows = Config::kRows;
  const auto [rank, flat_part] = plan.order.place_of(id);
  if (rank >= plan.order.blocks) return false;
  const int flat_head = plan.parts.divide(flat_part);
  const int part = flat_part - flat_head * static_cast<int>(plan.parts.divisor);
  block.batch = plan.kv_heads.divide(flat_head);
  int number = plan.first_to_last ? rank : plan.order.blocks - 1 - rank;
  if constexpr (Config::kIntervals) {
    if (!params.deterministic) number = work_at(params, block.batch, rank);
  }
  const int cluster_key = number * Config::kClusterKeys;
  block.first_key = cluster_key + rank_in_cluster * Config::kKeys;
  block.head = flat_head - block.batch * params.kv_heads;
  block.sum_batch = (adds_in_order<Config>(params) ? part * params.batch : 0) + block.batch;
  // Parts of heads are numbered as their query heads are.
  const int flat_query_head = flat_part * plan.query_heads;
  block.first_head = flat_query_head - block.batch * params.heads;
  block.in_sum = flat_query_head * plan.tiles;
  if constexpr (Config::kFinishes) {
    // By the first lane, so that nothing is added to windows, which the compiler would keep in
    // registers that the producer does not have.
    const int zero = ptx::laneid();
    block.mask = RowMask::make(
        sequence_length(params.query_lengths, block.batch, params.query_length, params),
        sequence_length(params.key_lengths, block.batch, params.key_length, params),
        params.window_left + zero, params.window_right + zero, params.bottom_right);
  } else {
    block.mask = mask_of<typename Config::Mask>(params, block.batch);
  }
  RowInterval rows;
  if constexpr (Config::kIntervals) {
    const IntervalsView& view = params.intervals;
    block.slopes = view.slopes;
    if (view.slopes != nullptr) {
      block.slopes += batch_offset(view.slope_strides, block.batch, params);
    }
    block.copied = false;
    if constexpr (Config::kDense) block.begin(params, block.batch);
    const KeyTile keys = block.mask.template key_tile<Config::kKeys>(block.first_key);
    block.dead_keys = keys.dead != 0;
    rows = {keys.first, keys.end};
  } else {
    block.keys = max(block.mask.key_length - block.first_key, 0);
    block.live = block.mask.rows(0, block.mask.key_length);
    rows = block.mask.rows(cluster_key, cluster_key + Config::kClusterKeys);
  }
  block.first_tile = rows.first / kRows;
  block.tiles = rows.first < rows.end ? (rows.end + kRows - 1) / kRows - block.first_tile : 0;
  block.query_heads = plan.query_heads;
  block.steps = plan.query_heads * block.tiles;
  block.in_sum += block.first_tile;
  block.next_head = plan.tiles - block.tiles + 1;
  if constexpr (Config::kFinishes) {
    block.begin_order(plan.ring, params.finished_rows != 0, number);
  }
  if constexpr (!Config::kIntervals) {
#pragma unroll 1
    for (int w = 0; w < Config::kWarpgroups; ++w) {
      const int first_key = block.first_key + Config::kKeyStep * w;
      const RowInterval all = block.mask.rows_of_all(first_key, first_key + 64);
      // Any other scale goes through the careful path, which multiplies it in.
      const bool none = all.first >= all.end || params.scale.first != 1.0f;
      const bool to_end = all.end == params.query_length;
      block.clean_first[w] = none ? 0 : (all.first + kRows - 1) / kRows;
      block.clean_end[w] = none ? 0 : (all.end + (to_end ? kRows - 1 : 0)) / kRows;
      if constexpr (kBwdPassesUnseen<Config>) {
        const RowInterval seen = block.mask.rows(first_key, first_key + 64);
        block.seen_first[w] = seen.first / kRows;
        block.seen_end[w] = seen.first < seen.end ? (seen.end + kRows - 1) / kRows : 0;
      }
    }
  }
  return true;
}

}  // namespace jax_flash::sm90
