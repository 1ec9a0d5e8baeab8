// What `extern __shared__ unsigned char shared[]` of the sm_80 kernels means here. In one source
// file of a library.
#pragma once

namespace jax_flash::sm80 {
alignas(1024) unsigned char shared[227 * 1024];
}  // namespace jax_flash::sm80
unsigned char* emulated_shared_memory = jax_flash::sm80::shared;
