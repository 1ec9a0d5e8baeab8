"""Abstract evaluation: shapes, dtypes, varying axes and shardings of results.

Results are derived from the query's type by `update`, so that the manual axes of
`shard_map` are kept; the sharding is rebuilt for each result, because its dimensions
are not the query's.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import PartitionSpec

from jax_flash._src import packed
from jax_flash._src.config import RESIDUALS, TRAILING, AttentionConfig, Backward
from jax_flash._src.scores import accumulator


def like(x: Any, shape: tuple, dtype: Any, spec: Iterable[Any]) -> Any:
    """A type on the mesh of the type x, varying over the same manual axes.

    Args:
      x: a type.
      shape: of the result.
      dtype: of the result.
      spec: of each dimension the mesh axes that split it, as in a PartitionSpec.
    """
    sharding = x.sharding.update(spec=PartitionSpec(*spec))
    return x.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def mesh_axes(entries: Iterable[Any]) -> set[str]:
    """Mesh axes in entries of a PartitionSpec."""
    axes: set[str] = set()
    for entry in entries:
        axes.update(entry if isinstance(entry, tuple) else (entry,))
    return axes - {None}


def _full_batch(named: list[tuple[str, Any]]) -> tuple[tuple, tuple]:
    """The full batch dimensions, and for each the first sharding an operand has.

    An axis that splits another dimension of the batch, or heads or rows of the first
    operand, is none of them.
    """
    shape = jnp.broadcast_shapes(*(x.shape[: x.ndim - TRAILING[n]] for n, x in named))
    spec: list[Any] = [None] * len(shape)
    used = mesh_axes(named[0][1].sharding.spec[len(shape) :])
    for _, x in named:
        for i, size in enumerate(shape):
            axes = mesh_axes([x.sharding.spec[i]])
            if x.shape[i] == size and spec[i] is None and not axes & used:
                spec[i] = x.sharding.spec[i]
                used |= axes
    return shape, tuple(spec)


def forward(*avals: ShapedArray, config: AttentionConfig, **_: Any) -> list[Any]:
    """Types of `[out, lse]`."""
    named = list(zip(config.present, avals, strict=True))
    batch, spec = _full_batch(named)
    query = avals[0]
    if config.qkv_heads is None:
        rows, heads, _ = query.shape[-3:]
        rows_spec, heads_spec, _ = query.sharding.spec[-3:]
        width = avals[2].shape[-1]
    else:
        rows, heads, width = packed.shapes(config.qkv_heads, query.shape)[0][-3:]
        rows_spec, heads_spec = query.sharding.spec[-2], None
    out_shape = (*batch, rows, heads, width)
    lse_dtype = accumulator(query.dtype)
    return [
        like(query, out_shape, query.dtype, (*spec, rows_spec, heads_spec, None)),
        like(query, (*batch, heads, rows), lse_dtype, (*spec, heads_spec, rows_spec)),
    ]


def tangent(
    *avals: ShapedArray, config: AttentionConfig, perturbed: tuple[str, ...]
) -> list[Any]:
    """Types of `[dout, dlse]`; the tangents may have more batch than the residuals."""
    names = config.present + RESIDUALS + perturbed
    batch, spec = _full_batch(list(zip(names, avals, strict=True)))
    count = len(config.present)
    return [
        like(
            avals[0],
            batch + x.shape[-TRAILING[n] :],
            x.dtype,
            spec + tuple(x.sharding.spec[-TRAILING[n] :]),
        )
        for n, x in zip(RESIDUALS, avals[count : count + 2], strict=True)
    ]


def backward(
    *avals: ShapedArray, config: AttentionConfig, backward: Backward, **_: Any
) -> list[Any]:
    """Types of the gradients of `backward.perturbed`."""
    names = backward_operands(config, backward)
    batch, spec = _full_batch(list(zip(names, avals, strict=True)))
    operands = dict(zip(names, avals, strict=True))
    results = []
    for name, shared in zip(backward.perturbed, backward.shared, strict=True):
        x, shape, own = operands[name], list(batch), list(spec)
        for axis in shared:
            shape[axis], own[axis] = 1, None
        start = x.ndim - TRAILING[name]
        # A gradient is sharded as its operand is, where that has the dimension.
        trailing = tuple(x.sharding.spec[start:])
        for i, size in enumerate(shape):
            if x.shape[i] == size:
                own[i] = x.sharding.spec[i]
            elif mesh_axes([own[i]]) & mesh_axes(trailing):
                own[i] = None
        full_spec = (*own, *trailing)
        results.append(like(avals[0], (*shape, *x.shape[start:]), x.dtype, full_spec))
    return results


def backward_operands(config: AttentionConfig, backward: Backward) -> tuple[str, ...]:
    """Names of what the backward primitive takes."""
    cotangents = ("dout", "dlse") if backward.has_dlse else ("dout",)
    return config.present + RESIDUALS + cotangents
