"""Set-up of the tests: 8 virtual CPU devices, strict dtypes, warnings are errors.

Tests under `gpu/` need an NVIDIA GPU and run only when asked for (`pytest tests/gpu` or
`-m gpu`); everything else runs on the CPU, also on a machine that has a GPU.
"""

import os
from collections.abc import Iterator

import pytest

# Modules of other people's code, which mixes dtypes.
LOOSE_DTYPES = ("flax_test", "examples_test", "readme_test")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the platform before anything imports JAX."""
    wanted = any("gpu" in str(argument) for argument in config.args)
    if not wanted and config.getoption("markexpr", "") != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
        os.environ["XLA_FLAGS"] = flags


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """No implicit promotion of dtypes in our own code."""
    import jax

    loose = request.module.__name__.rpartition(".")[2] in LOOSE_DTYPES
    with jax.numpy_dtype_promotion("standard" if loose else "strict"):
        yield


@pytest.fixture
def kernels() -> Iterator[None]:
    """Calls are lowered for CUDA as if the kernels had been built."""
    from jax_flash._src import registry

    with registry.assume_kernels():
        yield
