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
from jax_flash._src import intervals, plan, registry

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


@pytest.mark.parametrize("pattern", ["bnts", "11ts", "11t1"])
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
    assert (" all-reduce(" in text) == pattern.startswith("11")


OPTIONS_OF_GRADIENTS: list[tuple[str, dict[str, Any], int]] = [
    ("bnts", {"softcap": 2.0, **DROPOUT}, 2),
    ("1n1s", {"softcap": 2.0, "deterministic": True}, 2),
    ("11ts", {"deterministic": True}, 1),
    ("bnts", {"deterministic": True}, 1),
]
"""Of a bias: options, and how many calls of the backward that takes."""


@pytest.mark.parametrize(("pattern", "options", "count"), OPTIONS_OF_GRADIENTS)
def test_gradient_of_bias_with(
    pattern: str, options: dict[str, Any], count: int
) -> None:
    """A soft cap takes a call for that of the bias alone."""
    args = *tensors(), bias_of(pattern, jnp.float32)

    def gradients(argnums: Any, **more: Any) -> Any:
        return jax.grad(lambda *a: loss(attend)(*a, **options, **more), argnums)

    def calls(argnums: Any) -> int:
        g = gradients(argnums, implementation="cuda")
        return kernel_calls(g, *args, target=registry.BACKWARD_TARGET)

    with registry.assume_kernels():
        assert [calls(x) for x in ((0, 1), 3, (0, 3))] == [1, 1, count]
        given = {"bias": args[3], **options}
        details = jax_flash.explain(*tensors(), **given).details["cuda"]
        assert "jnp" not in details
    got, expected = both(
        lambda implementation, *a: gradients(
            (0, 1, 2, 3), implementation=implementation
        )(*a),
        *args,
    )
    assert_close(got, expected, ROUNDING)


def test_gradients_in_an_order_need_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores' are written where something shares the bias, if they are few."""
    monkeypatch.setattr(plan, "BIAS_GRADIENT", BATCH * HEADS * ROWS * KEYS - 1)

    def calls(pattern: str, **options: Any) -> int:
        g = jax.grad(lambda *a: loss(attend)(*a, **options), 3)
        args = *tensors(), bias_of(pattern)
        return kernel_calls(g, *args, target=registry.BACKWARD_TARGET)

    with registry.assume_kernels():
        assert calls("11ts") == calls("bnts", deterministic=True) == 1
        assert calls("11ts", deterministic=True) == 0
        message = "deterministic=True and 72800 scores, more than 72799"
        with pytest.raises(NotImplementedError, match=message):
            calls("11ts", deterministic=True, implementation="cuda")
        given: dict[str, Any] = {"bias": bias_of("11ts"), "deterministic": True}
        details = jax_flash.explain(*tensors(), **given).details["cuda"]
        assert details.endswith("(by jnp if bias has one)")


ROW_BIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("bnt1", {}),
    "sinks": ("11t1", {"sinks": SLOPES, "is_causal": True}),
    "sinks and mask": (
        "bnt1",
        {"sinks": SLOPES, "mask": mask_of("b1ts").at[:, :, 7].set(False)},
    ),
    "sinks, rows alike": ("1n11", {"sinks": SLOPES, "softcap": 2.0}),
    "in an order": ("1n11", {"deterministic": True}),
}
"""Which dimensions a bias has in full, and options."""


@pytest.mark.parametrize("case", ROW_BIASES)
def test_a_bias_that_keys_share(case: str) -> None:
    """Joined to what the kernel computes without it; large numbers and -inf."""
    pattern, given = ROW_BIASES[case]
    size = 1 if "sinks" in given else 300
    args = *tensors(), size * bias_of(pattern, jnp.float32)

    def f(implementation: str, *args: Any) -> Any:
        def one(*args: Any) -> Any:
            rest = {**given, "implementation": implementation}
            return attend(*args, **rest)

        return one(*args), jax.grad(loss(one), (0, 1, 2, 3))(*args)

    got, expected = both(f, *args)
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1], expected[1], ROUNDING)


def test_a_huge_bias_that_keys_share_changes_no_weight() -> None:
    """Nor do gradients overflow: lse less the bias would not be the lse without it."""

    def f(implementation: str, *args: Any) -> Any:
        def one(*args: Any) -> Any:
            return attend(*args, implementation=implementation)[0]

        return one(*args), jax.grad(lambda *a: one(*a).sum(), (0, 1, 2))(*args)

    query, key, value = tensors()
    bias = jnp.full((ROWS, 1), -1e12, jnp.float32)
    got = both(f, 30 * query, key, value, bias)[0]
    assert_close(got, both(f, 30 * query, key, value, None)[0], 0)


def test_kernels_of_a_bias_that_keys_share() -> None:
    """Are those without it: of float32, too."""
    bias = bias_of("11t1", jnp.float32)

    def f(*args: Any, **options: Any) -> Any:
        return mha(*args, bias=bias, implementation="cuda", **options)

    for dtype in (jnp.bfloat16, jnp.float32):
        args = [x.astype(dtype) for x in tensors()]
        with registry.assume_kernels():
            line = call_of(registry.FORWARD_TARGET, cuda_text(f, *args))
            g = jax.grad(lambda *a: f(*a).astype(jnp.float32).sum(), (0, 1, 2))
            counts = [
                kernel_calls(g, *args, target=target)
                for target in (registry.FORWARD_TARGET, registry.BACKWARD_TARGET)
            ]
            given: dict[str, Any] = {"bias": bias, "sinks": SLOPES}
            details = jax_flash.explain(*args, **given).details["cuda"]
        assert "has_intervals = false" in line
        assert counts == [2, 1]
        assert ", bias and sinks joined by XLA; gradients by" in details
        assert "intervals" not in details
