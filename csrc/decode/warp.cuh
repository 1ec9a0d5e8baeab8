// One warp's 16 rows: registers, and the two products by mma.sync with the softmax between them.
#pragma once

#include <cstdint>

#include "decode/config.cuh"
#include "decode/params.h"
#include "decode/plan.cuh"
#include "decode/quantised.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/copy.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::decode {

// The first of the rows of its query heads that a warp has.
template <typename Config>
__device__ __forceinline__ int first_row(const Place& place) {
  return place.row_tile * Config::kRows +
         static_cast<int>(threadIdx.x) / 32 % Config::kTeamWarps * 16;
}

// Where the rows of a unit stand: row r is token r / group, at position shift + r / group. What
// else follows from the place, which is in shared memory, is read where it is needed: registers are
// few.
struct RowPositions {
  const Place& place;
  int shift;
  KeyInterval seen_by_all;  // keys, of those before the split's end

  __device__ __forceinline__ int position(const DecodeParams& params, int row) const {
    return shift + params.group_divisor.divide(row);
  }
};

// ALiBi of a row: what its logits, in base 2, lose for each key that one is before its position.
struct RowSlope {
  float slope;
  int position;

  static __device__ __forceinline__ RowSlope of(const DecodeParams& params,
                                                const RowPositions& rows, int row) {
    row = static_cast<int>(ptx::fresh_word(row));  // found for each tile anew: registers are few
    const int token = params.group_divisor.divide(row);
    const int head = rows.place.kv_head * params.group + row - token * params.group;
    const float slope = __ldg(params.slopes + rows.place.batch * params.slope_stride + head);
    return {SoftmaxScale::kLog2e * slope, rows.position(params, row)};
  }
  // Of a key up to the position; later ones are masked.
  __device__ __forceinline__ float add_to(float logit, int key) const {
    return fmaf(slope, static_cast<float>(key - position), logit);
  }
};

__device__ __forceinline__ float scale_of(const float* scales, int index) {
  return scales == nullptr ? 1.0f : scales[index];
}

// Where a row's query is.
template <typename Given = Element16>
__device__ __forceinline__ const Given* query_row(const DecodeParams& params, int batch,
                                                  int kv_head, int row) {
  const int token = params.group_divisor.divide(row);
  const int head = kv_head * params.group + row - token * params.group;
  return static_cast<const Given*>(params.query) +
         ((int64_t{batch} * params.tokens + token) * params.heads + head) * params.head_dim;
}

// This lane's part of a row of queries as f16, over a power of two so that it fits, which is
// returned; columns are in the order that `to_half` gives those of the keys. They go to
// query[step][low] and query[step][high]. Four neighbouring lanes have a row.
template <typename Given, int kSteps, int kParts>
__device__ __forceinline__ float load_half_row(const DecodeParams& params, const Element16* source,
                                               bool exists, uint32_t (&query)[kSteps][kParts],
                                               int low, int high) {
  const int first_column = 2 * fragment_column();
  float largest = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = 16 * step + first_column;
    const uint2 pairs = exists && column < params.head_dim
                            ? *reinterpret_cast<const uint2*>(source + column)
                            : make_uint2(0, 0);
    query[step][low] = pairs.x;
    query[step][high] = pairs.y;
    const float2 x = ptx::unpack_x2<Given>(pairs.x);
    const float2 y = ptx::unpack_x2<Given>(pairs.y);
    largest = fmaxf(largest, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(y.x), fabsf(y.y))));
  }
  largest = quad_max(largest);
  // 2^e of the largest, up to what has a normal reciprocal.
  const uint32_t exponent = min(__float_as_uint(largest) & 0x7f800000u, 253u << 23);
  const float down = __uint_as_float((254u << 23) - exponent);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const float2 x = ptx::unpack_x2<Given>(query[step][low]);
    const float2 y = ptx::unpack_x2<Given>(query[step][high]);
    query[step][low] = ptx::cvt_rn_x2<__half>(x.x * down, y.x * down);
    query[step][high] = ptx::cvt_rn_x2<__half>(x.y * down, y.y * down);
  }
  return __uint_as_float(exponent);
}

// Where a column of a row of shared outputs is: four rows in different banks.
template <typename Config>
__device__ __forceinline__ uint32_t output_offset(int row, int column) {
  return 4 * row * Config::kWidth + (4 * column ^ row % 4 << 5);
}

// The rows of a warp between and behind the products: logits, softmax and outputs in the registers
// that mma.sync and wgmma have them in.
template <typename Config>
struct DecodeRows {
  static constexpr int kScoreTiles = Config::kKeys / 8;
  static constexpr int kOutTiles = Config::kWidth / 8;

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

  // Scores of the keys from `key` on, those before `end`, become weights relative to the maximum so
  // far, by which the outputs are rescaled.
  __device__ __forceinline__ void weigh(float (&scores)[kScoreTiles][4], const DecodeParams& params,
                                        const RowPositions& rows, int key, int end) {
    scale(scores, params);
    if (params.slopes != nullptr) lean(scores, params, rows, key);
    if (key < rows.seen_by_all.first || key + Config::kKeys > rows.seen_by_all.end) {
      mask(scores, params, rows, key, end);
    }
    soften(scores);
  }

 private:
  // Scores become logits in base 2.
  __device__ __forceinline__ void scale(float (&scores)[kScoreTiles][4],
                                        const DecodeParams& params) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float factor = params.logit_factor;
      if constexpr (Config::kQuantised) factor *= key_factor[h];
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        scores[j][2 * h] *= factor;
        scores[j][2 * h + 1] *= factor;
      }
    }
    if (params.cap == 0.0f) return;
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = params.cap * tanhf(scores[j][e]);
    }
  }

  // Adds ALiBi to logits.
  static __device__ __forceinline__ void lean(float (&scores)[kScoreTiles][4],
                                              const DecodeParams& params, const RowPositions& rows,
                                              int key) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowSlope row =
          RowSlope::of(params, rows, first_row<Config>(rows.place) + fragment_row() + 8 * h);
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[j][2 * h + e];
          score = row.add_to(score, key + 8 * j + fragment_column() + e);
        }
      }
    }
  }

  static __device__ __forceinline__ void mask(float (&scores)[kScoreTiles][4],
                                              const DecodeParams& params, const RowPositions& rows,
                                              int key, int end) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row<Config>(rows.place) + fragment_row() + 8 * h;
      const int position = rows.position(params, row);
      const int first = params.window_left == kUnbounded ? 0 : position - params.window_left;
      const int last = min_int(position, end - 1);
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = key + 8 * j + fragment_column() + e;
          if (column < first || column > last) scores[j][2 * h + e] = kMinusInfinity;
        }
      }
    }
  }

  // Logits become exponentials relative to the maximum so far, by which the outputs are rescaled.
  __device__ __forceinline__ void soften(float (&scores)[kScoreTiles][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = kMinusInfinity;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        largest = fmaxf(largest, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
      }
      largest = fmaxf(quad_max(largest), maximum[h]);
      // A row without any key so far: exponents are -inf, not -inf + inf.
      const float shift = largest == kMinusInfinity ? 0.0f : largest;
      const float factor = ptx::ex2_approx_ftz(maximum[h] - shift);
      maximum[h] = largest;
      sum[h] *= factor;
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
        out[j][2 * h] *= factor;
        out[j][2 * h + 1] *= factor;
      }
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          scores[j][e] = ptx::ex2_approx_ftz(scores[j][e] - shift);
          sum[h] += scores[j][e];
        }
      }
    }
  }
};

template <typename Config>
struct DecodeWarp : DecodeRows<Config> {
  using Base = DecodeRows<Config>;
  using Element = typename Config::Element;
  using Layout = typename Config::Layout;
  using Base::key_factor;
  using Base::kOutTiles;
  using Base::kScoreTiles;
  using Base::maximum;
  using Base::out;
  using Base::sum;
  static constexpr int kSteps = Config::kWidth / 16;

  uint32_t query[kSteps][4];

  __device__ __forceinline__ void load_queries(const DecodeParams& params, int batch, int kv_head,
                                               int first_row) {
    if constexpr (!Config::kQuantised) {
      load_own_queries(params, batch, kv_head, first_row);
    } else if (params.query_bf16 != 0) {
      load_half_queries<__nv_bfloat16>(params, batch, kv_head, first_row);
    } else {
      load_half_queries<__half>(params, batch, kv_head, first_row);
    }
  }

  // Takes the tile of keys at `tile`, the values behind it, into account. The first key of the tile
  // is `key`, none at or after `end` counts.
  __device__ __forceinline__ void attend(const DecodeParams& params, const RowPositions& rows,
                                         uint32_t tile, int key, int end) {
    float scores[kScoreTiles][4];
    multiply_keys(scores, tile);
    this->weigh(scores, params, rows, key, end);
    multiply_values(scores, tile + Config::kTileBytes);
  }

  // Leaves the states of its rows, the first one being `first` of `rows`, at `states`, and their
  // outputs at `outputs`.
  __device__ __forceinline__ void share(int rows, int first, uint32_t states,
                                        uint32_t outputs) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = quad_sum(sum[h]);
      const int row = first + fragment_row() + 8 * h;
      if (row >= rows) continue;
      if (fragment_column() == 0) ptx::st_shared_v2(states + 8 * row, maximum[h], total);
#pragma unroll
      for (int j = 0; j < kOutTiles; j += 2) {
        const auto& left = out[j];
        const auto& right = out[j + 1];
        if constexpr (Config::kQuantised) {
          // Even columns are left, odd ones right.
          const uint32_t four = outputs + output_offset<Config>(row, 8 * j + 2 * fragment_column());
          ptx::st_shared_v2(four, left[2 * h], right[2 * h]);
          ptx::st_shared_v2(four + 8, left[2 * h + 1], right[2 * h + 1]);
        } else {
          const int column = 8 * j + fragment_column();
          ptx::st_shared_v2(outputs + output_offset<Config>(row, column), left[2 * h],
                            left[2 * h + 1]);
          ptx::st_shared_v2(outputs + output_offset<Config>(row, column + 8), right[2 * h],
                            right[2 * h + 1]);
        }
      }
    }
  }

 private:
  // Queries go straight to the registers that the product reads: each is read once.
  __device__ __forceinline__ void load_own_queries(const DecodeParams& params, int batch,
                                                   int kv_head, int first_row) {
    const int rows = params.tokens * params.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + fragment_row() + 8 * h;
      const Element16* const source = query_row(params, batch, kv_head, row);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * step + 8 * half + fragment_column();
          const bool valid = row < rows && column < params.head_dim;
          query[step][h + 2 * half] =
              valid ? *reinterpret_cast<const uint32_t*>(source + column) : 0u;
        }
      }
    }
  }

  // The same as f16. Also sets the factors of scores.
  template <typename Given>
  __device__ __forceinline__ void load_half_queries(const DecodeParams& params, int batch,
                                                    int kv_head, int first_row) {
    const float k_scale = scale_of(params.k_scale, batch * params.k_scale_stride + kv_head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + fragment_row() + 8 * h;
      const float factor =
          load_half_row<Given>(params, query_row(params, batch, kv_head, row),
                               row < params.tokens * params.group, query, h, h + 2);
      key_factor[h] = kUnit<Config::kCache> * k_scale * factor;
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&scores)[kScoreTiles][4],
                                                uint32_t tile) const {
    const uint32_t address = b_operand_address<Layout>(tile, 0);
#pragma unroll
    for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[j][e] = 0.0f;
    }
#pragma unroll
    for (int pair = 0; pair < Layout::kChunks / 2; ++pair) {
#pragma unroll
      for (int j = 0; j < kScoreTiles / 2; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, Layout::advance(address, 2 * pair) + j * 16 * Layout::kPitch);
        if constexpr (Config::kQuantised) {
          // A chunk of 16 bytes is a k-step.
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const HalfPairs k = to_half<Config::kCache>(b[i]);
            ptx::mma_m16n8k16<Element>(scores[2 * j + i / 2], query[2 * pair + i % 2], k.even,
                                       k.odd);
          }
        } else {
          ptx::mma_m16n8k16<Element>(scores[2 * j], query[pair], b[0], b[1]);
          ptx::mma_m16n8k16<Element>(scores[2 * j + 1], query[pair], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_values(const float (&scores)[kScoreTiles][4],
                                                  uint32_t tile) {
    const uint32_t address = b_operand_trans_address<Layout>(tile, 0);
#pragma unroll
    for (int step = 0; step < kScoreTiles / 2; ++step) {
      uint32_t a[4];
      pack_a_operand<Element>(a, scores[2 * step], scores[2 * step + 1]);
#pragma unroll
      for (int j = 0; j < Layout::kChunks / 2; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Layout::advance(address, 2 * j) + step * 16 * Layout::kPitch);
        if constexpr (Config::kQuantised) {
          // A chunk has 16 columns, the even ones for one tile of outputs, the odd for the next.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const HalfPairs low = to_half<Config::kCache>(b[2 * i]);
            const HalfPairs high = to_half<Config::kCache>(b[2 * i + 1]);
            ptx::mma_m16n8k16<Element>(out[4 * j + 2 * i], a, low.even, high.even);
            ptx::mma_m16n8k16<Element>(out[4 * j + 2 * i + 1], a, low.odd, high.odd);
          }
        } else {
          ptx::mma_m16n8k16<Element>(out[2 * j], a, b[0], b[1]);
          ptx::mma_m16n8k16<Element>(out[2 * j + 1], a, b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace jax_flash::decode
