// Who does what, found in the kernel from the lengths.
//
// A head tile is a tile of rows of a kv head; a band is some neighbouring head tiles of a sequence,
// as many for all. A thread block does one head tile of a band, beside others that do the rest:
// they read the same memory, or neighbouring memory, at about the same time. The splits of all
// bands in a row (sequence, band, split) are cut into a piece for each such crew of thread blocks.
// A piece is a whole number of units: splits, or groups of them if the longest piece is then no
// longer. An empty sequence has one split, which writes its zeros.
//
// Which keys a split has depends on its sequence alone; which thread block gets it depends on all,
// and does not matter to the result.
#pragma once

#include <cstdint>

#include "decode/params.h"
#include "ptx/shared.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"

namespace jax_flash::decode {

// The part of one sequence's work that does not depend on its neighbours.
struct SequenceSplits {
  int length;
  int first_key;    // that its first query sees
  int first_split;  // that has a key
  int splits;       // that have keys; 0 for an empty sequence
};

__device__ __forceinline__ SequenceSplits sequence_splits(const DecodeParams& params, int batch) {
  const int length = min_int(max_int(params.lengths[batch], 0), params.room);
  int first = 0;
  if (params.window_left != kUnbounded) {
    first = min_int(max_int(length - params.tokens - params.window_left, 0), length);
  }
  const int first_split = params.split_divisor.divide(first);
  // Not length + split_keys - 1, which may be beyond 31 bits.
  const int end_split = length == 0 ? 0 : params.split_divisor.divide(length - 1) + 1;
  return {length, first, first_split, max_int(end_split - first_split, 0)};
}

// Units of a band.
__device__ __forceinline__ int units_of(const SequenceSplits& sequence, int unit_splits) {
  const int splits = sequence.splits;
  return max_int(unit_splits == 1 ? splits : (splits + kGroupSplits - 1) / kGroupSplits, 1);
}

// How units are dealt.
struct Plan {
  int unit_splits;  // 1 or kGroupSplits
  int each;         // units of a piece
  int longer;       // pieces, the first ones, that have one more

  __device__ __forceinline__ int first_unit(int piece) const {
    return piece * each + min_int(piece, longer);
  }
  __device__ __forceinline__ int piece_of(int unit) const {
    const int of_longer = longer * (each + 1);
    return unit < of_longer ? quotient(unit, each + 1) : longer + quotient(unit - of_longer, each);
  }

  // Of a group of splits that begins with `unit`, each split a unit: from which unit on others have
  // them than who begins it. May be behind the group.
  __device__ __forceinline__ int cut_behind(int unit) const {
    return first_unit(piece_of(unit) + 1);
  }

  // In kPlanBytes of shared memory.
  __device__ __forceinline__ void keep(uint32_t place) const {
    const uint32_t words[4] = {static_cast<uint32_t>(unit_splits), static_cast<uint32_t>(each),
                               static_cast<uint32_t>(longer), 0};
    ptx::st_shared_v4(place, words);
  }
  static __device__ __forceinline__ Plan kept(uint32_t place) {
    const uint4 words = ptx::ld_shared_v4(place);
    return {static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z)};
  }

 private:
  // Of a number of units and those of a piece. There are few pieces, so that a float is off by one
  // at most.
  static __device__ __forceinline__ int quotient(int units, int of_piece) {
    const int near =
        static_cast<int>(__fdividef(static_cast<float>(units), static_cast<float>(of_piece)));
    const int rest = units - near * of_piece;
    return near + (rest >= of_piece ? 1 : 0) - (rest < 0 ? 1 : 0);
  }
};

__device__ __forceinline__ int bands_of(const DecodeParams& params) {
  return params.crew_divisor.divide(params.head_tiles);
}

// Splits of a band, and groups of them.
struct BandUnits {
  int splits;
  int groups;

  static __device__ __forceinline__ BandUnits of(const SequenceSplits& sequence) {
    return {units_of(sequence, 1), units_of(sequence, kGroupSplits)};
  }
  // What a lane has.
  __device__ __forceinline__ BandUnits of_lane(int lane) const {
    return {__shfl_sync(0xffffffffu, splits, lane), __shfl_sync(0xffffffffu, groups, lane)};
  }
  __device__ __forceinline__ void add(const BandUnits& other) {
    splits += other.splits;
    groups += other.groups;
  }
};

// Some of 32 sequences, each lane's, and all up to it.
struct Chunk {
  SequenceSplits sequence;
  BandUnits upto;

  // From sequence `start` to before `end`. By a whole warp.
  static __device__ __forceinline__ Chunk of(const DecodeParams& params, int start, int end) {
    const int lane = lane_id();
    Chunk chunk{};
    if (start + lane < end) {
      chunk.sequence = sequence_splits(params, start + lane);
      chunk.upto = BandUnits::of(chunk.sequence);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const BandUnits lower = chunk.upto.of_lane(lane - step & 31);
      if (lane >= step) chunk.upto.add(lower);
    }
    return chunk;
  }
};

// The sum over the first `end` sequences, and the last chunk of them. By a whole warp.
__device__ __forceinline__ BandUnits count_units(const DecodeParams& params, int end,
                                                 Chunk& chunk) {
  BandUnits units{0, 0};
#pragma unroll 1
  for (int start = 0; start < end; start += 32) {
    chunk = Chunk::of(params, start, end);
    units.add(chunk.upto.of_lane(31));
  }
  return units;
}

// By a whole warp.
__device__ __forceinline__ Plan make_plan(const DecodeParams& params, Chunk& chunk) {
  BandUnits all = count_units(params, params.batch, chunk);
  const int bands = bands_of(params);
  all.splits *= bands;
  all.groups *= bands;
  const int pieces = static_cast<int>(params.piece_divisor.divisor);
  // Also full groups that leave some without work, but enough at work for the rate of the memory.
  const bool are_enough = all.groups <= pieces && all.groups >= params.enough_pieces &&
                          7 * kGroupSplits * all.groups <= 8 * all.splits;
  const bool by_groups = params.whole_groups != 0 || are_enough ||
                         kGroupSplits * params.piece_divisor.divide(all.groups + pieces - 1) <=
                             params.piece_divisor.divide(all.splits + pieces - 1);
  const int units = by_groups ? all.groups : all.splits;
  const int each = params.piece_divisor.divide(units);
  return {by_groups ? kGroupSplits : 1, each, units - each * pieces};
}

// A split of a head tile, and where its thread block stands.
struct Place {
  int batch;
  int head_tile;
  int kv_head;
  int row_tile;
  int split;  // of those that have keys
  SequenceSplits sequence;
  int unit_splits;
  int units;  // that the thread block still has, this one's included
  int done;   // splits that it has had

  // Whether it has had its sequence's splits of this head tile from the first one on, and this is
  // the last.
  __device__ __forceinline__ bool has_had_all() const {
    return done >= split && split + 1 >= sequence.splits;
  }

  __device__ __forceinline__ void enter(const DecodeParams& params, int tile) {
    head_tile = tile;
    kv_head = params.row_tile_divisor.divide(tile);
    row_tile = tile - kv_head * params.row_tiles;
  }
};

// What becomes of the sum of a group's splits when a thread block has done one of them.
struct GroupEnd {
  bool begins;      // with this split: nothing to add it to
  bool holds;       // the thread block does the next split of the group, too
  bool ends_alone;  // the group is the sequence, and the thread block has had it all
  bool is_whole;    // the thread block has had the group and all before it
  int slot;         // where the sum is stored as a part

  static __device__ __forceinline__ GroupEnd of(const Place& place, const Place& next) {
    const int within = place.split % kGroupSplits;
    // Whether the thread block has had the group from its first split on.
    const bool has_group = place.done >= within;
    return {!has_group || within == 0,
            has_group && next.units > 0 && next.split % kGroupSplits != 0,
            place.sequence.splits <= kGroupSplits && place.has_had_all(),
            place.done >= place.split &&
                (within == kGroupSplits - 1 || place.split + 1 >= place.sequence.splits),
            has_group ? place.split - within : place.split};
  }
};

// The first split of a thread block; without any if `units` is 0. `chunk`: the plan's. By a whole
// warp.
__device__ __forceinline__ Place first_place(const DecodeParams& params, const Plan& plan,
                                             Chunk& chunk, int block) {
  const int piece = params.crew_divisor.divide(block);
  const int crew = static_cast<int>(params.crew_divisor.divisor);
  Place place{};
  int rest = plan.first_unit(piece);  // units from the sequence on
  place.unit_splits = plan.unit_splits;
  place.units = plan.first_unit(piece + 1) - rest;
  if (place.units == 0) return place;
  const int bands = bands_of(params);
#pragma unroll 1
  for (int start = 0;; start += 32) {
    if (params.batch > 32) chunk = Chunk::of(params, start, params.batch);
    const int upto = bands * (plan.unit_splits == 1 ? chunk.upto.splits : chunk.upto.groups);
    const unsigned beyond = __ballot_sync(0xffffffffu, upto > rest);
    if (beyond == 0) {
      rest -= __shfl_sync(0xffffffffu, upto, 31);
      continue;
    }
    const int found = __ffs(beyond) - 1;
    place.batch = start + found;
    const auto of_found = [&](int value) { return __shfl_sync(0xffffffffu, value, found); };
    const SequenceSplits& its = chunk.sequence;
    place.sequence = {of_found(its.length), of_found(its.first_key), of_found(its.first_split),
                      of_found(its.splits)};
    rest -= of_found(upto) - bands * units_of(place.sequence, plan.unit_splits);
    break;
  }
  const int units = units_of(place.sequence, plan.unit_splits);
  const int band = bands == 1 ? 0 : rest / units;
  place.split = (rest - band * units) * plan.unit_splits;
  place.enter(params, band * crew + block - piece * crew);
  return place;
}

// The same where each head tile of the only sequence has a cluster: splits in turn.
__device__ __forceinline__ Place cluster_place(const DecodeParams& params, int block) {
  Place place{};
  place.sequence = sequence_splits(params, 0);
  place.unit_splits = 1;
  const int tile = block >> params.cluster_bits;
  place.split = block - (tile << params.cluster_bits);
  place.units = max_int(place.sequence.splits, 1) - place.split + (1 << params.cluster_bits) - 1 >>
                params.cluster_bits;
  place.enter(params, tile);
  return place;
}

// The thread block's next split; without any if `units` is 0. It has other queries if `split` is 0.
__device__ __forceinline__ Place next_place(const DecodeParams& params, const Place& place) {
  Place next = place;
  ++next.done;
  next.split += 1 << params.cluster_bits;
  const bool ends = next.split >= next.sequence.splits;
  if (ends || next.unit_splits == 1 || next.split % kGroupSplits == 0) --next.units;
  if (!ends || next.units == 0) return next;
  next.split = 0;
  const int crew = static_cast<int>(params.crew_divisor.divisor);
  int tile = next.head_tile + crew;
  if (tile >= params.head_tiles) {
    tile = params.crew_divisor.remainder(next.head_tile);
    next.sequence = sequence_splits(params, ++next.batch);
  }
  next.enter(params, tile);
  return next;
}

}  // namespace jax_flash::decode
