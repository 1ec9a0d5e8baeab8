#include <cstddef>

#include "ops/intervals.cuh"

namespace jax_flash::ops {

cudaError_t launch_intervals(const IntervalsParams& params, cudaStream_t stream) {
  const int row_tiles = params.sequences * params.row_count;
  const int key_tiles = params.sequences * params.key_count;
  constexpr int kWarps = kKeyThreads / kWarp;
  const dim3 key_grid(static_cast<unsigned>((key_tiles + kWarps - 1) / kWarps));
  const bool has_ids = params.key_ids != nullptr;
  cudaError_t error = cudaSuccess;
  if (has_ids) {
    error = launch_dependent_kernel(interval_keys_kernel, key_grid, kKeyThreads, 0, stream, params);
    if (error != cudaSuccess) return error;
  }
  const dim3 row_grid(static_cast<unsigned>(row_tiles + (has_ids ? 0 : key_tiles)));
  const size_t bytes = has_ids ? sizeof(IntervalRowsShared) : offsetof(IntervalRowsShared, found);
  error = launch_dependent_kernel(interval_rows_kernel, row_grid,
                                  has_ids ? kRowThreads : kIntervalRows, bytes, stream, params);
  const bool has_key_tiles = !has_ids && params.row_ranges == nullptr;
  if (error != cudaSuccess || has_key_tiles) return error;
  return launch_dependent_kernel(interval_key_tiles_kernel, key_grid, kKeyThreads, 0, stream,
                                 params);
}

}  // namespace jax_flash::ops
