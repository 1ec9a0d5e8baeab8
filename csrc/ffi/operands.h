// The operands of attention and its mask, which forward and backward decode alike.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "ffi/check.h"
#include "ffi/layout.h"
#include "host/dispatch.h"
#include "host/params.h"

namespace jax_flash {

using Dims = ffi::Span<const int64_t>;

// The attributes that both have.
struct MhaAttributes {
  float scale;
  int64_t window_left;
  int64_t window_right;
  bool bottom_right;
  bool has_query_lengths;
  bool has_kv_lengths;
  bool has_intervals;  // then there are no lengths, windows and alignment
  bool has_slopes;
  float softcap;    // 0: none
  int64_t dropout;  // random bytes below it drop; 0: none
  bool has_mask;
  bool has_bias;
  // N and K where one array [*batch, T, (N + 2 K) H], heads of queries, then of keys, then of
  // values, is each of the three operands; 0 otherwise.
  int64_t packed_heads;
  int64_t packed_kv_heads;
  Dims query_order;  // dims from major to minor, as they lie in memory
  Dims key_order;
  Dims value_order;
};

// Adds them to the binding of a handler, which gets them in this order.
template <typename Binding>
auto bind_mha_attributes(Binding binding) {
  return std::move(binding)
      .template Attr<float>("scale")
      .template Attr<int64_t>("window_left")
      .template Attr<int64_t>("window_right")
      .template Attr<bool>("bottom_right")
      .template Attr<bool>("has_query_lengths")
      .template Attr<bool>("has_kv_lengths")
      .template Attr<bool>("has_intervals")
      .template Attr<bool>("has_slopes")
      .template Attr<float>("softcap")
      .template Attr<int64_t>("dropout")
      .template Attr<bool>("has_mask")
      .template Attr<bool>("has_bias")
      .template Attr<int64_t>("packed_heads")
      .template Attr<int64_t>("packed_kv_heads")
      .template Attr<Dims>("query_order")
      .template Attr<Dims>("key_order")
      .template Attr<Dims>("value_order");
}

// What every row's address is a multiple of, in bytes, out of what the kernels make use of.
int32_t row_alignment(const void* data, std::span<const int64_t> strides);

// The same for a dense array with rows of `width` elements.
int32_t dense_row_alignment(const void* data, int64_t width);

// Query, key or value: [*batch, length, heads, width], strides in elements.
struct MhaTensor {
  const void* data;
  std::vector<int64_t> dims;
  std::vector<int64_t> strides;
};

// Checks query [*batch, T, N, H], key [*batch, S, K, H], value [*batch, S, K, Hv] (or the array of
// all three) and what says the mask, and fills the parameters from them. Batch dims of an operand
// are full or 1 (shared).
class MhaOperands {
 public:
  MhaOperands(const MhaAttributes& attributes, MhaParams* params)
      : attributes_(attributes), params_(params), batch_(0) {}

  // Comes first.
  ffi::Error decode(const ffi::AnyBuffer& query, const ffi::AnyBuffer& key,
                    const ffi::AnyBuffer& value);

  // What follows the first `skipped` of `args`: the lengths that there are, int32 [*batch], or
  // int32 arrays as IntervalsView has them, then slopes f32 [*batch, N] if there are any,
  // then seeds uint32 [*batch, N, 2] if there is dropout, then the bits of a mask, then a bias,
  // as MaskView and BiasView have them, of size 1 along dims that share them.
  ffi::Error decode_mask(const ffi::RemainingArgs& args, size_t skipped);

  // The gradient of a bias, f32 [*batch, N, T, S], of size 1 along dims that are summed up.
  ffi::Error decode_bias_gradient(const ffi::AnyBuffer& buffer, BiasGradientView* view);

  // Takes the batch dims of another operand [*batch, ...] into account, of which there are as many
  // as query has; false if they do not fit.
  bool join(Dims dims) { return batch_.join(dims); }

  // Comes last: merges batch dims and writes what depends on them.
  ffi::Error finish();

  ElementType type() const { return type_; }
  ffi::DataType data_type() const { return type_ == ElementType::kBf16 ? ffi::BF16 : ffi::F16; }
  // How many dims query has, and their sizes.
  size_t rank() const { return dims_[0].size(); }
  Dims query_dims() const { return {dims_[0].data(), rank()}; }
  // The full batch dims of all operands seen so far, and their product.
  const std::vector<int64_t>& batch_sizes() const { return batch_.sizes(); }
  int64_t batch_size() const { return batch_.count(); }

 private:
  // Query, key or value from its buffer and the order of the buffer's dims; if `count` is not 0 the
  // heads [first, first + count) of an array of all three.
  ffi::Error view(const ffi::AnyBuffer& buffer, Dims order, int64_t first, int64_t count,
                  MhaTensor* tensor) const;

  ffi::Error decode_intervals(const ffi::RemainingArgs& args, size_t first);
  ffi::Error decode_slopes(const ffi::AnyBuffer& slopes);
  ffi::Error decode_seeds(const ffi::AnyBuffer& seeds);
  ffi::Error decode_bias(const ffi::AnyBuffer& bias);
  // Checks [*batch, N, T, columns], of size 1 along dims that share it, and sets the strides.
  ffi::Error decode_rows(const char* name, const ffi::AnyBuffer& buffer, int64_t columns,
                         int64_t* batch_strides, int64_t* head_stride, int64_t* row_stride);
  void add(std::vector<int64_t> dims, std::vector<int64_t> strides, int64_t* merged);

  const MhaAttributes attributes_;
  MhaParams* const params_;
  ElementType type_ = ElementType::kBf16;
  BatchDims batch_;
  // For each operand.
  std::vector<std::vector<int64_t>> dims_;
  std::vector<std::vector<int64_t>> strides_;
  std::vector<int64_t*> merged_;  // where the strides of the merged batch dims go
};

}  // namespace jax_flash
