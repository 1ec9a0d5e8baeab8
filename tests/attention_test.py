"""`mha` as users call it: ranks, arguments, determinism, empty inputs, properties."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import specs
from helpers import assert_close, dense, flash, loss, normal, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_flash
from jax_flash import mha


def test_public_names() -> None:
    assert jax_flash.__all__ == [
        "KVCache",
        "OutOfPagesError",
        "PageAllocator",
        "PagedKVCache",
        "__version__",
        "alibi",
        "append_kv",
        "backends",
        "decode_mha",
        "dot_product_attention",
        "explain",
        "merge_partials",
        "mha",
        "mha_qkvpacked",
        "mha_varlen",
        "ring_mha",
        "rms_norm",
        "rope",
        "rope_append_kv",
        "rope_append_qkvpacked",
        "sample",
        "silu_mul",
        "split_qkv",
        "top_k",
        "ulysses_mha",
    ]


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 2), (2, 1, 2)], ids=str)
def test_any_batch_dimensions(batch: tuple[int, ...]) -> None:
    size = int(np.prod(batch))
    arrays = [x[:size].reshape(*batch, *x.shape[1:]) for x in qkv()]
    bias = normal(*batch, 4, 8, 8)
    lengths = np.arange(size, dtype=np.int32).reshape(batch) + 3
    options = {"key_value_seq_lengths": lengths, "is_causal": True}
    out, lse = flash(*arrays, bias=bias, **options)
    chex.assert_shape(out, (*batch, 8, 4, 8))
    chex.assert_shape(lse, (*batch, 4, 8))
    assert_close((out, lse), dense(*arrays, bias=bias, **options))


def test_lse_is_returned_only_on_request() -> None:
    out, lse = mha(*qkv(), return_lse=True)
    chex.assert_type(lse, jnp.float32)
    np.testing.assert_array_equal(mha(*qkv()), out)


def test_lengths_broadcast() -> None:
    query, key, value = (x.reshape(2, 2, *x.shape[1:]) for x in qkv())
    full = np.array([[3, 5], [3, 5]])
    expected = mha(query, key, value, key_value_seq_lengths=full)
    got = mha(query, key, value, key_value_seq_lengths=np.array([3, 5]))
    np.testing.assert_array_equal(got, expected)
    got = mha(query, key, value, key_value_seq_lengths=4)
    expected = mha(query, key, value, key_value_seq_lengths=np.full((2, 2), 4))
    np.testing.assert_array_equal(got, expected)


def test_lengths_are_clamped() -> None:
    expected = mha(*qkv(), key_value_seq_lengths=np.array([8, 0, 8, 2]))
    got = mha(*qkv(), key_value_seq_lengths=np.array([99, -5, 8, 2]))
    np.testing.assert_array_equal(got, expected)


def test_bias_and_mask_broadcast_from_any_shape() -> None:
    query, key, value = qkv()
    for shape in ((8,), (8, 1), (8, 8), (4, 1, 1), (4, 1, 1, 8), (1, 4, 8, 1), (1, 1)):
        bias = normal(*shape)
        expected = dense(query, key, value, jnp.broadcast_to(bias, (4, 4, 8, 8)))
        assert_close(flash(query, key, value, bias), expected)
        mask = np.asarray(bias) > 0
        got = mha(query, key, value, mask=mask)
        want = oracle.attention(query, key, value, mask=mask).out
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_every_argument_changes_the_output() -> None:
    """Nothing that is accepted is ignored."""
    base = np.asarray(mha(*qkv()))
    ids = np.array([[0] * 4 + [1] * 4] * 4)
    changes: tuple[dict[str, Any], ...] = (
        {"bias": normal(8, 8)},
        {"bias": jax_flash.alibi(jnp.full(4, 0.5))},
        {"mask": np.tri(8, dtype=bool)},
        {"scale": 0.1},
        {"is_causal": True},
        {"window_size": (2, 2)},
        {"window_size": (2, None)},
        {"window_size": (None, 2)},
        {"softcap": 0.5},
        {"sinks": normal(4)},
        {"q_segment_ids": ids, "kv_segment_ids": ids},
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
        {"query_seq_lengths": 5},
        {"key_value_seq_lengths": 5},
    )
    for options in changes:
        assert not np.allclose(mha(*qkv(), **options), base, atol=1e-3), options
    query, key, value = qkv()
    for alignment in ("top_left", "bottom_right"):
        got = mha(query[:, :5], key, value, is_causal=True, causal_alignment=alignment)
        want = oracle.attention(
            query[:, :5], key, value, is_causal=True, causal_alignment=alignment
        )
        np.testing.assert_allclose(got, want.out, atol=1e-5)


@pytest.mark.parametrize("x64", [False, True])
def test_segment_ids_of_other_types(x64: bool) -> None:
    """Ids that int32 cannot hold are told apart as well; those of no key see none."""
    ids = np.array([[0, 0, 1, 1, 1, 3, 2, 2]] * 4, np.int32)
    other = np.where(ids == 3, 7, ids)
    expected = np.asarray(mha(*qkv(), q_segment_ids=ids, kv_segment_ids=other))
    assert not expected[:, 5].any()
    with jax.enable_x64(x64):
        for dtype, base in (("uint8", 5), ("uint32", 2**32 - 9), ("int64", 2**40)):
            if dtype == "int64" and not x64:
                continue
            wide = [
                jnp.asarray(x.astype(dtype) + np.array(base, dtype))
                for x in (ids, other)
            ]
            got = mha(*qkv(), q_segment_ids=wide[0], kv_segment_ids=wide[1])
            np.testing.assert_array_equal(got, expected)
        if x64:
            far = jnp.asarray(np.where(ids == 1, -(2**40), ids.astype(np.int64)))
            got = mha(*qkv(), q_segment_ids=far, kv_segment_ids=jnp.asarray(other))
            assert not np.asarray(got)[:, 2:5].any()
    with pytest.raises(
        ValueError, match="q_segment_ids must fit int32, got the id 1099"
    ):
        mha(*qkv(), q_segment_ids=ids + np.int64(2**40), kv_segment_ids=ids)


def test_large_windows_are_unbounded() -> None:
    expected = mha(*qkv())
    for side in (2**30, 2**31, 2**40):
        got = mha(*qkv(), window_size=(side, side))
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(mha(*qkv(), window_size=(2**30 - 1, 8)), expected)


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 3, 2, 4), (0, 5, 1, 4), (0, 5, 1, 6)),
        ((2, 0, 2, 4), (2, 5, 1, 4), (2, 5, 1, 6)),
        ((2, 3, 2, 4), (2, 0, 1, 4), (2, 0, 1, 6)),
        ((0, 2, 4), (0, 1, 4), (0, 1, 6)),
    ],
    ids=["batch", "rows", "keys", "no batch"],
)
def test_empty_inputs(shapes: tuple[tuple[int, ...], ...]) -> None:
    args = [jnp.ones(shape) for shape in shapes]
    out, lse = jax.jit(flash)(*args)
    chex.assert_shape(out, (*shapes[0][:-1], shapes[2][-1]))
    np.testing.assert_array_equal(out, 0)
    if 0 in shapes[1]:
        np.testing.assert_array_equal(lse, -np.inf)
    grads = jax.grad(loss(flash), (0, 1, 2))(*args)
    for x, grad in zip(args, grads, strict=True):
        chex.assert_equal_shape([x, grad])
        np.testing.assert_array_equal(grad, 0)
    tangents = jax.jvp(flash, args, args)[1]
    chex.assert_trees_all_equal_shapes(tangents, (out, lse))
    chex.assert_tree_all_finite(tangents)


def test_values_without_width() -> None:
    """The output is empty; lse and what follows from it are those of any values."""
    query, key, value = qkv()
    run = functools.partial(mha, is_causal=True, return_lse=True)

    def score(width: int):
        def f(q: jax.Array, k: jax.Array) -> jax.Array:
            return (run(q, k, value[..., :width])[1] ** 2).sum()

        first = jax.grad(f, (0, 1))
        second = jax.jvp(first, (query, key), (query, key))[1]
        return f(query, key), first(query, key), second

    out, lse = run(query, key, value[..., :0])
    assert out.shape == (*query.shape[:-1], 0)
    assert np.isfinite(lse).all()
    chex.assert_trees_all_close(score(0), score(1), rtol=1e-5)
    assert jax.grad(lambda v: run(query, key, v)[0].sum())(value[..., :0]).size == 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_are_bitwise_equal(deterministic: bool) -> None:
    run = functools.partial(flash, deterministic=deterministic)
    f = jax.jit(jax.grad(loss(run), (0, 1, 2)))
    first = f(*qkv())
    for _ in range(3):
        chex.assert_trees_all_equal(f(*qkv()), first)


def test_independent_of_the_neighbours() -> None:
    """A row of the batch is the same alone and among others."""
    whole = mha(*qkv(), is_causal=True)
    for b in range(4):
        alone = mha(*(x[b : b + 1] for x in qkv()), is_causal=True)
        np.testing.assert_allclose(alone[0], whole[b], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype: str) -> None:
    out, lse = flash(*(x.astype(dtype) for x in qkv()))
    chex.assert_type([out, lse], [jnp.dtype(dtype), jnp.float32])


def test_bias_of_another_dtype() -> None:
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    bias = normal(4, 8, 8)

    def f(bias):
        return mha(*args, bias=bias).astype(jnp.float32).sum()

    grad = jax.grad(f)(bias)
    chex.assert_type(grad, jnp.float32)
    chex.assert_tree_all_finite(grad)
    chex.assert_type(jax.grad(f)(bias.astype(jnp.bfloat16)), jnp.bfloat16)


def test_under_strict_settings() -> None:
    """Users' debugging settings find nothing in our code."""
    with jax.numpy_rank_promotion("raise"):
        jax.grad(loss(flash), (0, 1, 2))(*qkv())
        mha(*qkv(), dropout_rate=0.5, dropout_key=jax.random.key(0))
        jax_flash.dot_product_attention(
            *[x[..., :8] for x in qkv()],
            key_value_seq_lengths=jnp.array([1, 2, 3, 4], jnp.int32),
        )
        mha(*qkv(), dropout_rate=0.5, dropout_key=jax.random.key(0))
    with jax.debug_nans(True):
        jax.grad(loss(flash), (0, 1, 2))(*qkv())
    with jax.checking_leaks():
        jax.jit(jax.grad(loss(flash), (0, 1, 2)))(*qkv())


def test_lazy_adapters() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = jax_flash.no_such_name


sizes = st.integers(1, 12)
sides = st.none() | st.integers(0, 14)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    rows=sizes,
    keys=sizes,
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    widths=st.tuples(sizes, sizes),
    is_causal=st.booleans(),
    alignment=st.sampled_from(["bottom_right", "top_left"]),
    window=st.none() | st.tuples(sides, sides),
    lengths=st.none() | st.tuples(st.integers(0, 14), st.integers(0, 14)),
    seed=st.integers(0, 1000),
)
def test_property(
    batch: int,
    rows: int,
    keys: int,
    kv_heads: int,
    groups: int,
    widths: tuple[int, int],
    is_causal: bool,
    alignment: str,
    window: tuple[int | None, int | None] | None,
    lengths: tuple[int, int] | None,
    seed: int,
) -> None:
    """Any small problem: out, lse and gradients equal float64."""
    spec = specs.Spec(
        batch,
        rows,
        keys,
        kv_heads * groups,
        kv_heads,
        *widths,
        dtype="float32",
        is_causal=is_causal,
        causal_alignment=alignment,
        window_size=window,
        query_lengths=None if lengths is None else (lengths[0],) * batch,
        key_lengths=None if lengths is None else (lengths[1],) * batch,
    )
    arrays = spec.arrays(seed)
    out, vjp = jax.vjp(lambda *a: flash(*a, **spec.options), *map(jnp.asarray, arrays))
    expected = oracle.attention(*arrays, **spec.options)
    chex.assert_trees_all_close(out, (expected.out, expected.lse), rtol=2e-5, atol=2e-5)
    grads = vjp((jnp.ones_like(out[0]), jnp.ones_like(out[1])))
    ones = np.ones(expected.out.shape), np.ones(expected.lse.shape)
    want = oracle.gradients(*arrays, dout=ones[0], dlse=ones[1], **spec.options)
    for name, grad in zip(("query", "key", "value"), grads, strict=True):
        np.testing.assert_allclose(grad, want[name], rtol=1e-4, atol=1e-4)
