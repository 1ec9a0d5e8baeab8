// Facts about the device that a launch runs on.
#pragma once

#include <cuda_runtime.h>

namespace jax_flash {

struct DeviceInfo {
  int compute_capability;  // 10 * major + minor
  int l2_bytes;
  int multiprocessors;
};

// Of the current device; asked once per device and process, safe from any thread.
cudaError_t current_device_info(DeviceInfo* info);

}  // namespace jax_flash
