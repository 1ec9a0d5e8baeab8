// Operands of f32 as kernels see them that copy units of 16 bits.
#pragma once

#include <cstdint>

#include "host/params.h"

namespace jax_flash::sm80 {

// Widths and strides of f32 operands in units of 16 bits, which are all that copies know.
inline void count_16_bits(MhaParams* params) {
  for (TensorView* const view : {&params->query, &params->key, &params->value}) {
    for (int64_t& stride : view->batch_strides) stride *= 2;
    view->row_stride *= 2;
    view->head_stride *= 2;
  }
  params->head_dim *= 2;
  params->head_dim_v *= 2;
}

}  // namespace jax_flash::sm80
