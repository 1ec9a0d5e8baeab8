// griddepcontrol (PTX ISA 9.7.13.13): programmatic dependent launch, sm_90 and later. Nothing on
// older GPUs, where kernels are not launched that way.
#pragma once

namespace jax_flash::ptx {

// Lets the next kernel of the stream start as soon as all thread blocks have come here or ended,
// if it was launched to allow that. It says nothing about memory.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernels that this one depends on have ended and their writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace jax_flash::ptx
