// The Python module: FFI targets and what was built, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <type_traits>

#include "ffi/handlers.h"
#include "host/dispatch.h"
#include "tile/mask.cuh"

namespace nb = nanobind;

namespace jax_flash {
namespace {

template <typename Handler>
nb::capsule encapsulate(Handler* handler) {
  static_assert(std::is_invocable_r_v<XLA_FFI_Error*, Handler, XLA_FFI_CallFrame*>,
                "an FFI handler takes an XLA_FFI_CallFrame");
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict registrations() {
  nb::dict targets;
  nb::dict decode;
  decode["instantiate"] = encapsulate(kDecodeInstantiate);
  decode["initialize"] = encapsulate(kDecodeInitialize);
  decode["execute"] = encapsulate(kDecode);
  targets["jax_flash_mha_fwd"] = encapsulate(kMhaFwd);
  targets["jax_flash_mha_bwd"] = encapsulate(kMhaBwd);
  targets["jax_flash_intervals"] = encapsulate(kIntervals);
  targets["jax_flash_decode"] = decode;
  targets["jax_flash_sample"] = encapsulate(kSample);
  targets["jax_flash_top_k"] = encapsulate(kTopK);
  targets["jax_flash_rms_norm"] = encapsulate(kRmsNorm);
  targets["jax_flash_rms_norm_bwd"] = encapsulate(kRmsNormBwd);
  targets["jax_flash_rope_append"] = encapsulate(kRopeAppend);
  return targets;
}

nb::dict types() {
  nb::dict counters;
  counters["type_id"] = nb::capsule(static_cast<void*>(decode_counters_id()));
  counters["type_info"] = nb::capsule(static_cast<const void*>(decode_counters_info()));
  nb::dict all;
  all["jax_flash_decode_counters"] = counters;
  return all;
}

nb::dict build_info() {
  nb::dict info;
  info["cuda"] = JAX_FLASH_CUDA_VERSION;
  info["architectures"] = JAX_FLASH_ARCHITECTURES;
  info["compiler"] = JAX_FLASH_CXX_COMPILER;
  return info;
}

constexpr const char* kTypes[] = {"bf16", "f16", "f32", "tf32", "split"};  // by ElementType

// Of calls without and with intervals.
constexpr const char* kForward[] = {"mha_fwd", "mha_fwd_intervals"};
constexpr const char* kBackward[] = {"mha_bwd", "mha_bwd_intervals"};

template <typename Params>
nb::tuple describe(const char* op, const Kernel<Params>& kernel) {
  const char* const family = kernel.family == Family::kSm90 ? "sm90" : "sm80";
  return nb::make_tuple(op, family, kTypes[static_cast<int>(kernel.type)], kernel.head_dim,
                        kernel.head_dim_v);
}

template <typename Params>
nb::object describe(const char* op, const Kernel<Params>* kernel) {
  if (kernel == nullptr) return nb::none();
  return describe(op, *kernel);
}

nb::list kernels() {
  nb::list rows;
  for (const bool intervals : {false, true}) {
    for (const MhaFwdKernel& kernel : mha_fwd_kernels(intervals)) {
      rows.append(describe(kForward[intervals], kernel));
    }
    for (const MhaBwdKernel& kernel : mha_bwd_kernels(intervals)) {
      rows.append(describe(kBackward[intervals], kernel));
    }
  }
  return rows;
}

nb::object choose_kernel(const std::string& op, const std::string& dtype, int head_dim,
                         int head_dim_v, int key_length, int batch_dims, int alignment,
                         int compute_capability, bool force_sm80, bool may_split) {
  const auto* const name = std::find(std::begin(kTypes), std::end(kTypes), dtype);
  if (name == std::end(kTypes)) return nb::none();
  const auto type = static_cast<ElementType>(name - kTypes);
  for (const bool intervals : {false, true}) {
    const MhaFacts facts = {type,      head_dim,           head_dim_v, key_length, batch_dims,
                            alignment, compute_capability, force_sm80, intervals,  may_split};
    if (op == kForward[intervals]) return describe(op.c_str(), choose_mha_fwd_kernel(facts));
    if (op == kBackward[intervals]) return describe(op.c_str(), choose_mha_bwd_kernel(facts));
  }
  return nb::none();
}

nb::tuple key_interval(int row, int query_length, int key_length, int window_left, int window_right,
                       bool bottom_right) {
  const KeyInterval keys =
      RowMask::make(query_length, key_length, window_left, window_right, bottom_right)
          .interval(row);
  return nb::make_tuple(keys.first, keys.end);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.def("registrations", &registrations,
        "FFI target name to its handler's capsule, or those of its stages by name, for platform "
        "CUDA.");
  m.def("types", &types, "Name to capsules of id and info of each type of state of the handlers.");
  m.def("build_info", &build_info, "What the kernels were compiled with and for.");
  m.def("kernels", &kernels,
        "Every kernel: (operation, family, dtype, head_dim, head_dim_v), widths as padded.");
  m.def("choose_kernel", &choose_kernel, nb::arg("op"), nb::arg("dtype"), nb::arg("head_dim"),
        nb::arg("head_dim_v"), nb::kw_only(), nb::arg("key_length"), nb::arg("batch_dims"),
        nb::arg("alignment"), nb::arg("compute_capability"), nb::arg("force_sm80"),
        nb::arg("may_split"),
        "The row of kernels() that runs a call with these properties, or None.");
  m.def("force_sm80", &force_sm80,
        "Whether JAX_FLASH_FORCE_SM80=1 was in the environment when it was first asked for.");
  m.def("key_interval", &key_interval, nb::arg("row"), nb::arg("query_length"),
        nb::arg("key_length"), nb::arg("window_left"), nb::arg("window_right"),
        nb::arg("bottom_right"),
        "Keys [first, end) that a query row sees, as the kernels compute it; -1 is unbounded.");
}

}  // namespace jax_flash
