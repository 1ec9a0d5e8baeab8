// Operands of csrc/ops: rows [groups, rows, ...], of size 1 where they are shared.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "ffi/check.h"
#include "ops/params.h"

namespace jax_flash {

inline std::optional<ops::Element> element_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return ops::Element::kF32;
    case ffi::BF16:
      return ops::Element::kBf16;
    case ffi::F16:
      return ops::Element::kF16;
    default:
      return std::nullopt;
  }
}

// The full sizes of a call, and how operands lie in memory under them.
class RowOperands {
 public:
  RowOperands(int64_t groups, int64_t rows) : groups_(groups), rows_(rows) {}

  int64_t groups() const { return groups_; }
  int64_t rows() const { return rows_; }
  int64_t count() const { return groups_ * rows_; }

  // Checks that `buffer` is [groups or 1, rows or 1, columns].
  ffi::Error decode(const char* name, const ffi::AnyBuffer& buffer, int64_t columns,
                    ops::Rows* view) const {
    const auto dims = buffer.dimensions();
    JAX_FLASH_CHECK(
        dims.size() == 3 && fits(dims[0], groups_) && fits(dims[1], rows_) && dims[2] == columns,
        name, " must be [", groups_, " or 1, ", rows_, " or 1, ", columns, "], got ",
        to_string(dims));
    *view = {buffer.untyped_data(), dims[0] == 1 ? 0 : dims[1] * columns,
             dims[1] == 1 ? 0 : columns};
    return ffi::Error::Success();
  }

  // Checks that `buffer` is [groups or 1, columns].
  ffi::Error decode_of_groups(const char* name, const ffi::AnyBuffer& buffer, int64_t columns,
                              ops::Rows* view) const {
    const auto dims = buffer.dimensions();
    JAX_FLASH_CHECK(dims.size() == 2 && fits(dims[0], groups_) && dims[1] == columns, name,
                    " must be [", groups_, " or 1, ", columns, "], got ", to_string(dims));
    *view = {buffer.untyped_data(), dims[0] == 1 ? 0 : columns, 0};
    return ffi::Error::Success();
  }

  // Checks that a result has all rows, of `columns` elements of `type`.
  ffi::Error check_result(const char* name, const ffi::AnyBuffer& buffer, int64_t columns,
                          ffi::DataType type) const {
    JAX_FLASH_CHECK(buffer.element_type() == type &&
                        static_cast<int64_t>(buffer.element_count()) == count() * columns,
                    name, " must have ", count() * columns, " elements of ", type, ", got ",
                    to_string(buffer.dimensions()), " of ", buffer.element_type());
    return ffi::Error::Success();
  }

 private:
  static bool fits(int64_t size, int64_t full) { return size == full || size == 1; }

  int64_t groups_;
  int64_t rows_;
};

// Whether a size fits the kernels' 32-bit indices.
inline bool is_index(int64_t size) { return size >= 0 && size < (int64_t{1} << 31); }

}  // namespace jax_flash
