// The sm_90 forward with intervals on the CPU.
#include <cuda_runtime.h>

#include "problem.h"
#include "sm90/fwd_launch.cuh"

// What `extern __shared__ unsigned char memory[]` of the kernels means here.
namespace jax_flash::sm90 {
alignas(1024) unsigned char memory[227 * 1024];
}  // namespace jax_flash::sm90
unsigned char* emulated_shared_memory = jax_flash::sm90::memory;

namespace {

using namespace jax_flash;

template <ElementType kType>
cudaError_t launch_sm90(const MhaFwdParams& params, const DeviceInfo& device) {
  const int width = std::max(params.head_dim, params.head_dim_v);
  if (width <= 64) return sm90::launch_mha_fwd_intervals<kType, 64, 64>(params, device, nullptr);
  if (width <= 128) {
    return sm90::launch_mha_fwd_intervals<kType, 128, 128>(params, device, nullptr);
  }
  return sm90::launch_mha_fwd_intervals<kType, 256, 256>(params, device, nullptr);
}

}  // namespace

extern "C" int mha_fwd_intervals_sm90(const jax_flash::Arguments* arguments) {
  const MhaFwdParams params = forward_params(*arguments);
  const DeviceInfo device{90, 50 << 20, arguments->multiprocessors};
  return arguments->f16 != 0 ? launch_sm90<ElementType::kF16>(params, device)
                             : launch_sm90<ElementType::kBf16>(params, device);
}

// factor * tanh(scale * score / softcap) by both polynomials, and whether they hold: of scores
// [count] values and bytes [2, count], the small one's first.
extern "C" void tanh_polynomials(float scale, float softcap, float factor, int count,
                                 const float* scores, float* values, unsigned char* holds) {
  const SmallTanh small = SmallTanh::make(scale, softcap, factor);
  const TanhPolynomial wide = TanhPolynomial::make(scale, softcap, factor);
  for (int i = 0; i < count; ++i) {
    const float x = scores[i];
    const float square = x * x;
    values[i] = x * small.quotient(square, small.factors[2]);
    holds[i] = small.holds(__float_as_uint(square));
    const float u = x * wide.argument;
    uint32_t outside = 0;
    values[count + i] = u * wide.quotient(u, outside);
    holds[count + i] = (outside & TanhPolynomial::kOutside) == 0;
  }
}

// Fills the queue with the order of blocks of keys, as before a backward.
extern "C" int work_order(const jax_flash::Arguments* arguments, int size) {
  MhaFwdParams params{};
  describe(*arguments, params);
  return size == 64 ? sm90::launch_work_order<64>(params, nullptr)
                    : sm90::launch_work_order<128>(params, nullptr);
}

// Fills the queue with the list of blocks of rows, as before a forward.
extern "C" int row_list(const jax_flash::Arguments* arguments, int cutting) {
  MhaFwdParams params{};
  describe(*arguments, params);
  return sm90::launch_row_list<128>(params, cutting != 0, nullptr);
}
