// FFI target jax_flash_intervals: decode, check, launch.
//
// int32 [3], the numbers of rows T and keys S, and 0; then, each if its attribute says so, int32
// segment ids [sequences, T] and [sequences, S], query lengths [sequences], key lengths
// [sequences], and offsets of packed sequences [sequences, n], of rows and of keys, and of a
// boolean mask the ranges [sequences, T, 2] of keys that it leaves to rows and what it hides,
// [sequences, R / 64, 2] -> the arrays of host/intervals.h: rows [sequences, R, 4], row_tiles
// [sequences, R / 64, 8], keys [sequences, K], key_tiles [sequences, K / 64, 8].
#include "host/intervals.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "ffi/check.h"
#include "ffi/handlers.h"
#include "host/device.h"
#include "ops/intervals.h"
#include "tile/mask.cuh"

namespace jax_flash {
namespace {

using Dims = ffi::Span<const int64_t>;

ffi::Error check_array(const char* name, const ffi::AnyBuffer& buffer,
                       std::initializer_list<int64_t> expected) {
  JAX_FLASH_CHECK(buffer.element_type() == ffi::S32, name, " must be int32, got ",
                  buffer.element_type());
  const Dims dims = buffer.dimensions();
  JAX_FLASH_CHECK(std::equal(dims.begin(), dims.end(), expected.begin(), expected.end()), name,
                  " must be ", to_string(Dims(expected.begin(), expected.size())), ", got ",
                  to_string(dims));
  return ffi::Error::Success();
}

ffi::Error intervals(cudaStream_t stream, ffi::AnyBuffer sizes, ffi::RemainingArgs others,
                     ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> row_tiles,
                     ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> key_tiles,
                     int64_t window_left, int64_t window_right, bool bottom_right,
                     int64_t max_seqlen_q, int64_t max_seqlen_k, bool has_ids,
                     bool has_query_lengths, bool has_kv_lengths, bool has_offsets, bool has_mask) {
  JAX_FLASH_RETURN_IF_ERROR(check_array("sizes", sizes, {3}));
  const Dims row_dims = rows->dimensions();
  const Dims key_dims = keys->dimensions();
  JAX_FLASH_CHECK(row_dims.size() == 3 && key_dims.size() == 2 &&
                      row_dims[1] % kIntervalRows == 0 && key_dims[1] % kIntervalKeys == 0,
                  "rows must be [sequences, R, 4] and keys [sequences, K] in whole tiles, got ",
                  to_string(row_dims), " and ", to_string(key_dims));
  const int64_t sequences = row_dims[0];
  const int64_t row_count = row_dims[1] / kIntervalRows;
  const int64_t key_count = key_dims[1] / kIntervalKeys;
  JAX_FLASH_CHECK(sequences * std::max(row_count, key_count) < kMaxLength, sequences,
                  " sequences of ", row_count, " and ", key_count, " tiles are too many");
  JAX_FLASH_RETURN_IF_ERROR(check_array("rows", *rows, {sequences, row_dims[1], 4}));
  JAX_FLASH_RETURN_IF_ERROR(check_array("row_tiles", *row_tiles, {sequences, row_count, 8}));
  JAX_FLASH_RETURN_IF_ERROR(check_array("keys", *keys, {sequences, key_dims[1]}));
  JAX_FLASH_RETURN_IF_ERROR(check_array("key_tiles", *key_tiles, {sequences, key_count, 8}));
  for (const int64_t number : {window_left, window_right, max_seqlen_q, max_seqlen_k}) {
    JAX_FLASH_CHECK(number >= -1,
                    "windows and longest sequences must be -1 (unbounded) or not "
                    "negative, got ",
                    number);
  }

  ops::IntervalsParams params{};
  params.sizes = static_cast<const int32_t*>(sizes.untyped_data());
  struct Operand {
    const char* name;
    bool is_given;
    int64_t tiles;  // of 64 numbers; 0: one number, -1: as many as there are
    const int32_t** data;
  };
  const Operand operands[] = {
      {"q_segment_ids", has_ids, row_count, &params.row_ids},
      {"kv_segment_ids", has_ids, key_count, &params.key_ids},
      {"query_seq_lengths", has_query_lengths, 0, &params.query_lengths},
      {"key_value_seq_lengths", has_kv_lengths, 0, &params.key_lengths},
      {"cu_seqlens_q", has_offsets, -1, &params.row_offsets},
      {"cu_seqlens_k", has_offsets, -1, &params.key_offsets},
  };
  size_t next = 0;
  for (const Operand& operand : operands) {
    if (!operand.is_given) continue;
    const auto buffer = others.get<ffi::AnyBuffer>(next++);
    if (buffer.has_error()) return buffer.error();
    const Dims dims = buffer->dimensions();
    JAX_FLASH_CHECK(buffer->element_type() == ffi::S32, operand.name, " must be int32, got ",
                    buffer->element_type());
    JAX_FLASH_CHECK(dims.size() == (operand.tiles == 0 ? 1 : 2) && dims[0] == sequences,
                    operand.name, " must be of ", sequences, " sequences, got ", to_string(dims));
    JAX_FLASH_CHECK(operand.tiles <= 0 || (dims[1] + 63) / 64 == operand.tiles, operand.name,
                    " must have ", operand.tiles, " tiles of 64, got ", to_string(dims));
    if (operand.tiles < 0) {
      JAX_FLASH_CHECK(
          dims[1] > 0 && dims[1] < kMaxLength && (params.offsets == 0 || params.offsets == dims[1]),
          "offsets must be equally many, and some, got ", to_string(dims));
      params.offsets = static_cast<int32_t>(dims[1]);
    }
    *operand.data = static_cast<const int32_t*>(buffer->untyped_data());
  }
  if (has_mask) {
    const auto ranges = others.get<ffi::AnyBuffer>(next++);
    if (ranges.has_error()) return ranges.error();
    const auto hidden = others.get<ffi::AnyBuffer>(next++);
    if (hidden.has_error()) return hidden.error();
    const Dims dims = ranges->dimensions();
    JAX_FLASH_CHECK(dims.size() == 3 && (dims[1] + 63) / 64 == row_count, "mask_ranges must be of ",
                    row_count, " tiles of 64 rows, got ", to_string(dims));
    JAX_FLASH_RETURN_IF_ERROR(check_array("mask_ranges", *ranges, {sequences, dims[1], 2}));
    JAX_FLASH_RETURN_IF_ERROR(check_array("mask_hidden", *hidden, {sequences, row_count, 2}));
    params.row_ranges = static_cast<const int32_t*>(ranges->untyped_data());
    params.row_hidden = static_cast<const int32_t*>(hidden->untyped_data());
  }
  JAX_FLASH_CHECK(others.size() == next, "expected ", next, " operands after sizes, got ",
                  others.size());
  if (sequences * row_count * key_count == 0) return ffi::Error::Success();

  const auto bounded = [](int64_t number) {
    return static_cast<int32_t>(std::min<int64_t>(number, kMaxLength));
  };
  params.window_left = bounded(window_left);
  params.window_right = bounded(window_right);
  params.most_queries = max_seqlen_q < 0 ? kMaxLength : bounded(max_seqlen_q);
  params.most_keys = max_seqlen_k < 0 ? kMaxLength : bounded(max_seqlen_k);
  params.bottom_right = bottom_right;
  params.rows = static_cast<RowRecord*>(rows->untyped_data());
  params.row_tiles = static_cast<RowTile*>(row_tiles->untyped_data());
  params.keys = static_cast<int32_t*>(keys->untyped_data());
  params.key_tiles = static_cast<KeyTile*>(key_tiles->untyped_data());
  params.sequences = static_cast<int32_t>(sequences);
  params.row_count = static_cast<int32_t>(row_count);
  params.key_count = static_cast<int32_t>(key_count);
  DeviceInfo device{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&device));
  const cudaError_t error = ops::launch_intervals(params, stream);
  if (error != cudaSuccess) return cuda_failure("launching jax_flash_intervals", error);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kIntervals, intervals,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window_left")
                                  .Attr<int64_t>("window_right")
                                  .Attr<bool>("bottom_right")
                                  .Attr<int64_t>("max_seqlen_q")
                                  .Attr<int64_t>("max_seqlen_k")
                                  .Attr<bool>("has_ids")
                                  .Attr<bool>("has_query_lengths")
                                  .Attr<bool>("has_kv_lengths")
                                  .Attr<bool>("has_offsets")
                                  .Attr<bool>("has_mask"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flash
