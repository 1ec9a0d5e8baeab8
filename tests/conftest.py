"""Set-up of the tests: 8 virtual CPU devices, strict dtypes, warnings are errors.

Tests under `gpu/` need an NVIDIA GPU and run only when asked for (`pytest tests/gpu` or
`-m gpu`); everything else runs on the CPU, also on a machine that has a GPU.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator

import pytest

CPU_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # The tests compile much and compute little.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)

# Modules of other people's code, which mixes dtypes.
LOOSE_DTYPES = ("flax_test", "examples_test", "readme_test")

# What those of examples/llama import, from the extra `examples`.
LLAMA = ("llama_", "serve_test", "smollm2_test")
LLAMA_PACKAGES = ("flax", "gguf", "jinja2", "safetensors", "tokenizers", "tqdm")


class LlamaModule(pytest.Module):
    """Skipped as a whole where the packages of the examples are not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """The tests of the module."""
        for name in LLAMA_PACKAGES:
            pytest.importorskip(name)
        return super().collect()


def pytest_pycollect_makemodule(
    module_path: pathlib.Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Tests of examples/llama, told by their names."""
    if module_path.stem.startswith(LLAMA):
        return LlamaModule.from_parent(parent, path=module_path)
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Starts JAX on the platform that the tests are for."""
    paths = (pathlib.Path(str(argument).partition("::")[0]) for argument in config.args)
    wanted = any("gpu" in path.parts[-2:] for path in paths)
    if wanted or config.getoption("markexpr", "") == "gpu":
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    before = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([before, *CPU_FLAGS])
    import jax

    # XLA reads its flags once. Programs that tests start should not inherit them.
    jax.devices()
    os.environ["XLA_FLAGS"] = before


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
def same_draws() -> None:
    """Random inputs of a test depend neither on its worker nor on its place."""
    import helpers

    helpers.reseed()


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


@pytest.fixture
def usual_promotion() -> Iterator[None]:
    """Types and ranks as users have them: peers rely on it."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
