// FFI target jax_flash_mha_fwd: decode, check, fill the parameters, launch.
//
// query [*batch, T, N, H], key [*batch, S, K, H], value [*batch, S, K, Hv], then int32 [*batch]
// query lengths and key lengths, each if its attribute says so -> out [*batch, T, N, Hv] in
// query's type, lse f32 [*batch, N, T]. Batch dims of an operand are full or 1 (shared).
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/layout.h"
#include "host/device.h"
#include "host/dispatch.h"
#include "host/params.h"
#include "tile/mask.cuh"

namespace jax_flash {
namespace {

using Dims = ffi::Span<const int64_t>;

// What every row's address is a multiple of, in bytes, out of what the kernels make use of.
int32_t row_alignment(const void* data, std::span<const int64_t> strides) {
  uint64_t bits = reinterpret_cast<uintptr_t>(data);
  for (const int64_t stride : strides) bits |= static_cast<uint64_t>(2 * stride);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

TensorView tensor_view(const ffi::AnyBuffer& buffer, const std::vector<int64_t>& strides) {
  TensorView view{};
  view.data = buffer.untyped_data();
  view.row_stride = strides[strides.size() - 3];
  view.head_stride = strides[strides.size() - 2];
  view.alignment = row_alignment(view.data, std::span(strides).first(strides.size() - 1));
  return view;
}

// Enqueues the kernel that suits the operands and the current device.
ffi::Error launch(const MhaFwdParams& params, ElementType type, cudaStream_t stream) {
  DeviceInfo device{};
  cudaError_t error = current_device_info(&device);
  if (error != cudaSuccess) return cuda_failure("asking for the device", error);
  const int capability = device.compute_capability;
  JAX_FLASH_CHECK(capability >= 80,
                  "the kernels need compute capability 8.0 or newer, this device has ",
                  capability / 10, ".", capability % 10);

  const int64_t out_strides[] = {params.head_dim_v};
  const int32_t alignment =
      std::min({params.query.alignment, params.key.alignment, params.value.alignment,
                row_alignment(params.out, out_strides)});
  const MhaFwdKernel* const kernel =
      choose_mha_fwd_kernel({type, params.head_dim, params.head_dim_v, params.key_length,
                             params.batch_dims, alignment, capability, force_sm80()});
  JAX_FLASH_CHECK(kernel != nullptr, "no kernel for widths ", params.head_dim, " and ",
                  params.head_dim_v);
  error = kernel->launch(params, device, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_mha_fwd", error);
  return ffi::Error::Success();
}

ffi::Error mha_fwd(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                   ffi::AnyBuffer value, ffi::RemainingArgs lengths,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse, float scale,
                   int64_t window_left, int64_t window_right, bool bottom_right,
                   bool has_query_lengths, bool has_kv_lengths, Dims query_order, Dims key_order,
                   Dims value_order) {
  const Dims q = query.dimensions();
  const Dims k = key.dimensions();
  const Dims v = value.dimensions();
  const size_t rank = q.size();
  JAX_FLASH_CHECK(rank >= 4 && k.size() == rank && v.size() == rank,
                  "query, key and value must be [*batch, length, heads, width] with the same "
                  "number of batch dims, at least one; got ",
                  to_string(q), ", ", to_string(k), " and ", to_string(v));
  const size_t batch_rank = rank - 3;
  const int64_t query_length = q[rank - 3];
  const int64_t heads = q[rank - 2];
  const int64_t head_dim = q[rank - 1];
  const int64_t key_length = k[rank - 3];
  const int64_t kv_heads = k[rank - 2];
  const int64_t head_dim_v = v[rank - 1];
  JAX_FLASH_CHECK(k[rank - 1] == head_dim, "key has width ", k[rank - 1], ", query ", head_dim);
  JAX_FLASH_CHECK(v[rank - 3] == key_length && v[rank - 2] == kv_heads, "value ", to_string(v),
                  " must have the length and heads of key ", to_string(k));
  JAX_FLASH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "query heads ", heads,
                  " must be a multiple of key heads ", kv_heads);
  JAX_FLASH_CHECK(query_length < kMaxLength && key_length < kMaxLength, "lengths ", query_length,
                  " and ", key_length, " must be below ", kMaxLength);
  JAX_FLASH_CHECK(window_left >= -1 && window_right >= -1,
                  "windows must be -1 (unbounded) or not negative; got left ", window_left,
                  ", right ", window_right);

  const ffi::DataType type = query.element_type();
  JAX_FLASH_CHECK(type == ffi::BF16 || type == ffi::F16, "query must be bf16 or f16, got ", type);
  JAX_FLASH_CHECK(key.element_type() == type && value.element_type() == type,
                  "key and value must have query's type ", type, ", got ", key.element_type(),
                  " and ", value.element_type());

  // Operands and their strides: query, key, value, then lengths.
  const Dims orders[] = {query_order, key_order, value_order};
  const ffi::AnyBuffer* const tensors[] = {&query, &key, &value};
  BatchDims batch(batch_rank);
  std::vector<std::vector<int64_t>> strides;
  for (int i = 0; i < 3; ++i) {
    const Dims dims = tensors[i]->dimensions();
    JAX_FLASH_CHECK(is_order_with_minor_width(orders[i], rank), "operand ", i, " has dim order ",
                    to_string(orders[i]), ", which is no permutation that ends with the width");
    JAX_FLASH_CHECK(batch.join(dims), "batch dims of ", to_string(q), ", ", to_string(k), " and ",
                    to_string(v), " must be equal or 1");
    strides.push_back(dense_strides(dims, orders[i]));
  }
  MhaFwdParams params{};
  params.query = tensor_view(query, strides[0]);
  params.key = tensor_view(key, strides[1]);
  params.value = tensor_view(value, strides[2]);
  std::vector<int64_t*> merged = {params.query.batch_strides, params.key.batch_strides,
                                  params.value.batch_strides};
  std::vector<Dims> dims = {q, k, v};

  LengthsView* const views[] = {has_query_lengths ? &params.query_lengths : nullptr,
                                has_kv_lengths ? &params.key_lengths : nullptr};
  const size_t expected = size_t{has_query_lengths} + size_t{has_kv_lengths};
  JAX_FLASH_CHECK(lengths.size() == expected, "expected ", expected, " length operands, got ",
                  lengths.size());
  size_t next = 0;
  for (LengthsView* const view : views) {
    if (view == nullptr) continue;
    const auto buffer = lengths.get<ffi::AnyBuffer>(next++);
    if (!buffer.has_value()) return buffer.error();
    JAX_FLASH_CHECK(buffer->element_type() == ffi::S32, "lengths must be int32, got ",
                    buffer->element_type());
    JAX_FLASH_CHECK(buffer->dimensions().size() == batch_rank && batch.join(buffer->dimensions()),
                    "lengths ", to_string(buffer->dimensions()), " do not fit the batch dims of ",
                    to_string(q));
    view->data = static_cast<const int32_t*>(buffer->untyped_data());
    dims.push_back(buffer->dimensions());
    strides.push_back(row_major_strides(buffer->dimensions()));
    merged.push_back(view->batch_strides);
  }

  const int64_t batch_size = batch.count();
  JAX_FLASH_CHECK(
      batch_size * query_length * heads * head_dim_v == static_cast<int64_t>(out->element_count()),
      "out ", to_string(out->dimensions()), " does not fit query ", to_string(q));
  JAX_FLASH_CHECK(batch_size * query_length * heads == static_cast<int64_t>(lse->element_count()),
                  "lse ", to_string(lse->dimensions()), " does not fit query ", to_string(q));
  JAX_FLASH_CHECK(out->element_type() == type && lse->element_type() == ffi::F32,
                  "out must have query's type and lse f32, got ", out->element_type(), " and ",
                  lse->element_type());
  if (out->element_count() == 0) return ffi::Error::Success();
  JAX_FLASH_CHECK(batch_size * heads < kMaxLength, "batch ", batch_size, " times heads ", heads,
                  " must be below ", kMaxLength);

  for (size_t i = 0; i < dims.size(); ++i) {
    for (size_t dim = 0; dim < batch_rank; ++dim) {
      if (dims[i][dim] == 1) strides[i][dim] = 0;  // shared
    }
  }
  params.batch_dims = batch.merge(strides, params.batch_sizes, merged);
  JAX_FLASH_CHECK(params.batch_dims > 0, "more than ", kMaxBatchDims,
                  " batch dims that cannot be merged");
  params.out = out->untyped_data();
  params.lse = static_cast<float*>(lse->untyped_data());
  params.batch = static_cast<int32_t>(batch_size);
  params.query_length = static_cast<int32_t>(query_length);
  params.key_length = static_cast<int32_t>(key_length);
  params.heads = static_cast<int32_t>(heads);
  params.kv_heads = static_cast<int32_t>(kv_heads);
  params.head_dim = static_cast<int32_t>(head_dim);
  params.head_dim_v = static_cast<int32_t>(head_dim_v);
  params.scale = SoftmaxScale::make(scale);
  params.window_left = static_cast<int32_t>(std::min<int64_t>(window_left, kMaxLength));
  params.window_right = static_cast<int32_t>(std::min<int64_t>(window_right, kMaxLength));
  params.bottom_right = bottom_right;

  return launch(params, type == ffi::BF16 ? ElementType::kBf16 : ElementType::kF16, stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kMhaFwd, mha_fwd,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window_left")
                                  .Attr<int64_t>("window_right")
                                  .Attr<bool>("bottom_right")
                                  .Attr<bool>("has_query_lengths")
                                  .Attr<bool>("has_kv_lengths")
                                  .Attr<Dims>("query_order")
                                  .Attr<Dims>("key_order")
                                  .Attr<Dims>("value_order"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
