// An FFI handler for the CPU that decodes the operands of attention as the handlers of the kernels
// do, and copies what the kernels would read as query, key and value into dense arrays.
#include "ffi/operands.cc"

namespace jax_flash {
namespace {

// [batch, length, heads, width], row-major, from a view of it.
void copy(const MhaParams& params, const TensorView& view, int length, int heads, int width,
          ffi::AnyBuffer result) {
  const auto* const from = static_cast<const uint16_t*>(view.data);
  auto* to = static_cast<uint16_t*>(result.untyped_data());
  for (int batch = 0; batch < params.batch; ++batch) {
    int64_t offset = 0;
    for (int dim = params.batch_dims - 1, left = batch; dim >= 0; --dim) {
      offset += left % params.batch_sizes[dim] * view.batch_strides[dim];
      left /= params.batch_sizes[dim];
    }
    for (int row = 0; row < length; ++row) {
      for (int head = 0; head < heads; ++head) {
        for (int column = 0; column < width; ++column) {
          *to++ = from[offset + row * view.row_stride + head * view.head_stride + column];
        }
      }
    }
  }
}

ffi::Error read(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                ffi::RemainingArgs mask, ffi::Result<ffi::AnyBuffer> query_read,
                ffi::Result<ffi::AnyBuffer> key_read, ffi::Result<ffi::AnyBuffer> value_read,
                ffi::Result<ffi::AnyBuffer> facts, float scale, int64_t window_left,
                int64_t window_right, bool bottom_right, bool has_query_lengths,
                bool has_kv_lengths, bool has_intervals, bool has_slopes, float softcap,
                int64_t dropout, bool has_mask, bool has_bias, int64_t packed_heads,
                int64_t packed_kv_heads, Dims query_order, Dims key_order, Dims value_order) {
  MhaParams params{};
  MhaOperands operands(
      {scale, window_left, window_right, bottom_right, has_query_lengths, has_kv_lengths,
       has_intervals, has_slopes, softcap, dropout, has_mask, has_bias, packed_heads,
       packed_kv_heads, query_order, key_order, value_order},
      &params);
  JAX_FLASH_RETURN_IF_ERROR(operands.decode(query, key, value));
  JAX_FLASH_RETURN_IF_ERROR(operands.decode_mask(mask, 0));
  JAX_FLASH_RETURN_IF_ERROR(operands.finish());
  copy(params, params.query, params.query_length, params.heads, params.head_dim, *query_read);
  copy(params, params.key, params.key_length, params.kv_heads, params.head_dim, *key_read);
  copy(params, params.value, params.key_length, params.kv_heads, params.head_dim_v, *value_read);
  auto* const numbers = static_cast<int32_t*>(facts->untyped_data());
  numbers[0] = params.batch_dims;
  numbers[1] = params.query.alignment;
  numbers[2] = params.key.alignment;
  numbers[3] = params.value.alignment;
  const BiasView& bias = params.intervals.bias;
  const MaskView& bits = params.intervals.mask;
  int next = 4;
  for (const int64_t stride : {bias.batch_strides[0], bias.head_stride, bias.row_stride,
                               bits.batch_strides[0], bits.head_stride, bits.row_stride}) {
    numbers[next++] = static_cast<int32_t>(stride);
  }
  numbers[next] = static_cast<int32_t>(bias.type);
  return ffi::Error::Success();
}

}  // namespace

extern "C" XLA_FFI_DEFINE_HANDLER_SYMBOL(read_operands, read,
                                         bind_mha_attributes(ffi::Ffi::Bind()
                                                                 .Arg<ffi::AnyBuffer>()
                                                                 .Arg<ffi::AnyBuffer>()
                                                                 .Arg<ffi::AnyBuffer>()
                                                                 .RemainingArgs()
                                                                 .Ret<ffi::AnyBuffer>()
                                                                 .Ret<ffi::AnyBuffer>()
                                                                 .Ret<ffi::AnyBuffer>()
                                                                 .Ret<ffi::AnyBuffer>()));

}  // namespace jax_flash
