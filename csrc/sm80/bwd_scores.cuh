// Scores, probabilities and score gradients of a tile of queries and a block's keys.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "sm80/bwd_block.cuh"
#include "sm80/bwd_products.cuh"
#include "sm80/f32_products.cuh"
#include "sm80/interval_scores.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/score_options.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm80 {

// One warp's part of them.
template <typename Config>
struct BwdScores {
  using Element = typename Config::Element;
  using Mask = typename Config::Mask;
  using ScoreLayout = typename Config::ScoreLayout;
  static constexpr int kBlocks = Config::kScoreRows / 16;
  static constexpr int kTiles = Config::kScoreKeys / 8;
  static constexpr int kParts = Config::kParts;
  using Scores = float[kBlocks][kTiles][4];

  static __device__ __forceinline__ int score_row() {
    return warp_id() % Config::kScoreRowWarps * Config::kScoreRows;
  }
  // In a part of the keys.
  static __device__ __forceinline__ int score_key() {
    return warp_id() % Config::kScoreWarps / Config::kScoreRowWarps * Config::kScoreKeys;
  }

  // scores = Q K^T
  static __device__ __forceinline__ void multiply_keys(Scores& scores, uint32_t query_tile,
                                                       uint32_t key_tile) {
    using Layout = typename Config::QueryLayout;
    if constexpr (Config::kF32) {
      f32::multiply_rows<Config::kProducts, Layout, Layout, Config::kHeadDim / 16>(
          scores, a_operand_address<Layout>(query_tile, score_row()),
          b_operand_address<Layout>(key_tile, score_key()));
    } else {
      clear(scores);
      multiply<Element, Config::kColumns / 16>(scores, a_rows<Layout>(query_tile, score_row()),
                                               b_rows<Layout>(key_tile, score_key()));
    }
  }

  // dscores = dO V^T - delta
  static __device__ __forceinline__ void multiply_values(Scores& dscores, uint32_t dout_tile,
                                                         uint32_t value_tile, uint32_t deltas) {
    using Layout = typename Config::DoutLayout;
    if constexpr (Config::kF32) {
      f32::multiply_rows<Config::kProducts, Layout, Layout, Config::kHeadDimV / 16>(
          dscores, a_operand_address<Layout>(dout_tile, score_row()),
          b_operand_address<Layout>(value_tile, score_key()));
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float delta = row_state(deltas, i, h);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if constexpr (Config::kF32) {
            dscores[i][j][2 * h] -= delta;
            dscores[i][j][2 * h + 1] -= delta;
          } else {
            dscores[i][j][2 * h] = dscores[i][j][2 * h + 1] = -delta;
          }
        }
      }
    }
    if constexpr (!Config::kF32) {
      multiply<Element, Config::kColumnsV / 16>(dscores, a_rows<Layout>(dout_tile, score_row()),
                                                b_rows<Layout>(value_tile, score_key()));
    }
  }

  // Scores (in place) become probabilities. `row` and `key` are the first of the tile.
  static __device__ __forceinline__ void softmax(Scores& scores, const Mask& mask, int row, int key,
                                                 uint32_t lses, const SoftmaxScale& scale) {
    if (scale.first != 1.0f) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[i][j][e] *= scale.first;
        }
      }
    }
    const int first_row = row + score_row();
    const int first_key = key + score_key();
    const KeyInterval unmasked = mask.core(first_row, first_row + Config::kScoreRows);
    if (first_key < unmasked.first || first_key + Config::kScoreKeys > unmasked.end) {
      apply_mask(scores, mask, first_row + fragment_row(), first_key + fragment_column());
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float lse = row_state(lses, i, h);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            scores[i][j][e] = ptx::ex2_approx_ftz(fmaf(scores[i][j][e], scale.log2, -lse));
          }
        }
      }
    }
  }

  // Of one query head, with Config::kDense.
  struct Dense {
    Dropout dropout;
    BiasRows bias;
    MaskRows bits;
    bool takes_cap_for_linear;  // see MhaBwdParams
  };
  static __device__ __forceinline__ Dense dense_of(const MhaBwdParams& params, int batch,
                                                   int head) {
    if constexpr (!Config::kDense) return {};
    return {Dropout::make(params, batch, head), BiasRows::make(params, batch, head),
            MaskRows::make(params, batch, head), params.takes_cap_for_linear()};
  }

  // The same for scores with options, and store_scores of the probabilities to `tile`. Scores
  // become probabilities times derivatives of logits by scores, what gradients are multiplied by;
  // negative where dropout drops, and then the probability in the tile is 0.
  static __device__ __forceinline__ void softmax_with_options(Scores& scores,
                                                              const IntervalMask& mask, int row,
                                                              int key, uint32_t lses,
                                                              const ScoreOptions& options,
                                                              const Dense& dense, uint32_t tile) {
    const uint32_t address = score_address(tile);
    row += score_row() + fragment_row();
    key += score_key() + fragment_column();
    const bool mixed = compares_ids(mask, row, key);
    const bool is_linear = Config::kDense && dense.takes_cap_for_linear;
    const float inverse = is_linear ? 0.0f : options.inverse();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      KeptScores<kTiles> kept;
      const bool drops = Config::kDense && dense.dropout.threshold != 0;
      if (drops) kept.draw(dense.dropout, row + 16 * i, key - fragment_column());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const RowRecord record = mask.row(row + 16 * i + 8 * h);
        const float lse = row_state(lses, i, h);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int key_pair = key + 8 * j;
          float2 biases = make_float2(0.0f, 0.0f);
          if (Config::kDense && dense.bias.data != nullptr) {
            biases = dense.bias.load_pair(row + 16 * i + 8 * h, key_pair);
          }
          uint32_t word = ~0u;
          if (Config::kDense && dense.bits.data != nullptr) {
            word = dense.bits.word(row + 16 * i + 8 * h, key_pair) >> (key_pair % 32);
          }
          float probabilities[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[i][j][2 * h + e];
            const int column = key + 8 * j + e;
            const float capped = options.capped<Config::kFloats>(score);
            float logit = options.biased(capped, static_cast<float>(record.position - column));
            if constexpr (Config::kDense) logit += e == 0 ? biases.x : biases.y;
            const bool seen = column >= record.first && column < record.end &&
                              (!mixed || mask.id(column) == record.id) && (word >> e & 1) != 0;
            const float exponent = fmaf(logit, SoftmaxScale::kLog2e, -lse);
            probabilities[e] = seen ? ptx::ex2_approx_ftz(exponent) : 0.0f;
            score = probabilities[e] * ScoreOptions::derivative(capped, inverse);
            if (drops && !kept(j, h, e)) {
              probabilities[e] = 0.0f;
              score = -fabsf(score);
            }
          }
          store_pair(address, i, j, h, probabilities[0], probabilities[1]);
        }
      }
    }
  }

  // Score gradients from dP - delta, with dropout and the scores of softmax_with_options: what is
  // kept of dP is larger by `kept_scale`.
  static __device__ __forceinline__ void multiply_dropped(Scores& dscores, const Scores& scores,
                                                          uint32_t deltas, float kept_scale) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float delta = row_state(deltas, i, h);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            const float score = scores[i][j][e];
            float& x = dscores[i][j][e];
            const bool dropped = __float_as_uint(score) >> 31 != 0;
            x = dropped ? -delta : fmaf(x, kept_scale, (kept_scale - 1.0f) * delta);
            x *= fabsf(score);
          }
        }
      }
    }
  }

  // Score gradients of a tile, `row` and `key` its first, to where those of biases are added up.
  static __device__ __forceinline__ void add_bias_gradients(const BiasGradient& gradient,
                                                            const Scores& dscores, int row, int key,
                                                            int rows, int keys) {
    row += score_row() + fragment_row();
    key += score_key() + fragment_column();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int this_row = row + 16 * i + 8 * h;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = key + 8 * j + e;
            if (this_row < rows && column < keys) {
              gradient.add(this_row, column, dscores[i][j][2 * h + e]);
            }
          }
        }
      }
    }
  }

  // Rounded to what products take, to a tile [row][key].
  static __device__ __forceinline__ void store_scores(uint32_t tile, const Scores& scores) {
    const uint32_t address = score_address(tile);
    visit_pairs([&](int i, int j, int h) {
      store_pair(address, i, j, h, scores[i][j][2 * h], scores[i][j][2 * h + 1]);
    });
  }

  // The same of probabilities, and what rounding took from them to another tile.
  static __device__ __forceinline__ void store_in_two_parts(uint32_t tile, uint32_t low_tile,
                                                            const Scores& scores) {
    const uint32_t address = score_address(tile);
    visit_pairs([&](int i, int j, int h) {
      const float left = scores[i][j][2 * h];
      const float right = scores[i][j][2 * h + 1];
      const uint32_t high = ptx::cvt_rn_x2<Element>(left, right);
      const float2 rounded = ptx::unpack_x2<Element>(high);
      const uint32_t place = pair_address(address, i, j, h);
      ptx::st_shared(place, high);
      ptx::st_shared(place + (low_tile - tile),
                     ptx::cvt_rn_x2<Element>(left - rounded.x, right - rounded.y));
    });
  }

  // Score gradients from dP - delta and such probabilities.
  static __device__ __forceinline__ void multiply_stored(Scores& dscores, uint32_t tile,
                                                         uint32_t low_tile) {
    const uint32_t address = score_address(tile);
    visit_pairs([&](int i, int j, int h) {
      const uint32_t place = pair_address(address, i, j, h);
      const float2 high = ptx::unpack_x2<Element>(ptx::ld_shared_u32(place));
      const float2 low = ptx::unpack_x2<Element>(ptx::ld_shared_u32(place + (low_tile - tile)));
      dscores[i][j][2 * h] *= high.x + low.x;
      dscores[i][j][2 * h + 1] *= high.y + low.y;
    });
  }

 private:
  template <typename Layout>
  static __device__ __forceinline__ auto a_rows(uint32_t tile, int row) {
    return RowBlocks<Layout, kParts>{a_operand_address<Layout, kParts>(tile, row)};
  }
  template <typename Layout>
  static __device__ __forceinline__ auto b_rows(uint32_t tile, int row) {
    return RowBlocks<Layout, kParts>{b_operand_address<Layout, kParts>(tile, row)};
  }

  // lse or delta of this lane's row 16 * block + 8 * half.
  static __device__ __forceinline__ float row_state(uint32_t states, int block, int half) {
    return ptx::ld_shared_f32(states + 4 * (score_row() + fragment_row() + 16 * block + 8 * half));
  }

  // Keys outside a row's interval get a score of -inf. `row` and `key` are this lane's first.
  static __device__ __forceinline__ void apply_mask(Scores& scores, const Mask& mask, int row,
                                                    int key) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const KeyInterval keys = mask.interval(row + 16 * i + 8 * h);
        const int begin = keys.first - key;
        const int end = keys.end - key;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * j + e;
            if (column < begin || column >= end) scores[i][j][2 * h + e] = kMinusInfinity;
          }
        }
      }
    }
    if constexpr (Config::kIntervals) {
      if (compares_ids(mask, row, key)) mask_ids(scores, mask, row, key);
    }
  }

  // Whether ids may hide keys from this warp's rows. No ids are there past the last key.
  static __device__ __forceinline__ bool compares_ids(const IntervalMask& mask, int row, int key) {
    return mask.mixed(row, row + 1) && key < mask.key_length;
  }

  // Where this lane's first pair of scores is in the tile [row][key].
  static __device__ __forceinline__ uint32_t score_address(uint32_t tile) {
    const int row = score_row() + fragment_row();
    if constexpr (Config::kF32) {
      const int pair = lane_id() % 4;  // two of them are a chunk
      return tile + ScoreLayout::offset(row, score_key() / 4 + pair / 2) + 8 * (pair % 2);
    } else {
      return tile + ScoreLayout::offset(row, kParts * (score_key() / 8)) + 2 * fragment_column();
    }
  }
  template <typename F>
  static __device__ __forceinline__ void visit_pairs(F f) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) f(i, j, h);
      }
    }
  }
  // The bits of j are zero in the warp's first chunk.
  static __device__ __forceinline__ uint32_t pair_address(uint32_t address, int i, int j, int h) {
    return (address ^ (Config::kUnits * j << 4)) + (16 * i + 8 * h) * ScoreLayout::kPitch;
  }
  static __device__ __forceinline__ void store_pair(uint32_t address, int i, int j, int h,
                                                    float left, float right) {
    address = pair_address(address, i, j, h);
    if constexpr (Config::kF32) {
      ptx::st_shared_v2(address, f32::stored<Config::kProducts>(left),
                        f32::stored<Config::kProducts>(right));
    } else {
      const uint32_t high = ptx::cvt_rn_x2<Element>(left, right);
      ptx::st_shared(address, high);
      if constexpr (Config::kSplit) ptx::st_shared(address ^ 16, low_parts(left, right, high));
    }
  }
};

// Where a tile of queries meets keys: all of the block, or a part of them.
template <typename Config>
struct BwdTile {
  uint32_t queries;
  uint32_t douts;
  uint32_t lses;  // and deltas
  uint32_t keys;
  uint32_t values;
  uint32_t probabilities;
  uint32_t dscores;
  int key;  // the first

  __device__ __forceinline__ BwdTile part(int index) const {
    constexpr int kPartKeys = Config::kKeys / Config::kScoreParts;
    static_assert(Config::kScoreParts == 1 || 2 * Config::kUnits * kPartKeys % 128 == 0,
                  "chunks of a part are permuted among themselves");
    BwdTile tile = *this;
    tile.keys += index * kPartKeys * Config::KeyLayout::kPitch;
    tile.values += index * kPartKeys * Config::ValueLayout::kPitch;
    tile.probabilities += index * kPartKeys * 2 * Config::kUnits;
    tile.dscores += index * kPartKeys * 2 * Config::kUnits;
    tile.key += index * kPartKeys;
    return tile;
  }
};

// Probabilities and score gradients to shared memory; before_douts() comes before the first read of
// output gradients.
template <typename Config, typename F>
__device__ __forceinline__ void make_scores(const MhaBwdParams& params, const BwdPlan& plan,
                                            const BwdBlock<Config>& block, BwdStep step,
                                            const BwdTile<Config>& tile, F before_douts) {
  using Part = BwdScores<Config>;
  typename Part::Scores scores;
  Part::multiply_keys(scores, tile.queries, tile.keys);
  bool options = false;
  if constexpr (Config::kIntervals) {
    options = Config::kDense || ScoreOptions::any(params);
    if (options) {
      const int head = block.kv_head * plan.group + step.head;
      Part::softmax_with_options(scores, block.mask, step.row, tile.key, tile.lses,
                                 ScoreOptions::make(params, block.batch, head),
                                 Part::dense_of(params, block.batch, head), tile.probabilities);
    }
  }
  if (!options) {
    Part::softmax(scores, block.mask, step.row, tile.key, tile.lses, params.scale);
    Part::store_scores(tile.probabilities, scores);
  }
  before_douts();
  typename Part::Scores dscores;
  Part::multiply_values(dscores, tile.douts, tile.values, tile.lses + 4 * Config::kRows);
  if (Config::kDense && params.intervals.dropout != 0) {
    Part::multiply_dropped(dscores, scores, tile.lses + 4 * Config::kRows,
                           params.intervals.kept_scale);
  } else {
#pragma unroll
    for (int i = 0; i < Part::kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < Part::kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dscores[i][j][e] *= scores[i][j][e];
      }
    }
  }
  if constexpr (Config::kDense) {
    if (params.dbias.data != nullptr) {
      const int head = block.kv_head * plan.group + step.head;
      Part::add_bias_gradients(BiasGradient::make(params, block.batch, head), dscores, step.row,
                               tile.key, params.query_length, params.key_length);
    }
    if (params.dslopes != nullptr) {
      static_assert(Config::kScoreRowWarps <= kSlopeParts);
      const int64_t part =
          (block.flat_head + step.head) * kSlopeParts + warp_id() % Config::kScoreRowWarps;
      add_slope_gradients(params.dslopes + part * params.key_length, block.mask, dscores,
                          step.row + Part::score_row() + fragment_row(),
                          tile.key + Part::score_key() + fragment_column(), params.key_length);
    }
  }
  Part::store_scores(tile.dscores, dscores);
}

// The same where half of the warps make scores, the others dP, for twice as many of both.
template <typename Config>
__device__ __forceinline__ void make_scores_in_pairs(const MhaBwdParams& params,
                                                     const BwdBlock<Config>& block, BwdStep step,
                                                     const BwdTile<Config>& tile) {
  using Part = BwdScores<Config>;
  const bool is_first = warp_id() < Config::kScoreWarps;
  typename Part::Scores x;
  if (is_first) {
    Part::multiply_keys(x, tile.queries, tile.keys);
    Part::softmax(x, block.mask, step.row, tile.key, tile.lses, params.scale);
    Part::store_in_two_parts(tile.probabilities, tile.dscores, x);
  } else {
    Part::multiply_values(x, tile.douts, tile.values, tile.lses + 4 * Config::kRows);
  }
  __syncthreads();  // probabilities before their reads
  if (!is_first) {
    Part::multiply_stored(x, tile.probabilities, tile.dscores);
    Part::store_scores(tile.dscores, x);
  }
}

}  // namespace jax_flash::sm80
