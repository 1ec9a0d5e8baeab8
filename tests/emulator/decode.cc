// The decode kernels' host code and kernels on the CPU.
#include <cuda_runtime.h>

#include "decode/warpgroup_launch.cuh"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::decode {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::decode
unsigned char* emulated_shared_memory = jax_flash::decode::memory;

namespace {

using namespace jax_flash;

template <decode::CacheType kCache>
cudaError_t launch(const decode::DecodeParams& params, const DeviceInfo& device) {
  const int width = std::max(params.head_dim, params.head_dim_v);
  if (width <= 64) return decode::launch_decode<kCache, 64>(params, device, nullptr);
  if (width <= 128) return decode::launch_decode<kCache, 128>(params, device, nullptr);
  return decode::launch_decode<kCache, 256>(params, device, nullptr);
}

}  // namespace

// `params` as tests/emulator_decode_test.py fills it, up to what the launch sets; `cache` is a
// CacheType, `order` that of thread blocks.
extern "C" int decode(const jax_flash::decode::DecodeParams* params, int cache, int capability,
                      int multiprocessors, unsigned order) {
  using jax_flash::decode::CacheType;
  emulator::order = order;
  emulator::largest_cluster = 0;
  const DeviceInfo device{capability, 50 << 20, multiprocessors};
  switch (static_cast<CacheType>(cache)) {
    case CacheType::kBf16:
      return launch<CacheType::kBf16>(*params, device);
    case CacheType::kF16:
      return launch<CacheType::kF16>(*params, device);
    case CacheType::kE4m3:
      return launch<CacheType::kE4m3>(*params, device);
    case CacheType::kInt8:
      return launch<CacheType::kInt8>(*params, device);
    case CacheType::kF32:
      return launch<CacheType::kF32>(*params, device);
  }
  return -1;
}

extern "C" int counters_of(int multiprocessors) {
  return jax_flash::decode::counters_of({90, 50 << 20, multiprocessors});
}

// Thread blocks of the largest cluster that the last call of `decode` launched.
extern "C" int cluster_of_last() { return emulator::largest_cluster; }
