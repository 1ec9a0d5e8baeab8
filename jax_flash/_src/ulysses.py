"""Attention of sharded sequences by exchanging sequence shards for head shards.

Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme
Long Sequence Transformer Models", 2023, arXiv:2309.14509: an all-to-all gives every
device whole sequences of some of the heads, and another one takes the results back.

Lives here: how each operand goes from the one sharding to the other. JAX transposes the
exchanges, so every derivative of the call between them is one of the whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash._src.call import Call

Axis = str | tuple[str, ...]
Arrays = dict[str, jax.Array]

HEAD_AXES = {"sinks": -1, "alibi_slopes": -1, "dropout_seeds": -2}
"""Operands that every device has whole, and their dimension of heads."""

IDS = ("q_segment_ids", "kv_segment_ids")


def repeats(heads: int, kv_heads: int, size: int) -> int:
    """How often a key/value head is sent, to serve query heads of several devices.

    Raises:
      ValueError: the heads do not divide among the devices.
    """
    if heads % size:
        raise ValueError(
            f"query must have heads that divide among the {size} devices of axis_name, "
            f"got N={heads}"
        )
    if kv_heads % size == 0:
        return 1
    if size % kv_heads:
        raise ValueError(
            f"key must have heads that divide among the {size} devices of axis_name, "
            f"or whose number divides theirs, got K={kv_heads}"
        )
    return size // kv_heads


def _to_heads(x: jax.Array, axis: Axis) -> jax.Array:
    """[*B, T / P, N, H] -> [*B, T, N / P, H]."""
    return lax.all_to_all(x, axis, x.ndim - 2, x.ndim - 3, tiled=True)


def _to_rows(x: jax.Array, axis: Axis, rows: int, heads: int) -> jax.Array:
    """The way back, with the dimensions of rows and heads."""
    return lax.all_to_all(x, axis, rows % x.ndim, heads % x.ndim, tiled=True)


def _own_heads(x: jax.Array, head_axis: int, axis: Axis, size: int) -> jax.Array:
    """This device's part of a dimension of heads, unless that is shared."""
    head_axis %= x.ndim
    heads = x.shape[head_axis]
    if heads == 1:
        return x
    first = lax.axis_index(axis) * (heads // size)
    return lax.dynamic_slice_in_dim(x, first, heads // size, head_axis)


def _scores_to_heads(x: jax.Array, rows: int, axis: Axis, size: int) -> jax.Array:
    """A bias or mask [*B, N|1, T / P|1, S|1] of this device's heads and all rows.

    If a device has one row, who can say whether that is shared: those of all devices
    are right for both.
    """
    if x.shape[-2] == 1 != rows:
        return _own_heads(x, -3, axis, size)
    if x.shape[-3] == 1:
        return lax.all_gather(x, axis, axis=x.ndim - 2, tiled=True)
    return lax.all_to_all(x, axis, x.ndim - 3, x.ndim - 2, tiled=True)


def attend(
    call: Call,
    operands: Arrays,
    axis: Axis,
    size: int,
    run: Callable[[Call, Arrays], tuple[jax.Array, jax.Array | None]],
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of this device's rows to all keys.

    Args:
      call: the call, with the query's local and the key's whole length.
      operands: its canonical operands, of this device's rows and keys; a bias and a
        mask have the columns of all keys.
      axis: the mesh axis along which sequences are sharded.
      size: its number of devices.
      run: runs a call on whole sequences: `(out, lse)`.

    Returns:
      `(out, lse)`: [*B, T, N, Hv] and [*B, N, T] of this device's rows; lse is None
      where `run` has none.
    """
    times = repeats(call.num_heads, call.num_kv_heads, size)
    moved = dict(operands)
    for name in ("key", "value"):
        if times > 1:
            moved[name] = jnp.repeat(moved[name], times, axis=-2)
    for name in ("query", "key", "value"):
        moved[name] = _to_heads(moved[name], axis)
    for name in ("bias", "mask"):
        if name in moved:
            rows = call.query.shape[-3]
            moved[name] = _scores_to_heads(moved[name], rows, axis, size)
    for name in IDS:
        if name in moved:
            ids = moved[name]
            moved[name] = lax.all_gather(ids, axis, axis=ids.ndim - 1, tiled=True)
    for name, head_axis in HEAD_AXES.items():
        if name in moved:
            moved[name] = _own_heads(moved[name], head_axis, axis, size)
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in moved.items()
    }
    out, lse = run(dataclasses.replace(call, **shapes), moved)
    out = _to_rows(out, axis, -3, -2)
    return out, None if lse is None else _to_rows(lse, axis, -1, -2)
