"""Blocks of keys that add to dQ in an order, and blocks that make it, on a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from gradient_helpers import assert_all, problem_of

from jax_flash import mha


@pytest.mark.parametrize("width", [64, 96, 128])
def test_without_a_mask(width: int) -> None:
    """Rings of one block and of several, in one round of thread blocks and in more."""
    chosen = [
        specs.Spec(1, 300, 100, 2, 2, width),
        specs.Spec(1, 500, 500, 4, 2, width, dtype="float16"),
        specs.Spec(2, 321, 257, 2, 1, width, key_lengths=(257, 129)),
        specs.Spec(3, 400, 380, 2, 2, width, query_lengths=(400, 1, 250)),
        specs.Spec(5, 260, 250, 32, 16, width),
    ]
    assert_all(chosen, [problem_of(spec, i, True) for i, spec in enumerate(chosen)])


@pytest.mark.parametrize("width", [64, 96, 128])
def test_with_a_diagonal(width: int) -> None:
    """The block of the first keys is the last to add, and some tiles have no other."""
    chosen = [
        specs.Spec(4, 300, 300, 128, 128, width, is_causal=True),
        specs.Spec(6, 250, 140, 128, 128, width, is_causal=True, dtype="float16"),
    ]
    assert_all(chosen, [problem_of(spec, i, True) for i, spec in enumerate(chosen)])


@functools.partial(jax.jit, static_argnames=("is_causal", "deterministic"))
def gradients(arrays: Any, dout: jax.Array, **options: bool) -> Any:
    f = functools.partial(mha, implementation="cuda", **options)
    return jax.vjp(f, *arrays)[1](dout)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("batch", "length", "heads"), [(1, 16384, 3), (3, 4096, 12), (8, 2048, 17)]
)
def test_orders_agree(
    batch: int, length: int, heads: int, width: int, is_causal: bool
) -> None:
    """With the order of every addition, and with that which is faster, many times."""
    keys = jax.random.split(jax.random.key(length), 4)
    shape = (batch, length, heads, width)
    *arrays, dout = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    expected = gradients(arrays, dout, is_causal=is_causal, deterministic=True)
    for _ in range(10):
        actual = gradients(arrays, dout, is_causal=is_causal, deterministic=False)
        for x, y in zip(actual, expected, strict=True):
            x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
            assert np.isfinite(x).all()
            assert np.abs(x - y).max() <= 2e-2 * np.abs(y).max()
