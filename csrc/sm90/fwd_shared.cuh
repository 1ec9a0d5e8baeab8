// What the roles of a thread block share: barriers, blocks of work, rows that are finished.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_config.cuh"

namespace jax_flash::sm90 {

// A position in a ring of kStages buffers, and the parity of its current round. One register where
// the number of stages is a power of two, else two.
template <int kStages, bool kPowerOfTwo = (kStages & (kStages - 1)) == 0>
class RingIndex {
 public:
  __device__ __forceinline__ int stage() const { return count_ % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return count_ / kStages % 2; }
  __device__ __forceinline__ void next() { ++count_; }

 private:
  uint32_t count_ = 0;
};

template <int kStages>
class RingIndex<kStages, false> {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void next() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// What follows the tiles in shared memory. "full" barriers: bytes have arrived. "empty": all
// consumers are done.
template <typename Config>
struct FwdShared {
  // A block is read until its outputs are stored, when the next one is already at work.
  static constexpr int kBlockSlots = 4;
  static_assert(Config::kQueryStages + 2 <= kBlockSlots);

  uint64_t query_full[Config::kQueryStages][Config::kWarpgroups];
  uint64_t query_empty[Config::kQueryStages][Config::kWarpgroups];
  // Finished rows, and their outputs where these are staged.
  uint64_t rows_full[Config::kWarpgroups];
  uint64_t rows_empty[Config::kWarpgroups];
  uint64_t key_full[Config::kKeyStages];
  uint64_t key_empty[Config::kKeyStages];
  uint64_t value_full[Config::kValueStages];
  uint64_t value_empty[Config::kValueStages];
  uint64_t block_full[kBlockSlots];
  uint64_t block_empty[kBlockSlots];
  FwdBlock<Config> blocks[kBlockSlots];
  float2 rows[Config::kRows];  // reference point and sum of finished rows
};

template <typename Config>
inline constexpr int kFwdSharedBytes = Config::kStateOffset + sizeof(FwdShared<Config>);

// Coordinates of flat batch index `batch` in the two batch dims of an operand's tensor map.
struct BatchCoordinate {
  int inner;
  int outer;
};
__device__ __forceinline__ BatchCoordinate batch_coordinate(const TensorView& view, int batch,
                                                            const MhaFwdParams& params,
                                                            const FwdPlan& plan) {
  int inner = batch;
  int outer = 0;
  if (params.batch_dims == 2) {
    outer = plan.inner_batch.divide(batch);
    inner = batch - outer * static_cast<int>(plan.inner_batch.divisor);
  }
  // A stride of 0 shares the operand along the dim, which the map then lacks.
  const int last = params.batch_dims - 1;
  return {view.batch_strides[last] == 0 ? 0 : inner, view.batch_strides[0] == 0 ? 0 : outer};
}

}  // namespace jax_flash::sm90
