"""What is lowered for CUDA, seen from a machine without a GPU."""

import itertools
import re

import fake_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    KEY_LENGTHS,
    QUERY_LENGTHS,
    call_of,
    cuda_text,
    flash,
    kernel_calls,
    moved_data,
    normal,
)

import jax_flash
from jax_flash._src import plan, registry

SHAPES = ((3, 64, 4, 16), (3, 48, 2, 16), (3, 48, 2, 8))


def inputs(dtype: str = "bfloat16") -> list[jax.Array]:
    return [normal(*shape).astype(dtype) for shape in SHAPES]


def the_call(text: str) -> str:
    return call_of(registry.FORWARD_TARGET, text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_custom_call(kernels: None, dtype: str) -> None:
    text = cuda_text(flash, *inputs(dtype))
    assert text.count("stablehlo.custom_call") == 1
    for operation in ("transpose", "all_gather", "dot_general", "broadcast_in_dim"):
        assert f"stablehlo.{operation}" not in text, operation


def test_attributes_and_operands(kernels: None) -> None:
    lengths = jnp.asarray(QUERY_LENGTHS[:3]), jnp.asarray(KEY_LENGTHS[:3])

    def f(query, key, value, query_lengths, key_lengths):
        return jax_flash.mha(
            query,
            key,
            value,
            scale=0.5,
            is_causal=True,
            window_size=(7, 3),
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
        )

    line = the_call(cuda_text(f, *inputs(), *lengths))
    for attribute in (
        "scale = 5.000000e-01 : f32",
        "window_left = 7 : i64",
        "window_right = 0 : i64",
        "bottom_right = true",
        "has_query_lengths = true",
        "has_kv_lengths = true",
        "query_order = dense<[0, 1, 2, 3]> : tensor<4xi64>",
        "key_order = dense<[0, 1, 2, 3]> : tensor<4xi64>",
        "value_order = dense<[0, 1, 2, 3]> : tensor<4xi64>",
    ):
        assert attribute in line, attribute
    types = line[line.rindex(" : (") :]
    expected = (
        "(tensor<3x64x4x16xbf16>, tensor<3x48x2x16xbf16>, tensor<3x48x2x8xbf16>, "
        "tensor<3xi32>, tensor<3xi32>) -> "
        "(tensor<3x64x4x8xbf16>, tensor<3x4x64xf32>)"
    )
    assert expected in types


@pytest.mark.parametrize("given", [(), (0,), (1,), (0, 1)])
def test_only_given_lengths_are_operands(kernels: None, given: tuple[int, ...]) -> None:
    names = ("query_seq_lengths", "key_value_seq_lengths")
    options = {names[i]: np.array([1, 2, 3]) for i in given}
    text = cuda_text(lambda *a: flash(*a, **options), *inputs())
    line = the_call(text)
    arguments = re.search(r"@\w+\((.*?)\)", line)
    assert arguments is not None
    assert len(arguments.group(1).split(",")) == 3 + len(given)
    assert f"has_query_lengths = {str(0 in given).lower()}" in line
    assert f"has_kv_lengths = {str(1 in given).lower()}" in line


def test_unbounded_window_and_alignment(kernels: None) -> None:
    def f(*a):
        return flash(*a, window_size=(None, 2), causal_alignment="top_left")

    line = the_call(cuda_text(f, *inputs()))
    assert "window_left = -1 : i64" in line
    assert "window_right = 2 : i64" in line
    assert "bottom_right = false" in line


def test_unmapped_keys_and_values_are_not_copied(kernels: None) -> None:
    query, key, value = inputs()
    mapped = jax.vmap(flash, (0, None, None))
    text = cuda_text(mapped, jnp.stack([query] * 5), key, value)
    line = the_call(text)
    for shape in ("5x3x64x4x16", "1x3x48x2x16", "1x3x48x2x8"):
        assert f"tensor<{shape}xbf16>" in line
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_layout_of_a_mapped_axis(kernels: None, axis: int) -> None:
    """The operand's layout is where the axis physically is."""
    query, key, value = inputs()
    mapped = jax.vmap(flash, (axis, None, None))
    line = the_call(cuda_text(mapped, jnp.stack([query] * 5, axis), key, value))
    order = [1, 2, 3, 4]
    order.insert(axis, 0)
    assert f"query_order = dense<{order}>" in line
    layouts = re.search(r"operand_layouts = \[(.*?)\], ", line)
    assert layouts is not None
    assert layouts.group(1).startswith(f"dense<{order[::-1]}>")


AXES = [a for a in itertools.product((None, 0, 1, 2, 3), repeat=2) if a != (None, None)]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_compiled_without_transpose_or_copy(
    axes: tuple[int | None, int | None],
) -> None:
    """Vmap over any axis but the width: the kernel reads the arguments in place."""
    query, key, value = inputs()
    stacked = [
        x if axis is None else jnp.stack([x] * 5, axis)
        for x, axis in zip((query, key), axes, strict=True)
    ]
    with fake_kernel.on_cpu():
        mapped = jax.vmap(flash, (*axes, None))
        text = jax.jit(mapped).lower(*stacked, value).compile().as_text()
        assert f'"{registry.FORWARD_TARGET}"' in str(text)
        assert moved_data(text) == []


def test_moved_data_is_detected() -> None:
    """The test above can fail: the width cannot be read from the middle."""
    query, key, value = inputs()
    with fake_kernel.on_cpu():
        mapped = jax.vmap(flash, (4, None, None))
        queries = jnp.stack([query] * 5, 4)
        text = jax.jit(mapped).lower(queries, key, value).compile().as_text()
        assert len(moved_data(text)) == 1


@pytest.mark.parametrize(
    "empty", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=["batch", "rows", "keys"]
)
def test_empty_problems_call_no_kernel(
    kernels: None, empty: tuple[int, int, int]
) -> None:
    batch, rows, keys = empty
    args = [
        jnp.zeros(shape, jnp.bfloat16)
        for shape in ((batch, rows, 2, 8), (batch, keys, 2, 8), (batch, keys, 2, 8))
    ]
    assert kernel_calls(flash, *args) == 0


def test_other_platforms_run_the_specification(kernels: None) -> None:
    query, key, value = inputs()
    lowered = jax.jit(flash).trace(query, key, value).lower()
    assert registry.FORWARD_TARGET not in lowered.as_text()


def test_named_implementation_decides(kernels: None) -> None:
    for implementation, calls in (("cuda", 1), ("xla", 0), (("xla", "cuda"), 0)):

        def f(*a, implementation=implementation):
            return flash(*a, implementation=implementation)

        assert kernel_calls(f, *inputs()) == calls


def test_too_many_batch_dimensions(kernels: None) -> None:
    """Vmap may add more dimensions than the kernel addresses: then jnp runs."""
    args = [jnp.zeros((1, 2, 1, 8), jnp.bfloat16)] * 3
    f = flash
    for _ in range(plan.MAX_BATCH_DIMS):
        f = jax.vmap(f, (0, None, None))
    query = jnp.zeros((1,) * plan.MAX_BATCH_DIMS + (1, 2, 1, 8), jnp.bfloat16)
    assert kernel_calls(f, query, *args[1:]) == 0

    def strict(*a):
        return flash(*a, implementation="cuda")

    for _ in range(plan.MAX_BATCH_DIMS):
        strict = jax.vmap(strict, (0, None, None))
    with pytest.raises(NotImplementedError, match="at most 8 batch dimensions"):
        cuda_text(strict, query, *args[1:])
