// The decode kernels' host code and kernels on the CPU.
#include <cuda_runtime.h>

#include "decode/launch.cuh"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::decode {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::decode
unsigned char* emulated_shared_memory = jax_flash::decode::memory;

namespace {

using namespace jax_flash;

template <ElementType kType>
cudaError_t launch(const decode::DecodeParams& params, const DeviceInfo& device) {
  const int width = std::max(params.head_dim, params.head_dim_v);
  if (width <= 64) return decode::launch_decode<kType, 64>(params, device, nullptr);
  if (width <= 128) return decode::launch_decode<kType, 128>(params, device, nullptr);
  return decode::launch_decode<kType, 256>(params, device, nullptr);
}

}  // namespace

// `params` as tests/emulator_decode_test.py fills it, up to what the launch sets.
extern "C" int decode(const jax_flash::decode::DecodeParams* params, int f16, int multiprocessors) {
  const DeviceInfo device{90, 50 << 20, multiprocessors};
  return f16 != 0 ? launch<ElementType::kF16>(*params, device)
                  : launch<ElementType::kBf16>(*params, device);
}
