"""The compiled extension: loaded if present, its FFI targets and types registered.

Lives here: what was built and why not, if not. Importing this room never fails and
never touches a GPU.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Iterable, Iterator

import jax

from jax_flash._src import plan

FORWARD_TARGET = "jax_flash_mha_fwd"
BACKWARD_TARGET = "jax_flash_mha_bwd"
INTERVALS_TARGET = "jax_flash_intervals"
DECODE_TARGET = "jax_flash_decode"
SAMPLE_TARGET = "jax_flash_sample"
TOP_K_TARGET = "jax_flash_top_k"
RMS_NORM_TARGET = "jax_flash_rms_norm"
RMS_NORM_BACKWARD_TARGET = "jax_flash_rms_norm_bwd"
ROPE_APPEND_TARGET = "jax_flash_rope_append"


@dataclasses.dataclass(frozen=True)
class Extension:
    """What the compiled extension offers.

    Attributes:
      kernels: the instantiations it holds; empty without an extension.
      build_info: CUDA version, architectures and compiler it was built with.
      force_sm80: whether JAX_FLASH_FORCE_SM80 keeps it from the "sm90" kernels.
      missing: why there is no extension, None if there is one.
    """

    kernels: tuple[plan.Kernel, ...] = ()
    build_info: tuple[tuple[str, str], ...] = ()
    force_sm80: bool = False
    missing: str | None = None


@functools.cache
def _load() -> Extension:
    if importlib.util.find_spec("jax_flash._kernels") is None:
        return Extension(missing="jax_flash was built without its CUDA extension")
    try:
        kernels = importlib.import_module("jax_flash._kernels")
    except ImportError as error:
        reason = f"the CUDA extension of jax_flash cannot be loaded: {error}"
        return Extension(missing=reason)
    # Handlers that make a state are refused before its type is known.
    for name, registration in kernels.types().items():
        jax.ffi.register_ffi_type(name, registration, platform="CUDA")
    for name, handler in kernels.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")
    table = tuple(plan.Kernel(*row) for row in kernels.kernels())
    info = tuple(sorted(kernels.build_info().items()))
    return Extension(table, info, kernels.force_sm80())


_assumed: list[Extension] = []


def extension() -> Extension:
    """The extension of this process, loaded on the first call."""
    return _assumed[-1] if _assumed else _load()


@contextlib.contextmanager
def assume_kernels(
    kernels: Iterable[plan.Kernel] = plan.KERNELS,
    *,
    force_sm80: bool = False,
) -> Iterator[None]:
    """Lets calls be traced and lowered for CUDA as if `kernels` had been built.

    For tests of the lowering on machines without the extension; what is lowered inside
    cannot be run there.
    """
    assumed = Extension(tuple(kernels), force_sm80=force_sm80)
    _assumed.append(assumed)
    try:
        yield
    finally:
        _assumed.pop()
