"""Outer primitives: what JAX transforms.

`forward_p` and `backward_p` are lowered through the partitioning rule; `tangent_p` is
linear in its last operands and lowered to jnp everywhere. Their batching rules are in
`batching`, their derivatives in `derivatives`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jax_flash._src import avals, compat, partitioning, reference_grad
from jax_flash._src.config import AttentionConfig, Backward
from jax_flash._src.inner import new_primitive


@functools.cache
def device_hint() -> Any:
    """A tiny jaxpr that holds a custom_partitioning call.

    JAX gives the lowering its list of devices only if some equation needs them, and
    looks for such equations also in jaxprs among the parameters of others. So the outer
    primitives carry this one as a parameter.
    """
    return jax.make_jaxpr(partitioning.identity)(
        jax.ShapeDtypeStruct((1,), jnp.float32)
    )


def _forward(*operands: jax.Array, config: AttentionConfig, needs_devices: Any) -> Any:
    return partitioning.partitioned(partitioning.Stage(config, None), *operands)


def _backward(
    *operands: jax.Array,
    config: AttentionConfig,
    backward: Backward,
    needs_devices: Any,
) -> Any:
    return partitioning.partitioned(partitioning.Stage(config, backward), *operands)


def tangent_in_jnp(
    *args: jax.Array, config: AttentionConfig, perturbed: tuple[str, ...]
) -> list[jax.Array]:
    """The jnp tangent, which JAX may differentiate; see `reference_grad.tangent`."""
    static = {"config": config, "perturbed": perturbed}
    results = avals.tangent(*map(jax.typeof, args), **static)
    fun = functools.partial(reference_grad.tangent, **static)
    return compat.on_auto_axes(fun, results)(*args)


def backward_in_jnp(
    *args: jax.Array, config: AttentionConfig, backward: Backward
) -> list[jax.Array]:
    """The jnp backward, which JAX may differentiate; see `reference_grad.backward`."""
    static = {"config": config, "backward": backward}
    results = avals.backward(*map(jax.typeof, args), **static)
    fun = functools.partial(reference_grad.backward, **static)
    return compat.on_auto_axes(fun, results)(*args)


forward_p = new_primitive(
    "flash_mha_fwd", avals.forward, mlir.lower_fun(_forward, multiple_results=True)
)
backward_p = new_primitive(
    "flash_mha_bwd", avals.backward, mlir.lower_fun(_backward, multiple_results=True)
)
tangent_p = new_primitive(
    "flash_mha_tangent",
    avals.tangent,
    mlir.lower_fun(tangent_in_jnp, multiple_results=True),
)


def forward(config: AttentionConfig, *operands: jax.Array) -> list[jax.Array]:
    """Binds the forward: `[out, lse]`."""
    return forward_p.bind(*operands, config=config, needs_devices=device_hint())


def backward(
    config: AttentionConfig, which: Backward, *operands: jax.Array
) -> list[jax.Array]:
    """Binds the backward: a gradient for each of `which.perturbed`."""
    return backward_p.bind(
        *operands, config=config, backward=which, needs_devices=device_hint()
    )


def tangent(
    config: AttentionConfig, perturbed: tuple[str, ...], *operands: jax.Array
) -> list[jax.Array]:
    """Binds the tangent: `[dout, dlse]`."""
    return tangent_p.bind(*operands, config=config, perturbed=perturbed)
