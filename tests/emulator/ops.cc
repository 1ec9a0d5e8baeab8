// The kernels of csrc/ops on the CPU.
#include <cuda_runtime.h>

#include "ops/rms_norm.cu"
#include "ops/sample.cu"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::ops {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::ops
unsigned char* emulated_shared_memory = jax_flash::ops::memory;

using namespace jax_flash::ops;

namespace {

// Operands are dense [groups, rows, columns], but for flags that say along which dims they are
// shared: 1 groups, 2 rows.
Rows rows_of(const void* data, int64_t rows, int64_t columns, int shared) {
  const int64_t own_rows = (shared & 2) != 0 ? 1 : rows;
  return {data, (shared & 1) != 0 ? 0 : own_rows * columns, (shared & 2) != 0 ? 0 : columns};
}

jax_flash::DeviceInfo device_of(int multiprocessors) { return {90, 50 << 20, multiprocessors}; }

}  // namespace

extern "C" int sample(const void* logits, int logits_shared, const void* table, const void* mask,
                      int mask_shared, int32_t* tokens, int groups, int rows, int size, int type,
                      int multiprocessors) {
  SampleParams params{};
  params.logits = rows_of(logits, rows, size, logits_shared);
  params.table = rows_of(table, rows, 6, 0);
  if (mask != nullptr) params.mask = rows_of(mask, rows, size, mask_shared);
  params.tokens = tokens;
  params.rows = rows;
  params.size = size;
  return launch_sample(params, int64_t{groups} * rows, static_cast<Element>(type),
                       device_of(multiprocessors), nullptr);
}

extern "C" int top_k(const void* logits, void* values, int32_t* indices, int groups, int rows,
                     int size, int k, int type, int multiprocessors) {
  const TopKParams params{rows_of(logits, rows, size, 0), values, indices, rows, size, k};
  return launch_top_k(params, int64_t{groups} * rows, static_cast<Element>(type),
                      device_of(multiprocessors), nullptr);
}

extern "C" int rms_norm(const void* x, int x_shared, const void* residual, const void* weight,
                        int weight_shared, void* y, void* sum, float* scale, int groups, int rows,
                        int columns, float eps, int f32_weight, int type, int multiprocessors) {
  RmsNormParams params{};
  params.x = rows_of(x, rows, columns, x_shared);
  if (residual != nullptr) params.residual = rows_of(residual, rows, columns, 0);
  params.weight = {weight, (weight_shared & 1) != 0 ? 0 : columns, 0};
  params.y = y;
  params.sum = sum;
  params.scale = scale;
  params.groups = groups;
  params.rows = rows;
  params.columns = columns;
  params.eps = eps;
  params.f32_weight = f32_weight != 0;
  return launch_rms_norm(params, static_cast<Element>(type), device_of(multiprocessors), nullptr);
}

extern "C" int rms_norm_bwd(const void* x, int x_shared, const void* weight, int weight_shared,
                            const void* scale, const void* dy, const void* dsum, void* dx,
                            float* parts, int groups, int rows, int columns, int blocks,
                            int f32_weight, int type) {
  RmsNormBwdParams params{};
  params.x = rows_of(x, rows, columns, x_shared);
  params.weight = {weight, (weight_shared & 1) != 0 ? 0 : columns, 0};
  params.scale = rows_of(scale, rows, 1, 0);
  params.dy = rows_of(dy, rows, columns, 0);
  if (dsum != nullptr) params.dsum = rows_of(dsum, rows, columns, 0);
  params.dx = dx;
  params.parts = parts;
  params.groups = groups;
  params.rows = rows;
  params.columns = columns;
  params.blocks = blocks;
  params.f32_weight = f32_weight != 0;
  return launch_rms_norm_bwd(params, static_cast<Element>(type), nullptr);
}
