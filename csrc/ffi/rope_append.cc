// FFI target jax_flash_rope_append: decode, check, fill the parameters, launch.
//
// query [*V, batch, T, N, H], new keys [*V, batch, T, K, H] and values [*V, batch, T, K, Hv],
// caches [*V, batch, S, K, H] and [*V, batch, S, K, Hv] or, with a page table, [*V, pages, page, K,
// H] and [*V, pages, page, K, Hv], all of one type, lengths int32 [*V, batch], frequencies f32
// [..., pairs] with one row for all or one for each sequence, then the page table int32 [*V, batch,
// max_pages] if has_page_table -> the turned query, and the caches, which are the memory of those
// operands. All arrays are row-major.
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

// An array of 4 dims and the *V before them, which are one number here.
struct Shape {
  int64_t outer;
  int64_t dims[4];

  int64_t operator[](int i) const { return dims[i]; }
  bool operator==(const Shape&) const = default;
};

ffi::Error decode(const char* name, const ffi::AnyBuffer& buffer, Shape* shape) {
  const Dims dims = buffer.dimensions();
  JAX_FLASH_CHECK(dims.size() >= 4, name, " must have 4 dimensions or more, got ", to_string(dims));
  const size_t rank = dims.size();
  shape->outer = 1;
  for (size_t i = 0; i < rank; ++i) {
    JAX_FLASH_CHECK(is_index(dims[i]), name, " is ", to_string(dims));
    if (i < rank - 4) {
      shape->outer *= dims[i];
      JAX_FLASH_CHECK(is_index(shape->outer), name, " is ", to_string(dims));
    } else {
      shape->dims[i + 4 - rank] = dims[i];
    }
  }
  return ffi::Error::Success();
}

ffi::Error rope_append(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                       ffi::AnyBuffer value, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache,
                       ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> inv_freq,
                       ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> new_k_cache,
                       ffi::Result<ffi::AnyBuffer> new_v_cache, bool interleaved,
                       bool has_page_table) {
  Shape q{};
  Shape k{};
  Shape v{};
  Shape new_key{};
  Shape new_value{};
  Shape result{};
  JAX_FLASH_RETURN_IF_ERROR(decode("query", query, &q));
  JAX_FLASH_RETURN_IF_ERROR(decode("k_cache", k_cache, &k));
  JAX_FLASH_RETURN_IF_ERROR(decode("v_cache", v_cache, &v));
  JAX_FLASH_RETURN_IF_ERROR(decode("new keys", key, &new_key));
  JAX_FLASH_RETURN_IF_ERROR(decode("new values", value, &new_value));
  JAX_FLASH_RETURN_IF_ERROR(decode("the result", *out, &result));
  const int64_t outer = q.outer;
  JAX_FLASH_CHECK(v == (Shape{outer, {k[0], k[1], k[2], v[3]}}) &&
                      k == (Shape{outer, {k[0], k[1], k[2], q[3]}}) && k[1] >= 1 && k[2] >= 1 &&
                      q[2] >= 1 && q[3] >= 1 && v[3] >= 1 && (has_page_table || k[0] == q[0]),
                  "query and caches do not fit: ", to_string(query.dimensions()), ", ",
                  to_string(k_cache.dimensions()), ", ", to_string(v_cache.dimensions()));
  JAX_FLASH_CHECK(new_key == (Shape{outer, {q[0], q[1], k[2], k[3]}}) &&
                      new_value == (Shape{outer, {q[0], q[1], k[2], v[3]}}),
                  "new keys and values do not fit query and caches: ", to_string(key.dimensions()),
                  ", ", to_string(value.dimensions()), ", ", to_string(query.dimensions()), ", ",
                  to_string(k_cache.dimensions()), ", ", to_string(v_cache.dimensions()));
  JAX_FLASH_CHECK(result == q, "the result must be as query ", to_string(query.dimensions()),
                  ", got ", to_string(out->dimensions()));
  const int64_t batch = outer * q[0];
  JAX_FLASH_CHECK(is_index(batch) && is_index(batch * q[1]) && is_index(outer * k[0]),
                  "tokens or sequences of query ", to_string(query.dimensions()),
                  " or pages of caches ", to_string(k_cache.dimensions()),
                  " are more than 31 bits can count");
  JAX_FLASH_CHECK(q[2] <= kMostElements && q[3] <= kMostElements && k[2] <= kMostElements &&
                      v[3] <= kMostElements && (q[2] + k[2]) * k[3] + k[2] * v[3] <= kMostElements,
                  "a token must have at most ", kMostElements, " elements, got ",
                  to_string(query.dimensions()), ", ", to_string(k_cache.dimensions()), ", ",
                  to_string(v_cache.dimensions()));
  const ffi::DataType type = query.element_type();
  JAX_FLASH_CHECK(element_of(type).has_value(), "query must be f32, bf16 or f16, got ", type);
  JAX_FLASH_CHECK(key.element_type() == type && value.element_type() == type &&
                      k_cache.element_type() == type && v_cache.element_type() == type &&
                      out->element_type() == type,
                  "keys, values, caches and result must have query's type ", type);
  JAX_FLASH_CHECK(new_k_cache->untyped_data() == k_cache.untyped_data() &&
                      new_v_cache->untyped_data() == v_cache.untyped_data() &&
                      new_k_cache->size_bytes() == k_cache.size_bytes() &&
                      new_v_cache->size_bytes() == v_cache.size_bytes(),
                  "the caches must be written in place");
  JAX_FLASH_CHECK(static_cast<int64_t>(lengths.element_count()) == batch, "lengths ",
                  to_string(lengths.dimensions()), " do not fit query ",
                  to_string(query.dimensions()));
  const Dims f = inv_freq.dimensions();
  const int64_t pairs = f.size() == 0 ? 0 : f[f.size() - 1];
  JAX_FLASH_CHECK(pairs >= 1 && pairs <= q[3] / 2 && pairs <= kMostPairs,
                  "frequencies must be for 1 to ", q[3] / 2, " pairs, at most ", kMostPairs,
                  ", got ", to_string(f));
  const auto rows = static_cast<int64_t>(inv_freq.element_count()) / pairs;
  JAX_FLASH_CHECK(rows == 1 || rows == batch, "frequencies ", to_string(f), " do not fit query ",
                  to_string(query.dimensions()));
  JAX_FLASH_CHECK(others.size() == (has_page_table ? 1u : 0u), "has_page_table is ", has_page_table,
                  ", but there are ", others.size(), " further operands");

  ops::RopeAppendParams params{};
  params.max_pages = 1;
  if (has_page_table) {
    auto table = others.get<ffi::Buffer<ffi::S32>>(0);
    if (table.has_error()) return table.error();
    const Dims t = table->dimensions();
    const int64_t slots = t.size() == 0 ? -1 : t[t.size() - 1];
    JAX_FLASH_CHECK(
        is_index(slots) && static_cast<int64_t>(table->element_count()) == batch * slots,
        "the page table ", to_string(t), " does not fit query ", to_string(query.dimensions()));
    params.page_table = table->typed_data();
    params.max_pages = static_cast<int32_t>(slots);
  }
  if (batch * q[1] == 0) return ffi::Error::Success();
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
  params.inv_freq_stride = rows == 1 ? 0 : pairs;
  params.batch = static_cast<int32_t>(batch);
  params.tokens = static_cast<int32_t>(q[1]);
  params.heads = static_cast<int32_t>(q[2]);
  params.kv_heads = static_cast<int32_t>(k[2]);
  params.width = static_cast<int32_t>(k[3]);
  params.value_width = static_cast<int32_t>(v[3]);
  params.pairs = static_cast<int32_t>(pairs);
  params.pool_sequences = static_cast<int32_t>(has_page_table ? q[0] : batch);
  params.pages = static_cast<int32_t>(has_page_table ? k[0] : batch);
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
