// 16 bytes of a row at a time, as f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/params.h"
#include "ptx/math.cuh"

namespace jax_flash::ops {

// Elements of 16 bytes.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[kVector<T>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = ptx::unpack_x2<T>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = ptx::cvt_rn_x2<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One element as f32.
template <typename T>
__device__ __forceinline__ float load_element(const T* source) {
  return static_cast<float>(*source);
}

// Columns first .. first + kVector of a row, zeros at and past `columns`. `wide`: the row begins at
// a multiple of 16 bytes, and `columns` is one of kVector.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* row, int first, int columns, bool wide) {
  if (first >= columns) return make_uint4(0, 0, 0, 0);
  if (wide) return *reinterpret_cast<const uint4*>(row + first);
  float x[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    x[i] = first + i < columns ? load_element(row + first + i) : 0.0f;
  }
  return pack<T>(x);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* row, int first, int columns, bool wide,
                                             const uint4& raw) {
  if (first >= columns) return;
  if (wide) {
    *reinterpret_cast<uint4*>(row + first) = raw;
    return;
  }
  float x[kVector<T>];
  unpack<T>(raw, x);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (first + i < columns) row[first + i] = static_cast<T>(x[i]);
  }
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int group, int row) {
  return static_cast<const T*>(rows.data) + group * rows.group_stride + row * rows.row_stride;
}

}  // namespace jax_flash::ops
