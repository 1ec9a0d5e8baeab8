# Defines jax_flash::xla_ffi, the headers of XLA's foreign function interface as
# shipped with the jax of the build environment. Sets JAX_FLASH_XLA_FFI_ERROR
# when that jax cannot be imported.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "from jax import ffi; print(ffi.include_dir())"
  OUTPUT_VARIABLE _xla_ffi_include_dir
  ERROR_VARIABLE _xla_ffi_stderr
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE _xla_ffi_result)

if(_xla_ffi_result EQUAL 0)
  set(JAX_FLASH_XLA_FFI_ERROR "")
  add_library(jax_flash_xla_ffi INTERFACE)
  add_library(jax_flash::xla_ffi ALIAS jax_flash_xla_ffi)
  target_include_directories(jax_flash_xla_ffi SYSTEM INTERFACE "${_xla_ffi_include_dir}")
else()
  set(JAX_FLASH_XLA_FFI_ERROR
      "jax cannot be imported by ${Python_EXECUTABLE}:\n${_xla_ffi_stderr}")
endif()
