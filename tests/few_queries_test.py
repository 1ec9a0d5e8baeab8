"""Calls of `mha` with few queries on many keys, which the decode kernel runs."""

from __future__ import annotations

from typing import Any

import fake_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, call_of, cuda_text, kernel_calls, loss
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import mha
from jax_flash._src import decode_plan, registry

KEYS = decode_plan.MHA_KEYS
ROUNDING = 2.0**-7


def tensors(
    *batch: int,
    rows: int = 1,
    keys: int = KEYS,
    heads: int = 4,
    widths: tuple[int, int] = (16, 8),
    dtype: Any = jnp.bfloat16,
) -> list[jax.Array]:
    """Query, key and value, two key heads."""
    rng = np.random.default_rng(0)
    shapes = (rows, heads, widths[0]), (keys, 2, widths[0]), (keys, 2, widths[1])
    arrays = [rng.standard_normal((*batch, *one), np.float32) for one in shapes]
    return [jnp.asarray(x, dtype) for x in arrays]


def attend(*arrays: Any, **options: Any) -> Any:
    out, lse = mha(*arrays, return_lse=True, **options)
    return out.astype(jnp.float32), lse


def decodes(*arrays: Any, **options: Any) -> bool:
    """Which of the two kernels runs a call."""

    def f(*a: Any) -> Any:
        return mha(*a, **options)

    targets = registry.DECODE_TARGET, registry.FORWARD_TARGET
    decode, forward = (kernel_calls(f, *arrays, target=t) for t in targets)
    assert decode + forward == 1
    explained = jax_flash.explain(*arrays, **options).details["cuda"]
    assert explained.startswith("the decode kernel, ") == bool(decode)
    return bool(decode)


LENGTHS = np.array([KEYS // 6, KEYS + 5], np.int32)
RUN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "several causal": ({"rows": 3}, {"is_causal": True}),
    "right side": ({"rows": 8}, {"window_size": (None, 0)}),
    "wide window": ({}, {"window_size": (KEYS - 1, 3)}),
    "top left without a mask": ({}, {"causal_alignment": "top_left"}),
    "lengths": ({}, {"key_value_seq_lengths": LENGTHS}),
    "sinks": ({}, {"sinks": np.ones((2, 4), np.float32), "softcap": 3.0}),
    "float16": ({"dtype": jnp.float16, "heads": 32}, {"deterministic": True}),
}
DO_NOT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fewer keys": ({"keys": KEYS - 1}, {}),
    "several": ({"rows": 2}, {}),
    "more rows": ({"rows": 9}, {"is_causal": True}),
    "larger groups": ({"heads": 34}, {}),
    "narrow window": ({}, {"window_size": (KEYS - 2, None)}),
    "top left": ({}, {"is_causal": True, "causal_alignment": "top_left"}),
    "query lengths": ({}, {"query_seq_lengths": np.array([1, 0], np.int32)}),
    "widths": ({"widths": (16, 12)}, {}),
    "float32": ({"dtype": jnp.float32}, {}),
    "slopes": ({}, {"bias": jax_flash.alibi(np.ones(4, np.float32))}),
    "bias": ({}, {"bias": np.zeros(KEYS, np.float32)}),
    "mask": ({}, {"mask": np.ones(KEYS, bool)}),
    "dropout": ({}, {"dropout_rate": 0.5, "dropout_key": np.zeros(2, np.uint32)}),
}


@pytest.mark.parametrize("case", [*RUN, *DO_NOT])
@pytest.mark.usefixtures("kernels")
def test_choice(case: str) -> None:
    sizes, options = (RUN | DO_NOT)[case]
    assert decodes(*tensors(2, **sizes), **options) == (case in RUN)


@pytest.mark.usefixtures("kernels")
def test_the_batch_does_not_matter() -> None:
    assert decodes(*tensors())
    assert decodes(*tensors(64))


@pytest.mark.usefixtures("kernels")
def test_call() -> None:
    """Batch dimensions are one, results come back with them."""
    arrays = tensors(3, 2, rows=2)
    options = {"scale": 0.5, "softcap": 2.0, "window_size": (KEYS, 0)}
    lengths = jnp.full((1, 2), KEYS // 3, jnp.int32)

    def f(*a: Any) -> Any:
        return attend(*a, **options, key_value_seq_lengths=lengths)

    line = call_of(registry.DECODE_TARGET, cuda_text(f, *arrays))
    operands = (
        f"(tensor<6x2x4x16xbf16>, tensor<6x{KEYS}x2x16xbf16>, "
        f"tensor<6x{KEYS}x2x8xbf16>, tensor<6xi32>) -> "
    )
    assert operands in line
    for attribute in ("scale = 5.0", "softcap = 2.0", "window_left = -1"):
        assert attribute in line
    shapes = [x.shape for x in jax.eval_shape(f, *arrays)]
    assert shapes == [(3, 2, 2, 4, 8), (3, 2, 4, 2)]


@pytest.mark.usefixtures("kernels")
def test_only_the_kernel_that_was_asked_for() -> None:
    arrays = tensors(2)
    assert decodes(*arrays, implementation="cuda")
    text = cuda_text(lambda *a: mha(*a, implementation="xla"), *arrays)
    assert "@jax_flash_" not in text


@pytest.mark.parametrize("case", RUN)
def test_values_and_gradients(case: str) -> None:
    """Rows without keys are among them; gradients are the usual kernel's."""
    sizes, options = RUN[case]
    arrays = tensors(2, **sizes)
    if case == "several causal":  # rows without keys, and padding of NaN
        options = options | {"key_value_seq_lengths": np.array([2, 0], np.int32)}
        arrays[1:] = [x.at[:, 2:].set(jnp.nan) for x in arrays[1:]]

    def f(implementation: str, *a: Any) -> Any:
        def one(*a: Any) -> Any:
            return attend(*a, **options, implementation=implementation)

        return one(*a), jax.grad(loss(one), (0, 1, 2))(*a)

    expected = jax.jit(lambda *a: f("xla", *a))(*arrays)
    with fake_kernel.emulated():
        got = jax.jit(lambda *a: f("cuda", *a))(*arrays)
    assert_close(got[0], expected[0], ROUNDING)
    assert_close(got[1], expected[1], ROUNDING)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got[1])


@pytest.mark.usefixtures("kernels")
def test_gradients_run_the_kernel_of_the_backward() -> None:
    arrays = tensors(2)
    f = jax.grad(lambda *a: mha(*a).astype(jnp.float32).sum(), (0, 1, 2))
    assert kernel_calls(f, *arrays, target=registry.DECODE_TARGET) == 1
    assert kernel_calls(f, *arrays, target=registry.BACKWARD_TARGET) == 1
    assert kernel_calls(f, *arrays, target=registry.FORWARD_TARGET) == 0


@pytest.mark.usefixtures("kernels")
def test_vmap() -> None:
    """Over all operands it is a larger batch; shared keys are not repeated."""
    arrays = tensors(3, 2)
    sinks = jnp.ones((3, 4))

    def f(*a: Any) -> Any:
        return mha(*a[:3], sinks=a[3])

    text = cuda_text(jax.vmap(f), *arrays, sinks)
    line = call_of(registry.DECODE_TARGET, text)
    assert f"(tensor<6x1x4x16xbf16>, tensor<6x{KEYS}x2x16xbf16>" in line
    assert "tensor<6x4xf32>) ->" in line
    shared = jax.vmap(f, (0, None, None, None))
    one = [arrays[0], arrays[1][0], arrays[2][0], sinks[0]]
    assert kernel_calls(shared, *one, target=registry.FORWARD_TARGET) == 1
    moved = jax.vmap(lambda *a: mha(*a), 1)
    turned = [jnp.moveaxis(x, 0, 1) for x in arrays]
    assert kernel_calls(moved, *turned, target=registry.FORWARD_TARGET) == 1


@pytest.mark.parametrize("manual", [False, True])
def test_sharding(manual: bool) -> None:
    """By batch and heads: every device decodes what it has."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spec = P("x", None, "y")
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in tensors(2)]

    def f(*a: Any) -> Any:
        return attend(*a, sinks=jnp.ones(a[0].shape[-2]), implementation="cuda")

    expected = jax.jit(lambda *a: attend(*a, sinks=jnp.ones(4)))(*tensors(2))
    run = f
    if manual:
        out_specs = spec, P("x", "y")
        run = jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 3, out_specs=out_specs)
    with fake_kernel.emulated():
        got = jax.jit(run)(*arrays)
    assert_close(got, expected, ROUNDING)


@pytest.mark.usefixtures("kernels")
def test_symbolic_lengths_are_the_forward_kernel_s() -> None:
    (keys,) = export.symbolic_shape("s")
    shapes = [
        jax.ShapeDtypeStruct((2, n, *x.shape[2:]), x.dtype)
        for n, x in zip((1, keys, keys), tensors(2), strict=True)
    ]
    targets = registry.FORWARD_TARGET, registry.DECODE_TARGET
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    exported = export.export(
        jax.jit(lambda *a: mha(*a)), platforms=("cuda",), disabled_checks=checks
    )(*shapes)
    assert registry.FORWARD_TARGET in exported.mlir_module()
    assert registry.DECODE_TARGET not in exported.mlir_module()


def test_threshold() -> None:
    """Of the keys that a window leaves, and of the rows of a key head."""
    assert decode_plan.serves_mha(1, 16, KEYS, -1)
    assert not decode_plan.serves_mha(1, 17, KEYS, -1)
    assert not decode_plan.serves_mha(1, 1, KEYS - 1, -1)
    assert decode_plan.serves_mha(4, 4, 1 << 20, KEYS - 4)
    assert not decode_plan.serves_mha(4, 4, 1 << 20, KEYS - 5)
