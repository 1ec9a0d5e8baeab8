#include <algorithm>

#include "decode/decode.h"

namespace jax_flash::decode {
namespace {

template <ElementType kType>
cudaError_t launch_width(const DecodeParams& params, const DeviceInfo& device,
                         cudaStream_t stream) {
  const int width = std::max(params.head_dim, params.head_dim_v);
  if (width <= 64) return launch_decode<kType, 64>(params, device, stream);
  if (width <= 128) return launch_decode<kType, 128>(params, device, stream);
  return launch_decode<kType, 256>(params, device, stream);
}

}  // namespace

cudaError_t launch(ElementType type, const DecodeParams& params, const DeviceInfo& device,
                   cudaStream_t stream) {
  return type == ElementType::kBf16 ? launch_width<ElementType::kBf16>(params, device, stream)
                                    : launch_width<ElementType::kF16>(params, device, stream);
}

}  // namespace jax_flash::decode
