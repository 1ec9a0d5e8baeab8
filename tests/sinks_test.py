"""Sinks on the kernels: joined to the results of a call that knows none."""

import contextlib
import functools
import re
from typing import Any

import baseline
import fake_kernel
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    KEY_LENGTHS,
    QUERY_LENGTHS,
    assert_close,
    call_of,
    cuda_text,
    flash,
    kernel_calls,
    loss,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import explain, mha
from jax_flash._src import blocks, registry, sinks
from jax_flash._src.config import AttentionConfig

SHAPES = ((4, 8, 4, 16), (4, 8, 2, 16), (4, 8, 2, 8))
RULE = 2.0**-7
"""A step of bfloat16: the kernel's way rounds out once more than jnp's."""


def arrays(*lead: int) -> list[jax.Array]:
    """Query, key, value in bfloat16; sinks [N] in float32."""
    rng = np.random.default_rng(3)
    tensors = [
        jnp.asarray(rng.standard_normal((*lead, *shape), np.float32), jnp.bfloat16)
        for shape in SHAPES
    ]
    return [*tensors, jnp.asarray(rng.standard_normal((*lead, 4), np.float32))]


def attend(query: Any, key: Any, value: Any, sink: Any, **options: Any) -> Any:
    out, lse = flash(query, key, value, None, sink, **options)
    return out.astype(jnp.float32), lse


def both(f: Any, *args: Any) -> tuple[Any, Any]:
    """The results of f(implementation, *args) by the emulated kernels, and by jnp."""
    with fake_kernel.emulated():
        got = jax.jit(lambda *a: f("cuda", *a))(*args)
    return got, jax.jit(lambda *a: f("xla", *a))(*args)


def operand_types(target: str, text: str) -> list[str]:
    line = call_of(target, text)
    return re.findall(r"tensor<(.*?)>", line[line.rindex(" : (") :].split(" -> ")[0])


def test_the_kernel_is_given_no_sinks(kernels: None) -> None:
    text = cuda_text(attend, *arrays())
    expected = ["4x8x4x16xbf16", "4x8x2x16xbf16", "4x8x2x8xbf16"]
    assert operand_types(registry.FORWARD_TARGET, text) == expected
    assert text.count("stablehlo.custom_call") == 1

    gradient = jax.grad(loss(attend), (0, 1, 2, 3))
    text = cuda_text(gradient, *arrays())
    rest = ["4x8x4x8xbf16", "4x4x8xf32"] * 2
    assert operand_types(registry.BACKWARD_TARGET, text) == expected + rest
    assert text.count("stablehlo.custom_call") == 2
    assert "dot_general" not in text


@pytest.mark.parametrize(("argnums", "calls"), [(3, 0), ((0, 3), 1), (2, 1)])
def test_gradients_of_sinks_alone_call_no_kernel(
    kernels: None, argnums: Any, calls: int
) -> None:
    gradient = jax.grad(loss(attend), argnums)
    assert kernel_calls(gradient, *arrays(), target=registry.BACKWARD_TARGET) == calls


def test_explain(kernels: None) -> None:
    query, key, value, sink = arrays()
    explanation = explain(query, key, value, sinks=sink)
    assert explanation.chosen["cuda"] == "cuda"
    assert "sinks joined by XLA" in explanation.details["cuda"]
    assert "sinks" not in explain(query, key, value).details["cuda"]


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (1, 2)},
    "no keys": {"window_size": (0, 0), "key_value_seq_lengths": np.int32(3)},
    "lengths": {
        "query_seq_lengths": QUERY_LENGTHS,
        "key_value_seq_lengths": KEY_LENGTHS * np.array([1, 1, 0, 1], np.int32),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients(case: str) -> None:
    """As the specification, also in rows without keys, for sinks of any dtype."""
    *tensors, sink = arrays()
    dtype = "bfloat16" if case == "window" else "float32"
    sink = sink.astype(dtype).at[1].set(-jnp.inf).at[2].set(9.0)

    def f(implementation: str, *args: Any) -> Any:
        options = {**OPTIONS[case], "implementation": implementation}
        value = attend(*args, **options)
        return value, jax.grad(loss(attend), (0, 1, 2, 3))(*args, **options)

    got, expected = both(f, *tensors, sink)
    assert_close(got[0], expected[0], RULE)
    assert_close(got[1], expected[1], 2e-2)
    empty = jnp.isinf(expected[0][1])
    assert bool(empty.any()) == (case in ("no keys", "lengths"))
    assert not np.asarray(jnp.swapaxes(got[0][0], 1, 2))[empty].any()


def test_a_row_of_infinite_logits_has_the_sink_as_its_lse() -> None:
    query, key, value, sink = arrays()
    query = jnp.ones_like(query).at[0, 2].set(3e38)
    key = jnp.full_like(key, -1.0).at[0].set(-3e38)

    def f(implementation: str, *args: Any) -> Any:
        return attend(*args, implementation=implementation)

    (out, lse), expected = both(f, query, key, value, sink)
    assert_close((out, lse), expected, RULE)
    np.testing.assert_array_equal(lse[0, :, 2], sink)
    assert not np.asarray(out[0, 2]).any()


@pytest.mark.parametrize("masked", ["mask", "ids", "ids, packed"])
def test_a_row_of_an_infinite_bias_has_the_sink_as_its_lse(masked: str) -> None:
    """Unless the mask or its segment leaves it no key, of the specification and not."""
    query, key, value, sink = arrays()
    bias = jnp.zeros((4, 8, 8)).at[1, 2:4].set(-jnp.inf).at[2, 4, 1:].set(-jnp.inf)
    ids = jnp.asarray([0, 0, 1, -1, 2, 2, 3, 3])
    options: dict[str, Any] = {"q_segment_ids": ids, "kv_segment_ids": ids}
    if masked == "mask":
        seen = (jnp.arange(8) > 0) & (jnp.arange(8) != 3)[:, None]
        options = {"mask": seen & (jnp.arange(4) != 3)[:, None, None]}

    def attended(implementation: str, *args: Any) -> Any:
        *tensors, sink, bias = args
        given = options | {"sinks": sink, "bias": bias, "return_lse": True}
        given["implementation"] = implementation
        if masked != "ids, packed":
            return mha(*tensors, **given)
        qkv = jnp.concatenate([x.reshape(4, 8, -1) for x in tensors], -1)
        return jax_flash.mha_qkvpacked(qkv, 4, 2, **given)

    def f(implementation: str, *args: Any) -> Any:
        def total(*args: Any) -> Any:
            out, lse = attended(implementation, *args)
            return out.astype(jnp.float32).sum() + jnp.where(lse > -99, lse, 0).sum()

        gradients = jax.grad(total, (3, 4))(*args)
        return attended(implementation, *args), gradients

    value = jnp.concatenate([value, value], -1)
    got, expected = both(f, query, key, value, sink, bias)
    (out, lse), _ = got
    np.testing.assert_array_equal(lse[:, 1, 2], sink[1])
    assert not np.asarray(out[:, 2, 1], np.float32).any()
    assert np.isneginf(lse[:, 1, 3]).all()
    assert_close(got[0], expected[0], RULE)
    assert_close(got[1], expected[1], 2e-2)


@pytest.mark.parametrize("route", ["small", "chunked", "kernel"])
def test_an_infinite_sink_takes_all(
    monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """As one far above all logits, but for its lse. Rows without keys stay theirs."""
    args = [x.astype(jnp.float32) for x in arrays()]
    sink = args.pop().at[0].set(80.0)
    infinite = sink.at[0].set(jnp.inf)
    if route == "kernel":
        args = [x.astype(jnp.bfloat16) for x in args]
    else:
        monkeypatch.setattr(blocks, "small", lambda operands: route == "small")
    options = {"is_causal": True, "key_value_seq_lengths": jnp.asarray([8, 8, 5, 0])}

    def f(implementation: str, *args: Any) -> Any:
        def call(*args: Any) -> Any:
            return attend(*args, **options, implementation=implementation)

        def weighted(*args: Any) -> Any:
            out, lse = call(*args)
            one = jnp.where(jnp.isfinite(lse), lse, 0).sum()
            return jnp.sin(out).sum() + one

        gradient = jax.grad(weighted, (0, 1, 2, 3))
        tangent = jax.jvp(gradient, args, tuple(map(jnp.ones_like, args)))[1]
        return call(*args), gradient(*args), tangent

    def run(sink: jax.Array) -> Any:
        program = functools.partial(f, "cuda" if route == "kernel" else "xla")
        emulation = (
            fake_kernel.emulated if route == "kernel" else contextlib.nullcontext
        )
        with emulation():
            return jax.jit(program)(*args, sink)

    (out, lse), *derivatives = run(infinite)
    (expected_out, expected_lse), *expected = run(sink)
    assert not np.asarray(out[..., 0, :]).any()
    live = np.isfinite(expected_lse[:, 0])
    assert live.any()
    assert not live.all()
    np.testing.assert_array_equal(lse[:, 0], np.where(live, np.inf, -np.inf))
    assert_close((out, lse[:, 1:]), (expected_out, expected_lse[:, 1:]), 1e-6)
    for got, wanted in zip(derivatives, expected, strict=True):
        *tensors, of_sink = got
        *expected_tensors, expected_of_sink = wanted
        assert_close(tensors, expected_tensors, 1e-5)
        # Where the lse is inf, this loss does not take it.
        assert_close(of_sink[1:], expected_of_sink[1:], 1e-5)
        assert not np.asarray(of_sink[0]).any()


SUBSETS = [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (1, 2, 3), (0, 1, 2, 3)]


@pytest.mark.parametrize("mapped", SUBSETS, ids=str)
def test_vmap(mapped: tuple[int, ...]) -> None:
    """Of every subset of the operands, with and without gradients inside."""
    axes = tuple(0 if i in mapped else None for i in range(4))
    plain, stacked = arrays(), arrays(3)
    args = [stacked[i] if i in mapped else plain[i] for i in range(4)]

    def f(implementation: str, *args: Any) -> Any:
        def one(*args: Any) -> Any:
            return attend(*args, implementation=implementation, is_causal=True)

        def total(*args: Any) -> Any:
            return jnp.sum(jax.vmap(loss(one), axes)(*args))

        inside = jax.vmap(jax.grad(loss(one), (0, 3)), axes)(*args)
        return jax.vmap(one, axes)(*args), inside, jax.grad(total, (1, 2, 3))(*args)

    got, expected = both(f, *args)
    assert_close(got[0], expected[0], RULE)
    assert_close(got[1:], expected[1:], 2e-2)


def test_mapped_sinks_run_the_kernel_once(kernels: None) -> None:
    """Sinks alone are mapped: what the kernel computes is the same for all."""
    *tensors, sink = arrays()
    mapped = jax.vmap(attend, (None, None, None, 0))
    text = cuda_text(mapped, *tensors, jnp.stack([sink] * 5))
    assert operand_types(registry.FORWARD_TARGET, text)[0] == "1x4x8x4x16xbf16"
    assert "tensor<1x4x8x4x8xbf16>" in call_of(registry.FORWARD_TARGET, text)


@pytest.mark.parametrize("spec", [P(), P("y")], ids=str)
def test_shard_map(spec: P) -> None:
    """check_vma is on; sinks split as the heads are, or the same everywhere."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    heads = P("x", None, "y") if spec else P("x")
    lse = P("x", "y") if spec else P("x")
    specs = (heads, heads, heads, spec)

    def f(implementation: str, *args: Any) -> Any:
        def local(*args: Any) -> Any:
            return attend(*args, implementation=implementation)

        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, lse))
        gradient = jax.shard_map(
            jax.grad(loss(local), (0, 3)),
            mesh=mesh,
            in_specs=specs,
            out_specs=(heads, spec),
        )
        return mapped(*args), gradient(*args)

    got, expected = both(f, *arrays())
    assert_close(got[0], expected[0], RULE)
    assert_close(got[1], expected[1], 2e-2)


def test_error_is_within_twice_that_of_xla() -> None:
    """Though out is rounded twice: once by the kernel, once with the sinks joined."""
    rng = np.random.default_rng(0)
    shapes = ((2, 256, 4, 64), (2, 300, 2, 64), (2, 300, 2, 64))
    query, key, value = (
        rng.standard_normal(shape, np.float32).astype(jnp.bfloat16) for shape in shapes
    )
    given: dict[str, Any] = {"is_causal": True}
    without = oracle.attention(query, key, value, **given)
    kernel = baseline.attention(*map(jnp.asarray, (query, key, value)), **given)
    # From a sink that takes nothing to one that takes nearly all.
    for height in (-4.0, 2.0, 5.0, 8.0, 12.0):
        sink = jnp.asarray(height + rng.standard_normal(4), jnp.float32)
        config = AttentionConfig(scale=0.125, window_right=0)
        joined, lse = sinks.join(
            config,
            {"key": jnp.asarray(key), "sinks": sink[None]},
            kernel,
            jnp.asarray(without.lse, jnp.float32),
        )
        given["sinks"] = np.asarray(sink)
        expected = oracle.attention(query, key, value, **given)
        baseline.assert_accurate(joined, query, key, value, expected.out, **given)
        np.testing.assert_allclose(lse, expected.lse, rtol=1e-6, atol=1e-6)


def test_mha_without_lse(kernels: None) -> None:
    """The public call, whose lse nobody takes, is one kernel call as well."""

    def f(query: Any, key: Any, value: Any, sink: Any) -> Any:
        return mha(query, key, value, sinks=sink, implementation="cuda")

    assert kernel_calls(f, *arrays()) == 1


@pytest.mark.parametrize("sink", [-np.inf, 50.0, 100.0, np.inf])
def test_second_derivatives_of_rows_without_keys(sink: float) -> None:
    """Zero, however large the sink: nothing overflows on its way to the zero."""
    x = jnp.ones((1, 4, 2, 8))
    sinks_ = jnp.full(2, sink, jnp.float32)

    def value(s: jax.Array, rows: int) -> jax.Array:
        out = mha(x[:, :rows], x, x, sinks=s, query_seq_lengths=np.array([2]))
        return (out**2).sum()

    def twice(rows: int) -> jax.Array:
        def first(s: jax.Array) -> jax.Array:
            return jax.grad(value)(s, rows).sum()

        return jax.grad(first)(sinks_)

    assert_close(twice(4), twice(2), 0)
    assert np.isfinite(twice(4)).all()
