#include <algorithm>

#include "decode/decode.h"

namespace jax_flash::decode {
namespace {

template <CacheType kCache>
cudaError_t launch_width(const DecodeParams& params, const DeviceInfo& device,
                         cudaStream_t stream) {
  const int width = std::max(params.head_dim, params.head_dim_v);
  if (width <= 64) return launch_decode<kCache, 64>(params, device, stream);
  if (width <= 128) return launch_decode<kCache, 128>(params, device, stream);
  return launch_decode<kCache, 256>(params, device, stream);
}

}  // namespace

cudaError_t launch(CacheType cache, const DecodeParams& params, const DeviceInfo& device,
                   cudaStream_t stream) {
  switch (cache) {
    case CacheType::kBf16:
      return launch_width<CacheType::kBf16>(params, device, stream);
    case CacheType::kF16:
      return launch_width<CacheType::kF16>(params, device, stream);
    case CacheType::kE4m3:
      return launch_width<CacheType::kE4m3>(params, device, stream);
    case CacheType::kInt8:
      return launch_width<CacheType::kInt8>(params, device, stream);
    case CacheType::kF32:
      return launch_width<CacheType::kF32>(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_flash::decode
