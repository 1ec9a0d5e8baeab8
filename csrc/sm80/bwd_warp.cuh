// One warp's part of the gradients: its registers and the steps that work on them.
#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "sm80/bwd_products.cuh"
#include "sm80/bwd_sum.cuh"
#include "sm80/f32_products.cuh"
#include "tile/fragment.cuh"

namespace jax_flash::sm80 {

template <typename Config>
struct BwdWarp {
  using Element = typename Config::Element;
  using ScoreLayout = typename Config::ScoreLayout;
  static constexpr int kKeyBlocks = Config::kKeys / Config::kKeyWarps / 16;
  static constexpr int kKeyTiles = Config::kColumns / Config::kKeyColumnWarps / 8;
  static constexpr int kValueTiles = Config::kColumnsV / Config::kKeyColumnWarps / 8;
  static constexpr int kDqueryBlocks = Config::kDqueryRows / 16;
  static constexpr int kDqueryTiles = Config::kColumns / Config::kDqueryColumnWarps / 8;
  static constexpr int kSteps = Config::kRows / 16;  // of the gradients of keys and values
  using Dquery = float[kDqueryBlocks][kDqueryTiles][4];

  float dkey[kKeyBlocks][kKeyTiles][4];
  float dvalue[kKeyBlocks][kValueTiles][4];

  __device__ __forceinline__ void init() {
    clear(dkey);
    clear(dvalue);
  }

  static __device__ __forceinline__ int key_warp() { return warp_id() % Config::kKeyWarps; }
  static __device__ __forceinline__ int column_warp() { return warp_id() / Config::kKeyWarps; }
  static __device__ __forceinline__ int dquery_row() {
    return warp_id() % Config::kDqueryRowWarps * Config::kDqueryRows;
  }
  static __device__ __forceinline__ int dquery_column_warp() {
    return warp_id() / Config::kDqueryRowWarps;
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
  // steps of both products, which so hide the additions. between() follows the last read of
  // queries.
  template <typename F>
  __device__ __forceinline__ void add_all(float* sum, int row, const Dquery& dquery,
                                          uint32_t dscore_tile, uint32_t query_tile,
                                          uint32_t probability_tile, uint32_t dout_tile,
                                          F between) {
    constexpr int kTiles = kDqueryBlocks * kDqueryTiles;
    constexpr auto share = [](int step) { return (step * kTiles + 2 * kSteps - 1) / (2 * kSteps); };
    const auto add = [&](int step) {
      if (share(step) == share(step + 1)) return;
      __syncwarp();  // without it the compiler gathers the additions before the products
      add_to_sum(sum, row, dquery, share(step), share(step + 1));
    };
    add_dkey(dscore_tile, query_tile, add);
    between();
    add_dvalue(probability_tile, dout_tile, [&](int step) { add(kSteps + step); });
  }

  // dS K to the sum and dvalue += P^T dO.
  __device__ __forceinline__ void add_dquery_dvalue(float* sum, int row, uint32_t dscore_tile,
                                                    uint32_t key_tile, uint32_t probability_tile,
                                                    uint32_t dout_tile) {
    if constexpr (Config::kFloats) {
      Dquery dquery;
      multiply_dscores(dquery, dscore_tile, key_tile);
      add_to_sum(sum, row, dquery);
      add_dvalue(probability_tile, dout_tile, [](int) {});
    } else {
      add_dquery_with(sum, row, dscore_tile, key_tile, [&](int step) {
        multiply_step<Element>(dvalue, key_rows(probability_tile), dout_columns(dout_tile), step);
      });
    }
  }

  // The same with dkey += dS^T Q.
  __device__ __forceinline__ void add_dquery_dkey(float* sum, int row, uint32_t dscore_tile,
                                                  uint32_t key_tile, uint32_t query_tile) {
    add_dquery_with(sum, row, dscore_tile, key_tile, [&](int step) {
      multiply_step<Element>(dkey, key_rows(dscore_tile), query_columns(query_tile), step);
    });
  }

  // dS K to the sum, sixteen columns at a time, which are added before a part of another product's
  // kSteps k-steps. The rows of dS are read once and kept meanwhile.
  template <typename F>
  static __device__ __forceinline__ void add_dquery_with(float* sum, int row, uint32_t dscore_tile,
                                                         uint32_t key_tile, F multiply_other) {
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
        multiply_other(step);
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
  static __device__ __forceinline__ auto key_rows(uint32_t tile) {
    return a_columns<ScoreLayout, Config::kKeyWarps, kParts>(tile, key_warp());
  }
  static __device__ __forceinline__ auto dquery_rows(uint32_t tile) {
    return RowBlocks<ScoreLayout, kParts>{
        a_operand_address<ScoreLayout, kParts>(tile, dquery_row())};
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
