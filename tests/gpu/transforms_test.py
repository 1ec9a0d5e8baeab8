"""Transformations of the kernel call on the GPU, against the specification there."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs

from jax_flash import mha

SPEC = specs.Spec(2, 130, 200, 4, 2, 64, is_causal=True)
kernel = functools.partial(mha, is_causal=True, return_lse=True, implementation="cuda")
specification = functools.partial(
    mha, is_causal=True, return_lse=True, implementation="xla"
)


def arrays(*lead: int) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    return [
        jnp.asarray(rng.standard_normal((*lead, *shape), np.float32), jnp.bfloat16)
        for shape in SPEC.shapes
    ]


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-2) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.isfinite(x).all()
        assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max())


def loss(f: Callable) -> Callable:
    def of(*args: Any) -> jax.Array:
        out, lse = f(*args)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))

    return of


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("mapped", ["q", "k", "v", "qk", "kv", "qv", "qkv"])
def test_vmap_of_every_subset_and_axis(mapped: str, axis: int) -> None:
    plain, stacked = arrays(), arrays(3)
    axes = tuple(axis if name in mapped else None for name in "qkv")
    operands = [
        jnp.moveaxis(s, 0, axis) if name in mapped else p
        for name, p, s in zip("qkv", plain, stacked, strict=True)
    ]
    got = jax.jit(jax.vmap(kernel, in_axes=axes))(*operands)
    rows = [
        kernel(
            *(
                s[i] if n in mapped else p
                for n, p, s in zip("qkv", plain, stacked, strict=True)
            )
        )
        for i in range(3)
    ]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_vmap_copies_nothing(axis: int) -> None:
    """The compiled program is the kernel alone, whatever axis is mapped."""
    operands = [jnp.moveaxis(x, 0, axis) for x in arrays(3)]
    compiled = jax.jit(jax.vmap(kernel, in_axes=axis)).lower(*operands).compile()
    text = compiled.as_text() or ""
    assert text.count("custom_call_target=") == 1
    for word in (" copy(", " transpose(", "fusion("):
        assert word not in text, f"{word} in\n{text}"


def test_gradients() -> None:
    operands = arrays()
    gradient = lambda f: jax.jit(jax.grad(loss(f), (0, 1, 2)))  # noqa: E731
    assert_close(gradient(kernel)(*operands), gradient(specification)(*operands))


def test_vmap_of_grad() -> None:
    operands = arrays(3)
    gradient = lambda f: jax.jit(jax.vmap(jax.grad(loss(f), (0, 1, 2))))  # noqa: E731
    assert_close(gradient(kernel)(*operands), gradient(specification)(*operands))


def test_checkpoint_in_scan() -> None:
    query, key, value = arrays()
    policy = jax.checkpoint_policies.save_only_these_names(
        "jax_flash_out", "jax_flash_lse"
    )

    def network(f: Callable) -> Callable:
        def layer(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
            return x + f(x * scale, key, value)[0], None

        checked = jax.checkpoint(layer, policy=policy)
        return lambda x, s: jnp.sum(
            jax.lax.scan(checked, x, s)[0].astype(jnp.float32) ** 2
        )

    scales = jnp.array([1.0, 0.5, 0.25], jnp.bfloat16)
    got = jax.jit(jax.grad(network(kernel)))(query, scales)
    assert_close(got, jax.jit(jax.grad(network(specification)))(query, scales), 5e-2)


def test_jvp() -> None:
    operands = tuple(arrays())
    got = jax.jit(lambda *x: jax.jvp(kernel, x, x))(*operands)
    assert_close(got, jax.jit(lambda *x: jax.jvp(specification, x, x))(*operands))


def test_shard_map_on_one_device() -> None:
    mesh = jax.make_mesh(
        (1,),
        ("x",),
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    spec = jax.sharding.PartitionSpec("x")
    operands = arrays()
    f = jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec, spec))
    chex.assert_trees_all_equal(jax.jit(f)(*operands), kernel(*operands))
