// One warp's rows where there are up to 8 of them: as columns of the products, keys and widths in
// the rows. Half the products, and half the registers, of warp.cuh.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/quantised.cuh"
#include "decode/warp.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::decode {

// Lane l with g = l / 4 and t = l % 4 has rows 2t and 2t + 1 of keys g, g + 8, ..: their scores,
// and of the outputs columns g, g + 8, ...
template <typename Config>
struct DecodeColumns {
  using Element = typename Config::Element;
  using Layout = typename Config::Layout;
  static constexpr int kSteps = Config::kWidth / 16;
  static constexpr int kKeyTiles = Config::kKeys / 16;
  static constexpr int kOutTiles = Config::kWidth / 16;

  uint32_t query[kSteps][2];
  float out[kOutTiles][4];
  float maximum[2];     // of the logits, base 2
  float sum[2];         // this lane's part
  float key_factor[2];  // of the scores of a row, for 8-bit caches

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] = 0.0f;
    }
    maximum[0] = maximum[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.0f;
  }

  __device__ __forceinline__ void load_queries(const DecodeParams& params, int batch, int kv_head,
                                               int first_row) {
    const int row = first_row + fragment_row();
    const bool exists = row < params.tokens * params.group;
    const Element16* const source = query_row(params, batch, kv_head, row);
    if constexpr (!Config::kQuantised) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * step + 8 * half + fragment_column();
          const bool valid = exists && column < params.head_dim;
          query[step][half] = valid ? *reinterpret_cast<const uint32_t*>(source + column) : 0u;
        }
      }
    } else {
      const float k_scale = scale_of(params.k_scale, batch * params.k_scale_stride + kv_head);
      const float factor = params.query_bf16 != 0
                               ? load_half_row<__nv_bfloat16>(params, source, exists, query, 0, 1)
                               : load_half_row<__half>(params, source, exists, query, 0, 1);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float its = __shfl_sync(0xffffffffu, factor, 4 * (fragment_column() + e));
        key_factor[e] = kUnit<Config::kCache> * k_scale * its;
      }
    }
  }

  // Takes the tile of keys at `tile`, the values behind it, into account. The first key of the tile
  // is `key`, none at or after `end` counts.
  __device__ __forceinline__ void attend(const DecodeParams& params, const RowPositions& rows,
                                         uint32_t tile, int key, int end) {
    float scores[kKeyTiles][4];
    multiply_keys(scores, tile);
    scale(scores, params);
    if (params.slopes != nullptr) lean(scores, params, rows, key);
    if (key < rows.seen_by_all.first || key + Config::kKeys > rows.seen_by_all.end) {
      mask(scores, params, rows, key, end);
    }
    soften(scores);
    multiply_values(scores, tile + Config::kTileBytes);
  }

  // Leaves the states of the first `rows` rows at `states`, and their outputs at `outputs`.
  __device__ __forceinline__ void share(int rows, int, uint32_t states, uint32_t outputs) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = sum[e];
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) total += __shfl_xor_sync(0xffffffffu, total, bit);
      const int row = fragment_column() + e;
      if (row >= rows) continue;
      if (fragment_row() == 0) ptx::st_shared_v2(states + 8 * row, maximum[e], total);
      // The four places in 128 bytes, of 8 columns each, are in another order in each row: the
      // offsets of output_offset.
      uint32_t place[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        place[k] = outputs + output_offset<Config>(row, 8 * k) + 4 * fragment_row();
      }
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
        if constexpr (Config::kQuantised) {
          // Even columns are in the first eight rows of the product, odd ones in the others.
          const int column = 16 * j + 2 * fragment_row();
          ptx::st_shared_v2(outputs + output_offset<Config>(row, column), out[j][e], out[j][2 + e]);
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int k = 2 * j + h;
            ptx::st_shared(place[k % 4] + k / 4 * 128, __float_as_uint(out[j][2 * h + e]));
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void multiply_keys(float (&scores)[kKeyTiles][4],
                                                uint32_t tile) const {
    // Two chains of products for each tile of scores: one would be waited for.
    float odd[kKeyTiles][4];
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = odd[j][e] = 0.0f;
    }
    const uint32_t address = a_operand_address<Layout>(tile, 0);
#pragma unroll
    for (int pair = 0; pair < Layout::kChunks / 2; ++pair) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, Layout::advance(address, 2 * pair) + j * 16 * Layout::kPitch);
        if constexpr (Config::kQuantised) {
          // A chunk of 16 bytes is a k-step.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const HalfPairs low = to_half<Config::kCache>(a[2 * i]);
            const HalfPairs high = to_half<Config::kCache>(a[2 * i + 1]);
            const uint32_t k[4] = {low.even, high.even, low.odd, high.odd};
            const auto& q = query[2 * pair + i];
            ptx::mma_m16n8k16<Element>(i == 0 ? scores[j] : odd[j], k, q[0], q[1]);
          }
        } else {
          ptx::mma_m16n8k16<Element>(pair % 2 == 0 ? scores[j] : odd[j], a, query[pair][0],
                                     query[pair][1]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] += odd[j][e];
    }
  }

  // Scores become logits in base 2.
  __device__ __forceinline__ void scale(float (&scores)[kKeyTiles][4],
                                        const DecodeParams& params) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float factor = params.logit_factor;
      if constexpr (Config::kQuantised) factor *= key_factor[e];
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        scores[j][e] *= factor;
        scores[j][2 + e] *= factor;
      }
    }
    if (params.cap == 0.0f) return;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = params.cap * tanhf(scores[j][e]);
    }
  }

  // Adds ALiBi to logits.
  static __device__ __forceinline__ void lean(float (&scores)[kKeyTiles][4],
                                              const DecodeParams& params, const RowPositions& rows,
                                              int key) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const RowSlope row =
          RowSlope::of(params, rows, first_row<Config>(rows.place) + fragment_column() + e);
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& score = scores[j][2 * h + e];
          score = row.add_to(score, key + 16 * j + 8 * h + fragment_row());
        }
      }
    }
  }

  static __device__ __forceinline__ void mask(float (&scores)[kKeyTiles][4],
                                              const DecodeParams& params, const RowPositions& rows,
                                              int key, int end) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = first_row<Config>(rows.place) + fragment_column() + e;
      const int position = rows.position(params, row);
      const int first = params.window_left == kUnbounded ? 0 : position - params.window_left;
      const int last = min_int(position, end - 1);
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = key + 16 * j + 8 * h + fragment_row();
          if (column < first || column > last) scores[j][2 * h + e] = kMinusInfinity;
        }
      }
    }
  }

  // Logits become exponentials relative to the maximum so far. Where that grows, which is seldom
  // after some tiles, outputs are rescaled.
  __device__ __forceinline__ void soften(float (&scores)[kKeyTiles][4]) {
    float largest[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      largest[e] = fmaxf(scores[0][e], scores[0][2 + e]);
#pragma unroll
      for (int j = 1; j < kKeyTiles; ++j) {
        largest[e] = fmaxf(largest[e], fmaxf(scores[j][e], scores[j][2 + e]));
      }
    }
    if (__any_sync(0xffffffffu, largest[0] > maximum[0] || largest[1] > maximum[1])) {
      float factor[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) {
          largest[e] = fmaxf(largest[e], __shfl_xor_sync(0xffffffffu, largest[e], bit));
        }
        largest[e] = fmaxf(largest[e], maximum[e]);
        factor[e] = ptx::ex2_approx_ftz(maximum[e] - finite(largest[e]));
        maximum[e] = largest[e];
        sum[e] *= factor[e];
      }
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[j][e] *= factor[e % 2];
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = finite(maximum[e]);
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& score = scores[j][2 * h + e];
          score = ptx::ex2_approx_ftz(score - shift);
          sum[e] += score;
        }
      }
    }
  }

  // A row without any key so far: exponents are -inf, not -inf + inf.
  static __device__ __forceinline__ float finite(float largest) {
    return largest == kMinusInfinity ? 0.0f : largest;
  }

  __device__ __forceinline__ void multiply_values(const float (&scores)[kKeyTiles][4],
                                                  uint32_t tile) {
    const uint32_t address = b_operand_address<Layout>(tile, 0);
#pragma unroll
    for (int step = 0; step < kKeyTiles; ++step) {
      const float (&p)[4] = scores[step];
      const uint32_t b0 = ptx::movmatrix_trans(ptx::cvt_rn_x2<Element>(p[0], p[1]));
      const uint32_t b1 = ptx::movmatrix_trans(ptx::cvt_rn_x2<Element>(p[2], p[3]));
#pragma unroll
      for (int j = 0; j < Layout::kChunks / 2; ++j) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, Layout::advance(address, 2 * j) + step * 16 * Layout::kPitch);
        if constexpr (Config::kQuantised) {
          // A chunk has 16 columns, the even ones in the first eight rows.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const HalfPairs low = to_half<Config::kCache>(a[i]);
            const HalfPairs high = to_half<Config::kCache>(a[2 + i]);
            const uint32_t v[4] = {low.even, low.odd, high.even, high.odd};
            ptx::mma_m16n8k16<Element>(out[2 * j + i], v, b0, b1);
          }
        } else {
          ptx::mma_m16n8k16<Element>(out[j], a, b0, b1);
        }
      }
    }
  }
};

}  // namespace jax_flash::decode
