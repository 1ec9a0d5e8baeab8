// The kernel of csrc/ops/rope_append.cuh on the CPU.
#include <cuda_runtime.h>

#include "ops/rope_append.cu"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::ops {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::ops
unsigned char* emulated_shared_memory = jax_flash::ops::memory;

using namespace jax_flash::ops;

// Of [batch, tokens] tokens of any strides. `page_table` may be null: then `pages` and
// `pool_sequences` are the batch.
extern "C" int rope_append(const void* query, int64_t query_stride, const void* key,
                           int64_t key_stride, const void* value, int64_t value_stride,
                           const int32_t* lengths, const float* inv_freq, int inv_freq_shared,
                           const int32_t* page_table, void* out, void* k_cache, void* v_cache,
                           int batch, int tokens, int heads, int kv_heads, int width,
                           int value_width, int pairs, int pool_sequences, int pages, int page_size,
                           int max_pages, int interleaved, int type) {
  RopeAppendParams params{};
  params.query = query;
  params.query_stride = query_stride;
  params.key = key;
  params.key_stride = key_stride;
  params.value = value;
  params.value_stride = value_stride;
  params.lengths = lengths;
  params.inv_freq = inv_freq;
  params.inv_freq_stride = inv_freq_shared != 0 ? 0 : pairs;
  params.page_table = page_table;
  params.out = out;
  params.k_cache = k_cache;
  params.v_cache = v_cache;
  params.batch = batch;
  params.tokens = tokens;
  params.heads = heads;
  params.kv_heads = kv_heads;
  params.width = width;
  params.value_width = value_width;
  params.pairs = pairs;
  params.pool_sequences = pool_sequences;
  params.pages = pages;
  params.page_size = page_size;
  params.max_pages = max_pages;
  params.interleaved = interleaved != 0;
  return launch_rope_append(params, static_cast<Element>(type), nullptr);
}
