// What the host hands to the decode kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "host/fast_divisor.h"

namespace jax_flash::decode {

// Splits start at multiples of this many keys, and so do the tiles that are skipped.
inline constexpr int kSplitUnit = 64;

// Results of so many neighbouring splits are added up first, one after another, then those of the
// groups: always, so that it does not matter whether one thread block does a group or several share
// it.
inline constexpr int kGroupSplits = 8;

// The most splits that a cluster of thread blocks adds up: groups by eight lanes.
inline constexpr int kClusterSplits = 8 * kGroupSplits;

// Thread blocks of a multiprocessor at most: launches have no more than run at a time.
inline constexpr int kMostBlocksPerSm = 3;

// Element types of the caches. Query and output have the type of a cache of 16 or 32 bits, and one
// of the two of 16 bits with an 8-bit one.
enum class CacheType { kBf16, kF16, kE4m3, kInt8, kF32 };

// Arrays are row-major. A row of the caches is one token: [rows, kv_heads, width], where a row is
// batch * room + key, or page * page_size + key with a page table.
struct DecodeParams {
  const void* query;          // [batch, tokens, heads, head_dim]
  const void* key;            // [rows, kv_heads, head_dim]
  const void* value;          // [rows, kv_heads, head_dim_v]
  const int32_t* lengths;     // [batch], new tokens included
  const int32_t* page_table;  // [batch, max_pages], or null
  const float* sinks;         // [batch or 1, heads], or null
  const float* slopes;        // of ALiBi, the same
  const float* k_scale;       // [batch or 1, kv_heads], or null for 1; for 8-bit caches
  const float* v_scale;       // the same
  void* out;                  // [batch, tokens, heads, head_dim_v]
  float* lse;                 // [batch, heads, tokens]
  // A place for each split. The place of a group's first split has the sum of those that one thread
  // block did of it from the first on, the places of the others have theirs; the first place of all
  // may have that of all groups that its thread block did. Row t * group + g is token t of query
  // head g of its group.
  float* partial_out;     // [batch, kv_heads, splits, tokens * group, head_dim_v], not normalised
  float2* partial_state;  // [batch, kv_heads, splits, tokens * group]: maximum (base 2), sum
  // How many splits, or groups of many, are done of a head tile that several thread blocks share:
  // one for each thread block; then how many of them have done theirs of a group that they share,
  // as many. Zero before a launch and after it. Nobody else's, or null if nothing is shared.
  uint32_t* counters;
  int32_t batch;
  int32_t tokens;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t head_dim_v;
  int32_t room;       // keys that a sequence can have
  int32_t pages;      // of the pool
  int32_t page_size;  // 1 without a page table
  int32_t max_pages;
  int32_t sink_stride;     // heads, or 0 if all sequences share them
  int32_t slope_stride;    // the same
  int32_t k_scale_stride;  // kv_heads, or 0
  int32_t v_scale_stride;
  int32_t window_left;  // kUnbounded or how many keys before its own a query sees
  int32_t split_keys;   // keys of a split, a multiple of kSplitUnit
  int32_t splits;       // the most that a sequence can need
  int32_t query_bf16;   // else f16
  float scale;
  float softcap;  // 0: none

  // Set by the launch.
  float logit_factor;     // of scores: to logits in base 2, or to what is under the cap's tanh
  float cap;              // of logits in base 2; 0: none
  int32_t cluster_bits;   // 0, or a head tile of the only sequence has 1 << cluster_bits blocks
  int32_t whole_groups;   // whether thread blocks must do whole groups of splits
  int32_t enough_pieces;  // of all pieces, to read the memory at its rate
  int32_t page_rows;      // rows of the caches that a page has: page_size, or room without pages
  int32_t group;          // heads / kv_heads
  int32_t row_tiles;      // tiles of the tokens * group rows
  int32_t tile_rows;      // rows of a tile
  int32_t head_tiles;     // kv_heads * row_tiles
  FastDivisor group_divisor;
  FastDivisor page_divisor;
  FastDivisor split_divisor;     // split_keys
  FastDivisor row_tile_divisor;  // row_tiles
  FastDivisor crew_divisor;      // neighbouring head tiles whose thread blocks are a crew
  FastDivisor piece_divisor;     // crews: pieces of the work
};

}  // namespace jax_flash::decode
