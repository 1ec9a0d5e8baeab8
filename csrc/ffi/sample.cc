// FFI targets jax_flash_sample and jax_flash_top_k: decode, check, fill the parameters, launch.
//
// sample: logits [G, R, V], parameters u32 [G, R, 6] (jax_flash/_src/sample_reference.py), then a
// mask bool [G, R, V] if has_mask -> tokens i32 [G, R]. top_k: logits [G, R, V] -> values
// [G, R, k] in their type, indices i32 [G, R, k]. G and R of an operand are full or 1.
#include <cstdint>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/rows.h"
#include "host/device.h"
#include "ops/launch.h"

namespace jax_flash {
namespace {

constexpr int64_t kMaxVocabulary = 1 << 20;  // so that sums of weights stay below 2^50
constexpr int64_t kMaxRanked = 256;          // as in ops/sample_shared.cuh

ffi::Error check_logits(const ffi::AnyBuffer& logits) {
  const auto dims = logits.dimensions();
  JAX_FLASH_CHECK(dims.size() == 3 && dims[2] >= 1 && dims[2] <= kMaxVocabulary,
                  "logits must be [groups, rows, V] with V from 1 to ", kMaxVocabulary, ", got ",
                  to_string(dims));
  JAX_FLASH_CHECK(element_of(logits.element_type()).has_value(),
                  "logits must be f32, bf16 or f16, got ", logits.element_type());
  return ffi::Error::Success();
}

ffi::Error sample(cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer table,
                  ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> tokens, bool has_mask) {
  JAX_FLASH_RETURN_IF_ERROR(check_logits(logits));
  const int64_t size = logits.dimensions()[2];
  const auto dims = tokens->dimensions();
  JAX_FLASH_CHECK(dims.size() == 2 && is_index(dims[0] * dims[1]),
                  "tokens must be [groups, rows], got ", to_string(dims));
  const RowOperands operands(dims[0], dims[1]);
  ops::SampleParams params{};
  JAX_FLASH_RETURN_IF_ERROR(operands.decode("logits", logits, size, &params.logits));
  JAX_FLASH_CHECK(table.element_type() == ffi::U32, "parameters must be u32, got ",
                  table.element_type());
  JAX_FLASH_RETURN_IF_ERROR(operands.decode("parameters", table, 6, &params.table));
  JAX_FLASH_CHECK(others.size() == (has_mask ? 1u : 0u), "has_mask is ", has_mask,
                  ", but there are ", others.size(), " further operands");
  if (has_mask) {
    auto mask = others.get<ffi::AnyBuffer>(0);
    if (mask.has_error()) return mask.error();
    JAX_FLASH_CHECK(mask->element_type() == ffi::PRED, "mask must be bool, got ",
                    mask->element_type());
    JAX_FLASH_RETURN_IF_ERROR(operands.decode("mask", *mask, size, &params.mask));
  }
  JAX_FLASH_RETURN_IF_ERROR(operands.check_result("tokens", *tokens, 1, ffi::S32));
  if (operands.count() == 0) return ffi::Error::Success();
  params.tokens = static_cast<int32_t*>(tokens->untyped_data());
  params.rows = static_cast<int32_t>(operands.rows());
  params.size = static_cast<int32_t>(size);
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const cudaError_t error = ops::launch_sample(params, operands.count(),
                                               *element_of(logits.element_type()), device, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_sample", error);
  return ffi::Error::Success();
}

ffi::Error top_k(cudaStream_t stream, ffi::AnyBuffer logits, ffi::Result<ffi::AnyBuffer> values,
                 ffi::Result<ffi::AnyBuffer> indices) {
  JAX_FLASH_RETURN_IF_ERROR(check_logits(logits));
  const int64_t size = logits.dimensions()[2];
  const auto dims = indices->dimensions();
  JAX_FLASH_CHECK(dims.size() == 3 && is_index(dims[0] * dims[1]),
                  "indices must be [groups, rows, k], got ", to_string(dims));
  const int64_t k = dims[2];
  JAX_FLASH_CHECK(k <= kMaxRanked && k <= size, "k must be at most ", kMaxRanked, " and V=", size,
                  ", got ", k);
  const RowOperands operands(dims[0], dims[1]);
  ops::TopKParams params{};
  JAX_FLASH_RETURN_IF_ERROR(operands.decode("logits", logits, size, &params.logits));
  JAX_FLASH_RETURN_IF_ERROR(operands.check_result("values", *values, k, logits.element_type()));
  JAX_FLASH_RETURN_IF_ERROR(operands.check_result("indices", *indices, k, ffi::S32));
  if (operands.count() == 0 || k == 0) return ffi::Error::Success();
  params.values = values->untyped_data();
  params.indices = static_cast<int32_t*>(indices->untyped_data());
  params.rows = static_cast<int32_t>(operands.rows());
  params.size = static_cast<int32_t>(size);
  params.k = static_cast<int32_t>(k);
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const cudaError_t error = ops::launch_top_k(params, operands.count(),
                                              *element_of(logits.element_type()), device, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_top_k", error);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kSample, sample,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("has_mask"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(kTopK, top_k,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
