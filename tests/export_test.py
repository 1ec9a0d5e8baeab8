"""Export, serialise, load and run; donation; abstract evaluation."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, dense, flash, loss, normal, qkv
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import mha
from jax_flash._src import registry

KERNEL_CHECKS = [
    export.DisabledSafetyCheck.custom_call(target)
    for target in (registry.FORWARD_TARGET, registry.BACKWARD_TARGET)
]


def train_step(f):
    def step(weights, x):
        def objective(w):
            h = x @ w
            return jnp.sum(jnp.square(f(h, h[:, :, :2], h[:, :, 2:])[0]))

        value, grad = jax.value_and_grad(objective)(weights)
        return weights - 1e-3 * grad, value

    return step


def test_train_step_round_trip() -> None:
    weights, query = normal(16, 16), qkv()[0]
    exported = export.export(jax.jit(train_step(flash)))(weights, query)
    loaded = export.deserialize(exported.serialize())
    assert_close(loaded.call(weights, query), train_step(dense)(weights, query))


def test_for_cpu_and_cuda(kernels: None) -> None:
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    exported = export.export(
        jax.jit(flash), platforms=("cpu", "cuda"), disabled_checks=KERNEL_CHECKS
    )(*args)
    assert registry.FORWARD_TARGET in exported.mlir_module()
    loaded = export.deserialize(exported.serialize())
    assert_close(loaded.call(*args), flash(*args))


def test_gradient_of_an_exported_function() -> None:
    exported = export.export(jax.jit(flash))(*qkv())
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    got = jax.grad(loss(loaded.call), (0, 1, 2))(*qkv())
    assert_close(got, jax.grad(loss(dense), (0, 1, 2))(*qkv()))


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_symbolic_batch(kernels: None, platforms: tuple[str, ...]) -> None:
    (batch,) = export.symbolic_shape("b")
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in args]
    exported = export.export(
        jax.jit(lambda *a: flash(*a, is_causal=True)),
        platforms=platforms,
        disabled_checks=KERNEL_CHECKS,
    )(*shapes)
    loaded = export.deserialize(exported.serialize())
    for count in (1, 4):
        some = [x[:count] for x in args]
        assert_close(loaded.call(*some), flash(*some, is_causal=True), 1e-2)


def test_symbolic_gradient() -> None:
    (batch,) = export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in qkv()]
    exported = export.export(jax.jit(jax.grad(loss(flash), (0, 1, 2))))(*shapes)
    loaded = export.deserialize(exported.serialize())
    assert_close(loaded.call(*qkv()), jax.grad(loss(dense), (0, 1, 2))(*qkv()))


def test_symbolic_gradient_for_cpu_and_cuda(kernels: None) -> None:
    """The workspace and the sums over examples have symbolic sizes, too."""
    batch, rows = export.symbolic_shape("b, t")
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    shapes = [
        jax.ShapeDtypeStruct((batch, 4, rows, *args[0].shape[2:]), jnp.bfloat16),
        *(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in args[1:]),
    ]

    def total(query, key, value):
        out, _ = jax.vmap(flash, (0, None, None))(query, key, value)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    exported = export.export(
        jax.jit(jax.grad(total, (0, 1, 2))),
        platforms=("cpu", "cuda"),
        disabled_checks=KERNEL_CHECKS,
    )(*shapes)
    assert registry.BACKWARD_TARGET in exported.mlir_module()
    loaded = export.deserialize(exported.serialize())
    some = jnp.stack([args[0], -args[0]])[:, :, :5], *args[1:]
    assert_close(loaded.call(*some), jax.grad(total, (0, 1, 2))(*some), 1e-2)


def test_symbolic_lengths() -> None:
    rows, keys = export.symbolic_shape("t, s")
    query, key, value = qkv()
    shapes = [
        jax.ShapeDtypeStruct((4, rows, *query.shape[2:]), query.dtype),
        jax.ShapeDtypeStruct((4, keys, *key.shape[2:]), key.dtype),
        jax.ShapeDtypeStruct((4, keys, *value.shape[2:]), value.dtype),
    ]
    exported = export.export(jax.jit(lambda *a: flash(*a, is_causal=True)))(*shapes)
    loaded = export.deserialize(exported.serialize())
    args = query[:, :5], key, value
    assert_close(loaded.call(*args), dense(*args, is_causal=True))


def test_symbolic_lengths_of_wide_ids() -> None:
    """Ids that int32 cannot hold, of batches and sequences of any size."""
    batch, rows = export.symbolic_shape("b, t")
    shape = jax.ShapeDtypeStruct((batch, rows, 4, 16), jnp.float32)
    ids_type = jax.ShapeDtypeStruct((batch, rows), jnp.uint32)

    def attend(q, i):
        return mha(q, q, q, q_segment_ids=i, kv_segment_ids=i)

    exported = export.export(jax.jit(attend))(shape, ids_type)
    ids = np.array([[3, 3, 1, 1, 1, 3, 2, 2]] * 4, np.int32)
    wide = jnp.asarray(ids.astype(np.uint32) + np.uint32(2**32 - 4))
    assert_close(exported.call(qkv()[0], wide), attend(qkv()[0], ids))


def test_sharded_by_shard_map() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spec = P("x", None, "y")
    sharding = NamedSharding(mesh, spec)
    mapped = jax.shard_map(
        flash, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec, P("x", "y"))
    )
    jitted = jax.jit(mapped, in_shardings=(sharding,) * 3)
    loaded = export.deserialize(export.export(jitted)(*qkv()).serialize())
    args = [jax.device_put(x, sharding) for x in qkv()]
    assert_close(jax.jit(loaded.call)(*args), dense(*qkv()))


def test_donation() -> None:
    weights, query = normal(16, 16), qkv()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(train_step(flash), donate_argnums=0)(weights, query)
    assert weights.is_deleted()


def test_abstract_evaluation() -> None:
    out, lse = jax.eval_shape(flash, *qkv())
    chex.assert_shape([out, lse], [(4, 8, 4, 8), (4, 4, 8)])
    grads = jax.eval_shape(jax.grad(loss(flash), (0, 1, 2)), *qkv())
    chex.assert_equal_shape(next(zip(grads, qkv(), strict=True)))
    assert [x.shape for x in grads] == [x.shape for x in qkv()]


def test_disable_jit() -> None:
    with jax.disable_jit():
        assert_close(flash(*qkv()), dense(*qkv()))
