// FFI target jax_flash_decode: decode, check, fill the parameters, launch.
//
// query [batch, T, N, H], caches [batch, S, K, H] and [batch, S, K, Hv] or, with a page table,
// [pages, page, K, H] and [pages, page, K, Hv], lengths int32 [batch]; then, if their attributes
// say so, the page table int32 [batch, max_pages], sinks and slopes of ALiBi, f32 [batch or 1, N],
// and scales of keys and of values, f32 [batch or 1, K], for caches of e4m3 or int8 -> out [batch,
// T, N, Hv] in query's type, lse f32 [batch, N, T], and two workspaces: f32 [batch, K, splits, T *
// N / K, Hv] and f32 [batch, K, splits, T * N / K, 2], which may be empty if there is one split.
// All arrays are row-major and start at multiples of 16 bytes, as XLA's do. The call's state is in
// decode_counters.h. forward_parts: not 0 where, on compute capability 9.0, the forward kernel of
// attention runs the call, which has nothing but the first four operands: into how many parts it
// cuts the keys. If there are several, the workspaces hold their results: 16 bits [batch, parts, T,
// N, Hv] and f32 [batch, parts, N, T] (the other kernels have those of splits there).
#include "decode/decode.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "ffi/check.h"
#include "ffi/decode_counters.h"
#include "ffi/handlers.h"
#include "host/device.h"
#include "host/dispatch.h"
#include "host/params.h"
#include "sm90/fwd_parts.h"
#include "tile/mask.cuh"

namespace jax_flash {
namespace {

using Dims = ffi::Span<const int64_t>;

// Of one of the five types that caches may have.
decode::CacheType cache_type_of(ffi::DataType type) {
  switch (type) {
    case ffi::BF16:
      return decode::CacheType::kBf16;
    case ffi::F16:
      return decode::CacheType::kF16;
    case ffi::F32:
      return decode::CacheType::kF32;
    case ffi::S8:
      return decode::CacheType::kInt8;
    default:
      return decode::CacheType::kE4m3;
  }
}

// Caches are keys with lengths, and the new tokens the last queries, to the forward kernel.
ffi::Error launch_forward(const decode::DecodeParams& params, int64_t parts,
                          const DeviceInfo& device, cudaStream_t stream) {
  MhaFwdParams forward{};
  const auto view = [](const void* data, int64_t length, int64_t heads, int64_t width) {
    TensorView of{};
    of.data = data;
    of.batch_strides[0] = length * heads * width;
    of.row_stride = heads * width;
    of.head_stride = width;
    of.alignment = 16;
    return of;
  };
  forward.query = view(params.query, params.tokens, params.heads, params.head_dim);
  forward.key = view(params.key, params.room, params.kv_heads, params.head_dim);
  forward.value = view(params.value, params.room, params.kv_heads, params.head_dim_v);
  forward.key_lengths.data = params.lengths;
  forward.key_lengths.batch_strides[0] = 1;
  forward.batch_dims = 1;
  forward.batch_sizes[0] = forward.batch = params.batch;
  forward.query_length = params.tokens;
  forward.key_length = params.room;
  forward.heads = params.heads;
  forward.kv_heads = params.kv_heads;
  forward.head_dim = params.head_dim;
  forward.head_dim_v = params.head_dim_v;
  forward.scale = SoftmaxScale::make(params.scale);
  forward.window_left = params.window_left;
  forward.window_right = 0;
  forward.bottom_right = true;
  const bool cut = parts > 1;
  forward.out = cut ? params.partial_out : params.out;
  forward.lse = cut ? reinterpret_cast<float*>(params.partial_state) : params.lse;
  forward.key_parts = static_cast<int32_t>(parts);
  const ElementType type = params.query_bf16 != 0 ? ElementType::kBf16 : ElementType::kF16;
  const MhaFwdKernel* const kernel =
      choose_mha_fwd_kernel({type, params.head_dim, params.head_dim_v, params.room, 1, 16,
                             device.compute_capability, false, false});
  JAX_FLASH_CHECK(kernel != nullptr && kernel->family == Family::kSm90, "no kernel for widths ",
                  params.head_dim, " and ", params.head_dim_v);
  cudaError_t error = kernel->launch(forward, device, stream);
  if (error == cudaSuccess && cut) {
    error = sm90::add_fwd_parts(
        {forward.out, forward.lse, params.out, params.lse, params.batch, forward.key_parts,
         params.tokens, params.heads, params.head_dim_v, params.query_bf16 != 0},
        stream);
  }
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_decode", error);
  return ffi::Error::Success();
}

ffi::Error decode_handler(cudaStream_t stream, DecodeCounters* counters, ffi::AnyBuffer query,
                          ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::Buffer<ffi::S32> lengths,
                          ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> out,
                          ffi::Result<ffi::Buffer<ffi::F32>> lse,
                          ffi::Result<ffi::Buffer<ffi::F32>> partial_out,
                          ffi::Result<ffi::Buffer<ffi::F32>> partial_state, float scale,
                          float softcap, int64_t window_left, int64_t split_keys, int64_t splits,
                          bool has_page_table, bool has_sinks, bool has_slopes, bool has_k_scale,
                          bool has_v_scale, int64_t forward_parts) {
  const Dims q = query.dimensions();
  const Dims k = key.dimensions();
  const Dims v = value.dimensions();
  JAX_FLASH_CHECK(q.size() == 4 && k.size() == 4 && v.size() == 4,
                  "query and caches must have 4 dimensions, got ", to_string(q), ", ", to_string(k),
                  ", ", to_string(v));
  JAX_FLASH_CHECK(k[0] == v[0] && k[1] == v[1] && k[2] == v[2] && k[3] == q[3],
                  "query and caches do not fit: ", to_string(q), ", ", to_string(k), ", ",
                  to_string(v));
  JAX_FLASH_CHECK(k[2] > 0 && q[2] > 0 && q[2] % k[2] == 0, "query has ", q[2],
                  " heads, the caches ", k[2]);
  const ffi::DataType type = query.element_type();
  JAX_FLASH_CHECK(type == ffi::BF16 || type == ffi::F16 || type == ffi::F32,
                  "query must be bf16, f16 or f32, got ", type);
  const ffi::DataType cache_type = key.element_type();
  const bool quantised = cache_type == ffi::F8E4M3FN || cache_type == ffi::S8;
  JAX_FLASH_CHECK((cache_type == type || (quantised && type != ffi::F32)) &&
                      value.element_type() == cache_type && out->element_type() == type,
                  "caches must have query's type ", type,
                  " or be of e4m3 or int8 with 16-bit queries, out must have it, got ", cache_type,
                  ", ", value.element_type(), ", ", out->element_type());
  // Rows of the caches start at multiples of 16 bytes.
  const int64_t cache_bytes = quantised ? 1 : type == ffi::F32 ? 4 : 2;
  const int64_t multiple = 16 / cache_bytes;
  JAX_FLASH_CHECK(q[3] > 0 && q[3] % multiple == 0 && v[3] > 0 && v[3] % multiple == 0 &&
                      q[3] <= decode::kMaxWidth && v[3] <= decode::kMaxWidth,
                  "widths must be multiples of ", multiple, " up to ", decode::kMaxWidth, ", got ",
                  q[3], " and ", v[3]);
  JAX_FLASH_CHECK(static_cast<int64_t>(lengths.element_count()) == q[0], "lengths ",
                  to_string(lengths.dimensions()), " do not fit query ", to_string(q));
  const size_t elements = std::max(key.element_count(), value.element_count());
  JAX_FLASH_CHECK(elements * cache_bytes <= size_t{1} << 36, "caches ", to_string(k), " and ",
                  to_string(v), " have more than 2^36 bytes");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  JAX_FLASH_CHECK(k[0] * k[1] <= kMax, "the caches have ", k[0] * k[1],
                  " rows, more than 31 bits can count");

  decode::DecodeParams params{};
  size_t next = 0;
  const int named = has_page_table + has_sinks + has_slopes + has_k_scale + has_v_scale;
  JAX_FLASH_CHECK(others.size() == static_cast<size_t>(named), "got ", others.size(),
                  " optional operands, the attributes name ", named);
  JAX_FLASH_CHECK(quantised || !(has_k_scale || has_v_scale), "caches of ", cache_type,
                  " have no scales");
  JAX_FLASH_CHECK(forward_parts == 0 || (named == 0 && cache_bytes == 2 && softcap == 0.0f),
                  "the forward kernel takes neither options nor caches of ", cache_type);
  JAX_FLASH_CHECK(forward_parts >= 0 && forward_parts <= sm90::kMaxKeyParts,
                  "forward_parts must be 0 to ", sm90::kMaxKeyParts, ", got ", forward_parts);
  params.page_size = 1;
  int64_t room = k[1];
  if (has_page_table) {
    auto table = others.get<ffi::Buffer<ffi::S32>>(next++);
    if (!table.has_value()) return table.error();
    const Dims t = table->dimensions();
    JAX_FLASH_CHECK(t.size() == 2 && t[0] == q[0], "page table ", to_string(t),
                    " does not fit query ", to_string(q));
    room = t[1] * k[1];
    params.page_table = table->typed_data();
    params.max_pages = static_cast<int32_t>(t[1]);
    params.page_size = static_cast<int32_t>(k[1]);
  } else {
    JAX_FLASH_CHECK(k[0] == q[0], "caches ", to_string(k), " do not fit query ", to_string(q));
  }
  // f32 [batch or 1, heads].
  const auto take = [&](const char* name, int64_t heads, const float** data, int32_t* stride) {
    auto given = others.get<ffi::Buffer<ffi::F32>>(next++);
    if (!given.has_value()) return given.error();
    const Dims s = given->dimensions();
    JAX_FLASH_CHECK(s.size() == 2 && (s[0] == 1 || s[0] == q[0]) && s[1] == heads, name, " ",
                    to_string(s), " do not fit query ", to_string(q), " and caches ", to_string(k));
    *data = given->typed_data();
    *stride = s[0] == 1 ? 0 : static_cast<int32_t>(heads);
    return ffi::Error::Success();
  };
  if (has_sinks) {
    JAX_FLASH_RETURN_IF_ERROR(take("sinks", q[2], &params.sinks, &params.sink_stride));
  }
  if (has_slopes) {
    JAX_FLASH_RETURN_IF_ERROR(take("slopes", q[2], &params.slopes, &params.slope_stride));
  }
  if (has_k_scale) {
    JAX_FLASH_RETURN_IF_ERROR(take("k_scale", k[2], &params.k_scale, &params.k_scale_stride));
  }
  if (has_v_scale) {
    JAX_FLASH_RETURN_IF_ERROR(take("v_scale", k[2], &params.v_scale, &params.v_scale_stride));
  }
  JAX_FLASH_CHECK(room < kMaxLength, "sequences have room for ", room, " keys, the limit is ",
                  kMaxLength);
  JAX_FLASH_CHECK(window_left >= -1 && window_left < kMaxLength, "window_left is ", window_left);
  JAX_FLASH_CHECK(split_keys > 0 && split_keys % decode::kSplitUnit == 0 && split_keys <= kMax &&
                      splits > 0 && splits <= kMax,
                  "got ", splits, " splits of ", split_keys, " keys");
  // With a window a sequence needs fewer splits than its room has.
  JAX_FLASH_CHECK(splits * split_keys >= room || window_left >= 0, splits, " splits of ",
                  split_keys, " keys are too few for ", room);

  const int64_t rows = q[0] * q[1] * q[2];
  // Parts have half the bytes of splits: outputs of 16 bits, and lse alone.
  const int64_t room_of =
      std::max(splits > 1 ? splits : 0, forward_parts > 1 ? (forward_parts + 1) / 2 : 0);
  JAX_FLASH_CHECK(static_cast<int64_t>(out->element_count()) == rows * v[3] &&
                      static_cast<int64_t>(lse->element_count()) == rows,
                  "out ", to_string(out->dimensions()), " and lse ", to_string(lse->dimensions()),
                  " do not fit query ", to_string(q));
  JAX_FLASH_CHECK(partial_out->element_count() >= static_cast<size_t>(rows * room_of * v[3]) &&
                      partial_state->element_count() >= static_cast<size_t>(rows * room_of * 2),
                  "workspaces ", to_string(partial_out->dimensions()), " and ",
                  to_string(partial_state->dimensions()), " do not fit query ", to_string(q), ", ",
                  splits, " splits and ", forward_parts, " parts");
  if (rows == 0) return ffi::Error::Success();

  params.query_bf16 = type == ffi::BF16;
  params.query = query.untyped_data();
  params.key = key.untyped_data();
  params.value = value.untyped_data();
  params.lengths = lengths.typed_data();
  params.out = out->untyped_data();
  params.lse = lse->typed_data();
  params.partial_out = partial_out->typed_data();
  params.partial_state = reinterpret_cast<float2*>(partial_state->typed_data());
  params.batch = static_cast<int32_t>(q[0]);
  params.tokens = static_cast<int32_t>(q[1]);
  params.heads = static_cast<int32_t>(q[2]);
  params.kv_heads = static_cast<int32_t>(k[2]);
  params.head_dim = static_cast<int32_t>(q[3]);
  params.head_dim_v = static_cast<int32_t>(v[3]);
  params.room = static_cast<int32_t>(room);
  params.pages = static_cast<int32_t>(k[0]);
  params.window_left = static_cast<int32_t>(window_left);
  params.split_keys = static_cast<int32_t>(split_keys);
  params.splits = static_cast<int32_t>(splits);
  params.scale = scale;
  params.softcap = softcap;

  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  if (forward_parts > 0 && device.compute_capability == 90 && !force_sm80()) {
    return launch_forward(params, forward_parts, device, stream);
  }
  JAX_FLASH_RETURN_IF_ERROR(counters->get(&params.counters));
  const cudaError_t error = decode::launch(cache_type_of(cache_type), params, device, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_decode", error);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kDecode, decode_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::State<DecodeCounters>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window_left")
                                  .Attr<int64_t>("split_keys")
                                  .Attr<int64_t>("splits")
                                  .Attr<bool>("has_page_table")
                                  .Attr<bool>("has_sinks")
                                  .Attr<bool>("has_slopes")
                                  .Attr<bool>("has_k_scale")
                                  .Attr<bool>("has_v_scale")
                                  .Attr<int64_t>("forward_parts"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
