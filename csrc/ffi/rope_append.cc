// FFI target jax_flash_rope_append: decode, check, fill the parameters, launch.
//
// query [batch, T, N, H], new keys [batch, T, K, H] and values [batch, T, K, Hv], caches [batch, S,
// K, H] and [batch, S, K, Hv] or, with a page table, [pages, page, K, H] and [pages, page, K, Hv],
// all of one type, lengths int32 [batch], frequencies f32 [batch or 1, pairs], then the page table
// int32 [batch, max_pages] if has_page_table -> the turned query, and the caches, which are the
// memory of those operands. All arrays are row-major.
#include <cstdint>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/rows.h"
#include "host/device.h"
#include "ops/launch.h"

namespace jax_flash {
namespace {

using Dims = ffi::Span<const int64_t>;

constexpr int64_t kMostElements = 1 << 22;  // of a token
constexpr int64_t kMostPairs = 4096;        // whose angles fit 32 KB of shared memory

bool has_dims(Dims dims, int64_t a, int64_t b, int64_t c, int64_t d) {
  return dims.size() == 4 && dims[0] == a && dims[1] == b && dims[2] == c && dims[3] == d;
}

ffi::Error rope_append(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                       ffi::AnyBuffer value, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache,
                       ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> inv_freq,
                       ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> new_k_cache,
                       ffi::Result<ffi::AnyBuffer> new_v_cache, bool interleaved,
                       bool has_page_table) {
  const Dims q = query.dimensions();
  const Dims k = k_cache.dimensions();
  const Dims v = v_cache.dimensions();
  JAX_FLASH_CHECK(q.size() == 4 && k.size() == 4 && v.size() == 4,
                  "query and caches must have 4 dimensions, got ", to_string(q), ", ", to_string(k),
                  ", ", to_string(v));
  JAX_FLASH_CHECK(has_dims(v, k[0], k[1], k[2], v[3]) && k[3] == q[3] && k[0] >= 1 && k[1] >= 1 &&
                      k[2] >= 1 && q[2] >= 1 && q[3] >= 1 && v[3] >= 1,
                  "query and caches do not fit: ", to_string(q), ", ", to_string(k), ", ",
                  to_string(v));
  JAX_FLASH_CHECK(has_dims(key.dimensions(), q[0], q[1], k[2], k[3]) &&
                      has_dims(value.dimensions(), q[0], q[1], v[2], v[3]),
                  "new keys and values must be [", q[0], ", ", q[1], "] tokens of the caches ",
                  to_string(k), " and ", to_string(v), ", got ", to_string(key.dimensions()),
                  " and ", to_string(value.dimensions()));
  JAX_FLASH_CHECK(has_page_table || k[0] == q[0], "the caches have ", k[0],
                  " sequences, the query ", q[0]);
  JAX_FLASH_CHECK(
      is_index(q[0]) && is_index(q[1]) && is_index(q[0] * q[1]) && is_index(k[0]) && is_index(k[1]),
      "tokens ", q[0], " x ", q[1], " or rows of caches ", k[0], " x ", k[1],
      " are more than 31 bits can count");
  JAX_FLASH_CHECK(q[2] <= kMostElements && q[3] <= kMostElements && k[2] <= kMostElements &&
                      v[3] <= kMostElements && (q[2] + k[2]) * k[3] + k[2] * v[3] <= kMostElements,
                  "a token must have at most ", kMostElements, " elements, got ", to_string(q),
                  ", ", to_string(k), ", ", to_string(v));
  const ffi::DataType type = query.element_type();
  JAX_FLASH_CHECK(element_of(type).has_value(), "query must be f32, bf16 or f16, got ", type);
  JAX_FLASH_CHECK(key.element_type() == type && value.element_type() == type &&
                      k_cache.element_type() == type && v_cache.element_type() == type &&
                      out->element_type() == type,
                  "keys, values, caches and result must have query's type ", type);
  JAX_FLASH_CHECK(has_dims(out->dimensions(), q[0], q[1], q[2], q[3]),
                  "the result must be as query ", to_string(q), ", got ",
                  to_string(out->dimensions()));
  JAX_FLASH_CHECK(new_k_cache->untyped_data() == k_cache.untyped_data() &&
                      new_v_cache->untyped_data() == v_cache.untyped_data() &&
                      new_k_cache->size_bytes() == k_cache.size_bytes() &&
                      new_v_cache->size_bytes() == v_cache.size_bytes(),
                  "the caches must be written in place");
  JAX_FLASH_CHECK(static_cast<int64_t>(lengths.element_count()) == q[0], "lengths ",
                  to_string(lengths.dimensions()), " do not fit query ", to_string(q));
  const Dims f = inv_freq.dimensions();
  JAX_FLASH_CHECK(f.size() == 2 && (f[0] == q[0] || f[0] == 1) && f[1] >= 1 && f[1] <= q[3] / 2 &&
                      f[1] <= kMostPairs,
                  "frequencies must be [", q[0], " or 1, up to ", q[3] / 2, " or ", kMostPairs,
                  "], got ", to_string(f));
  JAX_FLASH_CHECK(others.size() == (has_page_table ? 1u : 0u), "has_page_table is ", has_page_table,
                  ", but there are ", others.size(), " further operands");

  ops::RopeAppendParams params{};
  params.max_pages = 1;
  if (has_page_table) {
    auto table = others.get<ffi::Buffer<ffi::S32>>(0);
    if (table.has_error()) return table.error();
    const Dims dims = table->dimensions();
    JAX_FLASH_CHECK(dims.size() == 2 && dims[0] == q[0] && is_index(dims[1]),
                    "the page table must be [", q[0], ", max_pages], got ", to_string(dims));
    params.page_table = table->typed_data();
    params.max_pages = static_cast<int32_t>(dims[1]);
  }
  if (q[0] * q[1] == 0) return ffi::Error::Success();
  params.query = query.untyped_data();
  params.key = key.untyped_data();
  params.value = value.untyped_data();
  params.lengths = lengths.typed_data();
  params.inv_freq = inv_freq.typed_data();
  params.out = out->untyped_data();
  params.k_cache = k_cache.untyped_data();
  params.v_cache = v_cache.untyped_data();
  params.query_stride = q[2] * q[3];
  params.key_stride = k[2] * k[3];
  params.value_stride = v[2] * v[3];
  params.inv_freq_stride = f[0] == 1 ? 0 : f[1];
  params.batch = static_cast<int32_t>(q[0]);
  params.tokens = static_cast<int32_t>(q[1]);
  params.heads = static_cast<int32_t>(q[2]);
  params.kv_heads = static_cast<int32_t>(k[2]);
  params.width = static_cast<int32_t>(k[3]);
  params.value_width = static_cast<int32_t>(v[3]);
  params.pairs = static_cast<int32_t>(f[1]);
  params.pages = static_cast<int32_t>(k[0]);
  params.page_size = static_cast<int32_t>(k[1]);
  params.interleaved = interleaved;
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const cudaError_t error = ops::launch_rope_append(params, *element_of(type), stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_rope_append", error);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kRopeAppend, rope_append,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("interleaved")
                                  .Attr<bool>("has_page_table"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
