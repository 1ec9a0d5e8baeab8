"""The kernels of `rms_norm` against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import rms_norm
from jax_flash._src.norm_op import KERNEL_MAX_BYTES

EPS = 1e-5
COLUMNS = (1, 64, 100, 128, 512, 768, 1000, 2048, 4096, 5120, 8192, 12288, 16384)


def exact(x: Any, weight: Any, dy: Any, dsum: Any) -> tuple[np.ndarray, ...]:
    """y, dx, dweight in float64, and the size of what cancels in dx."""
    x, weight, dy, dsum = (np.asarray(a, np.float64) for a in (x, weight, dy, dsum))
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    unit = x * scale
    inner = dy * weight
    dx = scale * (inner - unit * (unit * inner).mean(-1, keepdims=True)) + dsum
    parts = np.abs(inner) + np.abs(unit) * np.abs(unit * inner).mean(-1, keepdims=True)
    return unit * weight, dx, (dy * unit).sum(0), scale * parts


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rms_norm(dtype: str, columns: int, residual: bool) -> None:
    rows = (1, 67, 1500)[(COLUMNS.index(columns) + len(dtype) + residual) % 3]
    rng = np.random.default_rng(columns)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    x, added, weight = normal(rows, columns), normal(rows, columns), normal(columns)
    if columns % 3 == 0:
        weight = weight.astype(jnp.float32)
    dy, dsum = normal(rows, columns), normal(rows, columns)

    @jax.jit
    def run(x: Any, weight: Any, added: Any, dy: Any, dsum: Any) -> Any:
        if residual:
            out, vjp = jax.vjp(
                lambda x, w, r: rms_norm(x, w, residual=r, eps=EPS), x, weight, added
            )
            return out, vjp((dy, dsum))
        y, vjp = jax.vjp(lambda x, w: rms_norm(x, w, eps=EPS), x, weight)
        return (y, x), vjp(dy)

    text = run.lower(x, weight, added, dy, dsum).as_text()
    most = max(KERNEL_MAX_BYTES.values()) // x.dtype.itemsize
    assert ("jax_flash_rms_norm" in text) == (columns <= most)
    (y, total), (dx, dweight, *rest) = run(x, weight, added, dy, dsum)
    if residual:
        wide = np.asarray(x, np.float64) + np.asarray(added, np.float64)
        np.testing.assert_array_equal(total, wide.astype(x.dtype))
        np.testing.assert_array_equal(rest[0], dx)
    want = exact(total, weight, dy, dsum if residual else 0 * dsum)
    step = 2e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    for got, expected, parts in ((y, want[0], 1), (dx, want[1], want[3])):
        error = np.abs(np.asarray(got, np.float64) - expected)
        size = np.maximum(np.maximum(np.abs(expected), 1), parts)
        assert (error <= step * size).all(), error.max()
    error = np.abs(np.asarray(dweight, np.float64) - want[2])
    step = max(step if dweight.dtype != jnp.float32 else 0, 1e-5)
    assert (error <= step * np.maximum(np.abs(want[2]), rows**0.5)).all(), error.max()


def test_vmap_of_the_gradient() -> None:
    """A gradient of the weight for each element."""
    x = jax.random.normal(jax.random.key(0), (3, 40, 256))
    weight = jax.random.normal(jax.random.key(1), (256,))
    f = jax.grad(lambda w, x: jnp.sin(rms_norm(x, w)).sum())
    got = jax.vmap(f, (None, 0))(weight, x)
    want = jnp.stack([f(weight, a) for a in x])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_repeated_calls_are_equal() -> None:
    x = jax.random.normal(jax.random.key(0), (2000, 4096), jnp.bfloat16)
    weight = jnp.ones(4096, jnp.bfloat16)
    f = jax.jit(jax.grad(lambda x, w: rms_norm(x, w).astype(jnp.float32).sum(), (0, 1)))
    first = jax.tree.map(np.asarray, f(x, weight))
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, f(x, weight), first)
