// FFI target jax_flash_mha_fwd: decode, check, fill the parameters, launch.
//
// query [*batch, T, N, H], key [*batch, S, K, H], value [*batch, S, K, Hv], or for each of them the
// array of all three, [*batch, T, (N + 2 K) H], whose N and K the attributes packed_heads and
// packed_kv_heads are, otherwise 0; then int32 [*batch] query lengths and key lengths, each if its
// attribute says so, or with intervals the arrays of host/intervals.h and, if there are any,
// slopes, seeds, bits of a mask and a bias
// -> out [*batch, T, N, Hv] in query's type, lse f32 [*batch, N, T] and scratch: with intervals
// int32 [row_list_size], then, for operands of f32, bf16 [split_elements] if products may be those
// of split operands. Batch dims of an operand are full or 1 (shared).
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/operands.h"
#include "host/device.h"
#include "host/dispatch.h"
#include "host/params.h"
#include "host/split.h"

namespace jax_flash {
namespace {

// Enqueues the kernel that suits the operands and the current device. `parts`: for how many bf16
// there is room.
ffi::Error launch(const MhaFwdParams& params, ElementType type, int64_t parts,
                  cudaStream_t stream) {
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const int32_t alignment =
      std::min({params.query.alignment, params.key.alignment, params.value.alignment,
                dense_row_alignment(type, params.out, params.head_dim_v)});
  const MhaFwdKernel* const kernel =
      choose_mha_fwd_kernel({type, params.head_dim, params.head_dim_v, params.key_length,
                             params.batch_dims, alignment, device.compute_capability, force_sm80(),
                             params.intervals.rows != nullptr, params.parts != nullptr});
  JAX_FLASH_CHECK(kernel != nullptr, "no kernel for widths ", params.head_dim, " and ",
                  params.head_dim_v);
  if (kernel->type == ElementType::kSplit) {
    const int64_t needed = split_elements(params, kernel->head_dim, kernel->head_dim_v);
    JAX_FLASH_CHECK(parts >= needed, "the parts of the operands are ", needed,
                    " bf16, there is room for ", parts);
  }
  const cudaError_t error = kernel->launch(params, device, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_mha_fwd", error);
  return ffi::Error::Success();
}

ffi::Error decode_queue(const ffi::RemainingRets& scratch, MhaFwdParams* params) {
  auto queue = scratch.get<ffi::AnyBuffer>(0);  // older headers have no const access
  if (queue.has_error()) return queue.error();
  const int64_t size = row_list_size(params->batch, params->query_length);
  JAX_FLASH_CHECK((*queue)->element_type() == ffi::S32 &&
                      static_cast<int64_t>((*queue)->element_count()) >= size,
                  "the queue must have ", size, " int32, got ", (*queue)->element_count(), " of ",
                  (*queue)->element_type());
  params->intervals.queue = static_cast<int32_t*>((*queue)->untyped_data());
  return ffi::Error::Success();
}

// Where the parts of split operands may go, and for how many there is room.
ffi::Error decode_parts(const ffi::RemainingRets& scratch, size_t index, MhaFwdParams* params,
                        int64_t* count) {
  auto parts = scratch.get<ffi::AnyBuffer>(index);
  if (parts.has_error()) return parts.error();
  JAX_FLASH_CHECK((*parts)->element_type() == ffi::BF16, "parts must be bf16, got ",
                  (*parts)->element_type());
  params->parts = (*parts)->untyped_data();
  *count = static_cast<int64_t>((*parts)->element_count());
  return ffi::Error::Success();
}

ffi::Error mha_fwd(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                   ffi::AnyBuffer value, ffi::RemainingArgs mask, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> lse, ffi::RemainingRets scratch, float scale,
                   int64_t window_left, int64_t window_right, bool bottom_right,
                   bool has_query_lengths, bool has_kv_lengths, bool has_intervals, bool has_slopes,
                   float softcap, bool tf32, int64_t dropout, bool has_mask, bool has_bias,
                   int64_t packed_heads, int64_t packed_kv_heads, Dims query_order, Dims key_order,
                   Dims value_order) {
  MhaFwdParams params{};
  MhaOperands operands(
      {scale, window_left, window_right, bottom_right, has_query_lengths, has_kv_lengths,
       has_intervals, has_slopes, softcap, tf32, dropout, has_mask, has_bias, packed_heads,
       packed_kv_heads, query_order, key_order, value_order},
      &params);
  JAX_FLASH_RETURN_IF_ERROR(operands.decode(query, key, value));
  JAX_FLASH_RETURN_IF_ERROR(operands.decode_mask(mask, 0));

  const Dims q = operands.query_dims();
  const int64_t rows = operands.batch_size() * params.query_length * params.heads;
  JAX_FLASH_CHECK(rows * params.head_dim_v == static_cast<int64_t>(out->element_count()), "out ",
                  to_string(out->dimensions()), " does not fit query ", to_string(q));
  JAX_FLASH_CHECK(rows == static_cast<int64_t>(lse->element_count()), "lse ",
                  to_string(lse->dimensions()), " does not fit query ", to_string(q));
  JAX_FLASH_CHECK(out->element_type() == operands.data_type() && lse->element_type() == ffi::F32,
                  "out must have query's type and lse f32, got ", out->element_type(), " and ",
                  lse->element_type());
  if (out->element_count() == 0) return ffi::Error::Success();
  JAX_FLASH_RETURN_IF_ERROR(operands.finish());
  params.out = out->untyped_data();
  params.lse = static_cast<float*>(lse->untyped_data());
  const size_t queues = has_intervals ? 1 : 0;
  const bool may_split = operands.data_type() == ffi::F32 && scratch.size() > queues;
  JAX_FLASH_CHECK(scratch.size() == queues + (may_split ? 1 : 0), "has_intervals is ",
                  has_intervals, ", but there are ", scratch.size(), " results after lse");
  if (has_intervals) JAX_FLASH_RETURN_IF_ERROR(decode_queue(scratch, &params));
  int64_t parts = 0;
  if (may_split) JAX_FLASH_RETURN_IF_ERROR(decode_parts(scratch, queues, &params, &parts));
  return launch(params, operands.type(), parts, stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kMhaFwd, mha_fwd,
                              bind_mha_attributes(ffi::Ffi::Bind()
                                                      .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .Arg<ffi::AnyBuffer>()
                                                      .RemainingArgs()
                                                      .Ret<ffi::AnyBuffer>()
                                                      .Ret<ffi::AnyBuffer>()
                                                      .RemainingRets()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
