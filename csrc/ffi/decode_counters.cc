#include "ffi/decode_counters.h"

#include <cstddef>
#include <memory>

#include "decode/decode.h"
#include "ffi/handlers.h"

namespace jax_flash {

ffi::TypeId DecodeCounters::id = {};

// No error counts here: the process may be about to end, and the driver gone.
DecodeCounters::~DecodeCounters() {
  for (uint32_t* const counters : counters_) cudaFree(counters);
}

uint32_t*& DecodeCounters::of_device(int device) {
  if (counters_.size() <= static_cast<size_t>(device)) counters_.resize(device + 1);
  return counters_[device];
}

ffi::Error DecodeCounters::allocate(cudaStream_t stream) {
  if (!needed_) return ffi::Error::Success();
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cuda_failure("asking for the device", error);
  const std::lock_guard<std::mutex> lock(mutex_);
  uint32_t*& counters = of_device(device);
  if (counters != nullptr) return ffi::Error::Success();
  DeviceInfo info{};
  JAX_FLASH_RETURN_IF_ERROR(supported_device(&info));
  const size_t bytes = decode::counters_of(info) * sizeof(uint32_t);
  void* memory = nullptr;
  error = cudaMalloc(&memory, bytes);
  if (error != cudaSuccess) return cuda_failure("allocating counters of jax_flash_decode", error);
  error = cudaMemsetAsync(memory, 0, bytes, stream);
  if (error != cudaSuccess) {
    cudaFree(memory);
    return cuda_failure("zeroing counters of jax_flash_decode", error);
  }
  counters = static_cast<uint32_t*>(memory);
  return ffi::Error::Success();
}

ffi::Error DecodeCounters::get(uint32_t** counters) {
  *counters = nullptr;
  if (!needed_) return ffi::Error::Success();
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cuda_failure("asking for the device", error);
  const std::lock_guard<std::mutex> lock(mutex_);
  *counters = of_device(device);
  JAX_FLASH_CHECK(*counters != nullptr, "jax_flash_decode has no counters on device ", device,
                  ": XLA did not initialize the call there");
  return ffi::Error::Success();
}

namespace {

ffi::ErrorOr<std::unique_ptr<DecodeCounters>> instantiate(ffi::Dictionary attributes) {
  const auto splits = attributes.get<int64_t>("splits");
  if (!splits.has_value()) return ffi::Unexpected(splits.error());
  return std::make_unique<DecodeCounters>(*splits > 1);
}

ffi::Error initialize(cudaStream_t stream, DecodeCounters* counters) {
  return counters->allocate(stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kDecodeInstantiate, instantiate, ffi::Ffi::BindInstantiate().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kDecodeInitialize, initialize,
                              ffi::Ffi::BindInitialize()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::State<DecodeCounters>>());

extern "C" XLA_FFI_TypeId* decode_counters_id() { return &DecodeCounters::id; }

extern "C" const XLA_FFI_TypeInfo* decode_counters_info() {
  static constexpr XLA_FFI_TypeInfo kInfo = ffi::MakeTypeInfo<DecodeCounters>();
  return &kInfo;
}

}  // namespace jax_flash
