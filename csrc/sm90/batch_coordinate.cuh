// Where a sequence lies in the two batch dims of a tensor map.
#pragma once

#include "host/params.h"

namespace jax_flash::sm90 {

struct BatchCoordinate {
  int inner;
  int outer;
};

// Of flat batch index `batch`. inner_batch: the size of the inner of two batch dims.
__device__ __forceinline__ BatchCoordinate batch_coordinate(const TensorView& view, int batch,
                                                            const MhaParams& params,
                                                            const FastDivisor& inner_batch) {
  int inner = batch;
  int outer = 0;
  if (params.batch_dims == 2) {
    outer = inner_batch.divide(batch);
    inner = batch - outer * static_cast<int>(inner_batch.divisor);
  }
  // A stride of 0 shares the operand along the dim, which the map then lacks.
  const int last = params.batch_dims - 1;
  return {view.batch_strides[last] == 0 ? 0 : inner, view.batch_strides[0] == 0 ? 0 : outer};
}

}  // namespace jax_flash::sm90
