// Checks that turn into an ffi::Error with the values that failed.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <string>

#include "host/device.h"
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

// Returns from the enclosing function with the error, if it is one.
#define JAX_FLASH_RETURN_IF_ERROR(...)                     \
  do {                                                     \
    ffi::Error jax_flash_error = (__VA_ARGS__);            \
    if (jax_flash_error.failure()) return jax_flash_error; \
  } while (false)

// Returns from the enclosing handler with the parts of the message, streamed, unless it holds.
#define JAX_FLASH_CHECK(condition, ...)                     \
  do {                                                      \
    if (!(condition)) return invalid_argument(__VA_ARGS__); \
  } while (false)

namespace jax_flash {

// Facts about the current device, which must be one that kernels run on.
inline ffi::Error supported_device(DeviceInfo* device) {
  const cudaError_t error = current_device_info(device);
  if (error != cudaSuccess) return cuda_failure("asking for the device", error);
  const int capability = device->compute_capability;
  JAX_FLASH_CHECK(capability >= 80,
                  "the kernels need compute capability 8.0 or newer, this device has ",
                  capability / 10, ".", capability % 10);
  return ffi::Error::Success();
}

}  // namespace jax_flash
