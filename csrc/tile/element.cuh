// From the name of an element type to the type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "host/dispatch.h"

namespace jax_flash {

template <ElementType kType>
struct ElementOf;
template <>
struct ElementOf<ElementType::kBf16> {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<ElementType::kF16> {
  using Type = __half;
};
template <>
struct ElementOf<ElementType::kF32> {
  using Type = float;
};
template <>
struct ElementOf<ElementType::kTf32> {
  using Type = float;
};

}  // namespace jax_flash
