// What the mask says of the scores that a lane has of a tile.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "sm90/fwd_block.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm90 {

template <int kKeys>
struct FwdBitMaker {
  static constexpr int kWords = kKeys / 32;  // of a row of the mask

  // A row's words of the mask, of which rows past the last one have those of the last one. Rows are
  // of whole 16 bytes, so that every tile is there.
  static __device__ __forceinline__ void load_words(const MhaFwdParams& params,
                                                    const FwdDenseBlock& block, int row, int tile,
                                                    uint32_t (&words)[kWords]) {
    const uint32_t* const source =
        block.bits + min(row, params.query_length - 1) * params.intervals.mask.row_stride +
        tile * kWords;
    if constexpr (kWords == 4) {
      const uint4 all = __ldg(reinterpret_cast<const uint4*>(source));
      words[0] = all.x;
      words[1] = all.y;
      words[2] = all.z;
      words[3] = all.w;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = __ldg(source + i);
    }
  }

  // Of a row's words this lane's columns: bits as FwdMask has them.
  static __device__ __forceinline__ uint32_t lane_bits(const uint32_t (&words)[kWords]) {
    static_assert(kWords == 4 || kWords == 2);
    uint32_t seen[4] = {~0u, ~0u, ~0u, ~0u};  // of 32 columns each, in the highest byte
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      // The two lowest bits of each byte, moved together.
      seen[i] = (words[i] >> fragment_column() & 0x03030303u) * 0x01041040u;
    }
    return ptx::prmt(ptx::prmt(seen[0], seen[1], 0x0073), ptx::prmt(seen[2], seen[3], 0x0073),
                     0x5410);
  }
};

}  // namespace jax_flash::sm90
