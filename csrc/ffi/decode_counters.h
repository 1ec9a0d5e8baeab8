// The state of a call of jax_flash_decode: counters in the memory of each device that runs it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "ffi/check.h"

namespace jax_flash {

// XLA makes one for each call of an executable, when it loads it, and destroys it with the
// executable. On one device all runs of an executable are in one order, so nobody else has its
// counters while a kernel runs.
class DecodeCounters {
 public:
  static ffi::TypeId id;

  // needed: whether kernels of the call count at all.
  explicit DecodeCounters(bool needed) : needed_(needed) {}
  DecodeCounters(const DecodeCounters&) = delete;
  DecodeCounters& operator=(const DecodeCounters&) = delete;
  ~DecodeCounters();

  // Once for the current device: memory for its counters, which become zero in `stream`.
  ffi::Error allocate(cudaStream_t stream);

  // Those of the current device, null if none are needed.
  ffi::Error get(uint32_t** counters);

 private:
  uint32_t*& of_device(int device);

  bool needed_;
  std::mutex mutex_;
  std::vector<uint32_t*> counters_;  // by device, null before `allocate`
};

}  // namespace jax_flash
