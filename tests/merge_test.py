"""`merge_partials`: attention over parts of the keys is attention over all of them."""

import itertools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax.test_util import check_grads

import jax_flash
from jax_flash import decode_mha, merge_partials, mha

CUTS = {
    "one part": (),
    "halves": (8,),
    "uneven": (1, 12),
    "with an empty part": (5, 5, 9),
}


def operands(batch: tuple[int, ...] = (2,)) -> tuple[jax.Array, ...]:
    return (
        normal(*batch, 5, 4, 8),
        normal(*batch, 16, 2, 8),
        normal(*batch, 16, 2, 6),
        normal(*batch, 1, 5, 16),
    )


def whole(*arrays: jax.Array) -> Any:
    query, key, value, bias = arrays
    return mha(query, key, value, bias, return_lse=True)


def in_parts(cuts: tuple[int, ...], stacked: bool = False) -> Callable[..., Any]:
    """Attention with the keys cut before each of `cuts`."""

    def f(*arrays: jax.Array) -> Any:
        query, key, value, bias = arrays
        edges = (0, *cuts, key.shape[-3])
        parts = [
            mha(
                query,
                key[..., a:b, :, :],
                value[..., a:b, :, :],
                bias[..., a:b],
                return_lse=True,
            )
            for a, b in itertools.pairwise(edges)
        ]
        outs, lses = zip(*parts, strict=True)
        if stacked:
            return merge_partials(jnp.stack(outs), jnp.stack(lses))
        return merge_partials(outs, lses)

    return f


def test_cascade() -> None:
    """The example of the documentation: a prefix is read once for all sequences."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
    (example,) = re.findall(r"```python\n(def cascade.*?)```", page.read_text(), re.S)
    names: dict[str, Any] = {"jax_flash": jax_flash, "jnp": jnp}
    exec(example, names)
    query, prefix = normal(3, 2, 4, 8), [normal(7, 2, width) for width in (8, 6)]
    caches = [normal(3, 9, 2, width) for width in (8, 6)]
    lengths = jnp.array([2, 9, 5], jnp.int32)
    got = names["cascade"](query, *prefix, *caches, lengths)
    together = [
        jnp.concatenate([jnp.broadcast_to(x, (3, *x.shape)), y], 1)
        for x, y in zip(prefix, caches, strict=True)
    ]
    want = decode_mha(query, together[0], together[1], lengths + 7)
    np.testing.assert_allclose(got, want, atol=1e-5)


def loss_of(f: Callable[..., Any]) -> Callable[..., jax.Array]:
    def loss(*arrays: jax.Array) -> jax.Array:
        out, lse = f(*arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    return loss


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_parts_are_the_whole(
    cuts: tuple[int, ...], batch: tuple[int, ...], stacked: bool
) -> None:
    arrays = operands(batch)
    got = jax.jit(in_parts(cuts, stacked))(*arrays)
    chex.assert_trees_all_close(got, whole(*arrays), atol=2e-6)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_gradients(cuts: tuple[int, ...]) -> None:
    """Of query, key, value and bias, through out and lse."""
    arrays = operands()
    gradient = jax.jit(jax.grad(loss_of(in_parts(cuts)), (0, 1, 2, 3)))
    expected = jax.grad(loss_of(whole), (0, 1, 2, 3))(*arrays)
    chex.assert_trees_all_close(gradient(*arrays), expected, atol=5e-6)


def test_higher_orders_and_forward_mode() -> None:
    # Differences of second derivatives have no digits left in float32.
    with jax.enable_x64(True):
        outs = [normal(3, 2, 4).astype(np.float64) for _ in range(3)]
        lses = [3 * normal(2, 3).astype(np.float64) for _ in range(3)]
        check_grads(merge_partials, (outs, lses), order=2, modes=("fwd", "rev"))


def test_merging_again_in_another_order() -> None:
    outs = [normal(2, 3, 2, 4) for _ in range(4)]
    lses = [5 * normal(2, 2, 3) for _ in range(4)]
    a = merge_partials(outs[:2], lses[:2])
    b = merge_partials(outs[2:], lses[2:])
    got = merge_partials((b[0], a[0]), (b[1], a[1]))
    chex.assert_trees_all_close(got, merge_partials(outs, lses), atol=1e-6)


@pytest.mark.parametrize("far", [90.0, 1e4, 1e30])
def test_lses_far_apart(far: float) -> None:
    """Exponentials that overflow or vanish; the sum of lse and its gradients do not."""
    outs = [normal(3, 2, 4) for _ in range(2)]
    for sign in (-1, 1):
        lses = [jnp.full((2, 3), sign * far), jnp.zeros((2, 3))]
        winner = 0 if sign > 0 else 1
        out, lse = merge_partials(outs, lses)
        chex.assert_trees_all_close(out, outs[winner])
        chex.assert_trees_all_close(lse, lses[winner])
        grads = jax.grad(loss_of(merge_partials), (0, 1))(outs, lses)
        chex.assert_tree_all_finite(grads)


def test_parts_without_keys() -> None:
    """They count for nothing, whatever their output; all of them give 0 and -inf."""
    outs = [normal(3, 2, 4) for _ in range(2)]
    lses = [normal(2, 3) for _ in range(2)]
    dead = np.array([[True, False, True], [False, False, True]])  # [N, T]
    everywhere = np.array([[True, False, False], [False, False, False]])
    lses[0] = jnp.where(dead, -jnp.inf, lses[0])
    lses[1] = jnp.where(everywhere, -jnp.inf, lses[1])
    outs[0] = jnp.where(dead.T[..., None], jnp.nan, outs[0])
    outs[1] = jnp.where(everywhere.T[..., None], jnp.inf, outs[1])
    out, lse = merge_partials(outs, lses)
    assert np.isfinite(out).all()
    alone = dead & ~everywhere
    chex.assert_trees_all_equal(lse[alone], lses[1][alone])
    by_row = np.asarray(alone.T)
    chex.assert_trees_all_equal(out[by_row], outs[1][by_row])
    np.testing.assert_array_equal(np.isneginf(lse), everywhere)
    assert (np.asarray(out)[everywhere.T] == 0).all()

    def loss(outs: Any, lses: Any) -> jax.Array:
        out, lse = merge_partials(outs, lses)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(everywhere, 0, lse) ** 2)

    douts, dlses = jax.grad(loss, (0, 1))(outs, lses)
    chex.assert_tree_all_finite((douts, dlses))
    assert (np.asarray(douts[0])[dead.T] == 0).all()
    assert (np.asarray(dlses[0])[dead] == 0).all()
    assert (np.asarray(dlses[1])[everywhere] == 0).all()
    # A cotangent of the lse that is -inf reaches nothing either.
    dlses = jax.grad(lambda lses: merge_partials(outs, lses)[1].sum())(lses)
    chex.assert_tree_all_finite(dlses)
    assert (np.asarray(dlses[1])[everywhere] == 0).all()


def test_cotangents_of_rows_without_keys() -> None:
    """May be anything, as `mha` takes them."""
    outs = [normal(1, 2, 1, 4), normal(1, 2, 1, 4)]
    seen = jnp.array([[[-jnp.inf, 0.5]]])
    lses = [seen, jnp.where(seen > 0, -jnp.inf, seen)]
    cotangent = jnp.ones((1, 2, 1, 4)).at[:, 0].set(jnp.nan)
    _, pullback = jax.vjp(lambda *a: merge_partials(*a)[0], outs, lses)
    for x in jax.tree.leaves(pullback(cotangent)):
        assert jnp.isfinite(x).all()


def test_a_part_with_an_infinite_sink_takes_all() -> None:
    outs = [normal(3, 2, 4) for _ in range(3)]
    lses = [normal(2, 3) for _ in range(3)]
    lses[1] = lses[1].at[0].set(jnp.inf)
    lses[2] = lses[2].at[0].set(-jnp.inf)
    out, lse = merge_partials(outs, lses)
    chex.assert_trees_all_equal(out[:, 0], outs[1][:, 0])
    assert np.isposinf(lse[0]).all()
    finite = merge_partials([x[:, 1:] for x in outs], [x[1:] for x in lses])
    chex.assert_trees_all_equal((out[:, 1:], lse[1:]), finite)

    def loss(outs: Any, lses: Any) -> jax.Array:
        out, lse = merge_partials(outs, lses)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse[1:] ** 2)

    douts, dlses = jax.grad(loss, (0, 1))(outs, lses)
    chex.assert_tree_all_finite((douts, dlses))
    assert not any(np.asarray(x[0]).any() for x in dlses)


def test_types_are_kept_and_sums_are_float32() -> None:
    count = 64
    outs = [jnp.full((1, 1, 8), 1 + 2.0**-7, jnp.bfloat16)] * count
    lses = [jnp.zeros((1, 1))] * count
    out, lse = merge_partials(outs, lses)
    chex.assert_type([out, lse], [jnp.bfloat16, jnp.float32])
    chex.assert_trees_all_equal(out, outs[0])
    np.testing.assert_allclose(lse, np.log(count), rtol=1e-6)


def test_vmap() -> None:
    outs, lses = normal(3, 2, 5, 2, 4), normal(3, 2, 2, 5)
    got = jax.vmap(merge_partials, 1)(outs, lses)
    for i in range(2):
        one = merge_partials(outs[:, i], lses[:, i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], got), one)


OUT, LSE = np.zeros((2, 5, 4, 8), np.float32), np.zeros((2, 4, 5), np.float32)
WRONG = {
    "no list": ((None, [LSE]), "outs must be a list or tuple .* got NoneType"),
    "scalar": ((np.float32(1), [LSE]), r"outs must have a first axis, got shape \(\)"),
    "no array": (
        ([OUT, 3.0], [LSE, LSE]),
        r"outs\[1\] must be an array, got float 3.0",
    ),
    "no parts": (([], []), "outs must have at least one part"),
    "numbers": (([OUT, OUT], [LSE]), "as many parts as outs, 2, got 1"),
    "rank": (([OUT[0, 0]], [LSE]), r"outs\[0\] must be .* got shape \(4, 8\)"),
    "shape": (([OUT, OUT[:1]], [LSE] * 2), r"outs\[1\] must .* float32\[1, 5, 4, 8\]"),
    "type": (
        ([OUT, OUT.astype(jnp.bfloat16)], [LSE] * 2),
        r"outs\[1\] .* got bfloat16",
    ),
    "integers": (([OUT.astype(np.int32)], [LSE]), "must be floating, got int32"),
    "lse": (([OUT], [OUT[..., 0]]), r"lses\[0\] .*\(2, 4, 5\).*, got \(2, 5, 4\)"),
    "half lse": (([OUT], [LSE.astype(np.float16)]), r"lses\[0\] must .* got float16"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_errors(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_partials(*arguments)
