#include "host/device.h"

#include <array>
#include <mutex>

namespace jax_flash {
namespace {

constexpr int kMaxDevices = 64;

cudaError_t query(int device, DeviceInfo* info) {
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  info->compute_capability = 10 * major + minor;
  error = cudaDeviceGetAttribute(&info->l2_bytes, cudaDevAttrL2CacheSize, device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&info->multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

cudaError_t current_device_info(DeviceInfo* info) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return query(device, info);

  static std::mutex mutex;
  static std::array<DeviceInfo, kMaxDevices> known{};
  static std::array<bool, kMaxDevices> asked{};
  const std::lock_guard<std::mutex> lock(mutex);
  if (!asked[device]) {
    const cudaError_t failure = query(device, &known[device]);
    if (failure != cudaSuccess) return failure;
    asked[device] = true;
  }
  *info = known[device];
  return cudaSuccess;
}

}  // namespace jax_flash
