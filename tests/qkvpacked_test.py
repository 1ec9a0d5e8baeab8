"""`mha_qkvpacked`, read in place by the kernels and split by everything else."""

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
    kernel_calls,
    loss,
    moved_data,
    normal,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import mha, mha_qkvpacked
from jax_flash._src import registry

BATCH, ROWS, HEADS, KV_HEADS, WIDTH = 4, 8, 4, 2, 16
PARTS = HEADS + 2 * KV_HEADS
STEP = 2.0**-7
"""Of bfloat16: the emulated kernels and jnp may round differently."""


def inputs(*lead: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return normal(*lead, BATCH, ROWS, PARTS * WIDTH).astype(dtype)


def attend(qkv: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    out, lse = mha_qkvpacked(qkv, HEADS, KV_HEADS, return_lse=True, **options)
    return out.astype(jnp.float32), lse


def unpacked(qkv: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The same on the parts, by jnp."""
    parts = qkv.reshape(*qkv.shape[:-1], PARTS, WIDTH)
    tensors = jnp.split(parts, [HEADS, HEADS + KV_HEADS], -2)
    out, lse = mha(*tensors, return_lse=True, **options)
    return out.astype(jnp.float32), lse


def in_place(f: Callable, *args: Any) -> Any:
    """What the emulated kernels make of `f`, which must give them the whole array."""
    with fake_kernel.emulated():
        text = jax.jit(f).trace(*args).jaxpr
        assert "qkv_heads=(4, 2)" in str(text)
        return jax.jit(f)(*args)


@pytest.fixture
def kernels_built() -> Any:
    with registry.assume_kernels():
        yield


def test_the_call_is_given_the_parameter(kernels_built: None) -> None:
    text = cuda_text(attend, inputs())
    line = call_of(registry.FORWARD_TARGET, text)
    assert line.count("tensor<4x8x128xbf16>") == 3
    assert "packed_heads = 4 : i64" in line
    assert "-> (tensor<4x8x4x16xbf16>, tensor<4x4x8xf32>)" in line
    assert "packed_kv_heads = 2 : i64" in line
    assert text.count("stablehlo.custom_call") == 1
    for operation in ("slice", "transpose", "concatenate", "broadcast_in_dim"):
        assert f"stablehlo.{operation}" not in text, operation
    assert "@jax_flash_mha_fwd(%arg0, %arg0, %arg0)" in line


def test_gradients_are_joined_once(kernels_built: None) -> None:
    text = cuda_text(jax.grad(loss(attend)), inputs())
    line = call_of(registry.BACKWARD_TARGET, text)
    operands, results = (
        re.findall(r"tensor<(.*?)>", part)
        for part in line[line.rindex(" : (") :].split(" -> ")
    )
    assert operands[:3] == ["4x8x128xbf16"] * 3
    assert results[:3] == ["4x8x4x16xbf16"] + ["4x8x2x16xbf16"] * 2
    # 128 rows of each of 16 heads: 64 wide, two numbers, and eight counts in all; four
    # numbers of a counter; gradients of 64 keys, 64 wide, for each query head.
    assert results[3] == f"{16 * (128 * (64 + 2) + 8) + 4 + 16 * 64 * (64 + 64)}xf32"
    assert text.count("stablehlo.concatenate") == 1
    assert "stablehlo.slice" not in text
    assert "packed_kv_heads = 2 : i64" in line


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_compiled_without_a_copy(axis: int | None) -> None:
    """Also with an axis of `vmap` that is not leading."""
    qkv = inputs() if axis is None else jnp.moveaxis(inputs(3), 0, axis)
    f = attend if axis is None else jax.vmap(attend, axis)
    with fake_kernel.on_cpu():
        text = jax.jit(f).lower(qkv).compile().as_text()
    assert f'"{registry.FORWARD_TARGET}"' in str(text)
    assert moved_data(text) == []
    assert " slice(" not in str(text)


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "xla"},
        {"precision": "highest"},
    ],
    ids=str,
)
def test_what_kernels_do_not_take_is_split(
    kernels_built: None, options: dict[str, Any]
) -> None:
    assert kernel_calls(lambda x: attend(x, **options), inputs()) == 0


def test_arguments_are_those_of_mha() -> None:
    qkv = inputs()
    with pytest.raises(TypeError, match="that mha has not: 'max_seqlen_q'"):
        attend(qkv, max_seqlen_q=3)
    with pytest.raises(ValueError, match=r"sinks must broadcast .*\(3,\)"):
        attend(qkv, sinks=jnp.zeros(3))
    with pytest.raises(ValueError, match="qkv must be floating, got dtype int32"):
        attend(qkv.astype(jnp.int32))
    reason = "precision='highest'"
    with registry.assume_kernels(), pytest.raises(NotImplementedError, match=reason):
        attend(qkv, precision="highest", implementation="cuda")


def test_values_and_gradients() -> None:
    """Also of sinks, in one backward, in either order of the arguments."""
    lengths = {
        "query_seq_lengths": QUERY_LENGTHS,
        "key_value_seq_lengths": KEY_LENGTHS,
    }

    def results(f: Callable) -> Callable:
        def of(sinks: jax.Array, qkv: jax.Array) -> Any:
            options = {"sinks": sinks, "window_size": (3, 1), "scale": 0.3, **lengths}
            return f(qkv, **options)

        return lambda *x: (of(*x), jax.grad(loss(of), (0, 1))(*x))

    args = normal(HEADS), inputs()
    got, expected = in_place(results(attend), *args), jax.jit(results(unpacked))(*args)
    assert_close(got[0], expected[0], STEP)
    assert_close(got[1], expected[1], 2e-2)


@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 1, 2, -1, -1], [2, 0, 2, 1, 0, -1, 1, 2]])
def test_with_intervals(ids: list[int]) -> None:
    """One call reads the whole array, and a mask by ids."""
    segments = jnp.broadcast_to(jnp.array(ids, jnp.int32), (BATCH, ROWS))
    options = {"q_segment_ids": segments, "kv_segment_ids": segments, "softcap": 2.0}

    def results(f: Callable) -> Callable:
        def of(x: jax.Array) -> Any:
            return f(x, is_causal=True, **options)

        return lambda x: (of(x), jax.grad(loss(of))(x))

    qkv = inputs()
    got, expected = in_place(results(attend), qkv), jax.jit(results(unpacked))(qkv)
    assert_close(got[0], expected[0], STEP)
    assert_close(got[1], expected[1], 2e-2)
    with registry.assume_kernels():
        text = cuda_text(lambda x: attend(x, is_causal=True, **options), qkv)
    line = call_of(registry.FORWARD_TARGET, text)
    assert "packed_heads = 4 : i64" in line
    assert "has_intervals = true" in line


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_any_number_of_batch_dimensions(lead: tuple[int, ...]) -> None:
    qkv = inputs()[0, :, :] if not lead else inputs(*lead[1:])[: lead[0]]
    assert_close(in_place(attend, qkv), unpacked(qkv), STEP)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(kernels_built: None, shape: tuple[int, int]) -> None:
    qkv = jnp.zeros((*shape, PARTS * WIDTH), jnp.bfloat16)
    out, gradient = jax.value_and_grad(loss(attend))(qkv)
    assert out == 0
    assert gradient.shape == qkv.shape


@pytest.mark.parametrize("axis", [1, 3])
def test_vmap(axis: int) -> None:
    """Of the array, with gradients inside and outside."""
    qkv = jnp.moveaxis(inputs(3), 0, axis)

    def results(f: Callable) -> Callable:
        mapped = jax.vmap(f, axis)
        inside = jax.vmap(jax.grad(loss(f)), axis)
        outside = jax.grad(lambda x: jax.vmap(loss(f), axis)(x).sum())
        return lambda x: (mapped(x), inside(x), outside(x))

    got, expected = in_place(results(attend), qkv), jax.jit(results(unpacked))(qkv)
    assert_close(got[0], expected[0], STEP)
    assert_close(got[1:], expected[1:], 2e-2)


def test_an_array_shared_by_all_examples() -> None:
    """Its gradient is summed over them in float32."""
    qkv, lengths = inputs(), np.array([[1, 5, 8, 3], [8, 8, 0, 2]], np.int32)

    def total(f: Callable) -> Callable:
        def of(qkv: jax.Array) -> jax.Array:
            def one(qkv: jax.Array, lengths: jax.Array) -> jax.Array:
                return loss(f)(qkv, key_value_seq_lengths=lengths)

            return jax.vmap(one, (None, 0))(qkv, jnp.asarray(lengths)).sum()

        return jax.grad(of)

    assert_close(in_place(total(attend), qkv), total(unpacked)(qkv), 2e-2)
    with registry.assume_kernels():
        line = call_of(registry.BACKWARD_TARGET, cuda_text(total(attend), qkv))
    assert "tensor<2x4x8x4x16xf32>, tensor<2x4x8x2x16xf32>" in line


def test_forward_mode_and_second_order() -> None:
    """They run in jnp, on the parts."""
    qkv, direction = inputs(), inputs()

    def results(f: Callable) -> Callable:
        return lambda *x: jax.jvp(jax.grad(loss(f)), x[:1], x[1:])

    got = in_place(results(attend), qkv, direction)
    assert_close(got, jax.jit(results(unpacked))(qkv, direction), 4e-2)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def test_shard_map() -> None:
    qkv, mesh = inputs(), mesh_of(4, 2)

    def results(f: Callable) -> Callable:
        values = jax.shard_map(
            f, mesh=mesh, in_specs=P("x"), out_specs=(P("x"), P("x")), check_vma=True
        )
        gradients = jax.shard_map(
            jax.grad(loss(f)), mesh=mesh, in_specs=P("x"), out_specs=P("x")
        )
        return lambda x: (values(x), gradients(x))

    got, expected = in_place(results(attend), qkv), results(unpacked)(qkv)
    assert_close(got[0], expected[0], STEP)
    assert_close(got[1], expected[1], 2e-2)


def test_sharded_batch_is_read_in_place() -> None:
    """Each device calls the kernel on its part of the array; nothing is sent."""
    qkv = jax.device_put(inputs(), NamedSharding(mesh_of(4, 2), P("x")))
    with fake_kernel.on_cpu():
        text = str(jax.jit(jax.grad(loss(attend))).lower(qkv).compile().as_text())
    for target in (registry.FORWARD_TARGET, registry.BACKWARD_TARGET):
        (line,) = (x for x in text.splitlines() if f'"{target}"' in x)
        assert line.count("bf16[1,8,128]") >= 3
    for operation in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert not re.search(rf" {operation}(-start)?\(", text), operation


@pytest.mark.parametrize(
    ("where", "kv_heads"),
    [(P("x", None, "y"), 1), (P("x", None, "y"), 2), (P(), 2)],
    ids=str,
)
def test_sharded_heads(where: P, kv_heads: int) -> None:
    """Split heads of the output, or a split width of the array: right, on the parts."""
    mesh = mesh_of(2, 4)
    width = (HEADS + 2 * kv_heads) * WIDTH
    qkv = inputs()[..., :width]
    spec = P("x") if where else P("x", None, "y")
    placed = jax.device_put(qkv, NamedSharding(mesh, spec))
    weights = normal(BATCH, ROWS, HEADS, WIDTH)

    def results(constrain: Callable) -> Callable:
        def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = mha_qkvpacked(x, HEADS, kv_heads, is_causal=True)
            out = constrain(out)
            return jnp.sum(weights * out.astype(jnp.float32)), out

        return jax.grad(total, has_aux=True)

    def constrain(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, where))

    with fake_kernel.emulated():
        compiled = jax.jit(results(constrain if where else lambda x: x)).lower(placed)
        got = compiled.compile()(placed)
    assert_close(got, results(lambda x: x)(qkv), 2e-2)


def test_registered_backends_get_the_parts() -> None:
    seen = []

    def run(call: Any, operands: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        seen.append({name: x.shape for name, x in operands.items()})
        return operands["query"], None

    backend = jax_flash.backends.Backend("mine", (), lambda call: None, run)
    jax_flash.backends.register(backend, before="xla")
    try:
        qkv = inputs()
        out = mha_qkvpacked(qkv, HEADS, KV_HEADS, implementation="mine")
    finally:
        jax_flash.backends.unregister("mine")
    assert_close(out, qkv[..., : HEADS * WIDTH].reshape(out.shape))
    kv = (BATCH, ROWS, KV_HEADS, WIDTH)
    assert seen == [{"query": out.shape, "key": kv, "value": kv}]
