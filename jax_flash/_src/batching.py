"""Batching rules: `vmap` adds one leading batch dimension and copies nothing.

An operand that is not mapped gets size 1 there. A mapped axis moves to the front, which
alone would transpose the array; the rule therefore notes in the config where the axis
physically is, and the kernel reads it from there.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching

from jax_flash._src import primitives
from jax_flash._src.config import AttentionConfig


def moved_order(order: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """Physical order of an operand after `axis` was moved to (or added at) the front.

    Args:
      order: physical order, major to minor, of the operand without the axis.
      axis: where the mapped axis was, None if the operand got a new one of size 1.

    Returns:
      The physical order of the operand with it; row-major if the width would not be the
      minor dimension, since the kernel reads rows of contiguous elements.
    """
    rank = len(order) + 1
    if axis is None or axis == 0:
        return (0, *(i + 1 for i in order))
    if axis == rank - 1:
        return tuple(range(rank))
    # The unmapped dimensions in physical order, with the mapped one back where it was.
    return (*(i + 1 for i in order[:axis]), 0, *(i + 1 for i in order[axis:]))


def _batched(config: AttentionConfig, axes: tuple[int | None, ...]) -> AttentionConfig:
    orders = tuple(moved_order(o, a) for o, a in zip(config.orders, axes, strict=False))
    return dataclasses.replace(config, orders=orders)


def _register(primitive: Primitive) -> None:
    def rule(args: tuple, axes: tuple, *, config: AttentionConfig, **params: Any):
        args = tuple(
            x[None] if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(args, axes, strict=True)
        )
        outs = primitive.bind(*args, config=_batched(config, axes), **params)
        return outs, [0] * len(outs)

    batching.primitive_batchers[primitive] = rule


for _primitive in (primitives.forward_p, primitives.backward_p, primitives.tangent_p):
    _register(_primitive)
