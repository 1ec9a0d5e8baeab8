// Checks that turn into an ffi::Error with the values that failed.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_flash {

namespace ffi = xla::ffi;

// [1, 2, 3]
inline std::string to_string(ffi::Span<const int64_t> dims) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < dims.size(); ++i) text << (i == 0 ? "" : ", ") << dims[i];
  text << "]";
  return text.str();
}

template <typename... Parts>
ffi::Error invalid_argument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return ffi::Error::InvalidArgument(text.str());
}

inline ffi::Error cuda_failure(const char* what, cudaError_t error) {
  return ffi::Error::Internal(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace jax_flash

// Returns from the enclosing handler with the parts of the message, streamed, unless it holds.
#define JAX_FLASH_CHECK(condition, ...)                     \
  do {                                                      \
    if (!(condition)) return invalid_argument(__VA_ARGS__); \
  } while (false)
