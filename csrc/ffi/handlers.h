// The FFI handlers, one for each target.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace jax_flash {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kMhaFwd);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kMhaBwd);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kIntervals);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDecode);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kSample);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kTopK);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kRmsNorm);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kRmsNormBwd);

}  // namespace jax_flash
