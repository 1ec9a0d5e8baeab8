"""The kernels of `sample` and `top_k` against the specification, bit by bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import sample, top_k
from jax_flash._src import sample_op, sample_reference

TYPES = ("float32", "bfloat16", "float16")
SIZES = (1, 1000, 50257, 128256, 300001)

# top_k, top_p, min_p, temperature of seven rows
ROWS: dict[str, tuple[Any, Any, Any, Any]] = {
    "plain": (None, None, None, [1, 0.5, 2, 1, 0, 100, 1e-3]),
    "k": ([1, 2, 50, 100, 256, 40, 7], None, None, 1.0),
    "k and p": (50, [0.9, 0.1, 0.0, 1.0, 0.5, 0.99, 0.95], None, 0.8),
    "many k": ([257, 300, 5000, 10**6, 1000, 400, 512], None, 0.01, 1.3),
    "many k and p": (2000, 0.8, None, 1.0),
    "p": (None, [0.9, 0.1, 0.0, 1.0, 0.5, 0.99, 0.95], None, 1.0),
    "min_p": (None, None, [0, 0.1, 0.5, 1, 1e-3, 0.05, 0.9], 1.5),
}


def rows_of_every_kind(size: int, dtype: str) -> np.ndarray:
    """Normal logits, ties, all equal, some or all absent, infinite."""
    rng = np.random.default_rng(size)
    x = (3 * rng.standard_normal((7, size))).astype(np.float32)
    x[1] = np.round(x[1])
    x[2] = 0.5
    x[3, ::3] = -np.inf
    x[4, size // 2] = np.inf
    x[5, 1::2] = np.nan
    x[6] = np.where(np.arange(size) % 2, 0.0, -0.0)
    return x.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_sample(size: int, name: str) -> None:
    """Types and masks in turn: what costs time is the specification on the CPU."""
    number = list(ROWS).index(name) + len(ROWS) * SIZES.index(size)
    dtype, masked = TYPES[number % 3], number % 2 == 1
    x = rows_of_every_kind(size, dtype)
    mask = np.random.default_rng(0).random((7, size)) < 0.3 if masked else None
    k, p, min_p, temperature = ROWS[name]

    def full(value: Any, kind: Any) -> Any:
        if value is None:
            return None
        return jnp.broadcast_to(jnp.asarray(value, kind), (7,))

    with jax.default_device(jax.devices("cpu")[0]):
        # One table for both: a division may differ by a rounding.
        table = sample_reference.parameters(
            jax.random.key_data(jax.random.key(size)),
            full(temperature, jnp.float32),
            full(k, jnp.int32),
            full(p, jnp.float32),
            full(min_p, jnp.float32),
        )
        on_cpu = None if mask is None else jnp.asarray(mask)
        expected = np.asarray(
            jax.jit(sample_reference.sample)(jnp.asarray(x), table, on_cpu)
        )
    arguments = jax.device_put((x, np.asarray(table), mask))
    got = jax.jit(sample_op.sample)(*arguments)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("k", [1, 50, 256])
@pytest.mark.parametrize("size", SIZES)
def test_top_k(size: int, k: int) -> None:
    dtype = TYPES[(SIZES.index(size) + k) % 3]
    x = rows_of_every_kind(size, dtype)
    k = min(k, size)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = jax.tree.map(np.asarray, sample_reference.top_k(jnp.asarray(x), k))
    values, indices = jax.jit(top_k, static_argnums=1)(jnp.asarray(x), k)
    np.testing.assert_array_equal(indices, expected[1])
    bits = np.asarray(values).view(np.uint8)
    np.testing.assert_array_equal(bits, expected[0].view(np.uint8))


def test_many_rows_repeatedly() -> None:
    """More rows than thread blocks fit at once, and the same tokens every time."""
    x = jax.random.normal(jax.random.key(1), (1000, 5000))
    key = jax.random.key(2)
    for options in ({"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {}):
        f = jax.jit(lambda x, options=options: sample(x, key, **options))
        first = np.asarray(f(x))
        for _ in range(10):
            np.testing.assert_array_equal(f(x), first)
        np.testing.assert_array_equal(f(x[:10]), first[:10])


BATCHES = (1, 16, 33, 66)
"""Rows that have 8, 8, 4 and 2 thread blocks each where 132 multiprocessors are."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_over_several_blocks(dtype: str) -> None:
    """A token does not depend on the batch, and so not on the blocks of a row."""
    rows, size = 133, 128256
    x = jax.random.normal(jax.random.key(1), (rows, size))
    # Ties, few of them and many; what is best lies together, or in order.
    x = x.at[1].set(jnp.round(x[1], 1)).at[2].set(jnp.round(x[2])).at[3].set(0)
    x = x.at[4, 700:900].add(5).at[5].set(jnp.sort(x[5])).at[6].set(-jnp.inf)
    x = x.astype(dtype)
    options = (
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 256, "min_p": 0.01},
        {"top_k": 1000, "top_p": 0.9},
        {"top_p": 0.9},
        {"min_p": 1e-3},
    )

    @jax.jit
    def run(x: jax.Array) -> Any:
        key = jax.random.key(2)
        draws = [sample(x, key, **option) for option in options]
        return *draws, *top_k(x, 50), *top_k(x, 256)

    whole = [np.asarray(y) for y in run(x)]
    assert (whole[0][6] == -1).all()
    for batch in BATCHES:
        for one, all_rows in zip(run(x[:batch]), whole, strict=True):
            np.testing.assert_array_equal(one, all_rows[:batch])
    logits = np.asarray(x[:8]).astype(np.float32)
    ranked = np.argsort(-logits, axis=-1, kind="stable")[:, :256]
    np.testing.assert_array_equal(whole[-1][:8], ranked)
    np.testing.assert_array_equal(
        whole[-2][:8].astype(np.float32), np.take_along_axis(logits, ranked, 1)
    )


def test_vmap() -> None:
    x = jax.random.normal(jax.random.key(1), (3, 5, 700))
    keys = jax.random.split(jax.random.key(2), 3)
    got = jax.vmap(lambda x, k: sample(x, k, top_k=20))(x, keys)
    each = [sample(a, k, top_k=20) for a, k in zip(x, keys, strict=True)]
    np.testing.assert_array_equal(got, each)
    got = jax.vmap(lambda k: sample(x[0], k, top_k=20))(keys)
    np.testing.assert_array_equal(got, [sample(x[0], k, top_k=20) for k in keys])
