// What a consumer of the forward with intervals makes of scores that have options: soft cap, ALiBi.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_softmax.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/score_options.cuh"

namespace jax_flash::sm90 {

// Of one thread, for a block of rows. `first_key` is a tile's, from that of tile 0.
template <typename Config>
struct FwdLogits {
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kScores = kKeys / 2;

  float slope;  // 0 if there are none
  // If there are slopes, the keys that the two rows are aligned with, from this lane's first column
  // of tile 0.
  int aligned[2];
  // There is a soft cap and no slope, and no scores have been found that SmallTanh does not hold
  // for.
  bool caps_small;
  // Scores have been found that the soft cap is not a polynomial for.
  bool caps_exactly;
  // Of a tile that left the range: the lane's scores did not leave that of the polynomial taken.
  bool is_inside;
  // Of the tile at work, if it is clean: SmallTanh is tried, and some row is aligned with a key
  // after the tile's first.
  bool small;
  bool before;

  // Rows `row` and `row` + 8 of the block; those that are dropped get the place of one that is not.
  __device__ __forceinline__ void begin(const FwdBlock<Config>& block, float softcap, int row,
                                        bool first_dropped, bool second_dropped) {
    slope = block.slope;
    caps_small = softcap != 0.0f && slope == 0.0f;
    caps_exactly = false;
    aligned[0] = aligned[1] = 0;
    if (slope == 0.0f) return;
    const bool dropped[2] = {first_dropped, second_dropped};
    int last = -kMaxLength;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (dropped[h]) continue;
      aligned[h] = block.mask.row(block.first_row + row + 8 * h).position;
      last = max(last, aligned[h]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      last = max(last, __shfl_xor_sync(0xffffffffu, last, step));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      aligned[h] = (dropped[h] ? last : aligned[h]) - block.key_of(0) - fragment_column();
    }
  }

  __device__ __forceinline__ float distance(int h, int first_key) const {
    return static_cast<float>(aligned[h] - first_key);
  }

  // Whether a clean tile needs `apply`, as it does where rows are watched. All lanes of the warp
  // find the same, and are known to.
  __device__ __forceinline__ bool is_special(bool watching, int first_key) {
    before = false;
    small = __any_sync(0xffffffffu, caps_small && !watching);
    if (small) return false;
    before = slope != 0.0f && any_after(first_key);
    return __any_sync(0xffffffffu, watching) || caps_exactly ||
           (before && any_before_last(first_key));
  }

  // Scores that a polynomial did not hold for: the next one is tried from now on.
  __device__ __forceinline__ void leave_polynomial() {
    caps_exactly = !caps_small;
    caps_small = false;
  }

  // Scores become logits, wherever the keys are. kTries: by a polynomial, if it holds; not where
  // it has just failed, since one more copy of it would not be worth its code. Whether SmallTanh
  // would have held is remembered.
  template <bool kTries>
  __device__ __forceinline__ void apply(float (&s)[kScores], const MhaFwdParams& params,
                                        const FwdPlan& plan, int first_key) {
    constexpr float kLn2 = 0.693147181f;
    const ScoreOptions options = {plan.logit_scale, params.intervals.softcap, slope};
    bool capped = false;
    if (kTries && options.softcap != 0.0f) {
      const float largest = RowSoftmax<Config>::largest_size(s);
      const bool is_small = plan.small.holds(__float_as_uint(largest * largest));
      caps_small = caps_small && !__any_sync(0xffffffffu, !is_small);
      capped = !__any_sync(0xffffffffu, !TanhPolynomial::holds(largest * plan.capped.argument));
    }
    if (capped) {
      uint32_t outside = 0;
      RowSoftmax<Config>::cap(s, plan.capped, outside);
    }
    const float factor = capped ? kLn2 : options.scale;
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] *= factor;
    if (!capped && options.softcap != 0.0f) {
      // With kDense not kept through the loop: registers are few.
      const float softcap =
          Config::kDense ? __uint_as_float(ptx::fresh_address(__float_as_uint(options.softcap)))
                         : options.softcap;
      const float inverse = ScoreOptions{options.scale, softcap, options.slope}.inverse();
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = options.cap<Config::kSplit>(s[i], inverse);
    }
    if (options.slope != 0.0f) {
      const float distances[2] = {distance(0, first_key), distance(1, first_key)};
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        s[i] = options.biased(s[i], distances[i / 2 % 2] - static_cast<float>(i / 4 * 8 + i % 2));
      }
    }
  }

  // Exponentials of a clean tile that is not special; see RowSoftmax. is_inside, of each lane: the
  // polynomial that was taken holds.
  __device__ __forceinline__ bool exponentials(float (&s)[kScores],
                                               const RowSoftmax<Config>& softmax,
                                               const MhaFwdParams& params, const FwdPlan& plan,
                                               int first_key, float (&tile_sum)[2],
                                               bool& is_inside) const {
    if (small) return softmax.capped_exponentials(s, plan.small, tile_sum, is_inside);
    const bool has_cap = params.intervals.softcap != 0.0f;
    uint32_t outside = 0;
    if (has_cap) softmax.cap(s, plan.capped, outside);
    is_inside = (outside & TanhPolynomial::kOutside) == 0;
    const LinearBias bias = LinearBias::make(slope, before);
    const float distances[2] = {distance(0, first_key), distance(1, first_key)};
    return softmax.biased_exponentials(s, has_cap ? 1.0f : plan.logit_log2, bias, distances,
                                       tile_sum, is_inside);
  }

 private:
  // Whether some row of the warp is aligned with a key after the tile's first (before its last).
  __device__ __forceinline__ bool any_after(int first_key) const {
    return __any_sync(0xffffffffu, max(aligned[0], aligned[1]) > first_key);
  }
  __device__ __forceinline__ bool any_before_last(int first_key) const {
    return __any_sync(0xffffffffu, min(aligned[0], aligned[1]) < first_key + kKeys - 7);
  }
};

}  // namespace jax_flash::sm90
