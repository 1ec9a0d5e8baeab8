"""The forward kernel against float64, over the shape table and at its edges."""

import random
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import specs
from gpu_helpers import assert_correct, in_new_process, run_kernel

from jax_flash import mha


@pytest.mark.parametrize("spec", specs.GPU_TABLE, ids=str)
def test_shape_table(spec: specs.Spec) -> None:
    assert_correct(*spec.arrays(), **spec.options)


def random_spec(seed: int) -> specs.Spec:
    """Any combination of options, shapes up to a few tiles."""
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    batch = rng.randint(1, 3)
    rows, keys = rng.randint(1, 400), rng.randint(1, 400)
    left, right = (rng.choice((None, 0, rng.randint(0, 300))) for _ in range(2))
    lengths: list[tuple[int, ...] | None] = [
        tuple(rng.randint(0, size + 5) for _ in range(batch))
        if rng.random() < 0.4
        else None
        for size in (rows, keys)
    ]
    return specs.Spec(
        batch,
        rows,
        keys,
        kv_heads * rng.choice((1, 2, 3, 7)),
        kv_heads,
        rng.randint(1, 256),
        rng.choice((0, rng.randint(1, 256))),
        rng.choice(specs.DTYPES),
        is_causal=rng.random() < 0.5,
        causal_alignment=rng.choice(("bottom_right", "top_left")),
        window_size=rng.choice((None, (left, right))),
        query_lengths=lengths[0],
        key_lengths=lengths[1],
    )


@pytest.mark.parametrize("seed", range(200))
def test_random_shapes(seed: int) -> None:
    spec = random_spec(seed)
    assert_correct(*spec.arrays(seed), **spec.options)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-30, -1e-30, 30.0, 1e-3])
@pytest.mark.parametrize("dtype", specs.DTYPES)
def test_any_scale(scale: float, dtype: str) -> None:
    spec = specs.Spec(1, 100, 170, 2, 1, 64, dtype=dtype, is_causal=True)
    assert_correct(*spec.arrays(), **spec.options, scale=scale)


@pytest.mark.parametrize("dtype", specs.DTYPES)
def test_scores_that_grow_tile_by_tile(dtype: str) -> None:
    """The running maximum moves at every tile, by little and by much."""
    spec = specs.Spec(1, 130, 1000, 2, 2, 64, dtype=dtype)
    for growth in (0.001, 0.01, 0.1, -0.1):
        query, key, value = spec.arrays()
        query = np.abs(query)
        ramp = growth * np.arange(1000, dtype=np.float32)[:, None, None]
        key = (key.astype(np.float32) * 0.1 + ramp).astype(query.dtype)
        assert_correct(query, key, value)


@pytest.mark.parametrize("dtype", specs.DTYPES)
def test_padding_may_hold_anything(dtype: str) -> None:
    spec = specs.Spec(
        3,
        90,
        200,
        4,
        2,
        96,
        dtype=dtype,
        query_lengths=(90, 33, 0),
        key_lengths=(7, 200, 65),
    )
    query, key, value = (x.copy() for x in spec.arrays())
    for b in range(3):
        query[b, spec.query_lengths[b] :] = np.nan  # type: ignore[index]
        key[b, spec.key_lengths[b] :] = np.inf  # type: ignore[index]
        value[b, spec.key_lengths[b] :] = np.nan  # type: ignore[index]
    assert_correct(query, key, value, **spec.options)


def test_bitwise_reproducible_and_independent_of_neighbours() -> None:
    spec = specs.Spec(5, 333, 777, 6, 2, 128, is_causal=True)
    query, key, value = spec.arrays()
    out, lse = run_kernel(query, key, value, is_causal=True)
    for _ in range(20):
        again = run_kernel(query, key, value, is_causal=True)
        chex.assert_trees_all_equal((out, lse), again)
    for b in range(5):
        alone = run_kernel(
            query[b : b + 1], key[b : b + 1], value[b : b + 1], is_causal=True
        )
        chex.assert_trees_all_equal((out[b : b + 1], lse[b : b + 1]), alone)


def test_more_elements_than_31_bits() -> None:
    in_new_process(more_elements_than_31_bits)


def more_elements_than_31_bits() -> None:
    """2.2e9 query elements; the last rows against a call on them alone."""
    rows, heads, width = 134_300, 128, 128
    key = jax.random.key(0)
    tail = jax.random.normal(key, (1, 100, heads, width), jnp.bfloat16)
    query = jnp.zeros((1, rows, heads, width), jnp.bfloat16)
    query = jax.jit(
        lambda q, t: jax.lax.dynamic_update_slice_in_dim(q, t, rows - 100, 1),
        donate_argnums=0,
    )(query, tail)
    assert query.size > 2**31
    keys, values = (
        jax.random.normal(jax.random.key(i), (1, 70, 1, width), jnp.bfloat16)
        for i in (1, 2)
    )
    call = jax.jit(lambda *x: mha(*x, implementation="cuda"))
    got = call(query, keys, values)[:, -100:]
    chex.assert_trees_all_equal(got, call(tail, keys, values))


def test_lengths_are_read_at_run_time() -> None:
    """One compiled program, inside a scan, with other lengths at every step."""
    spec = specs.Spec(2, 70, 300, 4, 2, 64)
    query, key, value = spec.arrays()
    lengths = np.array([[0, 300], [1, 64], [65, 299], [128, 129]], np.int32)

    @jax.jit
    def steps(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        def step(carry: Any, length: Any) -> Any:
            out = mha(
                query,
                key,
                value,
                key_value_seq_lengths=length,
                is_causal=True,
                implementation="cuda",
            )
            return carry, out

        return jax.lax.scan(step, 0, lengths)[1]

    outs = steps(query, key, value, lengths)
    again = steps(query, key, value, lengths[::-1].copy())
    chex.assert_trees_all_equal(outs, again[::-1])
    for out, length in zip(outs, lengths, strict=True):
        given = {"key_value_seq_lengths": length, "is_causal": True}
        expected = oracle.attention(query, key, value, **given).out
        np.testing.assert_allclose(
            np.asarray(out, np.float64), expected, rtol=0, atol=2e-2
        )
