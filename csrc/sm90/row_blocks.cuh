// The blocks of rows of a forward with intervals, and their order.
//
// Where documents begin is data. A small kernel finds it before the main kernel starts, from the
// intervals of neighbouring rows, and cuts the rows of each sequence in blocks that begin with
// documents: then a block's tiles of keys, which begin with the first key that it sees, hold the
// keys of its document alone, and the mask's border lies in the last of them. Short documents share
// a block. Thread blocks of the main kernel take one block after another from a queue: the longest
// documents first, and the blocks of a document one after the other, the last first. So those who
// work at a time read the same keys, and what is left at the end is short. Results do not depend on
// who works off what, nor when.
#pragma once

#include <cstdint>

#include "host/intervals.h"
#include "host/launch.h"
#include "host/params.h"
#include "ptx/griddepcontrol.cuh"
#include "tile/fragment.cuh"
#include "tile/intervals.cuh"

namespace jax_flash::sm90 {

inline constexpr int kWarp = 32;

// The entries of a sequence.
__device__ __forceinline__ RowBlock* row_list(const MhaParams& params, int batch) {
  return reinterpret_cast<RowBlock*>(params.intervals.queue + kQueueHeader) +
         int64_t{batch} * row_list_entries(params.query_length);
}

// A sequence is worked off in pieces, and the chains of blocks of a piece, each of which begins
// where the one before ends, by chunks of rows, whose first blocks are known beforehand.
inline constexpr int kRowListThreads = 512;
inline constexpr int kRowListPiece = kRowListThreads * kIntervalRows;  // a tile for each thread
inline constexpr int kRowListChunks = kRowListPiece / kRowListChunk;
static_assert(kRowListChunks == kWarp, "a lane for each chunk");

// Two blocks that follow each other have more rows than one block can have, but for the last of a
// chunk, which is up to a block longer than kRowListChunk.
constexpr int chunk_blocks(int size) { return 1 + 2 * (kRowListChunk + size) / size; }

template <int kSize>
struct RowListShared {
  static constexpr int kBlocks = kRowListChunks * chunk_blocks(kSize);

  // Of each tile of rows, and the one after them, read at once: 64 bits, the low ones first,
  // whether a document begins with row r; the last row before the tile that one begins with; the
  // end of the tile's hull.
  int4 tiles[kRowListThreads + 1];
  int warp_last[kRowListThreads / kWarp];
  int chunk_starts[kBlocks];         // of the blocks of each chunk, as many as it may have
  int chunk_begins[kRowListChunks];  // the number of its first block
  int chunk_counts[kRowListChunks];
  int chunk_stops[kRowListChunks];  // where its last block ends
  int starts[kBlocks + 1];          // of blocks, then where the last one ends
  int documents[kBlocks];           // how many tiles of keys the document of a block has
  int count;                        // of blocks
};

// Finds the blocks of at most kSize rows of one sequence.
template <int kSize>
struct RowListMaker {
  static_assert(kSize % kIntervalRows == 0 && kRowListChunk % kSize == 0);
  // A document that does not fit the rest of a block begins a block of its own, unless it saves one
  // to fill that rest: one that ends in the next block, if the rest is at least this.
  static constexpr int kLeastRest = 48;

  const IntervalMask& mask;
  RowListShared<kSize>& shared;
  bool cutting;   // otherwise blocks begin with multiples of kSize
  int first = 0;  // the piece at work
  int end = 0;

  __device__ __forceinline__ KeyInterval keys_of(int row) const {
    const int clamped = min(max(row, 0), mask.query_length - 1);
    const int2 words = __ldg(reinterpret_cast<const int2*>(mask.row_records + clamped));
    return {words.x, words.y};
  }

  // Whether a document, or a run of rows that see nothing, begins with a row: it and the one before
  // see no key that the other sees, too. The end of the sequence counts, too.
  __device__ __forceinline__ bool begins(int row) const {
    const KeyInterval own = keys_of(row);
    const KeyInterval other = keys_of(row - 1);
    const bool live = own.first < own.end;
    const bool apart = own.first >= other.end || other.first >= own.end;
    return row == 0 || row == mask.query_length ||
           (cutting && (live != (other.first < other.end) || (live && apart)));
  }

  // Each thread finds the cuts of one tile, a warp those of its lanes, and the end of its hull.
  __device__ __forceinline__ uint64_t find_cuts(int& hull_end) const {
    const int thread = threadIdx.x;
    const int lane = lane_id();
    const int row = first + thread * kIntervalRows;
    bool inside = false;
    uint64_t own = 0;
    if (row <= mask.query_length) {
      // Asked for beside the records, not after them.
      const RowTile* const tile = mask.row_tiles + min(row, mask.query_length - 1) / kIntervalRows;
      const int4 keys = __ldg(reinterpret_cast<const int4*>(tile));  // hull and core
      const int dead = __ldg(&tile->dead);
      hull_end = keys.y;
      own = begins(row) ? 1 : 0;
      // Otherwise all rows see some key, the same, or none does.
      inside = cutting && row < mask.query_length &&
               (keys.z >= keys.w || (dead != 0 && keys.x < keys.y));
    }
    uint32_t all = __ballot_sync(0xffffffffu, inside);
#pragma unroll 1
    while (all != 0) {
      constexpr int kTogether = 4;  // tiles whose records are asked for at the same time
      int tiles[kTogether];
      bool flags[2 * kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        tiles[i] = __ffs(all) - 1;  // -1: there are no more
        all &= all - 1;
        const int other = first + (thread - lane + max(tiles[i], 0)) * kIntervalRows + lane;
        flags[2 * i] = begins(other) && other <= mask.query_length;
        flags[2 * i + 1] = begins(other + kWarp) && other + kWarp <= mask.query_length;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const uint32_t low = __ballot_sync(0xffffffffu, flags[2 * i]);
        const uint32_t high = __ballot_sync(0xffffffffu, flags[2 * i + 1]);
        if (lane == tiles[i]) own = uint64_t{high} << 32 | low;
      }
    }
    return own;
  }

  // Fills `tiles`. last: before the piece.
  __device__ __forceinline__ void index_cuts(int last) {
    const int thread = threadIdx.x;
    const int lane = lane_id();
    const int warp = thread / kWarp;
    int hull_end = 0;
    const uint64_t own = find_cuts(hull_end);
    int running = own != 0 ? first + thread * kIntervalRows + 63 - __clzll(own) : -1;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_sync(0xffffffffu, running, (lane - step) & (kWarp - 1));
      if (lane >= step) running = max(running, other);
    }
    const int previous = __shfl_sync(0xffffffffu, running, (lane - 1) & (kWarp - 1));
    if (lane == kWarp - 1) shared.warp_last[warp] = running;
    int next = 0;  // whether a document begins right after the piece
    if (thread == kRowListThreads - 1) {
      const int row = first + kRowListPiece;
      next = row <= mask.query_length && begins(row) ? 1 : 0;
    }
    // Orders the warps' last cuts before they are read.
    __syncthreads();
    static_assert(kRowListThreads / kWarp <= kWarp, "a lane for each warp");
    const unsigned others = lane < warp ? max(0, shared.warp_last[lane]) : 0;
    int before = max(last, static_cast<int>(__reduce_max_sync(0xffffffffu, others)));
    if (lane != 0) before = max(before, previous);
    shared.tiles[thread] = {static_cast<int>(static_cast<uint32_t>(own)),
                            static_cast<int>(own >> 32), before, hull_end};
    if (thread == kRowListThreads - 1) {
      shared.tiles[kRowListThreads] = {next, 0, max(before, running), 0};
    }
    // Orders cuts before they are looked at.
    __syncthreads();
  }

  // The last row up to `row`, of the piece or right after it, that a document begins with.
  __device__ __forceinline__ int last_cut(int row) const {
    const int tile = (row - first) / kIntervalRows;
    const int bit = (row - first) % kIntervalRows;
    const int4 words = shared.tiles[tile];
    const uint64_t all =
        uint64_t{static_cast<uint32_t>(words.y)} << 32 | static_cast<uint32_t>(words.x);
    const uint64_t cuts = all & (~uint64_t{0} >> (63 - bit));
    return cuts != 0 ? first + tile * kIntervalRows + 63 - __clzll(cuts) : words.z;
  }

  // Where a block begins, whatever came before: that of the document of `row` with this row, if its
  // blocks begin with the document.
  __device__ __forceinline__ int chunk_start(int row) const {
    if (row >= mask.query_length) return mask.query_length;
    const int document = last_cut(row);
    return document + (row - document) / kSize * kSize;
  }

  // Where a block ends that begins with row `start`, at most at `stop`.
  __device__ __forceinline__ int block_end(int start, int stop) const {
    const int full = min(start + kSize, stop);
    const int cut = last_cut(full);
    if (cut <= start || cut == full) return full;
    const bool ends = last_cut(min(full + kSize, end)) > full;
    const bool fits = last_cut(min(cut + kSize, end)) > cut;  // a block of its own
    return ends && (!fits || full - cut >= kLeastRest) ? full : cut;
  }

  // Fills what is of chunks, and `count`, by one warp, each lane for a chunk.
  __device__ __forceinline__ void walk() {
    const int lane = lane_id();
    int* const own = shared.chunk_starts + lane * chunk_blocks(kSize);
    const int begin = chunk_start(min(first + lane * kRowListChunk, end));
    const int stop = chunk_start(min(first + (lane + 1) * kRowListChunk, end));
    int count = 0;
#pragma unroll 1
    for (int start = begin; start < stop; start = block_end(start, stop)) own[count++] = start;
    int running = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_sync(0xffffffffu, running, (lane - step) & (kWarp - 1));
      if (lane >= step) running += other;
    }
    shared.chunk_begins[lane] = running - count;
    shared.chunk_counts[lane] = count;
    shared.chunk_stops[lane] = stop;
    if (lane == kWarp - 1) {
      shared.count = running;
      shared.starts[running] = stop;
    }
  }

  // The length of the document of a block: of keys from the first that its first or last row sees
  // to the last that those see who see that one, in tiles, so that what a mask hides at the ends
  // does not count. -1 if they see none.
  __device__ __forceinline__ int document(int start, int stop) const {
    KeyInterval seen = keys_of(start);
    if (seen.first >= seen.end) seen = keys_of(stop - 1);
    if (seen.first >= seen.end) return -1;
    const int row_tiles = interval_tiles(mask.query_length);
    const KeyTile& keys = mask.key_tiles[seen.first / kIntervalKeys];
    const int last = max(1, min(keys.end / kIntervalRows, row_tiles)) - 1;
    const int place = last - first / kIntervalRows;  // in the piece, or outside
    const bool is_here = place >= 0 && place < kRowListThreads;
    const int end = is_here ? shared.tiles[place].w : mask.row_tiles[last].end;
    return max(0, interval_tiles(end) - seen.first / kIntervalKeys);
  }

  // Adds the blocks of the piece before those at `target`, in their order; returns how many.
  __device__ __forceinline__ int sort(RowBlock* target) {
    const int thread = threadIdx.x;
    constexpr int kOfChunk = kRowListThreads / kRowListChunks;  // threads
    const int chunk = thread / kOfChunk;
    const int* const own = shared.chunk_starts + chunk * chunk_blocks(kSize);
    const int blocks = shared.chunk_counts[chunk];
#pragma unroll 1
    for (int i = thread % kOfChunk; i < blocks; i += kOfChunk) {
      const int stop = i + 1 < blocks ? own[i + 1] : shared.chunk_stops[chunk];
      const int number = shared.chunk_begins[chunk] + i;
      shared.starts[number] = own[i];
      shared.documents[number] = document(own[i], stop);
    }
    // Orders blocks and lengths before they are read.
    __syncthreads();
    // Two threads find the place of a block.
    constexpr int kTogether = kRowListThreads / 2;
    const int count = shared.count;
    const int side = thread % 2;
#pragma unroll 1
    for (int first = 0; first < count; first += kTogether) {
      const int i = first + thread / 2;
      if (first + thread / kWarp * (kWarp / 2) >= count) continue;  // nothing for this warp
      const int own_length = i < count ? shared.documents[i] : 0;
      int place = 0;
#pragma unroll 8
      for (int other = side; other < count; other += 2) {
        const int length = shared.documents[other];
        place += length > own_length || (length == own_length && other > i) ? 1 : 0;
      }
      place += __shfl_xor_sync(0xffffffffu, place, 1);
      if (side == 0 && i < count) {
        target[place - count] = {shared.starts[i], shared.starts[i + 1] - shared.starts[i]};
      }
    }
    return count;
  }
};

// Writes the list of a call (RowBlock in host/intervals.h). A thread block for each sequence.
template <int kSize>
__global__ void __launch_bounds__(kRowListThreads)
    row_list_kernel(const __grid_constant__ MhaParams params, bool cutting) {
  extern __shared__ __align__(1024) unsigned char memory[];
  ptx::griddepcontrol_launch_dependents();
  const int batch = blockIdx.x;
  const IntervalMask mask = IntervalMask::make(params, batch);
  RowBlock* const list = row_list(params, batch);
  // For the arrays, and for whatever else the main kernel needs, which waits for this one alone.
  ptx::griddepcontrol_wait();
  if (batch == 0 && threadIdx.x == 0) *params.intervals.queue = 0;
  RowListShared<kSize>& shared = *reinterpret_cast<RowListShared<kSize>*>(memory);
  RowListMaker<kSize> maker = {mask, shared, cutting};
  int total = 0;
  int last = 0;
  // Pieces from the first to the last row, each before the one that was there.
#pragma unroll 1
  for (; maker.first < params.query_length; maker.first += kRowListPiece) {
    maker.end = min(maker.first + kRowListPiece, params.query_length);
    maker.index_cuts(last);
    if (threadIdx.x < kWarp) maker.walk();
    last = shared.tiles[kRowListThreads].z;
    // Orders blocks before they are read.
    __syncthreads();
    total += maker.sort(list + row_list_entries(params.query_length) - total);
    // Orders what is read before the next piece.
    __syncthreads();
  }
  if (threadIdx.x == 0) list[0] = {0, total};
}

template <int kSize>
cudaError_t launch_row_list(const MhaParams& params, bool cutting, cudaStream_t stream) {
  return launch_dependent_kernel(row_list_kernel<kSize>, dim3(static_cast<unsigned>(params.batch)),
                                 kRowListThreads, sizeof(RowListShared<kSize>), stream, params,
                                 cutting);
}

// By a warp: the most blocks that a sequence has.
__device__ __forceinline__ int most_row_blocks(const MhaParams& params) {
  int most = 0;
#pragma unroll 1
  for (int batch = lane_id(); batch < params.batch; batch += kWarp) {
    // Not by __ldg, which memory that is written while this kernel runs is not for.
    most = max(most, row_list(params, batch)->rows);
  }
  return static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(most)));
}

// The block with place `rank` in the order of its sequence; no rows: there are not so many. most:
// that of most_row_blocks.
__device__ __forceinline__ RowBlock row_block_at(const MhaParams& params, int batch, int rank,
                                                 int most) {
  const RowBlock* const list = row_list(params, batch);
  const int count = params.batch == 1 ? most : list->rows;
  if (rank >= count) return {0, 0};
  return list[row_list_entries(params.query_length) - count + rank];
}

}  // namespace jax_flash::sm90
