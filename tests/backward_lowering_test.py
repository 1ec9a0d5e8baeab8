"""What the backward is lowered to for CUDA, seen from a machine without a GPU."""

import itertools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import fake_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    KEY_LENGTHS,
    QUERY_LENGTHS,
    assert_close,
    call_of,
    cuda_text,
    dense,
    flash,
    kernel_calls,
    loss,
    moved_data,
    normal,
    qkv,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash._src import plan, registry

SHAPES = ((3, 64, 4, 16), (3, 48, 2, 16), (3, 48, 2, 8))
FORWARD_ONLY = [kernel for kernel in plan.KERNELS if kernel.op == "mha_fwd"]


def inputs(dtype: str = "bfloat16") -> list[jax.Array]:
    return [normal(*shape).astype(dtype) for shape in SHAPES]


def the_call(text: str) -> str:
    return call_of(registry.BACKWARD_TARGET, text)


def types(line: str) -> tuple[list[str], list[str]]:
    """Types of operands and results of a call, as in "3x64x4x16xbf16"."""
    operands, results = line[line.rindex(" : (") :].split(" -> ")
    found = [re.findall(r"tensor<(.*?)>", part) for part in (operands, results)]
    return found[0], found[1]


def backward_calls(f: Callable, *args: Any) -> int:
    return kernel_calls(f, *args, target=registry.BACKWARD_TARGET)


def total(*args: Any, with_lse: bool = False, **options: Any) -> jax.Array:
    """A scalar of out, and of lse if asked for."""
    out, lse = flash(*args, **options)
    result = jnp.sum(jnp.sin(out.astype(jnp.float32)))
    return result + jnp.sum(jnp.sin(lse)) if with_lse else result


def gradient(argnums: Any = (0, 1, 2), **options: Any) -> Callable:
    return jax.grad(lambda *a: total(*a, **options), argnums)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_attributes_operands_and_results(kernels: None, dtype: str) -> None:
    lengths = jnp.asarray(QUERY_LENGTHS[:3]), jnp.asarray(KEY_LENGTHS[:3])

    def f(query, key, value, query_lengths, key_lengths):
        return total(
            query,
            key,
            value,
            with_lse=True,
            scale=0.5,
            is_causal=True,
            window_size=(7, 3),
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
        )

    name = {"bf16": "bfloat16", "f16": "float16"}[dtype]
    line = the_call(cuda_text(jax.grad(f, (0, 1, 2)), *inputs(name), *lengths))
    for attribute in (
        "scale = 5.000000e-01 : f32",
        "window_left = 7 : i64",
        "window_right = 0 : i64",
        "bottom_right = true",
        "has_dlse = true",
        "has_query_lengths = true",
        "has_kv_lengths = true",
        "deterministic = false",
        "query_order = dense<[0, 1, 2, 3]> : tensor<4xi64>",
        "key_order = dense<[0, 1, 2, 3]> : tensor<4xi64>",
        "value_order = dense<[0, 1, 2, 3]> : tensor<4xi64>",
    ):
        assert attribute in line, attribute
    operands, results = types(line)
    gradients = [f"3x64x4x16x{dtype}", f"3x48x2x16x{dtype}", f"3x48x2x8x{dtype}"]
    out, lse = f"3x64x4x8x{dtype}", "3x4x64xf32"
    assert operands == [*gradients, out, lse, out, lse, "3xi32", "3xi32"]
    # 128 rows of each of 12 heads: 64 wide, two numbers, and eight counts in all; a
    # queue; and gradients of 64 keys for each of the 12, 64 wide.
    floats = 12 * (128 * (64 + 2) + 8) + 4 + 12 * 64 * (64 + 64)
    assert results == [*gradients, f"{floats}xf32"]


@pytest.mark.parametrize("given", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("with_lse", [False, True])
def test_only_given_operands(
    kernels: None, given: tuple[int, ...], with_lse: bool
) -> None:
    names = ("query_seq_lengths", "key_value_seq_lengths")
    options = {names[i]: np.array([1, 2, 3]) for i in given}
    line = the_call(cuda_text(gradient(with_lse=with_lse, **options), *inputs()))
    assert len(types(line)[0]) == 6 + with_lse + len(given)
    assert f"has_dlse = {str(with_lse).lower()}" in line
    assert f"has_query_lengths = {str(0 in given).lower()}" in line
    assert f"has_kv_lengths = {str(1 in given).lower()}" in line


@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_one_call_for_any_gradients(kernels: None, argnums: tuple[int, ...]) -> None:
    text = cuda_text(gradient(argnums, is_causal=True), *inputs())
    operands, results = types(the_call(text))
    assert results[:3] == operands[:3]
    for operation in ("transpose", "reduce", "dot_general", "exponential"):
        assert f"stablehlo.{operation}" not in text, operation
    shapes = [x.shape for x in jax.eval_shape(gradient(argnums), *inputs())]
    assert shapes == [SHAPES[i] for i in argnums]


def test_where_the_forward_has_a_kernel_the_gradient_has_one(kernels: None) -> None:
    args = inputs()
    f = jax.value_and_grad(lambda *a: jax_flash.mha(*a).astype(jnp.float32).sum())
    assert (kernel_calls(f, *args), backward_calls(f, *args)) == (1, 1)
    for implementation, calls in (("cuda", 1), ("xla", 0), (("xla", "cuda"), 0)):
        assert backward_calls(gradient(implementation=implementation), *args) == calls
    for options, dtype, calls in (
        ({}, "float32", 1),
        ({"softcap": 3.0}, "bfloat16", 1),
        ({"softcap": 3.0}, "float32", 1),
        ({"mask": np.ones((64, 48), bool)}, "bfloat16", 1),
        ({"mask": np.ones((64, 48), bool)}, "float32", 1),
    ):
        f = jax.value_and_grad(lambda *a, o=options: total(*a, **o), (0, 1, 2))
        arrays = inputs(dtype)
        assert (kernel_calls(f, *arrays), backward_calls(f, *arrays)) == (calls, calls)
    assert backward_calls(lambda *a: jax.jvp(flash, a, a), *args) == 0
    mapped = jax.vmap(jax.vmap(gradient()))
    stacked = [jnp.stack([jnp.stack([x] * 2)] * 3) for x in args]
    assert backward_calls(mapped, *stacked) == 1


def test_shared_operands_are_summed_in_float32(kernels: None) -> None:
    query, key, value = inputs()

    def f(queries, key, value):
        return jax.vmap(total, (0, None, None))(queries, key, value).sum()

    text = cuda_text(jax.grad(f, (0, 1, 2)), jnp.stack([query] * 5), key, value)
    operands, results = types(the_call(text))
    assert operands[:3] == ["5x3x64x4x16xbf16", "1x3x48x2x16xbf16", "1x3x48x2x8xbf16"]
    assert operands[3:6] == ["5x3x64x4x8xbf16", "5x3x4x64xf32", "5x3x64x4x8xbf16"]
    assert results[:3] == ["5x3x64x4x16xbf16", "5x3x48x2x16xf32", "5x3x48x2x8xf32"]
    for width in (16, 8):
        over_examples = re.search(
            rf"reduce\(.*dimensions = \[0\] : \(tensor<5x3x48x2x{width}xf32>", text
        )
        assert over_examples, width


def test_gradients_of_each_example_are_not_summed(kernels: None) -> None:
    query, key, value = inputs()
    mapped = jax.vmap(gradient(), (0, None, None))
    text = cuda_text(mapped, jnp.stack([query] * 5), key, value)
    results = types(the_call(text))[1]
    assert results[:3] == ["5x3x64x4x16xbf16", "5x3x48x2x16xbf16", "5x3x48x2x8xbf16"]
    assert "stablehlo.reduce" not in text


def test_residuals_and_cotangents_get_the_full_batch(kernels: None) -> None:
    """Jacrev maps the cotangents alone."""
    args = inputs()
    text = cuda_text(jax.jacrev(lambda *a: flash(*a)[0][0, 0, 0]), *args)
    operands, results = types(the_call(text))
    assert operands[0] == "1x3x64x4x16xbf16"
    assert operands[3:6] == ["8x3x64x4x8xbf16", "8x3x4x64xf32", "8x3x64x4x8xbf16"]
    assert results[0] == "8x3x64x4x16xbf16"


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_layout_of_a_mapped_axis(kernels: None, axis: int) -> None:
    """The operand's layout is where the axis physically is; others are row-major."""
    query, key, value = inputs()
    mapped = jax.vmap(gradient(), (None, axis, None))
    line = the_call(cuda_text(mapped, query, jnp.stack([key] * 5, axis), value))
    order = [1, 2, 3, 4]
    order.insert(axis, 0)
    assert f"key_order = dense<{order}>" in line
    assert "query_order = dense<[0, 1, 2, 3, 4]>" in line
    layouts = re.search(r"operand_layouts = \[(.*?)\], result_layouts", line)
    assert layouts is not None
    row_major = "dense<[4, 3, 2, 1, 0]>"
    found = re.findall(r"dense<\[.*?\]>", layouts.group(1))
    assert found == [
        row_major,
        f"dense<{order[::-1]}>",
        *[row_major] * 2,
        "dense<[3, 2, 1, 0]>",
        row_major,
    ]


AXES = [a for a in itertools.product((None, 0, 1, 3), repeat=2) if a != (None, None)]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_operands_are_not_moved(axes: tuple[int | None, int | None]) -> None:
    """Vmap over any axis but the width: the kernel reads the arguments in place."""
    query, key, value = inputs()
    stacked = [
        x if axis is None else jnp.stack([x] * 5, axis)
        for x, axis in zip((query, key), axes, strict=True)
    ]
    with fake_kernel.on_cpu():
        mapped = jax.vmap(jax.value_and_grad(total, (0, 1, 2)), (*axes, None))
        text = jax.jit(mapped).lower(*stacked, value).compile().as_text()
        assert f'"{registry.BACKWARD_TARGET}"' in str(text)
        assert moved_data(text) == []


# Calls by their options, of `qkv` in bfloat16.
EMULATED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "causal_alignment": "top_left", "scale": -0.3},
    "lengths": {
        "query_seq_lengths": QUERY_LENGTHS,
        "key_value_seq_lengths": KEY_LENGTHS,
        "is_causal": True,
    },
}


@pytest.mark.parametrize("options", EMULATED.values(), ids=EMULATED)
@pytest.mark.parametrize(
    "in_axes", [None, (0, None, None), (None, 1, None), (2, 0, 3), (None, None, 0)]
)
def test_values_around_the_call(options: Any, in_axes: Any) -> None:
    """Operands, sums and casts, with the call emulated from its attributes."""
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    if in_axes is not None:
        args = [
            x if axis is None else jnp.stack([x, 0.5 * x, -x], axis)
            for x, axis in zip(args, in_axes, strict=True)
        ]

    def derivatives(f: Callable) -> list[Callable]:
        one = jax.grad(loss(f), (0, 1, 2))
        if in_axes is None:
            return [one]
        mapped = jax.vmap(loss(f), in_axes)
        return [
            jax.vmap(one, in_axes),
            jax.grad(lambda *a: mapped(*a).sum(), (0, 1, 2)),
        ]

    def wide(*a: Any, **o: Any) -> Any:
        out, lse = flash(*a, **options)
        return out.astype(jnp.float32), lse

    def expected(*a: Any, **o: Any) -> Any:
        # What `dense` does not know is compared with the specification.
        f = flash if "scale" in options else dense
        return f(*(x.astype(jnp.float32) for x in a), **options)

    for got, want in zip(derivatives(wide), derivatives(expected), strict=True):
        reference = jax.jit(want)(*args)
        with fake_kernel.emulated_backward():
            assert_close(jax.jit(got)(*args), reference, 2e-2)


def test_emulation_is_used_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    want = gradient()(*args)
    right = fake_kernel._emulation

    def wrong(*a: Any, **o: Any) -> Callable:
        call = right(*a, **o)

        def run(*operands: Any, **attributes: Any) -> Any:
            return call(*operands, **(attributes | {"scale": np.float32(0.5)}))

        return run

    monkeypatch.setattr(fake_kernel, "_emulation", wrong)
    with fake_kernel.emulated_backward():
        got = jax.jit(gradient())(*args)
    with pytest.raises(AssertionError):
        assert_close(got, want, 2e-2)


def test_deterministic(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for deterministic in (False, True):
        f = gradient(deterministic=deterministic)
        attribute = f"deterministic = {str(deterministic).lower()}"
        assert attribute in the_call(cuda_text(f, *inputs()))


FLAGS = {
    "--xla_gpu_deterministic_ops": True,
    "--xla_gpu_deterministic_ops=true": True,
    "--xla_dump_to=x --xla_gpu_deterministic_ops=1 --xla_a=2": True,
    "--xla_gpu_exclude_nondeterministic_ops=true": True,
    "--xla_gpu_deterministic_ops=false": False,
    "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false": False,
    "--xla_gpu_deterministic_ops_not=true": False,
    "": False,
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("in_file", [False, True])
def test_flags_of_xla_are_followed(
    flags: str,
    in_file: bool,
    kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "flags"
    path.write_text(flags.replace(" ", "\n"))
    monkeypatch.setenv("XLA_FLAGS", str(path) if in_file else flags)
    # Lowered again, although it was before with other flags.
    line = the_call(cuda_text(lambda *a: gradient()(*a), *inputs()))
    assert f"deterministic = {str(FLAGS[flags]).lower()}" in line


def test_without_a_kernel_for_the_gradient() -> None:
    args = inputs()
    with registry.assume_kernels(FORWARD_ONLY):
        f = jax.value_and_grad(total)
        assert (kernel_calls(f, *args), backward_calls(f, *args)) == (1, 0)
        with pytest.raises(NotImplementedError, match=r"no mha_bwd kernel.*64x64"):
            cuda_text(gradient(implementation="cuda"), *args)
    with registry.assume_kernels():
        assert backward_calls(gradient(implementation="cuda"), *args) == 1


def test_kernels_alone_run_on_cuda_alone(kernels: None) -> None:
    """Also a program that holds nothing but the backward."""
    args = inputs()
    _, vjp = jax.vjp(lambda *a: flash(*a)[0], *args)
    dout = jnp.ones((*SHAPES[0][:-1], SHAPES[2][-1]), jnp.bfloat16)
    assert backward_calls(vjp, dout) == 1
    f = gradient(implementation="cuda")
    with pytest.raises(NotImplementedError, match="runs on platform 'cuda' only"):
        jax.jit(f).trace(*args).lower()


@pytest.mark.parametrize(
    "empty", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=["batch", "rows", "keys"]
)
@pytest.mark.parametrize("implementation", [None, "cuda"])
def test_empty_problems_call_no_kernel(
    kernels: None, empty: tuple[int, int, int], implementation: str | None
) -> None:
    batch, rows, keys = empty
    args = [
        jnp.zeros(shape, jnp.bfloat16)
        for shape in ((batch, rows, 2, 8), (batch, keys, 2, 8), (batch, keys, 2, 8))
    ]
    assert backward_calls(gradient(implementation=implementation), *args) == 0


def test_too_many_batch_dimensions(kernels: None) -> None:
    """Vmap may add more dimensions than the kernel addresses: then jnp runs."""
    args = [jnp.zeros((1, 2, 1, 8), jnp.bfloat16)] * 3
    f = gradient()
    for _ in range(plan.MAX_BATCH_DIMS):
        f = jax.vmap(f, (0, None, None))
    query = jnp.zeros((1,) * plan.MAX_BATCH_DIMS + (1, 2, 1, 8), jnp.bfloat16)
    assert backward_calls(f, query, *args[1:]) == 0
    assert backward_calls(f.__wrapped__, query[0], *args[1:]) == 1


SPEC = P("x", None, "y")


def sharded(mesh: jax.sharding.Mesh) -> list[jax.Array]:
    sharding = NamedSharding(mesh, SPEC)
    return [jax.device_put(x.astype(jnp.bfloat16), sharding) for x in qkv()]


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def test_sharded_batch_and_heads() -> None:
    """Each device calls the kernel on its part, and nothing is sent."""
    with fake_kernel.on_cpu():
        compiled = jax.jit(gradient()).lower(*sharded(mesh_of(4, 2))).compile()
        text = str(compiled.as_text())
    (line,) = (x for x in text.splitlines() if f'"{registry.BACKWARD_TARGET}"' in x)
    # 4 sequences over 4 devices, 4 query and 2 key heads over 2.
    assert "(bf16[1,8,2,16]" in line
    assert "bf16[1,8,1,16]" in line
    for operation in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert not re.search(rf" {operation}(-start)?\(", text), operation


def test_one_kv_head_over_sharded_query_heads() -> None:
    """Gradients of the shared head are partial: one sum over the devices."""
    mesh = mesh_of(4, 2)
    query = sharded(mesh)[0]
    key, value = (
        jax.device_put(x[:, :, :1].astype(jnp.bfloat16), NamedSharding(mesh, P("x")))
        for x in qkv()[1:]
    )
    with fake_kernel.on_cpu():
        compiled = jax.jit(gradient()).lower(query, key, value).compile()
        text = str(compiled.as_text())
    assert f'"{registry.BACKWARD_TARGET}"' in text
    assert re.search(r" all-reduce(-start)?\(", text)


def test_shard_map(kernels: None) -> None:
    specs = (SPEC,) * 3
    inside = jax.shard_map(
        gradient(), mesh=mesh_of(4, 2), in_specs=specs, out_specs=specs
    )
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    operands, results = types(the_call(cuda_text(inside, *args)))
    assert operands[0] == "1x8x2x16xbf16"
    assert results[:3] == operands[:3]

    def outside(*a: Any) -> jax.Array:
        def local(*b: Any) -> jax.Array:
            return jax.lax.psum(total(*b), ("x", "y"))

        mesh = mesh_of(4, 2)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(*a)

    assert backward_calls(jax.grad(outside, (0, 1, 2)), *args) == 1
