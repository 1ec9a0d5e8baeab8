"""The backward alone: its own program, fed with what a forward kept.

A timed call holds everything that the gradients need once there is a forward:
preparation, kernel, conversion and sums over groups of heads; and no forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import Call

Arrays = tuple[jax.Array, ...]
HEADS = 2


@dataclasses.dataclass(frozen=True)
class Programs:
    """Forward and backward of one problem, compiled apart.

    Attributes:
      forward: query, key, value -> leaves of the pullback.
      backward: leaves of the pullback, cotangent -> dq, dk, dv.
    """

    forward: Any
    backward: Any


def compile_backward(
    attention: Callable[..., jax.Array], shapes: Sequence[jax.ShapeDtypeStruct]
) -> Programs:
    """Compiles `attention` and its pullback.

    Args:
      attention: function of query, key and value.
      shapes: of query, key, value and the cotangent.
    """

    def forward(*operands: jax.Array) -> Any:
        return jax.vjp(attention, *operands)[1]

    traced = jax.jit(forward).trace(*shapes[:3])
    # The leaves travel, not the pullback: its tree holds a jaxpr, compared by identity.
    leaves, tree = jax.tree.flatten(traced.out_info)

    def backward(leaves: list[jax.Array], cotangent: jax.Array) -> Any:
        return jax.tree.unflatten(tree, leaves)(cotangent)

    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    lowered = jax.jit(backward).lower(structs, shapes[3])
    return Programs(traced.lower().compile(), lowered.compile())


def bind_backward(programs: Programs, inputs: Arrays) -> Call:
    """Runs the forward once; the call is the backward.

    Args:
      programs: of `compile_backward`.
      inputs: query, key, value and the cotangent.
    """
    leaves = jax.block_until_ready(jax.tree.leaves(programs.forward(*inputs[:3])))
    heads, kv_heads = inputs[0].shape[2], inputs[1].shape[2]
    pairs = kv_heads_of(heads, kv_heads)

    def compared(result: Arrays) -> Arrays:
        counts = (HEADS, pairs, pairs)
        return tuple(
            gradient[0, :, :count].astype(jnp.float32)
            for gradient, count in zip(result, counts, strict=True)
        )

    return Call(
        run=lambda: programs.backward(leaves, inputs[3]),
        wait=lambda result: jax.block_until_ready(result),
        heads=compared,
    )


def kv_heads_of(heads: int, kv_heads: int) -> int:
    """How many heads of key and value the first `HEADS` query heads read."""
    group = heads // kv_heads
    return -(-HEADS // group)


@jax.jit
def reference(inputs: Arrays, visible: jax.Array) -> Arrays:
    """What a check compares, in float32 and one query head at a time.

    Args:
      inputs: query, key, value and the cotangent.
      visible: the keys each row sees: first and end, int [T, 2].

    Returns:
      The gradient of the first two query heads of the first batch entry, [T, 2, D], and
      those of the heads of key and value which these read, summed over all the query
      heads of each group: [S, 1 or 2, D] and [S, 1 or 2, Dv].
    """
    query, key, value, cotangent = (x[0].astype(jnp.float32) for x in inputs)
    group = query.shape[1] // key.shape[1]
    pairs = kv_heads_of(query.shape[1], key.shape[1])
    column = jnp.arange(key.shape[0])
    seen = (column >= visible[:, :1]) & (column < visible[:, 1:])

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scores = jnp.dot(query, key.T, precision="highest") * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.dot(weights, value, precision="highest")

    def one(head: jax.Array) -> Arrays:
        operands = query[:, head], key[:, head // group], value[:, head // group]
        return jax.vjp(attention, *operands)[1](cotangent[:, head])

    # [heads, rows or keys, width] each.
    dquery, dkey, dvalue = jax.lax.map(one, jnp.arange(pairs * group))

    def summed(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(pairs, group, *x.shape[1:]).sum(1), 0, 1)

    return jnp.moveaxis(dquery[:HEADS], 0, 1), summed(dkey), summed(dvalue)
