"""vmap over every operand and axis: right, and nothing unmapped is copied."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    KEY_LENGTHS,
    QUERY_LENGTHS,
    assert_close,
    bias_and_sinks,
    count_primitive,
    dense,
    flash,
    kernel_calls,
    loss,
    normal,
    qkv,
)

from jax_flash._src import batching

OPERANDS = (
    "query",
    "key",
    "value",
    "bias",
    "sinks",
    "query_seq_lengths",
    "key_value_seq_lengths",
)


def operands() -> dict[str, jax.Array]:
    arrays = (
        *qkv(),
        *bias_and_sinks(),
        jnp.asarray(QUERY_LENGTHS),
        jnp.asarray(KEY_LENGTHS),
    )
    return dict(zip(OPERANDS, arrays, strict=True))


def compare(mapped: tuple[str, ...], axis: int) -> None:
    whole = operands()
    given = {
        name: jnp.stack([x, x[::-1], x], axis) if name in mapped else x
        for name, x in whole.items()
    }
    axes = ({name: axis if name in mapped else None for name in whole},)

    def run(f):
        return jax.vmap(lambda d: f(**d), in_axes=axes)(given)

    assert_close(jax.jit(lambda: run(flash))(), run(dense))


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("axis", [0, -1])
def test_one_operand(name: str, axis: int) -> None:
    compare((name,), axis)


@pytest.mark.parametrize(
    "mapped",
    [("query", "key", "value"), ("key", "value"), ("query", "value"), OPERANDS],
)
@pytest.mark.parametrize("axis", [0, -1])
def test_several_operands(mapped: tuple[str, ...], axis: int) -> None:
    compare(mapped, axis)


@pytest.mark.parametrize(
    "axes", list(itertools.product((None, 0, 1, 2, 3, 4), repeat=2))
)
def test_query_and_key_axes(axes: tuple[int | None, int | None]) -> None:
    if axes == (None, None):
        return
    query, key, value = normal(3, 5, 2, 4), normal(3, 6, 1, 4), normal(3, 6, 1, 2)
    stacked = [
        x if axis is None else jnp.stack([x, 2 * x], axis)
        for x, axis in zip((query, key), axes, strict=True)
    ]

    def run(f):
        return jax.vmap(lambda q, k: f(q, k, value), in_axes=axes)(*stacked)

    assert_close(run(flash), run(dense))


def test_nested() -> None:
    query, key, value = normal(3, 2, 4, 8, 4, 16), normal(4, 8, 2, 2, 16), qkv()[2]

    def run(f):
        inner = jax.vmap(f, in_axes=(0, 2, None))
        return jax.vmap(inner, in_axes=(0, None, None))(query, key, value)

    assert_close(jax.jit(lambda: run(flash))(), run(dense))


def test_out_axes() -> None:
    query, key, value = qkv()
    queries = jnp.stack([query, 2 * query])

    def run(f):
        mapped = jax.vmap(f, in_axes=(0, None, None), out_axes=(2, -1))
        return mapped(queries, key, value)

    assert_close(run(flash), run(dense))


def test_unbatched_call_under_vmap() -> None:
    query, key, value = qkv()

    def run(f):
        return jax.vmap(f)(query, key, value)

    assert_close(run(flash), run(dense))


def test_empty_axis() -> None:
    query, key, value = qkv()
    out, lse = jax.vmap(flash, (0, None, None))(
        jnp.zeros((0, *query.shape)), key, value
    )
    chex.assert_shape(out, (0, *query.shape[:-1], value.shape[-1]))
    chex.assert_shape(lse, (0, 4, 4, 8))


@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 0, None), (0, 0, 0)])
def test_grad_commutes_with_vmap(in_axes: tuple[int | None, ...]) -> None:
    stacked = [
        x if axis is None else jnp.stack([x, 2 * x])
        for x, axis in zip(qkv(), in_axes, strict=True)
    ]

    def vmap_of_grad(f):
        return jax.vmap(jax.grad(loss(f), (0, 1, 2)), in_axes)

    def grad_of_vmap(f):
        return jax.grad(lambda *a: jax.vmap(loss(f), in_axes)(*a).sum(), (0, 1, 2))

    for g in (vmap_of_grad, grad_of_vmap):
        assert_close(jax.jit(g(flash))(*stacked), g(dense)(*stacked))
        assert count_primitive(g(flash), "flash_mha_bwd", *stacked) == 1
        assert count_primitive(g(flash), "flash_mha_fwd", *stacked) == 1


def test_vmap_of_grad_of_shared_operands() -> None:
    """Per-example gradients of a bias and sinks that every example shares."""
    args = (*qkv(), *bias_and_sinks())
    queries = jnp.stack([args[0], 2 * args[0]])

    def g(f):
        grad = jax.grad(loss(f), (1, 2, 3, 4))
        return jax.vmap(grad, (0, None, None, None, None))(queries, *args[1:])

    assert_close(g(flash), g(dense))


def test_jvp_commutes_with_vmap() -> None:
    query, key, value = qkv()
    queries, tangents = jnp.stack([query, 2 * query]), normal(2, *query.shape)

    def jvp_of_vmap(f):
        mapped = jax.vmap(f, (0, None, None))
        return jax.jvp(mapped, (queries, key, value), (tangents, key, value))

    def vmap_of_jvp(f):
        def one(q, t):
            return jax.jvp(f, (q, key, value), (t, key, value))

        return jax.vmap(one)(queries, tangents)

    for g in (jvp_of_vmap, vmap_of_jvp):
        assert_close(g(flash), g(dense))


def test_vmap_of_grad_of_grad() -> None:
    query, key, value = qkv()
    queries = jnp.stack([query, 2 * query])

    def g(f):
        first = jax.grad(lambda q: loss(f)(q, key, value))
        return jax.vmap(jax.grad(lambda q: jnp.sum(jnp.sin(first(q)))))

    assert_close(jax.jit(g(flash))(queries), g(dense)(queries), 1e-4)


def test_vmap_of_lengths_in_grad() -> None:
    query, key, value = (x[:, None] for x in qkv())
    lengths = jnp.asarray(QUERY_LENGTHS)

    def g(f):
        def one(q, k, v, n):
            return loss(f)(q, k, v, query_seq_lengths=n[None], is_causal=True)

        return jax.vmap(jax.grad(one))(query, key, value, lengths)

    assert_close(g(flash), g(dense))


def test_vmap_of_scan_of_grad() -> None:
    query, key, value = normal(2, 4, 8, 4, 8), normal(2, 4, 8, 2, 8), None
    del value

    def g(f):
        def total(q):
            step = lambda c, k: (f(c, k, k)[0], None)  # noqa: E731
            return jnp.sum(jax.lax.scan(step, q, key)[0])

        return jax.vmap(jax.grad(total))

    assert_close(jax.jit(g(flash))(query), g(dense)(query))


def test_one_kernel_call(kernels: None) -> None:
    query, key, value = (x.astype(jnp.bfloat16) for x in qkv())
    queries = jnp.stack([query] * 3)
    mapped = jax.vmap(flash, (0, None, None))
    assert kernel_calls(mapped, queries, key, value) == 1
    twice = jax.vmap(jax.vmap(flash, (0, None, None)), (0, None, None))
    assert kernel_calls(twice, jnp.stack([queries] * 2), key, value) == 1


def test_moved_order() -> None:
    order = functools.partial(batching.moved_order, (0, 1, 2, 3))
    assert order(None) == (0, 1, 2, 3, 4)
    assert order(0) == (0, 1, 2, 3, 4)
    # [B, X, S, K, H] seen as [X, B, S, K, H] is physically B, X, S, K, H.
    assert order(1) == (1, 0, 2, 3, 4)
    assert order(3) == (1, 2, 3, 0, 4)
    # The width would not be contiguous.
    assert order(4) == (0, 1, 2, 3, 4)
