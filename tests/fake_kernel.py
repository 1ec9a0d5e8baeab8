"""A CPU stand-in for the kernel, to see what XLA compiles around the call.

XLA assigns layouts in the same way on every platform, so a program compiled for the CPU
with the kernel's custom call in it shows whether query, key and value reach the kernel
without a transpose or copy. The stand-in computes nothing; it is compiled, not run.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import jax
from jax.interpreters import mlir

from jax_flash._src import inner, registry

METADATA_EXTENSION = 1
OLDEST_MINOR_VERSION = 3


class _Extension(ctypes.Structure):
    pass


class _ApiVersion(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("api_version", _ApiVersion))


_Extension._fields_ = (
    ("struct_size", ctypes.c_size_t),
    ("type", ctypes.c_int),
    ("next", ctypes.c_void_p),
    ("metadata", ctypes.POINTER(_Metadata)),
)


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.POINTER(_Extension)),
    )


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _handler(frame: "ctypes._Pointer[_CallFrame]") -> None:
    """Answers XLA, which asks for the handler's version on registering."""
    extension = frame.contents.extension_start
    if extension and extension.contents.type == METADATA_EXTENSION:
        version = extension.contents.metadata.contents.api_version
        version.major, version.minor = 0, OLDEST_MINOR_VERSION


@functools.cache
def _register() -> None:
    capsule = jax.ffi.pycapsule(_handler)
    jax.ffi.register_ffi_target(registry.FORWARD_TARGET, capsule, platform="cpu")


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """The CPU lowers calls as CUDA does, to the stand-in."""
    _register()
    jax.clear_caches()
    mlir.register_lowering(inner.forward_i, inner._forward_cuda, platform="cpu")
    try:
        with registry.assume_kernels():
            yield
    finally:
        mlir.register_lowering(inner.forward_i, inner._forward_default, platform="cpu")
        jax.clear_caches()
