// FFI targets jax_flash_rms_norm and jax_flash_rms_norm_bwd: decode, check, fill the parameters,
// launch.
//
// rms_norm: x [G, R, C], weight [G, C] in x's type or f32, then a residual like x if has_residual
// -> y [G, R, C], the sum like y if there is a residual, 1 / rms f32 [G, R]. rms_norm_bwd: x,
// weight, 1 / rms, dy like x, then the sum's gradient like x if has_sum -> dx [G, R, C], f32
// [G, blocks, C] parts of the gradient of the weight. G and R of an operand are full or 1.
#include <cstdint>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "ffi/rows.h"
#include "host/device.h"
#include "ops/launch.h"

namespace jax_flash {
namespace {

ffi::Error check_types(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight) {
  JAX_FLASH_CHECK(x.dimensions().size() == 3 && x.dimensions()[2] >= 1,
                  "x must be [groups, rows, columns], got ", to_string(x.dimensions()));
  JAX_FLASH_CHECK(element_of(x.element_type()).has_value(), "x must be f32, bf16 or f16, got ",
                  x.element_type());
  JAX_FLASH_CHECK(weight.element_type() == x.element_type() || weight.element_type() == ffi::F32,
                  "weight must have x's type or f32, got ", weight.element_type());
  return ffi::Error::Success();
}

ffi::Error check_like(const char* name, const ffi::AnyBuffer& buffer, const ffi::AnyBuffer& x) {
  JAX_FLASH_CHECK(buffer.element_type() == x.element_type(), name, " must have x's type, got ",
                  buffer.element_type());
  return ffi::Error::Success();
}

ffi::Error rms_norm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                    ffi::RemainingArgs others, ffi::Result<ffi::AnyBuffer> y,
                    ffi::RemainingRets results, float eps, bool has_residual) {
  JAX_FLASH_RETURN_IF_ERROR(check_types(x, weight));
  const int64_t columns = x.dimensions()[2];
  const auto dims = y->dimensions();
  JAX_FLASH_CHECK(dims.size() == 3 && is_index(dims[0]) && is_index(dims[1]) && is_index(columns),
                  "y must be [groups, rows, columns], got ", to_string(dims));
  const size_t residuals = has_residual ? 1 : 0;
  JAX_FLASH_CHECK(others.size() == residuals && results.size() == residuals + 1, "has_residual is ",
                  has_residual, ", but there are ", others.size(), " further operands and ",
                  results.size(), " further results");
  const RowOperands operands(dims[0], dims[1]);
  ops::RmsNormParams params{};
  JAX_FLASH_RETURN_IF_ERROR(operands.decode("x", x, columns, &params.x));
  JAX_FLASH_RETURN_IF_ERROR(operands.decode_of_groups("weight", weight, columns, &params.weight));
  JAX_FLASH_RETURN_IF_ERROR(operands.check_result("y", *y, columns, x.element_type()));
  if (has_residual) {
    auto residual = others.get<ffi::AnyBuffer>(0);
    if (residual.has_error()) return residual.error();
    auto sum = results.get<ffi::AnyBuffer>(0);
    if (sum.has_error()) return sum.error();
    JAX_FLASH_RETURN_IF_ERROR(check_like("residual", *residual, x));
    JAX_FLASH_RETURN_IF_ERROR(operands.decode("residual", *residual, columns, &params.residual));
    JAX_FLASH_RETURN_IF_ERROR(operands.check_result("sum", **sum, columns, x.element_type()));
    params.sum = (*sum)->untyped_data();
  }
  auto scale = results.get<ffi::AnyBuffer>(residuals);
  if (scale.has_error()) return scale.error();
  JAX_FLASH_RETURN_IF_ERROR(operands.check_result("1 / rms", **scale, 1, ffi::F32));
  if (operands.count() == 0) return ffi::Error::Success();
  params.y = y->untyped_data();
  params.scale = static_cast<float*>((*scale)->untyped_data());
  params.groups = static_cast<int32_t>(operands.groups());
  params.rows = static_cast<int32_t>(operands.rows());
  params.columns = static_cast<int32_t>(columns);
  params.eps = eps;
  params.f32_weight = weight.element_type() == ffi::F32;
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const cudaError_t error =
      ops::launch_rms_norm(params, *element_of(x.element_type()), device, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_rms_norm", error);
  return ffi::Error::Success();
}

ffi::Error rms_norm_bwd(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                        ffi::AnyBuffer scale, ffi::AnyBuffer dy, ffi::RemainingArgs others,
                        ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> parts,
                        bool has_sum) {
  JAX_FLASH_RETURN_IF_ERROR(check_types(x, weight));
  const int64_t columns = x.dimensions()[2];
  const auto dims = dx->dimensions();
  const auto part_dims = parts->dimensions();
  JAX_FLASH_CHECK(dims.size() == 3 && is_index(dims[0]) && is_index(dims[1]) && is_index(columns),
                  "dx must be [groups, rows, columns], got ", to_string(dims));
  JAX_FLASH_CHECK(parts->element_type() == ffi::F32 && part_dims.size() == 3 &&
                      part_dims[0] == dims[0] && part_dims[1] >= 1 && is_index(part_dims[1]) &&
                      part_dims[2] == columns,
                  "the parts must be f32 [", dims[0], ", blocks, ", columns, "], got ",
                  to_string(part_dims), " of ", parts->element_type());
  JAX_FLASH_CHECK(others.size() == (has_sum ? 1u : 0u), "has_sum is ", has_sum, ", but there are ",
                  others.size(), " further operands");
  const RowOperands operands(dims[0], dims[1]);
  ops::RmsNormBwdParams params{};
  JAX_FLASH_RETURN_IF_ERROR(operands.decode("x", x, columns, &params.x));
  JAX_FLASH_RETURN_IF_ERROR(operands.decode_of_groups("weight", weight, columns, &params.weight));
  JAX_FLASH_RETURN_IF_ERROR(check_like("dy", dy, x));
  JAX_FLASH_RETURN_IF_ERROR(operands.decode("dy", dy, columns, &params.dy));
  const auto scale_dims = scale.dimensions();
  JAX_FLASH_CHECK(scale.element_type() == ffi::F32 && scale_dims.size() == 2 &&
                      (scale_dims[0] == dims[0] || scale_dims[0] == 1) &&
                      (scale_dims[1] == dims[1] || scale_dims[1] == 1),
                  "1 / rms must be f32 [", dims[0], " or 1, ", dims[1], " or 1], got ",
                  to_string(scale_dims), " of ", scale.element_type());
  params.scale = {scale.untyped_data(), scale_dims[0] == 1 ? 0 : scale_dims[1],
                  scale_dims[1] == 1 ? 0 : 1};
  if (has_sum) {
    auto dsum = others.get<ffi::AnyBuffer>(0);
    if (dsum.has_error()) return dsum.error();
    JAX_FLASH_RETURN_IF_ERROR(check_like("the sum's gradient", *dsum, x));
    JAX_FLASH_RETURN_IF_ERROR(operands.decode("the sum's gradient", *dsum, columns, &params.dsum));
  }
  JAX_FLASH_RETURN_IF_ERROR(operands.check_result("dx", *dx, columns, x.element_type()));
  if (operands.count() == 0) return ffi::Error::Success();
  params.dx = dx->untyped_data();
  params.parts = static_cast<float*>(parts->untyped_data());
  params.groups = static_cast<int32_t>(operands.groups());
  params.rows = static_cast<int32_t>(operands.rows());
  params.columns = static_cast<int32_t>(columns);
  params.blocks = static_cast<int32_t>(part_dims[1]);
  params.f32_weight = weight.element_type() == ffi::F32;
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const cudaError_t error = ops::launch_rms_norm_bwd(params, *element_of(x.element_type()), stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_rms_norm_bwd", error);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kRmsNorm, rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<float>("eps")
                                  .Attr<bool>("has_residual"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(kRmsNormBwd, rms_norm_bwd,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("has_sum"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
