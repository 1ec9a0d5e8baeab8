"""Which kernel runs, by its name in CUPTI's records."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_flash import decode_mha, mha
from jax_flash._src import plan, registry

# The benchmarks are no part of the package, so the repository must be on the path. It
# comes last: the package may be installed elsewhere, with kernels.
sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import timing


def forward(*arrays: jax.Array) -> jax.Array:
    return mha(*arrays, implementation="cuda")


def decode(*arrays: jax.Array) -> jax.Array:
    return decode_mha(*arrays, implementation="cuda")


def kernels(f: Callable, *arrays: jax.Array) -> list[str]:
    """Names of the kernels of a call."""
    binding = timing.cupti()
    if binding is None:
        pytest.skip("no CUPTI binding in this jax")
    call = jax.jit(f).lower(*arrays).compile()
    one = timing.Call(
        run=lambda: call(*arrays),
        wait=jax.block_until_ready,
        heads=lambda result: result,
    )
    return timing.kernel_times(binding, one, 3)[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "widths", [(64, 64), (40, 40), (128, 128), (192, 128), (256, 256), (36, 36), (7, 9)]
)
@pytest.mark.parametrize("lengths", [(200, 300), (4, 4000)])
def test_the_planned_kernel_runs_alone(
    lengths: tuple[int, int], widths: tuple[int, int], dtype: Any
) -> None:
    rows, keys = lengths
    query = jnp.ones((2, rows, 4, widths[0]), dtype)
    key, value = (jnp.ones((2, keys, 2, width), dtype) for width in widths)
    capability = int(jax.devices()[0].compute_capability.replace(".", ""))
    planned = plan.forward_kernel(
        jnp.dtype(dtype),
        *widths,
        capability,
        force_sm80=registry.extension().force_sm80,
    )
    assert planned is not None
    (name,) = kernels(forward, query, key, value)
    assert "mha_fwd_kernel" in name
    assert planned.family in name


def test_many_new_tokens_run_the_forward_kernel() -> None:
    """On Hopper, and one that adds up the parts of the keys; elsewhere decoding's."""
    query = jnp.ones((2, 64, 16, 64), jnp.bfloat16)
    cache = jnp.ones((2, 4096, 8, 64), jnp.bfloat16)
    lengths = jnp.full((2,), 4096, jnp.int32)
    names = kernels(decode, query, cache, cache, lengths)
    hopper = jax.devices()[0].compute_capability == "9.0"
    if hopper and not registry.extension().force_sm80:
        first, second = names
        assert "mha_fwd_kernel" in first
        assert "mha_fwd_parts_kernel" in second
    else:
        assert "decode" in names[0]


@pytest.mark.parametrize("width", [64, 40, 128, 36])
def test_the_planned_kernel_of_float32_runs(width: int) -> None:
    """After the one that splits operands, if it is of split bfloat16."""
    query = jnp.ones((2, 200, 4, width), jnp.float32)
    key, value = (jnp.ones((2, 300, 2, width), jnp.float32) for _ in range(2))
    planned = plan.forward_kernel(
        "float32",
        width,
        width,
        int(jax.devices()[0].compute_capability.replace(".", "")),
        force_sm80=registry.extension().force_sm80,
    )
    assert planned is not None
    *before, name = sorted(kernels(forward, query, key, value), reverse=True)
    assert "mha_fwd_kernel" in name
    assert planned.family in name
    assert len(before) == (planned.dtype == "split")
    assert all("mha_split_kernel" in one for one in before)


@pytest.mark.parametrize(
    "widths",
    [
        (64, 64),
        (96, 96),
        (128, 128),
        (192, 128),
        (192, 192),
        (256, 256),
        (36, 36),
        (7, 9),
    ],
)
def test_the_planned_backward_runs_after_the_forward(widths: tuple[int, int]) -> None:
    """Four kernels: the forward, row sums, the gradients, the rounding of one."""
    query = jnp.ones((2, 200, 4, widths[0]), jnp.bfloat16)
    key, value = (jnp.ones((2, 300, 2, width), jnp.bfloat16) for width in widths)
    planned = plan.backward_kernel(
        "bfloat16",
        *widths,
        int(jax.devices()[0].compute_capability.replace(".", "")),
        force_sm80=registry.extension().force_sm80,
    )
    assert planned is not None

    def gradients(*arrays: jax.Array) -> Any:
        out, vjp = jax.vjp(forward, *arrays)
        return vjp(out)

    names = kernels(gradients, query, key, value)
    assert len(names) == 4, names
    (name,) = (name for name in names if "mha_bwd_kernel" in name)
    assert planned.family in name


@pytest.mark.parametrize("precision", [None, "highest", "tf32"])
@pytest.mark.parametrize("width", [64, 40, 128, 36])
def test_the_planned_backward_of_float32_runs(
    width: int, precision: str | None
) -> None:
    """Kernels of float32 and of split bfloat16 leave sums in orders of their own."""
    query = jnp.ones((2, 200, 4, width), jnp.float32)
    key, value = (jnp.ones((2, 300, 2, width), jnp.float32) for _ in range(2))
    planned = plan.backward_kernel(
        "float32",
        width,
        width,
        int(jax.devices()[0].compute_capability.replace(".", "")),
        precision=precision,
        force_sm80=registry.extension().force_sm80,
    )
    assert planned is not None

    def gradients(*arrays: jax.Array) -> Any:
        out, vjp = jax.vjp(
            lambda *x: mha(*x, precision=precision, implementation="cuda"), *arrays
        )
        return vjp(out)

    names = kernels(gradients, query, key, value)
    assert sum("mha_bwd_kernel" in name for name in names) == 1
    (finish,) = (name for name in names if "bwd_finish_kernel" in name)
    assert ("DqueryF32Sum" in finish) == (planned.dtype != "split")
