"""What the Flax adapters say of masks and positions that are none."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_flash.linen
import jax_flash.nnx
from jax_flash.nnx import apply_rotary

ADAPTERS = [jax_flash.nnx, jax_flash.linen]
BATCH, LENGTH, HEADS, WIDTH = 2, 4, 2, 8


def heads() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (BATCH, LENGTH, HEADS, WIDTH))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("causal", "mask must be an array, got str: 'causal'"),
        (bool, "mask must be an array, got type: <class 'bool'>"),
        ([[True]], "mask must be an array, got list: [[True]]"),
        (True, "mask must be an array, got bool: True"),
        (np.ones((4, 4), complex), "mask must be bool or numbers (nonzero = attend)"),
        (np.array(["a"]), "mask must be bool or numbers (nonzero = attend), got dtype"),
        (np.array([None]), "(nonzero = attend), got dtype object"),
        (jax.random.key(0), "(nonzero = attend), got dtype key<fry>"),
    ],
)
def test_masks(adapter: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter.attention_fn(heads(), heads(), heads(), mask=mask)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8", "float64"])
def test_masks_of_numbers(adapter: Any, dtype: str) -> None:
    """As Flax makes them: whatever is not 0 attends."""
    mask = np.tril(np.ones((LENGTH, LENGTH)))
    actual = adapter.attention_fn(heads(), heads(), heads(), mask=mask.astype(dtype))
    expected = adapter.attention_fn(heads(), heads(), heads(), mask=mask > 0)
    np.testing.assert_array_equal(actual, expected)


POSITIONS = [
    ("0", "positions must be integers, got str: '0'"),
    (int, "positions must be integers, got type: <class 'int'>"),
    ([None], "positions must be integers, got list: [None]"),
    (jax.ShapeDtypeStruct((4,), jnp.int32), "must be integers, got ShapeDtypeStruct: "),
    (np.array(["a"] * 4), "positions must be integers, got ndarray: array(['a'"),
    (3.0, "positions must be integers, got dtype float32"),
    (True, "positions must be integers, got dtype bool"),
    (1 << 40, "positions must fit int32, got int: 1099511627776"),
    (np.full(4, 1 << 40), "positions must fit int32, got 1099511627776"),
    (np.full(4, -(1 << 40)), "positions must fit int32, got -1099511627776"),
]


@pytest.mark.parametrize(("positions", "message"), POSITIONS)
def test_positions(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_rotary(heads(), positions)


@pytest.mark.parametrize("rope_theta", [None, 1e4])
@pytest.mark.parametrize(("positions", "message"), POSITIONS)
def test_positions_of_modules(
    positions: Any, message: str, rope_theta: float | None
) -> None:
    x = jnp.ones((BATCH, LENGTH, 16))
    sizes: Any = {"num_heads": 2, "num_kv_heads": 1, "head_dim": WIDTH}
    layer = jax_flash.nnx.GroupedQueryAttention(
        16, **sizes, rope_theta=rope_theta, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(x, positions=positions)
    module = jax_flash.linen.GroupedQueryAttention(**sizes, rope_theta=rope_theta)
    with pytest.raises(ValueError, match=re.escape(message)):
        module.init(jax.random.key(0), x, positions=positions)


def test_positions_without_an_array() -> None:
    expected = apply_rotary(heads(), jnp.array([3, 1, 4, 1]))
    given: Any = [3, 1, 4, 1], np.array([3, 1, 4, 1]), (3, np.int8(1), 4, 1)
    for positions in given:
        np.testing.assert_array_equal(apply_rotary(heads(), positions), expected)
    layer = jax_flash.nnx.GroupedQueryAttention(16, 2, 1, WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"positions \(shape \(1,\)\) are for rotary"):
        layer(jnp.ones((BATCH, LENGTH, 16)), positions=given[0][:1])


@pytest.mark.parametrize("x", ["x", np.ones((4, 2, 8), int), np.ones((2, 8), "f4")])
def test_what_is_rotated(x: Any) -> None:
    with pytest.raises(ValueError, match=r"^x must be "):
        apply_rotary(x)
