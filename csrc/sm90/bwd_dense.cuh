// What a consumer of the backward makes of scores S^T, keys by queries, with operands that have an
// entry for each query and key, biases and masks in global memory, and with dropout.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host/intervals.h"
#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/reduction.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_option_scores.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/score_arrays.cuh"
#include "tile/score_options.cuh"
#include "tile/softmax.cuh"

namespace jax_flash::sm90 {

// How biases come to the scores: not, or of 16 bits or 32.
enum class Bias { kNone, k16, k32 };

// Of one step, for one thread. Nothing of it is kept beyond its use: registers are few.
template <typename Config>
struct BwdDense {
  using Element = typename Config::Element;
  static constexpr int kRows = Config::kRows;
  static constexpr int kScores = kRows / 2;
  // Of 8 by 8 biases, loaded together.
  static constexpr int kBiasTiles = Config::kStagesDense ? 4 : kScores / 4;
  static_assert(kRows == 64, "two rows for each lane of a warp");

  struct Bits {
    uint32_t seen;  // by the intervals: see seen_scores
    uint32_t hash;  // of dropout
  };

  const MhaBwdParams& params;
  const BwdBlock<Config>& block;
  const BwdStep& step;
  const BwdDenseStep& place;
  const RowRecord* records;  // of the step's queries
  int warpgroup;
  uint32_t tiles;  // shared address of the keys
  bool clean = is_clean(params, step, warpgroup);
  int warp_key = first_key_of_warp(block);

  // Whether the intervals hide nothing of a warpgroup's part of a tile, and scores have no options
  // but a bias of 16 bits.
  static __device__ __forceinline__ bool is_clean(const MhaBwdParams& params, const BwdStep& step,
                                                  int warpgroup) {
    const BiasView& bias = params.intervals.bias;
    return step.clean(warpgroup) && step.slope == 0.0f && params.dslopes == nullptr &&
           params.intervals.softcap == 0.0f &&
           (bias.data == nullptr || bias.type != BiasType::kF32);
  }

  // p: P = 2^(S - lse), less what dropout drops; weights: P times the derivatives of the logits,
  // for `take_gradients`. s is used up. lse: from this lane's first column on, of which `early` has
  // the first. kClean: as is_clean says, where it is known at compile time (kStagesDense).
  template <bool kClean, int kEarly>
  __device__ __forceinline__ void take(uint32_t (&p)[kScores / 2], uint32_t (&weights)[kScores / 2],
                                       float (&s)[kScores], const float2 (&early)[kEarly],
                                       const float* lse, Bits bits) const {
    const BiasView& bias = params.intervals.bias;
    if constexpr (Config::kStagesDense) {
      ptx::cp_async_wait_group<0>();
      __syncwarp();
    }
    if (kClean || (!Config::kStagesDense && clean)) {
      if (bias.data == nullptr) {
        take_clean<void>(p, weights, s, early, lse);
      } else if (bias.type == BiasType::kBf16) {
        take_clean<__nv_bfloat16>(p, weights, s, early, lse);
      } else {
        take_clean<__half>(p, weights, s, early, lse);
      }
    } else if (bias.data != nullptr && bias.type == BiasType::kF32) {
      take_exponentials<true, Bias::k32>(p, weights, s, early, lse, bits.seen);
    } else if (ScoreOptions::any<true>(params)) {
      take_exponentials<true, Bias::k16>(p, weights, s, early, lse, bits.seen);
    } else {
      take_exponentials<false, Bias::kNone>(p, weights, s, early, lse, bits.seen);
    }
    if (params.intervals.mask.data != nullptr) hide(p, weights);
    if (params.intervals.dropout != 0) drop<kClean>(p, weights, bits.hash);
  }

  // Asks for the biases of 16 bits and the words of the mask of a step to come to shared
  // memory, for this warp. Rows past the last one are read as the last one.
  static __device__ __forceinline__ void request(const MhaBwdParams& params,
                                                 const BwdBlock<Config>& block,
                                                 const BwdDenseStep& place, uint32_t tiles) {
    const int warp_key = first_key_of_warp(block);
    const uint32_t target = staged(tiles);
    const IntervalsView& view = params.intervals;
    const int last = params.query_length - 1;
    const int lane = lane_id();
    __syncwarp();  // all lanes have read what was there
    if (view.bias.data != nullptr && view.bias.type != BiasType::kF32) {
      const int chunk = lane % 2;
      const bool exists = warp_key + 8 * chunk < params.key_length;
      const unsigned char* const source = block.bias + 2 * (place.head * view.bias.head_stride +
                                                            (exists ? warp_key + 8 * chunk : 0));
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        const int row = lane / 2 + 16 * i;
        ptx::cp_async_16(target + bias_offset(row, chunk),
                         source + 2 * (min(place.row + row, last) * view.bias.row_stride),
                         exists ? 16 : 0);
      }
    }
    if (view.mask.data != nullptr) {
      const uint32_t* const source = block.bits + place.head * view.mask.head_stride +
                                     min(warp_key / 32, mask_words(params.key_length) - 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 32 * half + lane;
        ptx::cp_async_4(target + Config::kBiasBytes + 4 * row,
                        source + min(place.row + row, last) * view.mask.row_stride, 4);
      }
    }
    ptx::cp_async_commit_group();
  }

  // Of this lane's scores, while they are computed.
  __device__ __forceinline__ Bits find_bits() const { return {find_seen(), draw()}; }

  // dS = P (kept_scale * dP - delta), or -P delta where dropout drops, with P times the derivatives
  // of the logits; also to where the gradient of the bias is added up. weights, p, kClean: as for
  // `take`; p is not looked at if the signs of weights say what is dropped. delta: as lse above.
  template <bool kClean, int kEarly>
  __device__ __forceinline__ void take_gradients(uint32_t (&ds)[kScores / 2],
                                                 const uint32_t (&weights)[kScores / 2],
                                                 const uint32_t (&p)[kScores / 2],
                                                 const float (&dp)[kScores],
                                                 const float2 (&early)[kEarly],
                                                 const float* delta) const {
    if (params.dbias.data != nullptr) add_bias_gradients<kClean>(weights, p, dp, early, delta);
    if constexpr (!kClean) {
      if (params.dslopes != nullptr) add_slope_gradients(weights, p, dp, early, delta);
    }
    const bool drops = params.intervals.dropout != 0;
    if (drops) {
      each_gradient<kClean, true>(ds, weights, p, dp, early, delta);
    } else {
      each_gradient<kClean, false>(ds, weights, p, dp, early, delta);
    }
  }

 private:
  template <bool kClean, bool kDrops, int kEarly>
  __device__ __forceinline__ void each_gradient(uint32_t (&ds)[kScores / 2],
                                                const uint32_t (&weights)[kScores / 2],
                                                const uint32_t (&p)[kScores / 2],
                                                const float (&dp)[kScores],
                                                const float2 (&early)[kEarly],
                                                const float* delta) const {
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 2 * j + h;
        const float2 pair = gradient<kClean, kDrops>(weights[i], p[i], dp + 2 * i, x);
        ds[i] = ptx::cvt_rn_x2<Element>(pair.x, pair.y);
      }
    }
  }
  // Of two neighbouring queries.
  template <bool kClean, bool kDrops>
  __device__ __forceinline__ float2 gradient(uint32_t weights, uint32_t p, const float* dp,
                                             float2 delta) const {
    const float kept_scale = params.intervals.kept_scale;
    if constexpr (!kDrops) {
      const float2 weight = ptx::unpack_x2<Element>(weights);
      return make_float2(weight.x * (dp[0] - delta.x), weight.y * (dp[1] - delta.y));
    } else if constexpr (kClean) {
      const float2 weight = ptx::unpack_x2<Element>(weights);
      const float2 kept = ptx::unpack_x2<Element>(p);
      return make_float2(fmaf(kept.x, kept_scale * dp[0], -weight.x * delta.x),
                         fmaf(kept.y, kept_scale * dp[1], -weight.y * delta.y));
    } else {
      const float2 weight = ptx::unpack_x2<Element>(weights & 0x7fff7fffu);
      const float left = weights & 0x8000u ? 0.0f : dp[0];
      const float right = weights & 0x80000000u ? 0.0f : dp[1];
      return make_float2(weight.x * fmaf(left, kept_scale, -delta.x),
                         weight.y * fmaf(right, kept_scale, -delta.y));
    }
  }

  static __device__ __forceinline__ int first_key_of_warp(const BwdBlock<Config>& block) {
    const uint32_t warp = ptx::fresh_address(threadIdx.x) / 32;
    return block.first_key + static_cast<int>(Config::kKeyStep * (warp / 4) + 16 * (warp % 4));
  }
  // What is staged for this warp.
  static __device__ __forceinline__ uint32_t staged(uint32_t tiles) {
    const uint32_t warp = ptx::fresh_address(threadIdx.x) / 32;
    return tiles + Config::kDenseOffset + warp * Config::kDenseBytes;
  }

  __device__ __forceinline__ uint32_t find_seen() const {
    if (clean) return ~0u;
    const int key = warp_key + fragment_row();
    const RowRecord* const rows = records + fragment_column();
    if (!step.mixed()) return seen_scores<kScores, false>(rows, key, {0, 0});
    return seen_scores<kScores, true>(rows, key, {block.mask.id(key), block.mask.id(key + 8)});
  }

  __device__ __forceinline__ uint32_t draw() const {
    if (params.intervals.dropout == 0) return 0;
    const Dropout dropout = Dropout::of_head(params, block.seeds, place.head);
    return dropout.template hash<true, kRows / 16>(warp_key + fragment_row(), place.row);
  }

  // Of a clean tile without options but for a bias of type T, unless that is void.
  template <typename T, int kEarly>
  __device__ __forceinline__ void take_clean(uint32_t (&p)[kScores / 2],
                                             uint32_t (&weights)[kScores / 2], float (&s)[kScores],
                                             const float2 (&early)[kEarly],
                                             const float* lse) const {
    constexpr bool kBiased = !std::is_void_v<T>;
    constexpr float kLog2e = SoftmaxScale::kLog2e;
    const float log2 =
        kBiased ? params.scale.first * params.scale.second * kLog2e : params.scale.log2;
    uint32_t biases[kBiasTiles];
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(lse + 8 * j);
      if (kBiased && 2 * j % kBiasTiles == 0) load_biases(biases, 8 * j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 rest = make_float2(-x.x, -x.y);
        if constexpr (kBiased) {
          const float2 bias = ptx::unpack_x2<T>(biases[(2 * j + h) % kBiasTiles]);
          rest = make_float2(fmaf(bias.x, kLog2e, rest.x), fmaf(bias.y, kLog2e, rest.y));
        }
        const float* const score = s + 4 * j + 2 * h;
        p[2 * j + h] = weights[2 * j + h] =
            ptx::cvt_rn_x2<Element>(ptx::ex2_approx_ftz(fmaf(score[0], log2, rest.x)),
                                    ptx::ex2_approx_ftz(fmaf(score[1], log2, rest.y)));
      }
    }
  }

  // Of a row of staged biases, half `chunk`: eight rows lie in different banks.
  static __device__ __forceinline__ uint32_t bias_offset(int row, int chunk) {
    return 32 * row + 16 * (chunk ^ (row / 4 & 1));
  }

  // kOptions: whether scores have options.
  template <bool kOptions, Bias kBias, int kEarly>
  __device__ __forceinline__ void take_exponentials(uint32_t (&p)[kScores / 2],
                                                    uint32_t (&weights)[kScores / 2],
                                                    float (&s)[kScores],
                                                    const float2 (&early)[kEarly], const float* lse,
                                                    uint32_t seen) const {
    const ScoreOptions options = {params.scale.first * params.scale.second,
                                  params.intervals.softcap, step.slope};
    const float inverse = options.inverse();
    const float slope_inverse = params.takes_cap_for_linear() ? 0.0f : inverse;
    const float log2 = kOptions ? SoftmaxScale::kLog2e : params.scale.log2;
    const int first_key = warp_key + fragment_row();
    const RowRecord* const rows = records + fragment_column();
    uint32_t biases[kBiasTiles];
#pragma unroll
    for (float& score : s) score *= kOptions ? options.scale : params.scale.first;
    if (kOptions && options.softcap != 0.0f) {
#pragma unroll
      for (float& score : s) score = options.cap(score, inverse);
    }
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(lse + 8 * j);
      float2 bias[2] = {make_float2(0.0f, 0.0f), make_float2(0.0f, 0.0f)};  // of the halves
      if constexpr (kBias == Bias::k16) {
        if (2 * j % kBiasTiles == 0) load_biases(biases, 8 * j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          bias[h] = unpack_bias(params.intervals.bias.type, biases[(2 * j + h) % kBiasTiles]);
          if (Config::kStagesDense && block.bias == nullptr) bias[h] = make_float2(0.0f, 0.0f);
        }
      } else if constexpr (kBias == Bias::k32) {
        load_f32(bias, fragment_column() + 8 * j);
      }
      float probability[2][2];
      float weight[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float score = s[4 * j + 2 * h + e];
          float derivative = 1.0f;
          if constexpr (kOptions) {
            derivative = options.derivative(score, slope_inverse);
            const int distance = rows[8 * j + e].position - first_key - 8 * h;
            score = options.biased(score, static_cast<float>(distance));
            score += e == 0 ? bias[h].x : bias[h].y;
          }
          const float power = ptx::ex2_approx_ftz(fmaf(score, log2, e == 0 ? -x.x : -x.y));
          probability[h][e] = (seen & 1u << (4 * j + 2 * h + e)) != 0 ? power : 0.0f;
          weight[h][e] = probability[h][e] * derivative;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p[2 * j + h] = ptx::cvt_rn_x2<Element>(probability[h][0], probability[h][1]);
        weights[2 * j + h] =
            kOptions ? ptx::cvt_rn_x2<Element>(weight[h][0], weight[h][1]) : p[2 * j + h];
      }
    }
  }

  // Of a query, from the step's first on; keys from the array's first. Read where it exists.
  __device__ __forceinline__ bool exists(int row) const {
    return place.row + row < params.query_length;
  }
  __device__ __forceinline__ const unsigned char* bias_row(int row) const {
    const BiasView& view = params.intervals.bias;
    const int size = view.type == BiasType::kF32 ? 4 : 2;
    return block.bias +
           size * (place.head * view.head_stride + (place.row + row) * view.row_stride);
  }

  // Of queries from `row` on, as p lies: rows of the bias are columns of the fragment.
  __device__ __forceinline__ void load_biases(uint32_t (&biases)[kBiasTiles], int row) const {
    if constexpr (Config::kStagesDense) {
      const int lane = lane_id();
      const uint32_t source =
          staged(tiles) + bias_offset(row + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
      for (int i = 0; i < kBiasTiles; i += 4) {
        uint32_t words[4];  // of two eights of rows, both halves of the keys of either
        ptx::ldmatrix_x4_trans(words, source + 32 * 4 * i);
#pragma unroll
        for (int k = 0; k < 4; ++k) biases[i + k] = words[k];
      }
    } else {
      fetch_biases(biases, row);
    }
  }
  // The same from global memory.
  __device__ __forceinline__ void fetch_biases(uint32_t (&biases)[kBiasTiles], int row) const {
#pragma unroll
    for (uint32_t& pair : biases) pair = 0;
    if (block.bias == nullptr) return;
    ptx::forget_memory();
    row += fragment_row();
    const unsigned char* source = bias_row(row) + 2 * (warp_key + fragment_column());
#pragma unroll
    for (int i = 0; i < kBiasTiles; i += 2) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(source);
      if (exists(row + 4 * i)) {
        // Rows are whole eights.
        if (warp_key < params.key_length) biases[i] = __ldg(words);
        if (warp_key + 8 < params.key_length) biases[i + 1] = __ldg(words + 4);
      }
      source += 16 * params.intervals.bias.row_stride;
    }
#pragma unroll
    for (uint32_t& pair : biases) pair = ptx::movmatrix_trans(pair);
  }

  // Of f32, of two queries from `row` on and the two keys of this lane. Queries past the last one
  // are read as the last one: they see no keys.
  __device__ __forceinline__ void load_f32(float2 (&bias)[2], int row) const {
    ptx::forget_memory();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int own = min(row + e, params.query_length - 1 - place.row);
      const float* const source =
          reinterpret_cast<const float*>(bias_row(own)) + warp_key + fragment_row();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (warp_key + 8 * h >= params.key_length) break;
        (e == 0 ? bias[h].x : bias[h].y) = __ldg(source + 8 * h);
      }
    }
  }

  // Zeros where the mask has no bit. The 16 keys of a warp lie in one word of a query.
  __device__ __forceinline__ void hide(uint32_t (&p)[kScores / 2],
                                       uint32_t (&weights)[kScores / 2]) const {
    uint32_t words[2];  // of two queries, if they are not staged
    load_words(words);
    const int first = warp_key % 32;
    if (!__any_sync(0xffffffffu, (words[0] & words[1] & 0xffffu << first) != 0xffffu << first)) {
      return;
    }
    // The bits of a lane's keys to the highest of the first two bytes.
    const int turn = (first + fragment_row() - 7) & 31;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      uint32_t left;
      uint32_t right;
      if constexpr (Config::kStagesDense) {
        const float2 two =
            ptx::ld_shared_v2(staged(tiles) + Config::kBiasBytes + 4 * (8 * j + fragment_column()));
        left = __float_as_uint(two.x);
        right = __float_as_uint(two.y);
      } else {
        const int source = 8 * j % 32 + fragment_column();
        left = __shfl_sync(0xffffffffu, words[j / 4], source);
        right = __shfl_sync(0xffffffffu, words[j / 4], source + 1);
      }
      left = __funnelshift_r(left, left, turn);
      right = __funnelshift_r(right, right, turn);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t seen = ptx::prmt(left, right, h == 0 ? 0xcc88 : 0xdd99);
        p[2 * j + h] &= seen;
        weights[2 * j + h] &= seen;
      }
    }
  }
  // Of queries `lane` and `lane` + 32.
  __device__ __forceinline__ void load_words(uint32_t (&words)[2]) const {
    const MaskView& view = params.intervals.mask;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = 32 * half + lane_id();
      if constexpr (Config::kStagesDense) {
        words[half] =
            __float_as_uint(ptx::ld_shared_f32(staged(tiles) + Config::kBiasBytes + 4 * own));
      } else {
        const int row = min(place.row + own, params.query_length - 1);
        const uint32_t* const source =
            block.bits + place.head * view.head_stride + row * view.row_stride;
        words[half] = __ldg(source + min(warp_key / 32, mask_words(params.key_length) - 1));
      }
    }
  }

  template <bool kClean, int kEarly>
  __device__ __forceinline__ void add_bias_gradients(const uint32_t (&weights)[kScores / 2],
                                                     const uint32_t (&p)[kScores / 2],
                                                     const float (&dp)[kScores],
                                                     const float2 (&early)[kEarly],
                                                     const float* delta) const {
    ptx::forget_memory();
    const BiasGradientView& view = params.dbias;
    const int row = place.row + fragment_column();
    const int key = warp_key + fragment_row();
    float* const head = block.dbias + place.head * view.head_stride + key;
    float sums[2] = {0.0f, 0.0f};  // of all rows, where they share it
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(delta + 8 * j);
      float* const target = head + (row + 8 * j) * view.row_stride;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 2 * j + h;
        const float2 pair = gradient<kClean, true>(weights[i], p[i], dp + 2 * i, x);
        if (view.row_stride == 0) {
          sums[h] += pair.x + pair.y;
        } else if (key + 8 * h < params.key_length) {
          const int left = params.query_length - row - 8 * j;
          if (left > 0) add(target + 8 * h, pair.x);
          if (left > 1) add(target + view.row_stride + 8 * h, pair.y);
        }
      }
    }
    if (view.row_stride != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(sums[h]);
      if (fragment_column() == 0 && key + 8 * h < params.key_length) add(head + 8 * h, sum);
    }
  }

  // No two threads have the same keys of a head, so that sums have an order.
  template <int kEarly>
  __device__ __forceinline__ void add_slope_gradients(const uint32_t (&weights)[kScores / 2],
                                                      const uint32_t (&p)[kScores / 2],
                                                      const float (&dp)[kScores],
                                                      const float2 (&early)[kEarly],
                                                      const float* delta) const {
    ptx::forget_memory();
    const RowRecord* const rows = records + fragment_column();
    const int key = warp_key + fragment_row();
    float sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 x = j < kEarly ? early[j] : *reinterpret_cast<const float2*>(delta + 8 * j);
      const int left = rows[8 * j].position - key;
      const int right = rows[8 * j + 1].position - key;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 2 * j + h;
        const float2 pair = gradient<false, true>(weights[i], p[i], dp + 2 * i, x);
        sums[h] = fmaf(fabsf(static_cast<float>(left - 8 * h)), pair.x, sums[h]);
        sums[h] = fmaf(fabsf(static_cast<float>(right - 8 * h)), pair.y, sums[h]);
      }
    }
    const int64_t head = int64_t{block.batch} * params.heads + place.head;
    float* const target = params.dslopes + head * kSlopeParts * params.key_length + key;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(sums[h]);
      if (fragment_column() == 0 && key + 8 * h < params.key_length) {
        ptx::red_add(target + 8 * h, sum);
      }
    }
  }

  __device__ __forceinline__ void add(float* target, float x) const {
    if (params.dbias.shared) {
      ptx::red_add(target, x);
    } else {
      *target = x;
    }
  }

  // Dropout: zeros in p for what is dropped and, unless kClean, a sign in weights, which have none.
  template <bool kClean>
  __device__ __forceinline__ void drop(uint32_t (&p)[kScores / 2], uint32_t (&weights)[kScores / 2],
                                       uint32_t hash) const {
    const DropoutLevel level = DropoutLevel::make(params.intervals.dropout);
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) {
      uint32_t reached[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) reached[e] = level.reached(Dropout::word<true>(hash, i, e));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t mask = level.pair_mask(reached, Dropout::byte_of<true>(j % 2, j / 2 % 2));
        p[4 * i + j] &= mask;
        if constexpr (!kClean) weights[4 * i + j] |= ~mask & 0x80008000u;
      }
    }
  }
};

}  // namespace jax_flash::sm90
