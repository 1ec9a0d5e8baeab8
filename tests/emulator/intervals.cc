// The kernels that compute the arrays of calls with intervals, on the CPU.
#include "ops/intervals.cu"

#include <cuda_runtime.h>

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::ops {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::ops
unsigned char* emulated_shared_memory = jax_flash::ops::memory;

extern "C" int intervals(const jax_flash::ops::IntervalsParams* params) {
  return jax_flash::ops::launch_intervals(*params, nullptr);
}
