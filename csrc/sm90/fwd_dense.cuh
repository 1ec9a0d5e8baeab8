// What a consumer of the forward does with operands that have an entry for each query and key:
// biases and masks; and with dropout.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/address.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/fwd_block.cuh"
#include "sm90/fwd_mask.cuh"
#include "sm90/fwd_shared.cuh"
#include "sm90/fwd_tile_bits.cuh"
#include "tile/dropout.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/score_arrays.cuh"

namespace jax_flash::sm90 {

// Of one thread, for one key tile. Feeders (FwdFeeder) leave its biases in shared memory and, with
// kFeedsBits, what the mask says; where not, that is found where it is used.
template <typename Config, bool kDense>
struct FwdDense {
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kScores = kKeys / 2;
  static constexpr int kTiles = kKeys / 16;  // of 16 columns
  static constexpr int kWords = Config::kParts * kScores / 2;
  // Masks of bounds are made before the wait for the scores.
  static constexpr bool kEarly = Config::kHeadDimV <= 128;

  // The mask of a clean tile is applied beside its exponentials, which leave that pipe to others.
  static constexpr bool kHidesBeside = Config::kFeedsBits;
  // Dropout is applied beside the next tile's first product.
  static constexpr bool kDropsLate = Config::kFeedsBits;

  using Bits = FwdBitMaker<kKeys>;

  uint32_t seen[2] = {0, 0};         // by the mask: see FwdMask
  uint32_t hashes[kKeys / 64] = {};  // of dropout, for 64 keys each

  // Draws for dropout, with kDropsLate.
  __device__ __forceinline__ void draw(const MhaFwdParams& params, const FwdDenseBlock& block,
                                       int row, int tile) {
    if constexpr (kDropsLate) {
      if (params.intervals.dropout != 0) draw(block, row, tile);
    }
  }

  // What feeders have for the tile that `keys` is at.
  template <typename Ring>
  __device__ __forceinline__ void load(const MhaFwdParams& params, FwdShared<Config>& shared,
                                       const Ring& keys) {
    if (!feeds_bits<Config>(params)) return;
    const uint32_t count = keys.count();
    const int warp = uniform_warp();
    const int stage = count % FwdShared<Config>::kBitStages;
    ptx::mbarrier_wait(ptx::shared_address(&shared.bits_full[stage][warp]),
                       count / FwdShared<Config>::kBitStages % 2);
    const uint2 words = shared.seen[stage][threadIdx.x];
    seen[0] = words.x;
    seen[1] = words.y;
    // By all lanes, which have all read it: what racecheck understands.
    ptx::mbarrier_arrive(ptx::shared_address(&shared.bits_empty[stage][warp]));
  }

  // Logits: scores times `factor`, and the bias that is in shared memory from `row` on, the warp's
  // first, if there is one. Of the `count`-th tile.
  static __device__ __forceinline__ void take_bias(float (&s)[kScores], float factor,
                                                   const MhaFwdParams& params,
                                                   FwdShared<Config>& shared, int warpgroup,
                                                   uint32_t count, uint32_t row) {
    const int share = bias_share(warpgroup);
    const BiasView& bias = params.intervals.bias;
    if (bias.data == nullptr) return;
    if (bias.type == BiasType::kF32) {
      take_part(shared, share, 0, [&] { add_f32_bias<0>(s, factor, row); });
      take_part(shared, share, 1, [&] { add_f32_bias<1>(s, factor, row); });
    } else {
      take_part(shared, share, count % 2, [&] { add_bias(s, factor, bias.type, row); });
    }
  }
  // Lets the biases of a tile pass.
  static __device__ __forceinline__ void pass_bias(const MhaFwdParams& params,
                                                   FwdShared<Config>& shared, int warpgroup,
                                                   uint32_t count) {
    const BiasView& bias = params.intervals.bias;
    if (bias.data == nullptr) return;
    const int share = bias_share(warpgroup);
    const int parts = parts_of(bias);
    for (int i = 0; i < parts; ++i) take_part(shared, share, parts == 2 ? i : count % 2, [] {});
  }

  // Scores of -inf where the mask has no bit. row: this lane's first, of the head.
  __device__ __forceinline__ void hide(float (&s)[kScores], const MhaFwdParams& params,
                                       const FwdDenseBlock& block, int row, int tile) {
    if (params.intervals.mask.data == nullptr) return;
    if constexpr (!Config::kFeedsBits) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ptx::forget_memory();  // one row after the other: registers are few
        uint32_t words[Bits::kWords];
        Bits::load_words(params, block, fresh(row) + 8 * h, tile, words);
        seen[h] = Bits::lane_bits(words);
      }
    }
    if (any_hidden()) mask().apply(s);
  }

  // Exponentials of a tile, by RowSoftmax. careful: as for the consumer's step.
  template <typename Softmax>
  __device__ __forceinline__ bool exponentials(float (&s)[kScores], const Softmax& softmax,
                                               const MhaFwdParams& params, bool careful,
                                               float (&tile_sum)[2]) const {
    if constexpr (kHidesBeside) {
      if (!careful && params.intervals.mask.data != nullptr && any_hidden()) {
        return softmax.masked_exponentials(s, mask(), params.scale, tile_sum);
      }
    }
    return softmax.exponentials(s, params.scale, tile_sum);
  }

  // What softmax is taken of, of a clean tile's `row` and `key`: as the mask has it, and with the
  // bias of a score times `factor`, both read from global memory.
  static __device__ __forceinline__ float logit(const MhaFwdParams& params,
                                                const FwdDenseBlock& block, int row, int key,
                                                float score, float factor) {
    ptx::forget_memory();  // one after the other: registers are few
    const IntervalsView& view = params.intervals;
    row = min(fresh(row), params.query_length - 1);
    if (view.mask.data != nullptr) {
      const uint32_t word = __ldg(block.bits + row * view.mask.row_stride + key / 32);
      if ((word >> key % 32 & 1) == 0) return kMinusInfinity;
    }
    if (!Config::kBiasClean || view.bias.data == nullptr) return score;
    const int size = 2 * parts_of(view.bias);
    const BiasRows rows = {block.bias, size * view.bias.row_stride, view.bias.type,
                           params.query_length, (params.key_length + 7) / 8 * 8};
    key = fresh(key);
    const float2 pair = rows.load_pair(row, key & ~1);
    return fmaf(score, factor, key % 2 == 0 ? pair.x : pair.y);
  }

  // Zeros in place of the packed probabilities that dropout drops.
  __device__ __forceinline__ void drop(uint32_t (&p)[kWords], const MhaFwdParams& params,
                                       const FwdDenseBlock& block, int row, int tile) {
    if constexpr (!kDropsLate) {
      if (params.intervals.dropout == 0) return;
      ptx::forget_memory();
      draw(block, fresh(row), tile);
      clear(p, params);
    }
  }
  // The same with kDropsLate.
  __device__ __forceinline__ void drop_late(uint32_t (&p)[kWords],
                                            const MhaFwdParams& params) const {
    if constexpr (kDropsLate) {
      if (params.intervals.dropout != 0) clear(p, params);
    }
  }

 private:
  __device__ __forceinline__ void draw(const FwdDenseBlock& block, int row, int tile) {
#pragma unroll
    for (int i = 0; i < kKeys / 64; ++i) {
      hashes[i] = block.dropout.hash<false, 4>(row, tile * kKeys + 64 * i);
    }
  }

  __device__ __forceinline__ void clear(uint32_t (&p)[kWords], const MhaFwdParams& params) const {
    const DropoutLevel level = DropoutLevel::make(params.intervals.dropout);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t reached[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        reached[e] = level.reached(Dropout::word<false>(hashes[i / 4], i % 4, e));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t mask = level.pair_mask(reached, Dropout::byte_of<false>(j % 2, j / 2));
#pragma unroll
        for (int part = 0; part < Config::kParts; ++part) {
          p[kScores / 2 * part + 4 * i + j] &= mask;
        }
      }
    }
  }

  __device__ __forceinline__ FwdMask<Config::kKeys> mask() const { return {{seen[0], seen[1]}}; }
  __device__ __forceinline__ bool any_hidden() const {
    return __any_sync(0xffffffffu, (seen[0] & seen[1]) != 0xffffffffu);
  }

  // This warp's number in the thread block, known to be uniform. Where the address of a barrier is
  // not, ptxas thinks that a warp may part at the wait, and from there on every descriptor of a
  // product goes through the lanes' registers.
  static __device__ __forceinline__ int uniform_warp() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  }

  // Computed anew: registers are few.
  static __device__ __forceinline__ int fresh(int row) {
    return static_cast<int>(ptx::fresh_address(static_cast<uint32_t>(row)));
  }

  // See FwdDenseShared.
  static __device__ __forceinline__ int bias_share(int warpgroup) {
    return Config::kFeeders == 1 ? warpgroup : uniform_warp();
  }

  // Calls add() when the biases are there, at a parity.
  template <typename Add>
  static __device__ __forceinline__ void take_part(FwdShared<Config>& shared, int share,
                                                   uint32_t parity, Add add) {
    ptx::mbarrier_wait(ptx::shared_address(&shared.bias_full[share]), parity);
    add();
    __syncwarp();
    // By all lanes, which have all read it: what racecheck understands.
    ptx::mbarrier_arrive(ptx::shared_address(&shared.bias_empty[share]));
  }

  // Logits: scores times `factor`, and biases of 16 bits.
  static __device__ __forceinline__ void add_bias(float (&s)[kScores], float factor, BiasType type,
                                                  uint32_t row) {
    const uint32_t source = row + lane_id() % 16 * Config::kBiasRowBytes + lane_id() / 16 * 16;
    if (type == BiasType::kBf16) {
      add_matrices<__nv_bfloat16>(s, factor, source);
    } else {
      add_matrices<__half>(s, factor, source);
    }
  }

  // The same of a bias of f32 for the first or second half of the tile's keys.
  template <int kHalf>
  static __device__ __forceinline__ void add_f32_bias(float (&s)[kScores], float factor,
                                                      uint32_t row) {
    const uint32_t source = row + fragment_row() * Config::kBiasRowBytes + 4 * fragment_column();
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const int h = i % 2;
      const float2 pair = ptx::ld_shared_v2(source + 8 * h * Config::kBiasRowBytes + i / 2 * 8 * 4);
      float* const target = s + kHalf * kScores / 2 + 4 * (i / 2) + 2 * h;
      target[0] = fmaf(target[0], factor, pair.x);
      target[1] = fmaf(target[1], factor, pair.y);
    }
  }

  template <typename T>
  static __device__ __forceinline__ void add_matrices(float (&s)[kScores], float factor,
                                                      uint32_t source) {
#pragma unroll
    for (int i = 0; i < kScores / 8; ++i) {
      uint32_t words[4];  // of 16 columns: both row halves of the first eight, then of the others
      ptx::ldmatrix_x4(words, source + 32 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = ptx::unpack_x2<T>(words[j]);
        float* const target = s + 8 * i + 2 * j;
        target[0] = fmaf(target[0], factor, pair.x);
        target[1] = fmaf(target[1], factor, pair.y);
      }
    }
  }
};

// Without any of them.
template <typename Config>
struct FwdDense<Config, false> {
  static constexpr bool kEarly = true;
  static constexpr int kWords = Config::kParts * Config::kKeys / 4;
  static constexpr bool kHidesBeside = false;
  template <typename Softmax>
  __device__ __forceinline__ bool exponentials(float (&s)[Config::kKeys / 2],
                                               const Softmax& softmax, const MhaFwdParams& params,
                                               bool, float (&tile_sum)[2]) const {
    return softmax.exponentials(s, params.scale, tile_sum);
  }
  template <typename Ring>
  __device__ __forceinline__ void load(const MhaFwdParams&, const FwdShared<Config>&,
                                       const Ring&) const {}
  __device__ __forceinline__ void drop(uint32_t (&)[kWords], const MhaFwdParams&,
                                       const FwdBlock<Config>&, int, int) const {}
  __device__ __forceinline__ void drop_late(uint32_t (&)[kWords], const MhaFwdParams&) const {}
  __device__ __forceinline__ void draw(const MhaFwdParams&, const FwdBlock<Config>&, int,
                                       int) const {}
};

}  // namespace jax_flash::sm90
