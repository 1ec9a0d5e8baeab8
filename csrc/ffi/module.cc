// The Python module: FFI targets and what was built, nothing else.
#include <nanobind/nanobind.h>

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
  targets["jax_flash_mha_fwd"] = encapsulate(kMhaFwd);
  return targets;
}

nb::dict build_info() {
  nb::dict info;
  info["cuda"] = JAX_FLASH_CUDA_VERSION;
  info["architectures"] = JAX_FLASH_ARCHITECTURES;
  info["compiler"] = JAX_FLASH_CXX_COMPILER;
  return info;
}

nb::list kernels() {
  nb::list rows;
  for (const MhaFwdKernel& kernel : mha_fwd_kernels()) {
    const char* const type = kernel.type == ElementType::kBf16 ? "bf16" : "f16";
    rows.append(nb::make_tuple("mha_fwd", "sm80", type, kernel.head_dim, kernel.head_dim_v));
  }
  return rows;
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
  m.def("registrations", &registrations, "FFI target name to handler capsule, for platform CUDA.");
  m.def("build_info", &build_info, "What the kernels were compiled with and for.");
  m.def("kernels", &kernels,
        "Every kernel: (operation, family, dtype, head_dim, head_dim_v), widths as padded.");
  m.def("key_interval", &key_interval, nb::arg("row"), nb::arg("query_length"),
        nb::arg("key_length"), nb::arg("window_left"), nb::arg("window_right"),
        nb::arg("bottom_right"),
        "Keys [first, end) that a query row sees, as the kernels compute it; -1 is unbounded.");
}

}  // namespace jax_flash
