// Operands with an entry for each query and key: biases, masks as bits, and gradients of biases.
#pragma once

#include <cstdint>

#include "host/params.h"
#include "ptx/math.cuh"
#include "ptx/reduction.cuh"
#include "tile/fragment.cuh"
#include "tile/mask.cuh"
#include "tile/schedule.cuh"

namespace jax_flash {

// Two neighbouring biases of 16 bits.
__device__ __forceinline__ float2 unpack_bias(BiasType type, uint32_t pair) {
  return type == BiasType::kBf16 ? ptx::unpack_x2<__nv_bfloat16>(pair)
                                 : ptx::unpack_x2<__half>(pair);
}

// Of one query head. Rows and columns past the last ones are read as the last ones.
struct BiasRows {
  const unsigned char* data;  // of row 0
  int64_t stride;             // of rows, in bytes
  BiasType type;
  int rows;
  int columns;  // a multiple of 8

  __device__ __forceinline__ static BiasRows make(const MhaParams& params, int batch, int head) {
    const BiasView& view = params.intervals.bias;
    const int size = view.type == BiasType::kF32 ? 4 : 2;
    const int64_t offset =
        batch_offset(view.batch_strides, batch, params) + head * view.head_stride;
    return {static_cast<const unsigned char*>(view.data) + size * offset, size * view.row_stride,
            view.type, params.query_length, (params.key_length + 7) / 8 * 8};
  }

  __device__ __forceinline__ const unsigned char* row(int row) const {
    return data + min_int(max_int(row, 0), rows - 1) * stride;
  }

  __device__ __forceinline__ float2 unpack(uint32_t pair) const { return unpack_bias(type, pair); }

  // Two neighbouring columns, the first of them even, of 16 bits.
  __device__ __forceinline__ uint32_t load_word(int row, int column) const {
    return __ldg(reinterpret_cast<const uint32_t*>(this->row(row)) +
                 min_int(column, columns - 2) / 2);
  }
  // Of any type.
  __device__ __forceinline__ float2 load_pair(int row, int column) const {
    if (type != BiasType::kF32) return unpack(load_word(row, column));
    return __ldg(reinterpret_cast<const float2*>(this->row(row)) +
                 min_int(column, columns - 2) / 2);
  }

  // Of f32.
  __device__ __forceinline__ float load_f32(int row, int column) const {
    return __ldg(reinterpret_cast<const float*>(this->row(row)) + min_int(column, columns - 1));
  }
};

// Of one query head: bit k of word w of a row is whether the row may see key 32 w + k.
struct MaskRows {
  const uint32_t* data;  // of row 0
  int64_t stride;        // of rows, in words
  int rows;
  int words;  // of a row, a multiple of 4

  __device__ __forceinline__ static MaskRows make(const MhaParams& params, int batch, int head) {
    const MaskView& view = params.intervals.mask;
    return {view.data + batch_offset(view.batch_strides, batch, params) + head * view.head_stride,
            view.row_stride, params.query_length, mask_words(params.key_length)};
  }

  __device__ __forceinline__ const uint32_t* row(int row) const {
    return data + min_int(max_int(row, 0), rows - 1) * stride;
  }

  // The word with the bit of a column.
  __device__ __forceinline__ uint32_t word(int row, int column) const {
    return __ldg(this->row(row) + min_int(column / 32, words - 1));
  }
};

// Where gradients of biases are added up, in f32, of one query head.
struct BiasGradient {
  float* data;     // of row 0
  int64_t stride;  // of rows
  bool shared;     // others may add to the same

  __device__ __forceinline__ static BiasGradient make(const MhaBwdParams& params, int batch,
                                                      int head) {
    const BiasGradientView& view = params.dbias;
    return {view.data + batch_offset(view.batch_strides, batch, params) + head * view.head_stride,
            view.row_stride, view.shared};
  }

  __device__ __forceinline__ void add(int row, int key, float x) const {
    float* const target = data + row * stride + key;
    if (shared) {
      ptx::red_add(target, x);
    } else {
      *target = x;
    }
  }
};

}  // namespace jax_flash
