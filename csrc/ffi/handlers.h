// The FFI handlers, one for each target and stage, and the types of their states.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace jax_flash {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kMhaFwd);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kMhaBwd);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kIntervals);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDecodeInstantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDecodeInitialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDecode);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kSample);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kTopK);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kRmsNorm);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kRmsNormBwd);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kRopeAppend);

XLA_FFI_DECLARE_TYPE_ID_SYMBOL(decode_counters_id);
XLA_FFI_DECLARE_TYPE_INFO_SYMBOL(decode_counters_info);

}  // namespace jax_flash
