#include "ffi/operands.h"

#include <algorithm>
#include <iterator>

#include "tile/mask.cuh"

namespace jax_flash {
namespace {

Dims span_of(const std::vector<int64_t>& dims) { return {dims.data(), dims.size()}; }

TensorView tensor_view(const void* data, const std::vector<int64_t>& strides) {
  TensorView view{};
  view.data = data;
  view.row_stride = strides[strides.size() - 3];
  view.head_stride = strides[strides.size() - 2];
  view.alignment = row_alignment(view.data, std::span(strides).first(strides.size() - 1));
  return view;
}

}  // namespace

int32_t row_alignment(const void* data, std::span<const int64_t> strides) {
  uint64_t bits = reinterpret_cast<uintptr_t>(data);
  for (const int64_t stride : strides) bits |= static_cast<uint64_t>(2 * stride);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

int32_t dense_row_alignment(const void* data, int64_t width) {
  return row_alignment(data, std::span(&width, 1));
}

void MhaOperands::add(std::vector<int64_t> dims, std::vector<int64_t> strides, int64_t* merged) {
  dims_.push_back(std::move(dims));
  strides_.push_back(std::move(strides));
  merged_.push_back(merged);
}

ffi::Error MhaOperands::view(const ffi::AnyBuffer& buffer, Dims order, int64_t first, int64_t count,
                             MhaTensor* tensor) const {
  const Dims dims = buffer.dimensions();
  const size_t rank = dims.size();
  const bool packed = count > 0;
  JAX_FLASH_CHECK(rank >= (packed ? 3 : 4),
                  "query, key and value must be [*batch, length, heads, width], an array of all "
                  "three [*batch, length, width], with at least one batch dim; got ",
                  to_string(dims));
  JAX_FLASH_CHECK(is_order_with_minor_width(order, rank), "an operand ", to_string(dims),
                  " has dim order ", to_string(order),
                  ", which is no permutation that ends with the width");
  *tensor = {buffer.untyped_data(), {dims.begin(), dims.end()}, dense_strides(dims, order)};
  if (!packed) return ffi::Error::Success();

  const int64_t heads = attributes_.packed_heads + 2 * attributes_.packed_kv_heads;
  JAX_FLASH_CHECK(dims[rank - 1] % heads == 0, "an array of queries, keys and values has ", heads,
                  " heads, which do not divide its width: ", to_string(dims));
  const int64_t width = dims[rank - 1] / heads;
  tensor->data = static_cast<const uint16_t*>(tensor->data) + first * width;
  tensor->dims.back() = count;
  tensor->dims.push_back(width);
  tensor->strides.back() = width;
  tensor->strides.push_back(1);
  return ffi::Error::Success();
}

ffi::Error MhaOperands::decode(const ffi::AnyBuffer& query, const ffi::AnyBuffer& key,
                               const ffi::AnyBuffer& value) {
  const ffi::DataType type = query.element_type();
  JAX_FLASH_CHECK(type == ffi::BF16 || type == ffi::F16, "query must be bf16 or f16, got ", type);
  JAX_FLASH_CHECK(key.element_type() == type && value.element_type() == type,
                  "key and value must have query's type ", type, ", got ", key.element_type(),
                  " and ", value.element_type());
  type_ = type == ffi::BF16 ? ElementType::kBf16 : ElementType::kF16;

  const int64_t packed_heads = attributes_.packed_heads;
  const int64_t packed_kv_heads = attributes_.packed_kv_heads;
  JAX_FLASH_CHECK(
      packed_heads >= 0 && packed_kv_heads >= 0 && (packed_heads == 0) == (packed_kv_heads == 0),
      "an array of ", packed_heads, " heads of queries and ", packed_kv_heads, " of keys");
  const int64_t value_head = packed_heads + packed_kv_heads;
  MhaTensor tensors[3];
  JAX_FLASH_RETURN_IF_ERROR(view(query, attributes_.query_order, 0, packed_heads, &tensors[0]));
  JAX_FLASH_RETURN_IF_ERROR(
      view(key, attributes_.key_order, packed_heads, packed_kv_heads, &tensors[1]));
  JAX_FLASH_RETURN_IF_ERROR(
      view(value, attributes_.value_order, value_head, packed_kv_heads, &tensors[2]));
  const Dims q = span_of(tensors[0].dims);
  const Dims k = span_of(tensors[1].dims);
  const Dims v = span_of(tensors[2].dims);
  const size_t rank = q.size();
  JAX_FLASH_CHECK(k.size() == rank && v.size() == rank,
                  "query, key and value must have the same number of batch dims, got ",
                  to_string(q), ", ", to_string(k), " and ", to_string(v));
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
  const int64_t window_left = attributes_.window_left;
  const int64_t window_right = attributes_.window_right;
  JAX_FLASH_CHECK(window_left >= -1 && window_right >= -1,
                  "windows must be -1 (unbounded) or not negative; got left ", window_left,
                  ", right ", window_right);

  batch_ = BatchDims(rank - 3);
  for (const MhaTensor& tensor : tensors) {
    JAX_FLASH_CHECK(join(span_of(tensor.dims)), "batch dims of ", to_string(q), ", ", to_string(k),
                    " and ", to_string(v), " must be equal or 1");
  }
  TensorView* const views[] = {&params_->query, &params_->key, &params_->value};
  for (int i = 0; i < 3; ++i) {
    *views[i] = tensor_view(tensors[i].data, tensors[i].strides);
    add(tensors[i].dims, tensors[i].strides, views[i]->batch_strides);
  }

  params_->query_length = static_cast<int32_t>(query_length);
  params_->key_length = static_cast<int32_t>(key_length);
  params_->heads = static_cast<int32_t>(heads);
  params_->kv_heads = static_cast<int32_t>(kv_heads);
  params_->head_dim = static_cast<int32_t>(head_dim);
  params_->head_dim_v = static_cast<int32_t>(head_dim_v);
  params_->scale = SoftmaxScale::make(attributes_.scale);
  params_->window_left = static_cast<int32_t>(std::min<int64_t>(window_left, kMaxLength));
  params_->window_right = static_cast<int32_t>(std::min<int64_t>(window_right, kMaxLength));
  params_->bottom_right = attributes_.bottom_right;
  return ffi::Error::Success();
}

ffi::Error MhaOperands::decode_mask(const ffi::RemainingArgs& args, size_t skipped) {
  const bool has_intervals = attributes_.has_intervals;
  const bool has_lengths = attributes_.has_query_lengths || attributes_.has_kv_lengths;
  const bool has_options = attributes_.has_slopes || attributes_.softcap != 0 ||
                           attributes_.dropout != 0 || attributes_.has_mask || attributes_.has_bias;
  JAX_FLASH_CHECK(has_intervals ? !has_lengths : !has_options, "calls ",
                  has_intervals ? "with intervals have no lengths"
                                : "without intervals have no options of scores");
  JAX_FLASH_CHECK(attributes_.softcap >= 0, "softcap must not be negative, got ",
                  attributes_.softcap);
  JAX_FLASH_CHECK(attributes_.dropout >= 0 && attributes_.dropout < 256,
                  "dropout must be a number of parts of 256, got ", attributes_.dropout);
  const size_t expected =
      has_intervals ? size_t{4} + attributes_.has_slopes + (attributes_.dropout != 0) +
                          attributes_.has_mask + attributes_.has_bias
                    : size_t{attributes_.has_query_lengths} + size_t{attributes_.has_kv_lengths};
  JAX_FLASH_CHECK(args.size() == skipped + expected, "expected ", skipped + expected,
                  " operands after the tensors, got ", args.size());
  if (has_intervals) return decode_intervals(args, skipped);
  LengthsView* const views[] = {attributes_.has_query_lengths ? &params_->query_lengths : nullptr,
                                attributes_.has_kv_lengths ? &params_->key_lengths : nullptr};
  size_t next = skipped;
  for (LengthsView* const view : views) {
    if (view == nullptr) continue;
    const auto buffer = args.get<ffi::AnyBuffer>(next++);
    if (!buffer.has_value()) return buffer.error();
    const Dims dims = buffer->dimensions();
    JAX_FLASH_CHECK(buffer->element_type() == ffi::S32, "lengths must be int32, got ",
                    buffer->element_type());
    JAX_FLASH_CHECK(dims.size() == batch_.rank() && join(dims), "lengths ", to_string(dims),
                    " do not fit the batch dims of ", to_string(span_of(dims_[0])));
    view->data = static_cast<const int32_t*>(buffer->untyped_data());
    add({dims.begin(), dims.end()}, row_major_strides(dims), view->batch_strides);
  }
  return ffi::Error::Success();
}

ffi::Error MhaOperands::decode_intervals(const ffi::RemainingArgs& args, size_t first) {
  const int64_t row_tiles = interval_tiles(params_->query_length);
  const int64_t key_tiles = interval_tiles(params_->key_length);
  struct Array {
    const char* name;
    std::vector<int64_t> trailing;
    const void* data;
  };
  Array arrays[] = {{"rows", {row_tiles * kIntervalRows, sizeof(RowRecord) / 4}, nullptr},
                    {"row_tiles", {row_tiles, sizeof(RowTile) / 4}, nullptr},
                    {"keys", {key_tiles * kIntervalKeys}, nullptr},
                    {"key_tiles", {key_tiles, sizeof(KeyTile) / 4}, nullptr}};
  Dims batch;  // of the first, and so of all
  for (size_t i = 0; i < std::size(arrays); ++i) {
    Array& array = arrays[i];
    const auto buffer = args.get<ffi::AnyBuffer>(first + i);
    if (!buffer.has_value()) return buffer.error();
    const Dims dims = buffer->dimensions();
    JAX_FLASH_CHECK(buffer->element_type() == ffi::S32, array.name, " must be int32, got ",
                    buffer->element_type());
    JAX_FLASH_CHECK(
        dims.size() == batch_.rank() + array.trailing.size() &&
            std::equal(array.trailing.begin(), array.trailing.end(), dims.begin() + batch_.rank()),
        array.name, " must be [*batch, ...] with the trailing dims ",
        to_string(Dims(array.trailing.data(), array.trailing.size())), ", got ", to_string(dims));
    if (i == 0) batch = Dims(dims.begin(), batch_.rank());
    JAX_FLASH_CHECK(std::equal(batch.begin(), batch.end(), dims.begin()), array.name, " ",
                    to_string(dims), " must have the batch dims of rows, ", to_string(batch));
    array.data = buffer->untyped_data();
  }
  JAX_FLASH_CHECK(join(batch), "rows of the batch dims ", to_string(batch), " do not fit those of ",
                  to_string(span_of(dims_[0])));
  IntervalsView& view = params_->intervals;
  view.rows = static_cast<const RowRecord*>(arrays[0].data);
  view.row_tiles = static_cast<const RowTile*>(arrays[1].data);
  view.keys = static_cast<const int32_t*>(arrays[2].data);
  view.key_tiles = static_cast<const KeyTile*>(arrays[3].data);
  view.softcap = attributes_.softcap;
  view.dropout = static_cast<int32_t>(attributes_.dropout);
  view.kept_scale = dropout_scale(view.dropout);
  add({batch.begin(), batch.end()}, row_major_strides(batch), view.batch_strides);
  size_t next = first + std::size(arrays);
  if (attributes_.has_slopes) {
    const auto slopes = args.get<ffi::AnyBuffer>(next++);
    if (!slopes.has_value()) return slopes.error();
    JAX_FLASH_RETURN_IF_ERROR(decode_slopes(*slopes));
  }
  if (view.dropout != 0) {
    const auto seeds = args.get<ffi::AnyBuffer>(next++);
    if (!seeds.has_value()) return seeds.error();
    JAX_FLASH_RETURN_IF_ERROR(decode_seeds(*seeds));
  }
  if (attributes_.has_mask) {
    const auto mask = args.get<ffi::AnyBuffer>(next++);
    if (!mask.has_value()) return mask.error();
    JAX_FLASH_CHECK(mask->element_type() == ffi::U32, "bits of a mask must be uint32, got ",
                    mask->element_type());
    MaskView& bits = view.mask;
    bits.data = static_cast<const uint32_t*>(mask->untyped_data());
    JAX_FLASH_RETURN_IF_ERROR(decode_rows("mask", *mask, mask_words(params_->key_length),
                                          bits.batch_strides, &bits.head_stride, &bits.row_stride));
  }
  if (attributes_.has_bias) {
    const auto bias = args.get<ffi::AnyBuffer>(next++);
    if (!bias.has_value()) return bias.error();
    JAX_FLASH_RETURN_IF_ERROR(decode_bias(*bias));
  }
  return ffi::Error::Success();
}

ffi::Error MhaOperands::decode_slopes(const ffi::AnyBuffer& slopes) {
  const Dims dims = slopes.dimensions();
  JAX_FLASH_CHECK(slopes.element_type() == ffi::F32, "slopes must be f32, got ",
                  slopes.element_type());
  JAX_FLASH_CHECK(
      dims.size() == batch_.rank() + 1 && dims[batch_.rank()] == params_->heads && join(dims),
      "slopes ", to_string(dims), " do not fit the batch dims and heads of ",
      to_string(span_of(dims_[0])));
  IntervalsView& view = params_->intervals;
  view.slopes = static_cast<const float*>(slopes.untyped_data());
  add({dims.begin(), dims.end()}, row_major_strides(dims), view.slope_strides);
  return ffi::Error::Success();
}

ffi::Error MhaOperands::decode_seeds(const ffi::AnyBuffer& seeds) {
  const Dims dims = seeds.dimensions();
  JAX_FLASH_CHECK(seeds.element_type() == ffi::U32, "seeds must be uint32, got ",
                  seeds.element_type());
  JAX_FLASH_CHECK(dims.size() == batch_.rank() + 2 && dims[batch_.rank()] == params_->heads &&
                      dims[batch_.rank() + 1] == 2 && join(dims),
                  "seeds ", to_string(dims), " do not fit the batch dims and heads of ",
                  to_string(span_of(dims_[0])));
  IntervalsView& view = params_->intervals;
  view.seeds = static_cast<const uint32_t*>(seeds.untyped_data());
  add({dims.begin(), dims.end()}, row_major_strides(dims), view.seed_strides);
  return ffi::Error::Success();
}

ffi::Error MhaOperands::decode_bias(const ffi::AnyBuffer& bias) {
  const ffi::DataType type = bias.element_type();
  JAX_FLASH_CHECK(type == ffi::BF16 || type == ffi::F16 || type == ffi::F32,
                  "bias must be bf16, f16 or f32, got ", type);
  BiasView& view = params_->intervals.bias;
  view.data = bias.untyped_data();
  view.type = type == ffi::BF16  ? BiasType::kBf16
              : type == ffi::F16 ? BiasType::kF16
                                 : BiasType::kF32;
  return decode_rows("bias", bias, (int64_t{params_->key_length} + 7) / 8 * 8, view.batch_strides,
                     &view.head_stride, &view.row_stride);
}

ffi::Error MhaOperands::decode_bias_gradient(const ffi::AnyBuffer& buffer, BiasGradientView* view) {
  JAX_FLASH_CHECK(buffer.element_type() == ffi::F32, "the gradient of a bias must be f32, got ",
                  buffer.element_type());
  view->data = static_cast<float*>(buffer.untyped_data());
  JAX_FLASH_RETURN_IF_ERROR(decode_rows("dbias", buffer, params_->key_length, view->batch_strides,
                                        &view->head_stride, &view->row_stride));
  const int64_t all =
      batch_size() * params_->heads * params_->query_length * int64_t{params_->key_length};
  view->shared = static_cast<int64_t>(buffer.element_count()) != all;
  return ffi::Error::Success();
}

ffi::Error MhaOperands::decode_rows(const char* name, const ffi::AnyBuffer& buffer, int64_t columns,
                                    int64_t* batch_strides, int64_t* head_stride,
                                    int64_t* row_stride) {
  const Dims dims = buffer.dimensions();
  const size_t rank = batch_.rank();
  const auto fits = [&](size_t dim, int64_t size) { return dims[dim] == size || dims[dim] == 1; };
  JAX_FLASH_CHECK(dims.size() == rank + 3 && fits(rank, params_->heads) &&
                      fits(rank + 1, params_->query_length) && dims[rank + 2] == columns &&
                      join(dims),
                  name, " ", to_string(dims), " does not fit ", params_->heads, " heads, ",
                  params_->query_length, " queries, rows of ", columns, " and the batch dims of ",
                  to_string(span_of(dims_[0])));
  const std::vector<int64_t> strides = row_major_strides(dims);
  *head_stride = dims[rank] == 1 ? 0 : strides[rank];
  *row_stride = dims[rank + 1] == 1 ? 0 : strides[rank + 1];
  add({dims.begin(), dims.end()}, strides, batch_strides);
  return ffi::Error::Success();
}

ffi::Error MhaOperands::finish() {
  JAX_FLASH_CHECK(batch_size() * params_->heads < kMaxLength, "batch ", batch_size(),
                  " times heads ", params_->heads, " must be below ", kMaxLength);
  for (size_t i = 0; i < dims_.size(); ++i) {
    for (size_t dim = 0; dim < batch_.rank(); ++dim) {
      if (dims_[i][dim] == 1) strides_[i][dim] = 0;  // shared
    }
  }
  params_->batch_dims = batch_.merge(strides_, params_->batch_sizes, merged_);
  JAX_FLASH_CHECK(params_->batch_dims > 0, "more than ", kMaxBatchDims,
                  " batch dims that cannot be merged");
  params_->batch = static_cast<int32_t>(batch_size());
  return ffi::Error::Success();
}

}  // namespace jax_flash
