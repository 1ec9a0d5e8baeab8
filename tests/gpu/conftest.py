"""Everything here needs an NVIDIA GPU and the compiled kernels.

PYTHONPATH=.gpu pytest tests/gpu -n 6 --dist worksteal
JAX_FLASH_FORCE_SM80=1 PYTHONPATH=.gpu pytest tests/gpu   # the other family on Hopper
"""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def configure() -> None:
    """Settings that are read when JAX starts, and when NumPy is imported.

    Workers (`pytest -n`) inherit them, since a plugin may import NumPy before a worker
    reads this file.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The products of the oracle are small. Threads that wait for each other on busy
    # cores make them tens of times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Every shape would have its matrix products tuned by compiling and timing many
    # kernels.
    for flag in ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"):
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


# Not where the folder is only collected beside tests for the CPU.
if os.environ.get("JAX_PLATFORMS") != "cpu":
    configure()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder and spreads the slow ones over the workers."""
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
    slow = [item for item in here if item.path.stem == "sanitizer_test"]
    if slow:
        others = [item for item in items if item not in slow]
        size = -(-len(others) // len(slow))
        items[:] = [
            item
            for i, first in enumerate(slow)
            for item in (first, *others[i * size : (i + 1) * size])
        ]
