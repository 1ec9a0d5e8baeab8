"""The compiled extension: loaded if present, its FFI targets registered.

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


@dataclasses.dataclass(frozen=True)
class Extension:
    """What the compiled extension offers.

    Attributes:
      kernels: the instantiations it holds; empty without an extension.
      build_info: CUDA version, architectures and compiler it was built with.
      missing: why there is no extension, None if there is one.
    """

    kernels: tuple[plan.Kernel, ...]
    build_info: tuple[tuple[str, str], ...]
    missing: str | None


@functools.cache
def _load() -> Extension:
    if importlib.util.find_spec("jax_flash._kernels") is None:
        return Extension((), (), "jax_flash was built without its CUDA extension")
    try:
        kernels = importlib.import_module("jax_flash._kernels")
    except ImportError as error:
        reason = f"the CUDA extension of jax_flash cannot be loaded: {error}"
        return Extension((), (), reason)
    for name, capsule in kernels.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform="CUDA")
    table = tuple(plan.Kernel(*row) for row in kernels.kernels())
    return Extension(table, tuple(sorted(kernels.build_info().items())), None)


_assumed: list[Extension] = []


def extension() -> Extension:
    """The extension of this process, loaded on the first call."""
    return _assumed[-1] if _assumed else _load()


@contextlib.contextmanager
def assume_kernels(kernels: Iterable[plan.Kernel] = plan.KERNELS) -> Iterator[None]:
    """Lets calls be traced and lowered for CUDA as if `kernels` had been built.

    For tests of the lowering on machines without the extension; what is lowered inside
    cannot be run there.
    """
    _assumed.append(Extension(tuple(kernels), (), None))
    try:
        yield
    finally:
        _assumed.pop()
