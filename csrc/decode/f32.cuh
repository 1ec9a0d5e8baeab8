// One warp's up to 8 rows of float32, by m16n8k8 of tf32: every factor is high + low, two tf32
// (tile/tf32.cuh), and products lose no more than 2^-21 of themselves.
//
// Scores: queries are the rows of the product, keys its columns. With up to 8 rows half of a
// product would be empty, so the lower half has the low parts of the queries: two products instead
// of three. Outputs: widths are the rows, query rows the columns, as in columns.cuh. The k of a
// step are 8 keys in the order in which a lane has its scores, so nothing moves between lanes.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/warp.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"
#include "tile/tf32.cuh"

namespace jax_flash::decode {

// Lane l with g = l / 4 and t = l % 4 has scores of row g, keys 2t and 2t + 1 of every 8, and
// outputs of rows 2t and 2t + 1: of every 32 columns those from 4g to 4g + 3.
template <typename Config>
struct DecodeF32 {
  using Layout = typename Config::Layout;
  static constexpr int kSteps = Config::kWidth / 8;
  static constexpr int kKeyTiles = Config::kKeys / 8;
  static constexpr int kGroups = Config::kWidth / 32;  // of columns
  static_assert(Layout::kBits == 3);

  // Of a step: columns t and t + 4, each as high and low if there are registers for both.
  static constexpr bool kSplit = Config::kWidth <= 128;
  static constexpr int kParts = kSplit ? 4 : 2;

  uint32_t query[kSteps][kParts];
  float out[kGroups][2][4];  // [i][2h + e]: row 2t + e, column 4g + 2i + h
  float maximum;             // of the logits, base 2
  float sum;                 // this lane's part

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[group][i][e] = 0.0f;
      }
    }
    maximum = kMinusInfinity;
    sum = 0.0f;
  }

  __device__ __forceinline__ void load_queries(const DecodeParams& params, int batch, int kv_head,
                                               int first_row) {
    const int row = first_row + fragment_row();
    const bool exists = row < params.tokens * params.group;
    const float* const source = query_row<float>(params, batch, kv_head, row);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 8 * step + 4 * half + lane_id() % 4;
        const float x = exists && column < params.head_dim ? source[column] : 0.0f;
        if constexpr (kSplit) {
          Part part;
          part.set(0, x);
          query[step][2 * half] = part.high[0];
          query[step][2 * half + 1] = part.low[0];
        } else {
          query[step][half] = __float_as_uint(x);
        }
      }
    }
  }

  // Takes the tile of keys at `tile`, the values behind it, into account. The first key of the tile
  // is `key`, none at or after `end` counts.
  __device__ __forceinline__ void attend(const DecodeParams& params, const RowPositions& rows,
                                         uint32_t tile, int key, int end) {
    float scores[kKeyTiles][2];
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
    const float total = quad_sum(sum);
    if (lane_id() % 4 == 0 && fragment_row() < rows) {
      ptx::st_shared_v2(states + 8 * fragment_row(), maximum, total);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = fragment_column() + e;
      if (row >= rows) continue;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const auto& its = out[group];
        const uint32_t words[4] = {__float_as_uint(its[0][e]), __float_as_uint(its[0][2 + e]),
                                   __float_as_uint(its[1][e]), __float_as_uint(its[1][2 + e])};
        const int column = 32 * group + 4 * fragment_row();
        ptx::st_shared_v4(outputs + output_offset<Config>(row, column), words);
      }
    }
  }

 private:
  using Part = tf32::Fragment<3, 1>;

  // A step of the queries as the product takes it: rows g high, rows g + 8 low.
  __device__ __forceinline__ void split_query(uint32_t (&q)[4], int step) const {
    if constexpr (kSplit) {
#pragma unroll
      for (int r = 0; r < 4; ++r) q[r] = query[step][r];
    } else {
      // In the loop over tiles, not before it.
      tf32::Fragment<3, 2> part;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        part.set_word(half, ptx::fresh_word(query[step][half]));
        q[2 * half] = part.high[half];
        q[2 * half + 1] = part.low[half];
      }
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&scores)[kKeyTiles][2],
                                                uint32_t tile) const {
    // Products with the high parts of keys, which dominate, and with the low ones; those of even
    // and of odd steps, because one chain of products would be waited for.
    float high[2][kKeyTiles][4];
    float low[2][kKeyTiles][4];
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) high[parity][j][e] = low[parity][j][e] = 0.0f;
      }
    }
    const uint32_t address = tile + Layout::offset(lane_id() % 8, lane_id() / 8);
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        uint32_t words[4];  // of key g: columns t, t + 4, t + 8, t + 12
        ptx::ldmatrix_x4(words, Layout::advance(address, 4 * pair) + j * 8 * Layout::kPitch);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          tf32::Fragment<3, 2> k;
          k.set_word(0, words[2 * i]);
          k.set_word(1, words[2 * i + 1]);
          uint32_t q[4];
          split_query(q, 2 * pair + i);
          ptx::mma_m16n8k8_tf32(low[i][j], q, k.low[0], k.low[1]);
          ptx::mma_m16n8k8_tf32(high[i][j], q, k.high[0], k.high[1]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // The product of both low parts is here, it costs nothing.
        const float little = (low[0][j][2 + e] + low[1][j][2 + e]) + (low[0][j][e] + low[1][j][e]) +
                             (high[0][j][2 + e] + high[1][j][2 + e]);
        scores[j][e] = high[0][j][e] + high[1][j][e] + little;
      }
    }
  }

  // Scores become logits in base 2.
  __device__ __forceinline__ void scale(float (&scores)[kKeyTiles][2],
                                        const DecodeParams& params) const {
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) scores[j][e] *= params.logit_factor;
    }
    if (params.cap == 0.0f) return;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) scores[j][e] = params.cap * tanhf(scores[j][e]);
    }
  }

  // Adds ALiBi to logits.
  static __device__ __forceinline__ void lean(float (&scores)[kKeyTiles][2],
                                              const DecodeParams& params, const RowPositions& rows,
                                              int key) {
    const RowSlope row = RowSlope::of(params, rows, first_row<Config>(rows.place) + fragment_row());
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        scores[j][e] = row.add_to(scores[j][e], key + 8 * j + fragment_column() + e);
      }
    }
  }

  static __device__ __forceinline__ void mask(float (&scores)[kKeyTiles][2],
                                              const DecodeParams& params, const RowPositions& rows,
                                              int key, int end) {
    const int row = first_row<Config>(rows.place) + fragment_row();
    const int position = rows.position(params, row);
    const int first = params.window_left == kUnbounded ? 0 : position - params.window_left;
    const int last = min_int(position, end - 1);
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = key + 8 * j + fragment_column() + e;
        if (column < first || column > last) scores[j][e] = kMinusInfinity;
      }
    }
  }

  // Logits become exponentials relative to the maximum so far. Where that grows, which is seldom
  // after some tiles, outputs are rescaled.
  __device__ __forceinline__ void soften(float (&scores)[kKeyTiles][2]) {
    float largest = fmaxf(scores[0][0], scores[0][1]);
#pragma unroll
    for (int j = 1; j < kKeyTiles; ++j) {
      largest = fmaxf(largest, fmaxf(scores[j][0], scores[j][1]));
    }
    if (__any_sync(0xffffffffu, largest > maximum)) {
      largest = fmaxf(quad_max(largest), maximum);
      const float factor = ptx::ex2_approx_ftz(maximum - finite(largest));
      maximum = largest;
      sum *= factor;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float its = __shfl_sync(0xffffffffu, factor, 4 * (fragment_column() + e));
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            out[group][i][e] *= its;
            out[group][i][2 + e] *= its;
          }
        }
      }
    }
    const float shift = finite(maximum);
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        scores[j][e] = ptx::ex2_approx_ftz(scores[j][e] - shift);
        sum += scores[j][e];
      }
    }
  }

  // A row without any key so far: exponents are -inf, not -inf + inf.
  static __device__ __forceinline__ float finite(float largest) {
    return largest == kMinusInfinity ? 0.0f : largest;
  }

  // A step's k t is key 2t, k t + 4 is key 2t + 1; row g of the product of columns is column
  // 4g + 2i of the group, row g + 8 the next one. So a lane reads 16 bytes of a key at a time.
  __device__ __forceinline__ void multiply_values(const float (&scores)[kKeyTiles][2],
                                                  uint32_t tile) {
    tf32::Fragment<3, 2> p[kKeyTiles];
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) p[j].set(e, scores[j][e]);
    }
    const uint32_t even_key = tile + Layout::offset(fragment_column(), fragment_row());
    const uint32_t odd_key = tile + Layout::offset(fragment_column() + 1, fragment_row());
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      // The unit truncates, so a tile's share is formed apart.
      float part[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) part[i][e] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        const int offset = j * 8 * Layout::kPitch + 128 * group;
        const uint4 even = ptx::ld_shared_v4(even_key + offset);
        const uint4 odd = ptx::ld_shared_v4(odd_key + offset);
        const uint32_t words[2][4] = {{even.x, even.y, odd.x, odd.y},
                                      {even.z, even.w, odd.z, odd.w}};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          tf32::Fragment<3, 4> v;
#pragma unroll
          for (int r = 0; r < 4; ++r) v.set_word(r, words[i][r]);
          tf32::add_product<3>(part[i], part[i], v, p[j]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[group][i][e] += part[i][e];
      }
    }
  }
};

}  // namespace jax_flash::decode
