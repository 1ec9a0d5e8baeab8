"""Derivatives: grad, jvp, higher orders, checkpoint, and what they save."""

from typing import Any

import baseline
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import specs
from helpers import (
    KEY_LENGTHS,
    OPTION_COUNT,
    QUERY_LENGTHS,
    SEGMENTS,
    assert_close,
    bias_and_sinks,
    count_primitive,
    dense,
    equations,
    flash,
    kernel_calls,
    loss,
    normal,
    options_of_every_kind,
    qkv,
    shrink_blocks,
)
from jax.test_util import check_grads

import jax_flash
from jax_flash._src import blocks

ALL = (0, 1, 2, 3, 4)
NAMED = jax.checkpoint_policies.save_only_these_names("jax_flash_out", "jax_flash_lse")
MASKED = {
    "is_causal": True,
    "query_seq_lengths": QUERY_LENGTHS,
    "key_value_seq_lengths": KEY_LENGTHS,
    "q_segment_ids": SEGMENTS,
    "kv_segment_ids": SEGMENTS,
}


def sum_sin(tree: Any) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(tree)]).sum()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("index", range(OPTION_COUNT))
def test_options_against_float64(
    index: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        shrink_blocks(monkeypatch)
    spec = specs.Spec(2, 11, 13, 4, 2, 8, 6, dtype="float32")
    arrays = spec.arrays()
    options = options_of_every_kind(2, 11, 13, 4)[index]
    floats = {n: options[n] for n in ("bias", "sinks") if n in options}
    others = {n: x for n, x in options.items() if n not in floats}
    dout, dlse = np.asarray(normal(2, 11, 4, 6)), np.asarray(normal(2, 4, 11))

    def f(query, key, value, floats):
        out, lse = jax_flash.mha(query, key, value, **floats, **others, return_lse=True)
        finite = jnp.where(jnp.isinf(lse), 0, lse)
        return (out * dout).sum() + (finite * dlse).sum()

    got = jax.jit(jax.grad(f, (0, 1, 2, 3)))(*map(jnp.asarray, arrays), floats)
    expected = oracle.gradients(*arrays, dout=dout, dlse=dlse, **options)
    for name, x in zip(("query", "key", "value"), got[:3], strict=True):
        np.testing.assert_allclose(x, expected[name], rtol=2e-5, atol=2e-5)
    for name, x in got[3].items():
        chex.assert_trees_all_equal_shapes(x, floats[name])
        (x,) = jax.tree.leaves(x)
        reduced = oracle.reduced_to(expected[name], x.shape).reshape(x.shape)
        np.testing.assert_allclose(x, reduced, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", specs.CPU_TABLE, ids=str)
def test_table_against_float64(spec: specs.Spec) -> None:
    """Errors of 16-bit gradients are those of rounding the output."""
    arrays = spec.arrays()
    dout = np.asarray(normal(*spec.shapes[0][:-1], spec.widths[1]))
    dout = dout.astype(arrays[0].dtype)

    def f(*args):
        out = jax_flash.mha(*args, **spec.options)
        return (out.astype(jnp.float32) * dout.astype(np.float32)).sum()

    got = jax.grad(f, (0, 1, 2))(*map(jnp.asarray, arrays))
    expected = oracle.gradients(*arrays, dout=dout, **spec.options)
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}[spec.dtype]
    for name, x in zip(("query", "key", "value"), got, strict=True):
        chex.assert_type(x, arrays[0].dtype)
        largest = max(1.0, np.abs(expected[name]).max(initial=0))
        error = np.abs(np.asarray(x, np.float64) - expected[name]).max(initial=0)
        assert error <= tolerance * largest, name


WITH_ERRORS = [s for s in specs.CPU_TABLE if s.dtype != "float32"]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("spec", WITH_ERRORS, ids=str)
def test_sixteen_bits_against_the_baseline(spec: specs.Spec, with_lse: bool) -> None:
    """The bound that the kernels are held to, and that it is one."""
    arrays = spec.arrays()
    dtype = arrays[0].dtype
    step = float(jnp.finfo(dtype).eps)
    lse = jax_flash.mha(*map(jnp.asarray, arrays), **spec.options, return_lse=True)[1]
    empty = np.isneginf(lse)
    dout = np.asarray(normal(*spec.shapes[0][:-1], spec.widths[1])).astype(dtype)
    np.moveaxis(dout, 1, 2)[empty] = 0
    dlse = np.where(empty, np.float32(0), normal(*lse.shape)) if with_lse else None

    def f(*arrays):
        out, lse = jax_flash.mha(*arrays, **spec.options, return_lse=True)
        return (out, lse) if with_lse else out

    cotangents = jax.tree.map(jnp.asarray, (dout, dlse) if with_lse else dout)
    got = jax.vjp(f, *map(jnp.asarray, arrays))[1](cotangents)
    query, key, value = (x.astype(np.float64) for x in arrays)
    query, key, value = (
        x.astype(dtype) for x in oracle.without_padding(query, key, value, spec.options)
    )
    expected = oracle.gradients(query, key, value, dout, dlse, **spec.options)
    plain = baseline.gradients(query, key, value, dout, dlse, **spec.options)
    for name, x in zip(("query", "key", "value"), got, strict=True):
        chex.assert_type(plain[name], dtype)
        baseline.assert_within(x, plain[name], expected[name], step=step, extra=1e-4)
        # The baseline is right to a few roundings, and what is off by more is found.
        largest = np.abs(expected[name]).max()
        error = np.abs(plain[name].astype(np.float64) - expected[name]).max()
        assert error <= 4 * step * largest, name
        wrong = (1 + 8 * step) * expected[name]
        with pytest.raises(AssertionError):
            baseline.assert_within(wrong, plain[name], expected[name], step=step)


def test_float64_gradients() -> None:
    with jax.enable_x64(True):
        arrays = [x.astype(np.float64) for x in qkv()]

        def f(*args):
            out, lse = jax_flash.mha(*args, is_causal=True, return_lse=True)
            return sum_sin((out, lse))

        check_grads(f, arrays, order=2, rtol=1e-6, atol=1e-6)


def test_through_out_and_lse() -> None:
    args = (*qkv(), *bias_and_sinks())
    for options in ({}, {"is_causal": True}):

        def g(f, options=options):
            return jax.grad(lambda *a: loss(f)(*a, **options), ALL)

        assert_close(jax.jit(g(flash))(*args), g(dense)(*args))
        assert_close(g(flash)(*args), g(dense)(*args))


@pytest.mark.parametrize("argument", ALL)
def test_one_operand(argument: int) -> None:
    args = (*qkv(), *bias_and_sinks())

    def g(f):
        return jax.grad(lambda *a: f(*a)[0].sum(), argument)

    assert_close(jax.jit(g(flash))(*args), g(dense)(*args))


def test_only_perturbed_gradients_are_computed() -> None:
    query, key, value = qkv()
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: flash(q, key, value)[0].sum()))(query)
    (backward,) = (e for e in equations(jaxpr) if e.primitive.name == "flash_mha_bwd")
    assert backward.params["backward"].perturbed == ("query",)
    assert not backward.params["backward"].has_dlse


def test_jvp() -> None:
    primals, tangents = qkv(), tuple(normal(*x.shape) for x in qkv())

    def g(f):
        return lambda p, t: jax.jvp(f, p, t)

    assert_close(jax.jit(g(flash))(primals, tangents), g(dense)(primals, tangents))
    assert_close(g(flash)(primals, tangents), g(dense)(primals, tangents))


def test_jvp_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch)
    args = (*qkv(), *bias_and_sinks())
    tangents = tuple(normal(*x.shape) for x in args)
    for options in ({}, MASKED):

        def g(f, options=options):
            return jax.jvp(lambda *a: f(*a, **options), args, tangents)

        assert_close(g(flash), g(dense))


def test_jacobians() -> None:
    args = normal(1, 4, 2, 4), normal(1, 4, 1, 4), normal(1, 4, 1, 2)
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert_close(
            jacobian(flash, (0, 1, 2))(*args), jacobian(dense, (0, 1, 2))(*args)
        )


def test_linearize_and_transpose() -> None:
    args = qkv()
    tangents = args[0] * 0.5, args[1] * 0.3, args[2]
    out, linear = jax.linearize(flash, *args)
    expected, expected_linear = jax.linearize(dense, *args)
    assert_close((out, linear(*tangents)), (expected, expected_linear(*tangents)))
    transposed = jax.linear_transpose(linear, *args)
    expected_transposed = jax.linear_transpose(expected_linear, *args)
    assert_close(transposed(out), expected_transposed(out))


@pytest.mark.parametrize("chunked", [False, True])
def test_grad_of_grad(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        shrink_blocks(monkeypatch)
    args = (*qkv(), *bias_and_sinks())

    def g(f):
        inner = jax.grad(loss(f), ALL)
        return jax.grad(lambda *a: sum_sin(inner(*a)), ALL)

    assert_close(jax.jit(g(flash))(*args), g(dense)(*args), 1e-4)


def test_jvp_of_grad_and_grad_of_jvp() -> None:
    args = qkv()
    tangents = args[1].repeat(2, 2), args[1], args[2]

    def forward_over_reverse(f):
        return jax.jvp(jax.grad(loss(f), (0, 1, 2)), args, tangents)

    def reverse_over_forward(f):
        return jax.grad(lambda *p: sum_sin(jax.jvp(f, p, args)[1]), (0, 1, 2))(*args)

    for g in (forward_over_reverse, reverse_over_forward):
        assert_close(jax.jit(lambda g=g: g(flash))(), g(dense), 1e-4)


def test_hessian_and_third_order() -> None:
    query, key, value = normal(1, 4, 2, 3), normal(1, 4, 1, 3), normal(1, 4, 1, 2)

    def of_query(f):
        return lambda q: loss(f)(q, key, value)

    def again(f):
        return lambda q: jnp.sum(jnp.sin(jax.grad(f)(q)))

    got = jax.jit(jax.hessian(of_query(flash)))(query)
    assert_close(got, jax.hessian(of_query(dense))(query), 1e-4)
    got = jax.jit(jax.grad(again(again(of_query(flash)))))(query)
    assert_close(got, jax.grad(again(again(of_query(dense))))(query), 1e-3)


def test_second_order_holds_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of N * T * S elements leaves a block of rows in grad of grad."""
    monkeypatch.setattr(blocks, "MATERIALISE", 1)
    jax.clear_caches()
    args = normal(1, 64, 2, 8), normal(1, 64, 2, 8), normal(1, 64, 2, 8)

    def g(q):
        inner = jax.grad(lambda q: flash(q, *args[1:])[0].sum())
        return jnp.sum(jnp.sin(inner(q)))

    scores = 64 * 64 * 2
    sizes = [
        getattr(x.aval, "size", 0)
        for e in equations(jax.make_jaxpr(jax.grad(g))(args[0]))
        for x in e.outvars
    ]
    assert max(sizes) < scores


def test_residuals_are_operands_out_and_lse() -> None:
    args = qkv()
    _, vjp = jax.vjp(flash, *args)
    shapes = [x.shape for x in jax.tree.leaves(vjp) if hasattr(x, "shape")]
    out, lse = jax.eval_shape(flash, *args)
    expected = [x.shape for x in (*args, out, lse)]
    assert sorted(shapes) == sorted(expected)


def test_forward_runs_once(kernels: None) -> None:
    args = [x.astype(jnp.bfloat16) for x in qkv()]

    def f(*a):
        out, lse = flash(*a)
        return out.astype(jnp.float32).sum() + lse.sum()

    assert kernel_calls(f, *args) == 1
    assert kernel_calls(jax.value_and_grad(f, (0, 1, 2)), *args) == 1
    assert count_primitive(jax.grad(f, (0, 1, 2)), "flash_mha_bwd", *args) == 1


def test_checkpoint_with_named_policy_saves_the_forward(kernels: None) -> None:
    query, key, value = (x.astype(jnp.bfloat16) for x in qkv())
    weights = normal(8, 8).astype(jnp.bfloat16)

    def block(q, k, v, w):
        return jnp.sin(flash(jnp.sin(q), k, v)[0] @ w).astype(jnp.float32).sum()

    args = query, key, value, weights

    def count(f):
        return kernel_calls(jax.value_and_grad(f, (0, 1, 2, 3)), *args)

    assert count(jax.checkpoint(block, policy=NAMED)) == 1
    assert count(jax.checkpoint(block)) == 2, "the count must see a re-run"


def test_checkpoint_in_jit_in_scan() -> None:
    query = qkv()[0]
    weights = normal(3, 16, 16) * 0.2

    def net(f, policy):
        def layer(x, w):
            h = x @ w
            return x + f(h, h[:, :, :2], h[:, :, 2:])[0], None

        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy)
        return lambda x, ws: jnp.sum(jnp.sin(jax.lax.scan(layer, x, ws)[0]))

    got = jax.jit(jax.grad(net(jax.jit(flash), NAMED), (0, 1)))(query, weights)
    assert_close(got, jax.grad(net(dense, None), (0, 1))(query, weights))


def test_scan_and_loops() -> None:
    query, key, value = qkv()
    key = normal(4, 8, 2, 8)
    query = normal(4, 8, 4, 8)

    def over_keys(f):
        def step(carry, k):
            return f(carry, k, k)[0], f(carry, k, k)[1].sum()

        keys = jnp.stack([key, 2 * key, key])
        return lambda q: jnp.sum(jax.lax.scan(step, q, keys)[0])

    got = jax.jit(jax.grad(over_keys(flash)))(query)
    assert_close(got, jax.grad(over_keys(dense))(query))

    def loop(f):
        return jax.lax.fori_loop(0, 3, lambda _, c: f(c, key, key)[0], query)

    assert_close(loop(flash), loop(dense))

    def branches(f):
        def g(q):
            first = lambda q: f(q, key, key)[0]  # noqa: E731
            return jax.lax.cond(q.sum() > 0, first, lambda q: 2 * first(q), q).sum()

        return jax.grad(g)

    assert_close(jax.jit(branches(flash))(query), branches(dense)(query))
    del value


def test_empty_rows_have_zero_derivatives() -> None:
    """Also where the cotangent of lse is infinite there."""
    args = (*qkv(), *bias_and_sinks())

    def f(*a):
        return flash(*a, **MASKED)

    out, lse = f(*args)
    empty = np.isneginf(lse).transpose(0, 2, 1)
    assert empty.any()
    np.testing.assert_array_equal(np.asarray(out)[empty], 0)
    grads = jax.grad(lambda *a: f(*a)[0].sum() + (f(*a)[1] ** 2).sum(), ALL)(*args)
    tangents = jax.jvp(f, args, args)[1]
    second = jax.grad(
        lambda *a: sum_sin(jax.grad(lambda *b: loss(f)(*b), ALL)(*a)), ALL
    )(*args)
    chex.assert_tree_all_finite((grads, tangents, second))
    for x in (grads[0], tangents[0], second[0]):
        np.testing.assert_array_equal(np.asarray(x)[empty], 0)


def test_padding_does_not_leak_into_gradients() -> None:
    query, key, value = qkv()
    lengths = {
        "query_seq_lengths": QUERY_LENGTHS,
        "key_value_seq_lengths": KEY_LENGTHS,
    }
    beyond_query = np.arange(8) >= QUERY_LENGTHS[:, None]
    beyond_key = np.arange(8) >= KEY_LENGTHS[:, None]
    poison = [
        jnp.where(beyond[..., None, None], jnp.nan, x)
        for x, beyond in ((query, beyond_query), (key, beyond_key), (value, beyond_key))
    ]
    dout = jnp.where(beyond_query[..., None, None], jnp.nan, 1.0)

    def grads(args, dout):
        out, vjp = jax.vjp(lambda *a: flash(*a, **lengths)[0], *args)
        return vjp(jnp.broadcast_to(dout, out.shape))

    got = grads(poison, dout)
    assert_close(got, grads((query, key, value), jnp.float32(1)))
    np.testing.assert_array_equal(np.asarray(got[1])[beyond_key], 0)
    tangents = jax.jvp(lambda *a: flash(*a, **lengths), poison, poison)[1]
    chex.assert_tree_all_finite(tangents)


def test_integer_operands_get_float0() -> None:
    args = qkv()

    def f(args, lengths):
        return flash(
            *args, query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1]
        )[0].sum()

    lengths = jnp.asarray(QUERY_LENGTHS), jnp.asarray(KEY_LENGTHS)
    grads = jax.grad(f, 1, allow_int=True)(args, lengths)
    assert all(x.dtype == jax.dtypes.float0 for x in grads)


def test_bias_gradient_is_not_materialised() -> None:
    """A bias shared by the batch has its gradient summed inside the block."""
    query, key, value = normal(8, 64, 1, 4), normal(8, 64, 1, 4), normal(8, 64, 1, 4)
    bias = normal(64, 64)

    def f(bias):
        return flash(query, key, value, bias)[0].sum()

    (backward,) = (
        e
        for e in equations(jax.make_jaxpr(jax.grad(f))(bias))
        if e.primitive.name == "flash_mha_bwd"
    )
    assert [x.aval.shape for x in backward.outvars] == [(1, 1, 64, 64)]


def test_users_own_rules_around_it() -> None:
    query, key, value = qkv()

    @jax.custom_vjp
    def wrapped(q):
        return flash(q, key, value)[0]

    def forward(q):
        return jax.vjp(lambda q: flash(q, key, value)[0], q)

    wrapped.defvjp(forward, lambda vjp, g: vjp(g))
    got = jax.jit(jax.grad(lambda q: wrapped(q).sum()))(query)
    assert_close(got, jax.grad(lambda q: dense(q, key, value)[0].sum())(query))


def test_second_order_in_bfloat16() -> None:
    args = [x.astype(jnp.bfloat16) for x in qkv()]

    def total(x):
        return x.astype(jnp.float32).sum()

    first = jax.grad(lambda *a: total(flash(*a)[0]))
    second = jax.jit(jax.grad(lambda *a: total(first(*a)), (0, 1, 2)))(*args)
    chex.assert_type(second, jnp.bfloat16)
    chex.assert_tree_all_finite(second)


def test_reverse_over_forward_of_rows_without_keys() -> None:
    """Their cotangents may be anything in every order of modes."""
    query, key, value = (normal(1, 3, 1, 4) for _ in range(3))
    alive = jnp.array([[True], [True], [False]])

    def f(*args: jax.Array) -> jax.Array:
        out, lse = jax_flash.mha(*args, mask=alive, return_lse=True)
        norm = jnp.linalg.norm(out, axis=-1)  # whose derivative at 0 is NaN
        norm = jnp.where(jnp.swapaxes(alive, 0, 1)[..., None], norm, 0)
        return (jnp.where(lse == -jnp.inf, 0, lse**2) + norm).sum()

    args = (query, key, value)
    ones = tuple(map(jnp.ones_like, args))

    def along(*args: jax.Array) -> jax.Array:
        return jax.jvp(f, args, ones)[1]

    got = jax.grad(along, (0, 1, 2))(*args)
    assert_close(got, jax.jvp(jax.grad(f, (0, 1, 2)), args, ones)[1])
    assert all(jnp.isfinite(x).all() for x in got)
