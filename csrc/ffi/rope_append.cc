// FFI target jax_flash_rope_append: decode, check, fill the parameters, launch.
//
// query [*V, batch, T, N, H], caches [*V, batch, S, K, H] and [*V, batch, S, K, Hv] or, with a page
// table, [*V, pages, page, K, H] and [*V, pages, page, K, Hv], lengths int32 [*V, batch],
// frequencies f32 [..., pairs] with one row for all or one for each sequence, then new keys
// [*V, batch, T, K, H] and values [*V, batch, T, K, Hv], then the page table int32 [*V, batch,
// max_pages] if has_page_table -> the turned query, and the caches, which are the memory of those
// operands. If is_packed, query is [*V, batch, T, N H + K H + K Hv] and has the new keys and
// values, too. All arrays are row-major, all but lengths, frequencies and table of one type.
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

// The last dims of an array, up to 4, and the *V before them, which are one number here.
struct Shape {
  int64_t outer;
  int64_t dims[4];

  int64_t operator[](int i) const { return dims[i]; }
  bool operator==(const Shape&) const = default;
};

ffi::Error decode(const char* name, const ffi::AnyBuffer& buffer, size_t own, Shape* shape) {
  const Dims dims = buffer.dimensions();
  const size_t rank = dims.size();
  JAX_FLASH_CHECK(rank >= own, name, " must have ", own, " dimensions or more, got ",
                  to_string(dims));
  shape->outer = 1;
  for (size_t i = 0; i < rank; ++i) {
    JAX_FLASH_CHECK(is_index(dims[i]), name, " is ", to_string(dims));
    if (i < rank - own) {
      shape->outer *= dims[i];
      JAX_FLASH_CHECK(is_index(shape->outer), name, " is ", to_string(dims));
    } else {
      shape->dims[i + own - rank] = dims[i];
    }
  }
  return ffi::Error::Success();
}

// Where the new tokens are: query, keys and values, of the turned query's and the caches' shapes.
ffi::Error decode_new(const ffi::AnyBuffer& query, const ffi::RemainingArgs& others, bool is_packed,
                      const Shape& q, const Shape& k, const Shape& v,
                      ops::RopeAppendParams* params) {
  const int64_t sizes[] = {q[2] * q[3], k[2] * k[3], v[2] * v[3]};
  const ffi::DataType type = query.element_type();
  Shape given{};
  params->query = query.untyped_data();
  if (is_packed) {
    const int64_t width = sizes[0] + sizes[1] + sizes[2];
    JAX_FLASH_RETURN_IF_ERROR(decode("the packed query", query, 3, &given));
    JAX_FLASH_CHECK(given == (Shape{q.outer, {q[0], q[1], width}}), "the packed query ",
                    to_string(query.dimensions()), " must have ", width,
                    " elements a token and fit the result");
    const auto* const data = static_cast<const char*>(params->query);
    const auto bytes = static_cast<int64_t>(ffi::ByteWidth(type));
    params->key = data + sizes[0] * bytes;
    params->value = data + (sizes[0] + sizes[1]) * bytes;
    params->query_stride = params->key_stride = params->value_stride = width;
    return ffi::Error::Success();
  }
  JAX_FLASH_RETURN_IF_ERROR(decode("query", query, 4, &given));
  JAX_FLASH_CHECK(given == q, "the result must be as query ", to_string(query.dimensions()));
  auto key = others.get<ffi::AnyBuffer>(0);
  auto value = others.get<ffi::AnyBuffer>(1);
  if (key.has_error()) return key.error();
  if (value.has_error()) return value.error();
  Shape new_key{};
  Shape new_value{};
  JAX_FLASH_RETURN_IF_ERROR(decode("new keys", *key, 4, &new_key));
  JAX_FLASH_RETURN_IF_ERROR(decode("new values", *value, 4, &new_value));
  JAX_FLASH_CHECK(new_key == (Shape{q.outer, {q[0], q[1], k[2], k[3]}}) &&
                      new_value == (Shape{q.outer, {q[0], q[1], k[2], v[3]}}),
                  "new keys and values do not fit query and caches: ", to_string(key->dimensions()),
                  ", ", to_string(value->dimensions()), ", ", to_string(query.dimensions()));
  JAX_FLASH_CHECK(key->element_type() == type && value->element_type() == type,
                  "new keys and values must have query's type ", type);
  params->key = key->untyped_data();
  params->value = value->untyped_data();
  params->query_stride = sizes[0];
  params->key_stride = sizes[1];
  params->value_stride = sizes[2];
  return ffi::Error::Success();
}

ffi::Error rope_append(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer k_cache,
                       ffi::AnyBuffer v_cache, ffi::Buffer<ffi::S32> lengths,
                       ffi::Buffer<ffi::F32> inv_freq, ffi::RemainingArgs others,
                       ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> new_k_cache,
                       ffi::Result<ffi::AnyBuffer> new_v_cache, bool interleaved, bool is_packed,
                       bool has_page_table) {
  Shape q{};
  Shape k{};
  Shape v{};
  JAX_FLASH_RETURN_IF_ERROR(decode("the result", *out, 4, &q));
  JAX_FLASH_RETURN_IF_ERROR(decode("k_cache", k_cache, 4, &k));
  JAX_FLASH_RETURN_IF_ERROR(decode("v_cache", v_cache, 4, &v));
  const int64_t outer = q.outer;
  JAX_FLASH_CHECK(v == (Shape{outer, {k[0], k[1], k[2], v[3]}}) &&
                      k == (Shape{outer, {k[0], k[1], k[2], q[3]}}) && k[1] >= 1 && k[2] >= 1 &&
                      q[2] >= 1 && q[3] >= 1 && v[3] >= 1 && (has_page_table || k[0] == q[0]),
                  "the turned query and caches do not fit: ", to_string(out->dimensions()), ", ",
                  to_string(k_cache.dimensions()), ", ", to_string(v_cache.dimensions()));
  const int64_t batch = outer * q[0];
  JAX_FLASH_CHECK(is_index(batch) && is_index(batch * q[1]) && is_index(outer * k[0]),
                  "tokens or sequences of query ", to_string(out->dimensions()),
                  " or pages of caches ", to_string(k_cache.dimensions()),
                  " are more than 31 bits can count");
  JAX_FLASH_CHECK(q[2] <= kMostElements && q[3] <= kMostElements && k[2] <= kMostElements &&
                      v[3] <= kMostElements && (q[2] + k[2]) * k[3] + k[2] * v[3] <= kMostElements,
                  "a token must have at most ", kMostElements, " elements, got ",
                  to_string(out->dimensions()), ", ", to_string(k_cache.dimensions()), ", ",
                  to_string(v_cache.dimensions()));
  const ffi::DataType type = query.element_type();
  JAX_FLASH_CHECK(element_of(type).has_value(), "query must be f32, bf16 or f16, got ", type);
  JAX_FLASH_CHECK(k_cache.element_type() == type && v_cache.element_type() == type &&
                      out->element_type() == type,
                  "caches and result must have query's type ", type);
  JAX_FLASH_CHECK(new_k_cache->untyped_data() == k_cache.untyped_data() &&
                      new_v_cache->untyped_data() == v_cache.untyped_data() &&
                      new_k_cache->size_bytes() == k_cache.size_bytes() &&
                      new_v_cache->size_bytes() == v_cache.size_bytes(),
                  "the caches must be written in place");
  JAX_FLASH_CHECK(static_cast<int64_t>(lengths.element_count()) == batch, "lengths ",
                  to_string(lengths.dimensions()), " do not fit query ",
                  to_string(out->dimensions()));
  const Dims f = inv_freq.dimensions();
  const int64_t pairs = f.size() == 0 ? 0 : f[f.size() - 1];
  JAX_FLASH_CHECK(pairs >= 1 && pairs <= q[3] / 2 && pairs <= kMostPairs,
                  "frequencies must be for 1 to ", q[3] / 2, " pairs, at most ", kMostPairs,
                  ", got ", to_string(f));
  const auto rows = static_cast<int64_t>(inv_freq.element_count()) / pairs;
  JAX_FLASH_CHECK(rows == 1 || rows == batch, "frequencies ", to_string(f), " do not fit query ",
                  to_string(out->dimensions()));
  const size_t new_operands = is_packed ? 0 : 2;
  JAX_FLASH_CHECK(others.size() == new_operands + (has_page_table ? 1 : 0), "has_page_table is ",
                  has_page_table, ", is_packed ", is_packed, ", but there are ", others.size(),
                  " further operands");

  ops::RopeAppendParams params{};
  JAX_FLASH_RETURN_IF_ERROR(decode_new(query, others, is_packed, q, k, v, &params));
  params.max_pages = 1;
  if (has_page_table) {
    auto table = others.get<ffi::Buffer<ffi::S32>>(new_operands);
    if (table.has_error()) return table.error();
    const Dims t = table->dimensions();
    const int64_t slots = t.size() == 0 ? -1 : t[t.size() - 1];
    JAX_FLASH_CHECK(
        is_index(slots) && static_cast<int64_t>(table->element_count()) == batch * slots,
        "the page table ", to_string(t), " does not fit query ", to_string(out->dimensions()));
    params.page_table = table->typed_data();
    params.max_pages = static_cast<int32_t>(slots);
  }
  if (batch * q[1] == 0) return ffi::Error::Success();
  params.lengths = lengths.typed_data();
  params.inv_freq = inv_freq.typed_data();
  params.out = out->untyped_data();
  params.k_cache = k_cache.untyped_data();
  params.v_cache = v_cache.untyped_data();
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
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("interleaved")
                                  .Attr<bool>("is_packed")
                                  .Attr<bool>("has_page_table"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
