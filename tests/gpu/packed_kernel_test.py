"""`mha_qkvpacked` read in place by the kernels, against the kernels on the parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from gpu_helpers import assert_result

from jax_flash import mha, mha_qkvpacked
from jax_flash._src import packed

# (N, K, H): of a width that TMA reads, of one that needs sm80, of odd ones.
HEADS = (
    (4, 4, 64),
    (8, 2, 128),
    (6, 3, 96),
    (5, 1, 80),
    (4, 2, 256),
    (3, 1, 33),
    (2, 2, 20),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"window_size": (40, 3)},
    {"is_causal": True, "key_value_seq_lengths": np.array([150, 0, 77], np.int32)},
)
BATCH, ROWS = 3, 150


def array_of(heads: tuple[int, int, int], *lead: int, dtype: Any = jnp.bfloat16) -> Any:
    n, k, width = heads
    rng = np.random.default_rng(1)
    shape = (*lead, BATCH, ROWS, (n + 2 * k) * width)
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def both(heads: tuple[int, int, int], **options: Any) -> tuple[Callable, Callable]:
    """`(out, lse)` of an array in place, and of its parts."""
    n, k, _ = heads
    given = {**options, "return_lse": True, "implementation": "cuda"}

    def whole(qkv: jax.Array) -> Any:
        return mha_qkvpacked(qkv, n, k, **given)

    def parts(qkv: jax.Array) -> Any:
        return mha(*packed.split((n, k), qkv), **given)

    return whole, parts


def with_gradient(f: Callable) -> Callable:
    """Results of f, and the gradient of a function of them."""

    def total(qkv: jax.Array) -> Any:
        out, lse = f(qkv)
        finite = jnp.where(jnp.isinf(lse), 0, lse)
        value = jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(finite))
        return value, (out, lse)

    return jax.grad(total, has_aux=True)


def assert_equal(got: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(
            np.asarray(x, np.float32), np.asarray(y, np.float32)
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_the_kernels_on_the_parts(
    heads: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """Bitwise: the same kernels read the same numbers from other places."""
    qkv = array_of(heads)
    whole, parts = both(heads, **options, deterministic=True)
    got = jax.jit(with_gradient(whole))(qkv)
    assert_equal(got, jax.jit(with_gradient(parts))(qkv))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_against_float64(heads: tuple[int, int, int]) -> None:
    qkv = array_of(heads, dtype=jnp.float16)
    whole, _ = both(heads, is_causal=True)
    n, k, _ = heads
    arrays = [np.asarray(x) for x in packed.split((n, k), qkv)]
    out, lse = (np.asarray(x) for x in jax.jit(whole)(qkv))
    assert_result((out, lse), (arrays, {"is_causal": True}))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_vmap(axis: int) -> None:
    heads = HEADS[1]
    qkv = jnp.moveaxis(array_of(heads, 2), 0, axis)
    whole, parts = both(heads, is_causal=True, deterministic=True)
    got = jax.jit(jax.vmap(with_gradient(whole), axis))(qkv)
    assert_equal(got, jax.jit(jax.vmap(with_gradient(parts), axis))(qkv))


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_nothing_but_the_kernel_runs(axis: int | None) -> None:
    heads = HEADS[1]
    whole, _ = both(heads, is_causal=True)
    qkv = array_of(heads) if axis is None else jnp.moveaxis(array_of(heads, 2), 0, axis)
    f = whole if axis is None else jax.vmap(whole, axis)
    text = jax.jit(f).lower(qkv).compile().as_text() or ""
    assert text.count("custom_call_target=") == 1
    for word in (" copy(", " transpose(", " slice(", "fusion("):
        assert word not in text, f"{word} in\n{text}"


def test_one_fusion_joins_the_gradients() -> None:
    """After the backward kernel one kernel of XLA writes the gradient of the array."""
    whole, _ = both(HEADS[1])
    f = jax.jit(lambda qkv, dout: jax.vjp(lambda x: whole(x)[0], qkv)[1](dout)[0])
    qkv = array_of(HEADS[1])
    dout = jnp.ones((BATCH, ROWS, *HEADS[1][:1], HEADS[1][2]), jnp.bfloat16)
    text = f.lower(qkv, dout).compile().as_text() or ""
    entry = text[text.index("ENTRY") :]
    assert entry.count("custom-call(") == 2
    assert entry.count("fusion(") + entry.count(" concatenate(") == 1


@pytest.mark.parametrize("rows", specs.SEQUENCE_LENGTHS[:9])
def test_lengths_without_a_batch(rows: int) -> None:
    heads = 4, 2, 64
    whole, parts = both(heads, is_causal=True)
    qkv = jnp.tile(array_of(heads)[0], (8, 1))[:rows]
    assert_equal(jax.jit(whole)(qkv), jax.jit(parts)(qkv))
