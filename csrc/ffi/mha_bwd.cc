// FFI target jax_flash_mha_bwd: decode, check, fill the parameters, launch.
//
// query, key and value as for jax_flash_mha_fwd, out and dout [*batch, T, N, Hv], lse f32
// [*batch, N, T], then dlse like lse if its attribute says so, and the lengths or intervals -> the
// gradients of query, key and value, each with the full batch and in query's type or f32, and a
// workspace f32 [floats], of which plan.py in jax_flash/_src says the size, and that of a bias if
// has_dbias, see operands.h. may_split: products of f32 operands may be those of split bf16.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/operands.h"
#include "host/device.h"
#include "host/dispatch.h"
#include "host/params.h"

namespace jax_flash {
namespace {

ffi::Error check_type(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type) {
  JAX_FLASH_CHECK(buffer.element_type() == type, name, " must be ", type, ", got ",
                  buffer.element_type());
  return ffi::Error::Success();
}

// Checks that `buffer` is [*batch, *trailing].
ffi::Error check_dims(const char* name, const ffi::AnyBuffer& buffer, const MhaOperands& operands,
                      std::initializer_list<int64_t> trailing) {
  std::vector<int64_t> expected = operands.batch_sizes();
  expected.insert(expected.end(), trailing);
  const Dims dims = buffer.dimensions();
  JAX_FLASH_CHECK(std::equal(dims.begin(), dims.end(), expected.begin(), expected.end()), name,
                  " must be ", to_string(Dims(expected.data(), expected.size())), ", got ",
                  to_string(dims));
  return ffi::Error::Success();
}

// A gradient in the operands' type or in f32.
struct Gradient {
  const char* name;
  ffi::AnyBuffer buffer;
  int64_t length;
  int64_t heads;
  int64_t width;
  void** data;
  bool* is_f32;
};

ffi::Error decode_gradient(const Gradient& gradient, const MhaOperands& operands) {
  const ffi::DataType type = gradient.buffer.element_type();
  JAX_FLASH_CHECK(type == operands.data_type() || type == ffi::F32, gradient.name,
                  " must have query's type or f32, got ", type);
  *gradient.data = gradient.buffer.untyped_data();
  *gradient.is_f32 = type == ffi::F32;
  return check_dims(gradient.name, gradient.buffer, operands,
                    {gradient.length, gradient.heads, gradient.width});
}

// Cuts the workspace into its parts, each of which begins at a multiple of 16 bytes because rows
// are padded to many more than four.
ffi::Error divide_workspace(const ffi::AnyBuffer& workspace, int width, MhaBwdParams* params) {
  const int64_t rows =
      int64_t{params->batch} * params->heads * bwd_padded_rows(params->query_length);
  const bool has_intervals = params->intervals.rows != nullptr;
  const int64_t floats = rows * (width + 2) + rows / kBwdTurnRows + kBwdQueueEntries +
                         (has_intervals ? queue_size(params->batch, params->key_length) : 0);
  JAX_FLASH_CHECK(static_cast<int64_t>(workspace.element_count()) >= floats,
                  "the workspace must have ", floats, " floats, got ", workspace.element_count());
  params->dquery_sum = static_cast<float*>(workspace.untyped_data());
  params->row_lse = params->dquery_sum + rows * width;
  params->row_delta = params->row_lse + rows;
  params->turns = reinterpret_cast<int32_t*>(params->row_delta + rows);
  params->queue = params->turns + rows / kBwdTurnRows;
  if (has_intervals) params->intervals.queue = params->queue + kBwdQueueEntries;
  params->parts = params->dquery_sum + floats;
  params->part_floats = static_cast<int64_t>(workspace.element_count()) - floats;
  return ffi::Error::Success();
}

// Enqueues the kernels that suit the operands and the current device.
ffi::Error launch(MhaBwdParams* params, ElementType type, bool may_split,
                  const ffi::AnyBuffer& workspace, cudaStream_t stream) {
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const int32_t alignment =
      std::min({params->query.alignment, params->key.alignment, params->value.alignment,
                dense_row_alignment(type, params->out, params->head_dim_v),
                dense_row_alignment(type, params->dout, params->head_dim_v),
                dense_row_alignment(type, params->dquery, params->head_dim),
                dense_row_alignment(type, params->dkey, params->head_dim),
                dense_row_alignment(type, params->dvalue, params->head_dim_v)});
  const MhaBwdKernel* const kernel =
      choose_mha_bwd_kernel({type, params->head_dim, params->head_dim_v, params->key_length,
                             params->batch_dims, alignment, device.compute_capability, force_sm80(),
                             params->intervals.rows != nullptr, may_split});
  JAX_FLASH_CHECK(kernel != nullptr, "no kernel for widths ", params->head_dim, " and ",
                  params->head_dim_v);
  JAX_FLASH_RETURN_IF_ERROR(divide_workspace(workspace, bwd_sum_width(kernel->head_dim), params));
  const cudaError_t error = kernel->launch(*params, device, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_mha_bwd", error);
  return ffi::Error::Success();
}

ffi::Error mha_bwd(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                   ffi::AnyBuffer value, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                   ffi::AnyBuffer dout, ffi::RemainingArgs others,
                   ffi::Result<ffi::AnyBuffer> dquery, ffi::Result<ffi::AnyBuffer> dkey,
                   ffi::Result<ffi::AnyBuffer> dvalue, ffi::Result<ffi::AnyBuffer> workspace,
                   ffi::RemainingRets more, bool has_dlse, bool has_dbias, bool has_dslopes,
                   bool deterministic, bool may_split, float scale, int64_t window_left,
                   int64_t window_right, bool bottom_right, bool has_query_lengths,
                   bool has_kv_lengths, bool has_intervals, bool has_slopes, float softcap,
                   bool tf32, int64_t dropout, bool has_mask, bool has_bias, int64_t packed_heads,
                   int64_t packed_kv_heads, Dims query_order, Dims key_order, Dims value_order) {
  MhaBwdParams params{};
  MhaOperands operands(
      {scale, window_left, window_right, bottom_right, has_query_lengths, has_kv_lengths,
       has_intervals, has_slopes, softcap, tf32, dropout, has_mask, has_bias, packed_heads,
       packed_kv_heads, query_order, key_order, value_order},
      &params);
  JAX_FLASH_RETURN_IF_ERROR(operands.decode(query, key, value));
  // The batch of dout is full, that of every other operand may be shared.
  JAX_FLASH_CHECK(dout.dimensions().size() == operands.rank() && operands.join(dout.dimensions()),
                  "dout ", to_string(dout.dimensions()), " does not fit the batch dims of ",
                  to_string(operands.query_dims()));
  const size_t skipped = has_dlse ? 1 : 0;
  JAX_FLASH_CHECK(others.size() >= skipped, "has_dlse is true, but there is no dlse");
  JAX_FLASH_RETURN_IF_ERROR(operands.decode_mask(others, skipped));

  const int64_t rows = params.query_length;
  const int64_t heads = params.heads;
  JAX_FLASH_CHECK(operands.batch_size() > 0 && rows > 0 && heads > 0 && params.key_length > 0 &&
                      params.head_dim > 0 && params.head_dim_v > 0,
                  "no operand may be empty, got query ", to_string(operands.query_dims()),
                  " and value ", to_string(value.dimensions()));
  const ffi::DataType type = operands.data_type();
  JAX_FLASH_RETURN_IF_ERROR(check_type("out", out, type));
  JAX_FLASH_RETURN_IF_ERROR(check_type("lse", lse, ffi::F32));
  JAX_FLASH_RETURN_IF_ERROR(check_type("dout", dout, type));
  JAX_FLASH_RETURN_IF_ERROR(check_type("workspace", *workspace, ffi::F32));
  JAX_FLASH_RETURN_IF_ERROR(check_dims("out", out, operands, {rows, heads, params.head_dim_v}));
  JAX_FLASH_RETURN_IF_ERROR(check_dims("lse", lse, operands, {heads, rows}));
  JAX_FLASH_RETURN_IF_ERROR(check_dims("dout", dout, operands, {rows, heads, params.head_dim_v}));
  params.out = out.untyped_data();
  params.lse = static_cast<const float*>(lse.untyped_data());
  params.dout = dout.untyped_data();
  if (has_dlse) {
    const auto dlse = others.get<ffi::AnyBuffer>(0);
    if (!dlse.has_value()) return dlse.error();
    JAX_FLASH_RETURN_IF_ERROR(check_type("dlse", *dlse, ffi::F32));
    JAX_FLASH_RETURN_IF_ERROR(check_dims("dlse", *dlse, operands, {heads, rows}));
    params.dlse = static_cast<const float*>(dlse->untyped_data());
  }
  const Gradient gradients[] = {
      {"dquery", *dquery, rows, heads, params.head_dim, &params.dquery, &params.f32_dquery},
      {"dkey", *dkey, params.key_length, params.kv_heads, params.head_dim, &params.dkey,
       &params.f32_dkey},
      {"dvalue", *dvalue, params.key_length, params.kv_heads, params.head_dim_v, &params.dvalue,
       &params.f32_dvalue},
  };
  for (const Gradient& gradient : gradients) {
    JAX_FLASH_RETURN_IF_ERROR(decode_gradient(gradient, operands));
  }
  JAX_FLASH_CHECK((has_bias || !has_dbias) && (has_slopes || !has_dslopes), "has_dbias is ",
                  has_dbias, " with has_bias ", has_bias, ", has_dslopes ", has_dslopes,
                  " with has_slopes ", has_slopes);
  JAX_FLASH_CHECK(more.size() == size_t{has_dbias} + size_t{has_dslopes}, "has_dbias is ",
                  has_dbias, " and has_dslopes ", has_dslopes, ", but there are ", more.size(),
                  " results more");
  if (has_dbias) {
    auto dbias = more.get<ffi::AnyBuffer>(0);
    if (!dbias.has_value()) return dbias.error();
    JAX_FLASH_RETURN_IF_ERROR(operands.decode_bias_gradient(**dbias, &params.dbias));
    JAX_FLASH_CHECK(!deterministic || !params.dbias.shared,
                    "sums of the gradient of a bias have no order: deterministic is not possible");
    const cudaError_t error = cudaMemsetAsync(params.dbias.data, 0, (*dbias)->size_bytes(), stream);
    if (error != cudaSuccess) return cuda_failure("zeroing the gradient of a bias", error);
  }
  if (has_dslopes) {
    auto dslopes = more.get<ffi::AnyBuffer>(has_dbias ? 1 : 0);
    if (!dslopes.has_value()) return dslopes.error();
    JAX_FLASH_RETURN_IF_ERROR(check_type("dslopes", **dslopes, ffi::F32));
    JAX_FLASH_RETURN_IF_ERROR(
        check_dims("dslopes", **dslopes, operands, {heads, kSlopeParts, params.key_length}));
    params.dslopes = static_cast<float*>((*dslopes)->untyped_data());
    const cudaError_t error = cudaMemsetAsync(params.dslopes, 0, (*dslopes)->size_bytes(), stream);
    if (error != cudaSuccess) return cuda_failure("zeroing the gradient of slopes", error);
  }
  JAX_FLASH_RETURN_IF_ERROR(operands.finish());
  params.factor = scale;
  params.deterministic = deterministic;
  JAX_FLASH_CHECK(!may_split || operands.data_type() == ffi::F32,
                  "may_split is for query of f32, got ", operands.data_type());
  return launch(&params, operands.type(), may_split, *workspace, stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kMhaBwd, mha_bwd,
                              bind_mha_attributes(ffi::Ffi::Bind()
                                                      .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .RemainingArgs()
                                                      .Ret<ffi::AnyBuffer>()
                                                      .Ret<ffi::AnyBuffer>()
                                                      .Ret<ffi::AnyBuffer>()
                                                      .Ret<ffi::AnyBuffer>()
                                                      .RemainingRets()
                                                      .Attr<bool>("has_dlse")
                                                      .Attr<bool>("has_dbias")
                                                      .Attr<bool>("has_dslopes")
                                                      .Attr<bool>("deterministic")
                                                      .Attr<bool>("may_split")),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
