// One warp of the backward: its registers and the steps that work on them.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "sm80/bwd_products.cuh"
#include "sm80/bwd_sum.cuh"
#include "sm80/f32_products.cuh"
#include "sm80/interval_scores.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/intervals.cuh"
#include "tile/mask.cuh"
#include "tile/score_options.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm80 {

template <typename Config>
struct BwdWarp {
  using Element = typename Config::Element;
  using Mask = typename Config::Mask;
  using ScoreLayout = typename Config::ScoreLayout;
  static constexpr int kScoreBlocks = Config::kScoreRows / 16;
  static constexpr int kScoreTiles = Config::kScoreKeys / 8;
  static constexpr int kKeyBlocks = Config::kKeys / Config::kKeyWarps / 16;
  static constexpr int kKeyTiles = Config::kColumns / Config::kKeyColumnWarps / 8;
  static constexpr int kValueTiles = Config::kColumnsV / Config::kKeyColumnWarps / 8;
  static constexpr int kDqueryBlocks = Config::kDqueryRows / 16;
  static constexpr int kDqueryTiles = Config::kColumns / Config::kDqueryColumnWarps / 8;
  static constexpr int kSteps = Config::kRows / 16;  // of the gradients of keys and values
  using Scores = float[kScoreBlocks][kScoreTiles][4];
  using Dquery = float[kDqueryBlocks][kDqueryTiles][4];

  float dkey[kKeyBlocks][kKeyTiles][4];
  float dvalue[kKeyBlocks][kValueTiles][4];

  __device__ __forceinline__ void init() {
    clear(dkey);
    clear(dvalue);
  }

  static __device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int score_row() {
    return warp_id() % Config::kScoreRowWarps * Config::kScoreRows;
  }
  static __device__ __forceinline__ int score_key() {
    return warp_id() / Config::kScoreRowWarps * Config::kScoreKeys;
  }
  static __device__ __forceinline__ int key_warp() { return warp_id() % Config::kKeyWarps; }
  static __device__ __forceinline__ int column_warp() { return warp_id() / Config::kKeyWarps; }
  static __device__ __forceinline__ int dquery_row() {
    return warp_id() % Config::kDqueryRowWarps * Config::kDqueryRows;
  }
  static __device__ __forceinline__ int dquery_column_warp() {
    return warp_id() / Config::kDqueryRowWarps;
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
    for (int i = 0; i < kScoreBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float delta = row_state(deltas, i, h);
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
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
      for (int i = 0; i < kScoreBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
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
    for (int i = 0; i < kScoreBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float lse = row_state(lses, i, h);
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
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
    for (int i = 0; i < kScoreBlocks; ++i) {
      KeptScores<kScoreTiles> kept;
      const bool drops = Config::kDense && dense.dropout.threshold != 0;
      if (drops) kept.draw(dense.dropout, row + 16 * i, key - fragment_column());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const RowRecord record = mask.row(row + 16 * i + 8 * h);
        const float lse = row_state(lses, i, h);
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
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
    for (int i = 0; i < kScoreBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float delta = row_state(deltas, i, h);
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
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
    for (int i = 0; i < kScoreBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int this_row = row + 16 * i + 8 * h;
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
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
#pragma unroll
    for (int i = 0; i < kScoreBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
          store_pair(address, i, j, h, scores[i][j][2 * h], scores[i][j][2 * h + 1]);
        }
      }
    }
  }

  // dvalue += P^T dO. Of operands of 16 bits after(step) follows each of kSteps k-steps.
  template <typename F>
  __device__ __forceinline__ void add_dvalue(uint32_t probability_tile, uint32_t dout_tile,
                                             F after) {
    if constexpr (Config::kF32) {
      add_columns<typename Config::DoutLayout>(dvalue, probability_tile, dout_tile);
    } else if constexpr (Config::kSplit) {
      add_product<Element, kSteps>(dvalue, key_rows(probability_tile), dout_columns(dout_tile));
    } else {
      multiply<Element, kSteps>(dvalue, key_rows(probability_tile), dout_columns(dout_tile), after);
    }
  }

  // dkey += dS^T Q, the same.
  template <typename F>
  __device__ __forceinline__ void add_dkey(uint32_t dscore_tile, uint32_t query_tile, F after) {
    if constexpr (Config::kF32) {
      add_columns<typename Config::QueryLayout>(dkey, dscore_tile, query_tile);
    } else if constexpr (Config::kSplit) {
      add_product<Element, kSteps>(dkey, key_rows(dscore_tile), query_columns(query_tile));
    } else {
      multiply<Element, kSteps>(dkey, key_rows(dscore_tile), query_columns(query_tile), after);
    }
  }
  __device__ __forceinline__ void add_dkey(uint32_t dscore_tile, uint32_t query_tile) {
    add_dkey(dscore_tile, query_tile, [](int) {});
  }

  // dquery = dS K
  static __device__ __forceinline__ void multiply_dscores(Dquery& dquery, uint32_t dscore_tile,
                                                          uint32_t key_tile) {
    clear(dquery);
    if constexpr (Config::kF32) {
      f32::add_columns<Config::kProducts, Config::kKeys / 8, Config::kDqueryColumnWarps>(
          dquery,
          f32::RowBlocks<ScoreLayout>{a_operand_address<ScoreLayout>(dscore_tile, dquery_row())},
          f32::Columns<typename Config::KeyLayout>::at(key_tile), dquery_column_warp());
    } else {
      multiply<Element, Config::kKeys / 16>(dquery, dquery_rows(dscore_tile),
                                            key_columns(key_tile));
    }
  }

  // This lane's tiles first..end - 1 of it, row blocks in turn, to the sum. `sum`: of the head;
  // `row`: the first of the tile of queries.
  static __device__ __forceinline__ void add_to_sum(float* sum, int row, const Dquery& dquery,
                                                    int first = 0,
                                                    int end = kDqueryBlocks * kDqueryTiles) {
#pragma unroll
    for (int t = first; t < end; ++t) {
      add_tile(sum, row, t / kDqueryTiles, t % kDqueryTiles,
               dquery[t / kDqueryTiles][t % kDqueryTiles]);
    }
  }

  // Adds to the gradients of keys and values and dquery to its sum: little by little, between the
  // steps of both products, which so hide the additions.
  __device__ __forceinline__ void add_all(float* sum, int row, const Dquery& dquery,
                                          uint32_t dscore_tile, uint32_t query_tile,
                                          uint32_t probability_tile, uint32_t dout_tile) {
    constexpr int kTiles = kDqueryBlocks * kDqueryTiles;
    constexpr auto share = [](int step) { return (step * kTiles + 2 * kSteps - 1) / (2 * kSteps); };
    const auto add = [&](int step) {
      if (share(step) == share(step + 1)) return;
      __syncwarp();  // without it the compiler gathers the additions before the products
      add_to_sum(sum, row, dquery, share(step), share(step + 1));
    };
    add_dkey(dscore_tile, query_tile, add);
    add_dvalue(probability_tile, dout_tile, [&](int step) { add(kSteps + step); });
  }

  // dS K to the sum and dvalue += P^T dO. Sixteen columns of the former at a time, which are added
  // before a part of the latter. The rows of dS are read once and kept meanwhile.
  __device__ __forceinline__ void add_dquery_dvalue(float* sum, int row, uint32_t dscore_tile,
                                                    uint32_t key_tile, uint32_t probability_tile,
                                                    uint32_t dout_tile) {
    if constexpr (Config::kFloats) {
      Dquery dquery;
      multiply_dscores(dquery, dscore_tile, key_tile);
      add_to_sum(sum, row, dquery);
      add_dvalue(probability_tile, dout_tile, [](int) {});
    } else {
      constexpr int kKeySteps = Config::kKeys / 16;
      constexpr int kParts = kDqueryTiles / 2;
      uint32_t dscores[kKeySteps][kDqueryBlocks][4];
#pragma unroll
      for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
        for (int i = 0; i < kDqueryBlocks; ++i) {
          dquery_rows(dscore_tile).load(dscores[step][i], i, step, 0);
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float dquery[kDqueryBlocks][2][4];
        clear(dquery);
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
          uint32_t key[4];
          key_columns(key_tile).load(key, part, step, 0);
#pragma unroll
          for (int i = 0; i < kDqueryBlocks; ++i) {
            ptx::mma_m16n8k16<Element>(dquery[i][0], dscores[step][i], key[0], key[1]);
            ptx::mma_m16n8k16<Element>(dquery[i][1], dscores[step][i], key[2], key[3]);
          }
        }
        __syncwarp();  // without it the compiler gathers the additions of all parts
#pragma unroll
        for (int i = 0; i < kDqueryBlocks; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) add_tile(sum, row, i, 2 * part + j, dquery[i][j]);
        }
#pragma unroll
        for (int step = part * kSteps / kParts; step < (part + 1) * kSteps / kParts; ++step) {
          multiply_step<Element>(dvalue, key_rows(probability_tile), dout_columns(dout_tile), step);
        }
      }
    }
  }

  // A gradient of keys or of values to a tile of 16 bits in shared memory.
  template <typename Layout, int kTiles>
  static __device__ __forceinline__ void stage_gradient(
      uint32_t tile, const float (&gradient)[kKeyBlocks][kTiles][4], float factor) {
    visit_rows<kTiles>([&](int i, int j, int h, int row, int chunk) {
      ptx::st_shared(tile + Layout::offset(row, chunk) + 2 * fragment_column(),
                     ptx::cvt_rn_x2<Element>(factor * gradient[i][j][2 * h],
                                             factor * gradient[i][j][2 * h + 1]));
    });
  }

  // The same in f32, to global memory: `rows` rows, those from valid_rows on being zeros.
  template <int kTiles>
  static __device__ __forceinline__ void store_gradient(
      float* target, int64_t row_stride, const float (&gradient)[kKeyBlocks][kTiles][4],
      float factor, int valid_rows, int rows, int width) {
    if constexpr (Config::kF32) {
      visit_groups<kTiles>([&](int i, int j, int e, int row, int column) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (row < rows && column + q < width) {
            target[row * row_stride + column + q] =
                row < valid_rows ? factor * gradient[i][j + q][e] : 0.0f;
          }
        }
      });
      return;
    }
    visit_rows<kTiles>([&](int i, int j, int h, int row, int chunk) {
      const int column = 8 * chunk + fragment_column();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (row < rows && column + e < width) {
          target[row * row_stride + column + e] =
              row < valid_rows ? factor * gradient[i][j][2 * h + e] : 0.0f;
        }
      }
    });
  }

 private:
  // What products take from a tile for this warp: of scores [row][key] keys as rows, or queries; of
  // others columns.
  static constexpr int kParts = Config::kParts;
  template <typename Layout>
  static __device__ __forceinline__ auto a_rows(uint32_t tile, int row) {
    return RowBlocks<Layout, kParts>{a_operand_address<Layout, kParts>(tile, row)};
  }
  template <typename Layout>
  static __device__ __forceinline__ auto b_rows(uint32_t tile, int row) {
    return RowBlocks<Layout, kParts>{b_operand_address<Layout, kParts>(tile, row)};
  }
  static __device__ __forceinline__ auto key_rows(uint32_t tile) {
    return a_columns<ScoreLayout, Config::kKeyWarps, kParts>(tile, key_warp());
  }
  static __device__ __forceinline__ auto dquery_rows(uint32_t tile) {
    return a_rows<ScoreLayout>(tile, dquery_row());
  }
  static __device__ __forceinline__ auto query_columns(uint32_t tile) {
    return b_columns<typename Config::QueryLayout, Config::kKeyColumnWarps, kParts>(tile,
                                                                                    column_warp());
  }
  static __device__ __forceinline__ auto dout_columns(uint32_t tile) {
    return b_columns<typename Config::DoutLayout, Config::kKeyColumnWarps, kParts>(tile,
                                                                                   column_warp());
  }
  static __device__ __forceinline__ auto key_columns(uint32_t tile) {
    return b_columns<typename Config::KeyLayout, Config::kDqueryColumnWarps, kParts>(
        tile, dquery_column_warp());
  }

  // Adds this lane's part of one tile of the gradient of queries.
  static __device__ __forceinline__ void add_tile(float* sum, int row, int block, int tile,
                                                  const float (&x)[4]) {
    // Of f32 a column tile here is a tile of a group: see f32::Columns.
    using Sum = DquerySum<Config::kColumns>;
    constexpr int kNeighbours = Config::kF32 ? 4 : 2;  // column tiles in a row of one warp
    float* const target = sum + Sum::tile(row + dquery_row(), kNeighbours * dquery_column_warp());
    const int column_tile =
        tile / kNeighbours * kNeighbours * Config::kDqueryColumnWarps + tile % kNeighbours;
    Sum::add(target + Sum::tile(16 * block, column_tile), lane_id(), x);
  }

  // d += A^T B, A being scores [row][key] and B the tile of the same rows.
  template <typename Layout, int kTiles>
  static __device__ __forceinline__ void add_columns(float (&d)[kKeyBlocks][kTiles][4],
                                                     uint32_t a_tile, uint32_t b_tile) {
    using Blocks = f32::ColumnBlocks<ScoreLayout, Config::kKeyWarps>;
    f32::add_columns<Config::kProducts, Config::kRows / 8, Config::kKeyColumnWarps>(
        d, Blocks{f32::Columns<ScoreLayout>::at(a_tile), key_warp()},
        f32::Columns<Layout>::at(b_tile), column_warp());
  }

  // lse or delta of this lane's row 16 * block + 8 * half.
  static __device__ __forceinline__ float row_state(uint32_t states, int block, int half) {
    return ptx::ld_shared_f32(states + 4 * (score_row() + fragment_row() + 16 * block + 8 * half));
  }

  // Keys outside a row's interval get a score of -inf. `row` and `key` are this lane's first.
  static __device__ __forceinline__ void apply_mask(Scores& scores, const Mask& mask, int row,
                                                    int key) {
#pragma unroll
    for (int i = 0; i < kScoreBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const KeyInterval keys = mask.interval(row + 16 * i + 8 * h);
        const int begin = keys.first - key;
        const int end = keys.end - key;
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
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
  // The bits of j are zero in the warp's first chunk.
  static __device__ __forceinline__ void store_pair(uint32_t address, int i, int j, int h,
                                                    float left, float right) {
    address = (address ^ (Config::kUnits * j << 4)) + (16 * i + 8 * h) * ScoreLayout::kPitch;
    if constexpr (Config::kF32) {
      ptx::st_shared_v2(address, f32::stored<Config::kProducts>(left),
                        f32::stored<Config::kProducts>(right));
    } else {
      const uint32_t high = ptx::cvt_rn_x2<Element>(left, right);
      ptx::st_shared(address, high);
      if constexpr (Config::kSplit) ptx::st_shared(address ^ 16, low_parts(left, right, high));
    }
  }

  // Calls f(block, tile, element, row, column) for this lane's fours of a gradient of keys or
  // values of f32: that element of the tiles tile.. is in the columns column.., see f32::Columns.
  template <int kTiles, typename F>
  static __device__ __forceinline__ void visit_groups(F f) {
    const int first_key = 4 * f32::Columns<ScoreLayout>::chunk(lane_id() / 4);
    const int first_column = 4 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < kKeyBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row =
            32 * (i / 2 * Config::kKeyWarps + key_warp()) + first_key + 2 * (i % 2) + e / 2;
#pragma unroll
        for (int j = 0; j < kTiles; j += 4) {
          f(i, j, e, row,
            32 * (j / 4 * Config::kKeyColumnWarps + column_warp()) + first_column + 16 * (e % 2));
        }
      }
    }
  }

  // Calls f(block, tile, half, row, chunk) for this lane's pairs of a gradient of keys or values.
  template <int kTiles, typename F>
  static __device__ __forceinline__ void visit_rows(F f) {
#pragma unroll
    for (int i = 0; i < kKeyBlocks; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * (i * Config::kKeyWarps + key_warp()) + 8 * h + fragment_row();
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          f(i, j, h, row, 2 * (j / 2 * Config::kKeyColumnWarps + column_warp()) + j % 2);
        }
      }
    }
  }
};

}  // namespace jax_flash::sm80
