#include "host/dispatch.h"

#include <cstdlib>
#include <string_view>

#include "sm80/bwd.h"
#include "sm80/fwd.h"
#include "sm90/bwd.h"
#include "sm90/fwd.h"

namespace jax_flash {
namespace {

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaFwdKernel sm80_fwd() {
  return {Family::kSm80, kType, kHeadDim, kHeadDimV,
          sm80::launch_mha_fwd<kType, kHeadDim, kHeadDimV>};
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaFwdKernel sm80_fwd_intervals() {
  return {Family::kSm80, kType, kHeadDim, kHeadDimV,
          sm80::launch_mha_fwd_intervals<kType, kHeadDim, kHeadDimV>};
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaFwdKernel sm90_fwd() {
  return {Family::kSm90, kType, kHeadDim, kHeadDimV,
          sm90::launch_mha_fwd<kType, kHeadDim, kHeadDimV>};
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaFwdKernel sm90_fwd_intervals() {
  return {Family::kSm90, kType, kHeadDim, kHeadDimV,
          sm90::launch_mha_fwd_intervals<kType, kHeadDim, kHeadDimV>};
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaBwdKernel sm80_bwd() {
  return {Family::kSm80, kType, kHeadDim, kHeadDimV,
          sm80::launch_mha_bwd<kType, kHeadDim, kHeadDimV>};
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaBwdKernel sm80_bwd_intervals() {
  return {Family::kSm80, kType, kHeadDim, kHeadDimV,
          sm80::launch_mha_bwd_intervals<kType, kHeadDim, kHeadDimV>};
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaBwdKernel sm90_bwd() {
  return {Family::kSm90, kType, kHeadDim, kHeadDimV,
          sm90::launch_mha_bwd<kType, kHeadDim, kHeadDimV>};
}

// Products of mma.sync, for Hopper, where the forward splits, too.
template <int kHeadDim, int kHeadDimV, bool kIntervals>
constexpr MhaBwdKernel sm90_bwd_split() {
  return {Family::kSm90, ElementType::kSplit, kHeadDim, kHeadDimV,
          sm80::launch_mha_bwd_split<kHeadDim, kHeadDimV, kIntervals>};
}

template <ElementType kType, int kHeadDim, int kHeadDimV>
constexpr MhaBwdKernel sm90_bwd_intervals() {
  return {Family::kSm90, kType, kHeadDim, kHeadDimV,
          sm90::launch_mha_bwd_intervals<kType, kHeadDim, kHeadDimV>};
}

constexpr auto kBf16 = ElementType::kBf16;
constexpr auto kF16 = ElementType::kF16;
constexpr auto kF32 = ElementType::kF32;
constexpr auto kTf32 = ElementType::kTf32;
constexpr auto kSplit = ElementType::kSplit;

constexpr MhaFwdKernel kMhaFwdKernels[] = {
    sm90_fwd<kBf16, 64, 64>(),   sm90_fwd<kF16, 64, 64>(),      //
    sm90_fwd<kBf16, 96, 96>(),   sm90_fwd<kF16, 96, 96>(),      //
    sm90_fwd<kBf16, 128, 128>(), sm90_fwd<kF16, 128, 128>(),    //
    sm90_fwd<kBf16, 192, 128>(), sm90_fwd<kF16, 192, 128>(),    //
    sm90_fwd<kBf16, 192, 192>(), sm90_fwd<kF16, 192, 192>(),    //
    sm90_fwd<kBf16, 256, 256>(), sm90_fwd<kF16, 256, 256>(),    //
    sm90_fwd<kSplit, 64, 64>(),  sm90_fwd<kSplit, 128, 128>(),  //
    sm80_fwd<kBf16, 32, 32>(),   sm80_fwd<kF16, 32, 32>(),      //
    sm80_fwd<kBf16, 64, 64>(),   sm80_fwd<kF16, 64, 64>(),      //
    sm80_fwd<kBf16, 80, 80>(),   sm80_fwd<kF16, 80, 80>(),      //
    sm80_fwd<kBf16, 96, 96>(),   sm80_fwd<kF16, 96, 96>(),      //
    sm80_fwd<kBf16, 128, 128>(), sm80_fwd<kF16, 128, 128>(),    //
    sm80_fwd<kBf16, 192, 128>(), sm80_fwd<kF16, 192, 128>(),    //
    sm80_fwd<kBf16, 192, 192>(), sm80_fwd<kF16, 192, 192>(),    //
    sm80_fwd<kBf16, 256, 256>(), sm80_fwd<kF16, 256, 256>(),    //
    sm80_fwd<kTf32, 64, 64>(),   sm80_fwd<kTf32, 128, 128>(),   //
    sm80_fwd<kF32, 64, 64>(),    sm80_fwd<kF32, 128, 128>(),    //
};

constexpr MhaBwdKernel kMhaBwdKernels[] = {
    sm90_bwd<kBf16, 64, 64>(),       sm90_bwd<kF16, 64, 64>(),           //
    sm90_bwd<kBf16, 96, 96>(),       sm90_bwd<kF16, 96, 96>(),           //
    sm90_bwd<kBf16, 128, 128>(),     sm90_bwd<kF16, 128, 128>(),         //
    sm90_bwd<kBf16, 192, 128>(),     sm90_bwd<kF16, 192, 128>(),         //
    sm90_bwd<kBf16, 192, 192>(),     sm90_bwd<kF16, 192, 192>(),         //
    sm90_bwd<kBf16, 256, 256>(),     sm90_bwd<kF16, 256, 256>(),         //
    sm90_bwd_split<64, 64, false>(), sm90_bwd_split<128, 128, false>(),  //
    sm80_bwd<kBf16, 64, 64>(),       sm80_bwd<kF16, 64, 64>(),           //
    sm80_bwd<kBf16, 96, 96>(),       sm80_bwd<kF16, 96, 96>(),           //
    sm80_bwd<kBf16, 128, 128>(),     sm80_bwd<kF16, 128, 128>(),         //
    sm80_bwd<kBf16, 192, 192>(),     sm80_bwd<kF16, 192, 192>(),         //
    sm80_bwd<kBf16, 256, 256>(),     sm80_bwd<kF16, 256, 256>(),         //
    sm80_bwd<kTf32, 64, 64>(),       sm80_bwd<kTf32, 128, 128>(),        //
    sm80_bwd<kF32, 64, 64>(),        sm80_bwd<kF32, 128, 128>(),
};

constexpr MhaFwdKernel kMhaFwdIntervalsKernels[] = {
    sm90_fwd_intervals<kBf16, 64, 64>(),   sm90_fwd_intervals<kF16, 64, 64>(),      //
    sm90_fwd_intervals<kBf16, 128, 128>(), sm90_fwd_intervals<kF16, 128, 128>(),    //
    sm90_fwd_intervals<kBf16, 256, 256>(), sm90_fwd_intervals<kF16, 256, 256>(),    //
    sm90_fwd_intervals<kSplit, 64, 64>(),  sm90_fwd_intervals<kSplit, 128, 128>(),  //
    sm80_fwd_intervals<kBf16, 128, 128>(), sm80_fwd_intervals<kF16, 128, 128>(),    //
    sm80_fwd_intervals<kBf16, 256, 256>(), sm80_fwd_intervals<kF16, 256, 256>(),    //
    sm80_fwd_intervals<kF32, 64, 64>(),    sm80_fwd_intervals<kF32, 128, 128>(),
};

constexpr MhaBwdKernel kMhaBwdIntervalsKernels[] = {
    sm90_bwd_intervals<kBf16, 64, 64>(),   sm90_bwd_intervals<kF16, 64, 64>(),    //
    sm90_bwd_intervals<kBf16, 128, 128>(), sm90_bwd_intervals<kF16, 128, 128>(),  //
    sm90_bwd_intervals<kBf16, 256, 256>(), sm90_bwd_intervals<kF16, 256, 256>(),  //
    sm90_bwd_split<64, 64, true>(),        sm90_bwd_split<128, 128, true>(),      //
    sm80_bwd_intervals<kBf16, 128, 128>(), sm80_bwd_intervals<kF16, 128, 128>(),  //
    sm80_bwd_intervals<kBf16, 256, 256>(), sm80_bwd_intervals<kF16, 256, 256>(),  //
    sm80_bwd_intervals<kF32, 64, 64>(),    sm80_bwd_intervals<kF32, 128, 128>(),
};

// The code is for sm_90a alone, and its operands are read by TMA: rows at multiples of 16 bytes, no
// empty dim, and two of at most five dims for the batch.
bool sm90_runs(const MhaFacts& facts) {
  return facts.compute_capability == 90 && !facts.force_sm80 && facts.alignment == 16 &&
         facts.head_dim % 8 == 0 && facts.head_dim_v % 8 == 0 && facts.head_dim > 0 &&
         facts.key_length > 0 && facts.batch_dims <= 2;
}

bool sm80_runs(const MhaFacts& facts) { return facts.compute_capability >= 80; }

template <typename Params>
const Kernel<Params>* choose(std::span<const Kernel<Params>> kernels, const MhaFacts& facts) {
  const bool runs[] = {sm80_runs(facts), sm90_runs(facts)};  // by Family
  for (const Kernel<Params>& kernel : kernels) {
    // Where none has products of tf32, those that are more precise will do.
    const bool suits = kernel.type == facts.type ||
                       (kernel.type == ElementType::kF32 && facts.type == ElementType::kTf32) ||
                       (kernel.type == ElementType::kSplit && facts.may_split);
    if (runs[static_cast<int>(kernel.family)] && suits && kernel.head_dim >= facts.head_dim &&
        kernel.head_dim_v >= facts.head_dim_v) {
      return &kernel;
    }
  }
  return nullptr;
}

bool is_set(const char* variable) {
  const char* const value = std::getenv(variable);
  return value != nullptr && std::string_view(value) == "1";
}

}  // namespace

std::span<const MhaFwdKernel> mha_fwd_kernels(bool intervals) {
  if (intervals) return kMhaFwdIntervalsKernels;
  return kMhaFwdKernels;
}
std::span<const MhaBwdKernel> mha_bwd_kernels(bool intervals) {
  if (intervals) return kMhaBwdIntervalsKernels;
  return kMhaBwdKernels;
}

const MhaFwdKernel* choose_mha_fwd_kernel(const MhaFacts& facts) {
  return choose(mha_fwd_kernels(facts.intervals), facts);
}
const MhaBwdKernel* choose_mha_bwd_kernel(const MhaFacts& facts) {
  return choose(mha_bwd_kernels(facts.intervals), facts);
}

bool force_sm80() {
  static const bool forced = is_set("JAX_FLASH_FORCE_SM80");
  return forced;
}

}  // namespace jax_flash
