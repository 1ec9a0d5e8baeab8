// Soft cap, ALiBi and bias: what becomes of a scaled score before it is masked.
#pragma once

#include "host/params.h"
#include "ptx/math.cuh"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"

namespace jax_flash {

// Of one query head. All numbers are natural logits; a kernel whose scores went through here takes
// exponentials of them with a scale of 1.
struct ScoreOptions {
  float scale;    // of q.k
  float softcap;  // 0: none
  float slope;    // 0: none

  // Whether scores change at all; otherwise they stay q.k and the kernel scales them as ever.
  JAX_FLASH_HOST_DEVICE static bool any(const MhaParams& params) {
    return params.intervals.softcap != 0.0f || params.intervals.slopes != nullptr ||
           params.intervals.bias.data != nullptr;
  }

  // Whether a row that has keys may yet see none of them.
  JAX_FLASH_HOST_DEVICE static bool hides(const MhaParams& params) {
    return params.intervals.mask.data != nullptr || params.intervals.bias.data != nullptr;
  }

  __device__ __forceinline__ static ScoreOptions make(const MhaParams& params, int batch,
                                                      int head) {
    const IntervalsView& view = params.intervals;
    float slope = 0.0f;
    if (view.slopes != nullptr) {
      slope = view.slopes[batch_offset(view.slope_strides, batch, params) + head];
    }
    return {params.scale.first * params.scale.second, view.softcap, slope};
  }

  // tanh(x) as 1 - 2 / (1 + e^(2 x)): 2^-22 of absolute error, where tanh.approx has 2^-11.
  static __device__ __forceinline__ float tanh(float x) {
    const float power = ptx::ex2_approx_ftz(2.0f * SoftmaxScale::kLog2e * x);
    return fmaf(-2.0f, ptx::rcp_approx_ftz(1.0f + power), 1.0f);
  }

  // 1 / softcap; 0 if there is none.
  __device__ __forceinline__ float inverse() const {
    return softcap == 0.0f ? 0.0f : ptx::rcp_approx_ftz(softcap);
  }

  // Where there is a soft cap: of scale * q.k.
  __device__ __forceinline__ float cap(float x, float inverse) const {
    return softcap * tanh(x * inverse);
  }

  // The logit of a score q.k before ALiBi.
  __device__ __forceinline__ float capped(float score) const {
    const float x = score * scale;
    return softcap == 0.0f ? x : cap(x, inverse());
  }

  // With ALiBi, of a key `distance` away from the one that the row is aligned with.
  __device__ __forceinline__ float biased(float capped, int distance) const {
    return fmaf(-slope, static_cast<float>(distance < 0 ? -distance : distance), capped);
  }

  __device__ __forceinline__ float logit(float score, int distance) const {
    return biased(capped(score), distance);
  }

  // The derivative of a logit by scale * q.k, from the logit before ALiBi.
  static __device__ __forceinline__ float derivative(float capped, float inverse) {
    const float ratio = capped * inverse;
    return fmaf(-ratio, ratio, 1.0f);
  }
  __device__ __forceinline__ float derivative(float capped) const {
    return derivative(capped, inverse());
  }
};

}  // namespace jax_flash
