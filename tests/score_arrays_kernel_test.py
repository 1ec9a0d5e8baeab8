"""Bias and mask on the kernels, seen from the CPU as in options_kernel_test.py."""

from typing import Any

import fake_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, call_of, cuda_text, kernel_calls, loss
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from options_kernel_test import (
    BATCH,
    DROPOUT,
    HEADS,
    KEYS,
    ROUNDING,
    ROWS,
    SLOPES,
    both,
    flash,
    intervals_of,
    mesh,
    operand_types,
    tensors,
)

import jax_flash
from jax_flash import mha
from jax_flash._src import intervals, registry

FULL = (BATCH, HEADS, ROWS, KEYS)
PATTERNS = ("bnts", "1nts", "b1ts", "bn1s", "11ts", "111s")
"""Which of the dimensions a bias has in full."""


def shape_of(pattern: str) -> tuple[int, ...]:
    return tuple(1 if c == "1" else size for c, size in zip(pattern, FULL, strict=True))


def bias_of(pattern: str, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal, some -inf, and all over a row that the bias has."""
    rng = np.random.default_rng(2)
    bias = rng.standard_normal(shape_of(pattern), np.float32)
    bias[rng.random(bias.shape) < 0.05] = -np.inf
    if bias.shape[2] > 1:
        bias[:, :, 5] = -np.inf
    return jnp.asarray(bias, dtype)


def mask_of(pattern: str) -> jax.Array:
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.random(shape_of(pattern)) < 0.6)


def attend(query: Any, key: Any, value: Any, bias: Any, **options: Any) -> Any:
    out, lse = flash(query, key, value, bias, **options)
    return out.astype(jnp.float32), lse


def test_bits_of_a_mask() -> None:
    """The lowest bit first, rows of 16 bytes; one number for all keys is spread."""
    mask = np.random.default_rng(0).random((2, 3, 150)) < 0.5
    words = np.asarray(intervals.mask_bits(jnp.asarray(mask), 150))
    assert (words.shape, words.dtype) == ((2, 3, 8), np.uint32)
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(bits[..., :150], mask)
    assert not bits[..., 150:].any()
    spread = intervals.mask_bits(jnp.asarray([[True], [False]]), 40)
    np.testing.assert_array_equal(spread[:, 0], [0xFFFFFFFF, 0])
    np.testing.assert_array_equal(spread[:, 1], [0xFF, 0])


def test_rows_of_a_bias() -> None:
    bias = jnp.ones((2, 13), jnp.float16)
    assert intervals.bias_rows(bias).shape == (2, 16)
    assert intervals.bias_rows(bias).dtype == jnp.float16
    assert intervals.bias_rows(bias.astype(jnp.float8_e4m3fn)).dtype == jnp.float32


def test_operands_and_attributes() -> None:
    bias, mask = bias_of("1nts"), mask_of("b11s")

    def f(*args: Any) -> Any:
        return attend(*args, bias=bias, mask=mask)

    with registry.assume_kernels():
        text = cuda_text(f, *tensors())
        backward = cuda_text(
            jax.grad(lambda b, *a: loss(attend)(*a, b, mask=mask), (0, 1)),
            bias,
            *tensors(),
        )
    expected = [*intervals_of(2), "2x1x1x8xui32", "1x4x70x136xbf16"]
    assert operand_types(registry.FORWARD_TARGET, text)[3:] == expected
    for target, program in (
        (registry.FORWARD_TARGET, text),
        (registry.BACKWARD_TARGET, backward),
    ):
        line = call_of(target, program)
        assert "has_mask = true" in line
        assert "has_bias = true" in line
    assert "has_dbias = true" in line
    assert "tensor<1x4x70x130xf32>" in line[line.rindex(" -> ") :]
    assert "dot_general" not in backward


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_every_broadcast(pattern: str) -> None:
    """Of query, key, value and bias; a row without keys among the rows."""
    bias = bias_of(pattern, jnp.float32 if "1" in pattern else jnp.bfloat16)
    options = {"mask": mask_of("b1ts"), "is_causal": True} if "n" in pattern else {}

    def f(implementation: str, *args: Any) -> Any:
        def one(*args: Any) -> Any:
            return attend(*args, **options, implementation=implementation)

        return one(*args), jax.grad(loss(one), (0, 1, 2, 3))(*args)

    got, expected = both(f, *tensors(), bias)
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1], expected[1], ROUNDING)


def test_values_with_other_options() -> None:
    """Masks of every kind, soft cap, dropout, ALiBi's slopes beside a mask."""
    for mask, bias, options in (
        (mask_of("bnts"), None, {"softcap": 2.0}),
        (mask_of("11ts")[0, 0], bias_of("11ts"), {"softcap": 2.0, **DROPOUT}),
        (mask_of("bn1s"), jax_flash.alibi(SLOPES), {"is_causal": True}),
        (jnp.arange(ROWS)[:, None] != 7, None, {"sinks": SLOPES}),
    ):

        def f(implementation: str, *args: Any, rest: Any = (bias, mask, options)):
            bias, mask, options = rest

            def one(*args: Any) -> Any:
                given = options | {"mask": mask, "implementation": implementation}
                return attend(*args, bias=bias, **given)

            return one(*args), jax.grad(loss(one), (0, 1, 2))(*args)

        got, expected = both(f, *tensors())
        assert_close(got[0], expected[0], 2.0**-7)
        assert_close(got[1], expected[1], ROUNDING)


@pytest.mark.parametrize("mapped", ["bias", "query", "both"])
def test_vmap(mapped: str) -> None:
    """Gradients of a bias that `vmap` maps, and of one that it does not."""
    query, key, value = tensors()
    bias = bias_of("1nts", jnp.float32)
    queries = jnp.stack([query, query[::-1]])
    args = (
        query if mapped == "bias" else queries,
        bias if mapped == "query" else jnp.stack([bias, jnp.roll(bias, 3, -1)]),
    )
    axes = (None if mapped == "bias" else 0, None if mapped == "query" else 0)

    def f(implementation: str, *args: Any) -> Any:
        def one(query: Any, bias: Any) -> Any:
            options = {"mask": mask_of("b1ts"), "implementation": implementation}
            return attend(query, key, value, bias, **options)

        def total(*args: Any) -> Any:
            return jnp.sum(jax.vmap(loss(one), axes)(*args))

        inside = jax.vmap(jax.grad(loss(one), (0, 1)), axes)(*args)
        return jax.vmap(one, axes)(*args), inside, jax.grad(total, (0, 1))(*args)

    got, expected = both(f, *args)
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1:], expected[1:], ROUNDING)


@pytest.mark.parametrize("pattern", ["bnts", "11ts"])
def test_named_sharding(pattern: str) -> None:
    """Parts of a bias that devices share are added up, and nothing else is sent."""
    bias, mask = bias_of(pattern, jnp.float32), mask_of("b1ts")

    def run(implementation: str, *args: Any) -> Any:
        def one(*args: Any) -> Any:
            return attend(*args[:4], mask=args[4], implementation=implementation)

        return one(*args), jax.grad(loss(one), (0, 1, 2, 3))(*args)

    spec = P(*(a if c != "1" else None for a, c in zip("xy", pattern, strict=False)))
    specs = (*(P("x", None, "y"),) * 3, spec, P("x"))
    args = [
        jax.device_put(x, NamedSharding(mesh(), spec))
        for x, spec in zip((*tensors(), bias, mask), specs, strict=True)
    ]
    expected = jax.jit(lambda *a: run("xla", *a))(*args)
    with fake_kernel.emulated():
        compiled = jax.jit(lambda *a: run("cuda", *a)).lower(*args).compile()
        got = compiled(*args)
    assert_close(got, expected, ROUNDING)
    text = str(compiled.as_text())
    assert " all-gather(" not in text
    assert (" all-reduce(" in text) == (pattern == "11ts")


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("bnts", {"softcap": 2.0}, "gradient of bias with softcap=2.0"),
        ("bn1s", {"deterministic": True}, "broadcast bias with deterministic=True"),
    ],
)
def test_gradients_that_are_jnp(
    pattern: str, options: dict[str, Any], message: str
) -> None:
    """Only if that of the bias is wanted."""
    bias = bias_of(pattern)

    def calls(argnums: Any, **more: Any) -> int:
        g = jax.grad(lambda *a: loss(attend)(*a, **options, **more), argnums)
        return kernel_calls(g, *tensors(), bias, target=registry.BACKWARD_TARGET)

    with registry.assume_kernels():
        assert calls((0, 1)) == 1
        assert calls((0, 3)) == 0
        with pytest.raises(NotImplementedError, match=message):
            calls(3, implementation="cuda")
        bias_alone = jax_flash.explain(*tensors(), bias=bias, **options).details["cuda"]
        assert bias_alone.endswith("(by jnp if bias has one)")


def test_exact_gradient_of_a_bias_is_deterministic() -> None:
    def f(bias: Any, *args: Any) -> Any:
        return loss(attend)(*args, bias, deterministic=True)

    with registry.assume_kernels():
        args = bias_of("bnts"), *tensors()
        assert kernel_calls(jax.grad(f), *args, target=registry.BACKWARD_TARGET) == 1
        details = jax_flash.explain(*args[1:], bias=args[0], deterministic=True).details
        assert "by jnp" not in details["cuda"]


def test_one_bias_for_all_keys_is_jnp() -> None:
    bias = jnp.ones((ROWS, 1), jnp.float32)
    with registry.assume_kernels():
        assert kernel_calls(lambda *a: mha(*a, bias=bias), *tensors()) == 0
        message = r"bias \(of shape \(1, 1, 70, 1\)\) that keys share is not supported"
        with pytest.raises(NotImplementedError, match=message):
            mha(*tensors(), bias=bias, implementation="cuda")
