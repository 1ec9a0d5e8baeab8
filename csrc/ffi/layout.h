// From the buffers of a call to the strides that a kernel works with.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "ffi/check.h"
#include "host/params.h"

namespace jax_flash {

// Strides in elements of each logical dim, where `order` lists the dims from major to minor.
inline std::vector<int64_t> dense_strides(ffi::Span<const int64_t> dims,
                                          ffi::Span<const int64_t> order) {
  std::vector<int64_t> strides(dims.size());
  int64_t stride = 1;
  for (size_t i = dims.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= dims[order[i]];
  }
  return strides;
}

inline std::vector<int64_t> row_major_strides(ffi::Span<const int64_t> dims) {
  std::vector<int64_t> order(dims.size());
  std::iota(order.begin(), order.end(), 0);
  return dense_strides(dims, {order.data(), order.size()});
}

// Whether `order` is a permutation of 0..rank-1 that ends with the last dim.
inline bool is_order_with_minor_width(ffi::Span<const int64_t> order, size_t rank) {
  if (order.size() != rank || order[rank - 1] != static_cast<int64_t>(rank) - 1) return false;
  std::vector<bool> seen(rank, false);
  for (size_t i = 0; i < rank; ++i) {
    if (order[i] < 0 || order[i] >= static_cast<int64_t>(rank) || seen[order[i]]) return false;
    seen[order[i]] = true;
  }
  return true;
}

// The batch dims of all operands, full size each; operands have that size or 1 (stride 0).
// Neighbours that every operand steps through evenly become one dim.
class BatchDims {
 public:
  explicit BatchDims(size_t rank) : sizes_(rank, 1) {}

  size_t rank() const { return sizes_.size(); }
  const std::vector<int64_t>& sizes() const { return sizes_; }

  // Takes an operand's leading dims into account; false if they do not fit the others.
  bool join(ffi::Span<const int64_t> dims) {
    for (size_t i = 0; i < rank(); ++i) {
      if (sizes_[i] == 1) sizes_[i] = dims[i];
      if (dims[i] != 1 && dims[i] != sizes_[i]) return false;
    }
    return true;
  }

  int64_t count() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }

  // Writes the merged sizes and, for each operand, its merged strides. `strides[o]` begins with the
  // strides of the batch dims. Returns how many dims there are, or -1 if more than kMaxBatchDims.
  int merge(const std::vector<std::vector<int64_t>>& strides, int32_t* merged_sizes,
            const std::vector<int64_t*>& merged_strides) const {
    int count = 0;
    for (size_t dim = 0; dim < rank(); ++dim) {
      if (sizes_[dim] == 1) continue;
      bool extends = count > 0;  // whether this dim continues the one before it
      for (size_t o = 0; o < strides.size() && extends; ++o) {
        extends = merged_strides[o][count - 1] == strides[o][dim] * sizes_[dim];
      }
      if (!extends && count == kMaxBatchDims) return -1;
      if (!extends) merged_sizes[count++] = 1;
      merged_sizes[count - 1] *= static_cast<int32_t>(sizes_[dim]);
      for (size_t o = 0; o < strides.size(); ++o) merged_strides[o][count - 1] = strides[o][dim];
    }
    if (count == 0) {
      merged_sizes[count++] = 1;
      for (int64_t* merged : merged_strides) merged[0] = 0;
    }
    return count;
  }

 private:
  std::vector<int64_t> sizes_;
};

}  // namespace jax_flash
