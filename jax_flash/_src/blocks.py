"""How the jnp path cuts a problem into blocks of query rows and keys.

A problem whose scores fit in `MATERIALISE` elements is one block; a larger one is cut
so that no block of scores is larger, and memory stays linear in T and S.
"""

import jax
import jax.numpy as jnp

from jax_flash._src import compat
from jax_flash._src.scores import Operands, batch_shape

MATERIALISE = 1 << 24
"""Elements of scores that are held at once."""

KEY_BLOCK = 512
ROW_BLOCK = 128
SMALLEST_ROW_BLOCK = 16

ROW_AXIS = {
    "query": -3,
    "out": -3,
    "dout": -3,
    "lse": -1,
    "dlse": -1,
    "bias": -2,
    "mask": -2,
    "q_segment_ids": -1,
}
KEY_AXIS = {"key": -3, "value": -3, "bias": -1, "mask": -1, "kv_segment_ids": -1}


def small(o: Operands) -> bool:
    """Whether all scores of the problem may be held at once."""
    *batch, rows, heads, _ = batch_shape(o) + o["query"].shape[-3:]
    size = rows * heads * o["key"].shape[-3]
    for dim in batch:
        size = size * dim
    return compat.at_most(size, MATERIALISE)


def row_block(o: Operands, keys: int) -> int:
    """Rows of one block of scores against `keys` keys, at most T."""
    *batch, rows, heads, _ = batch_shape(o) + o["query"].shape[-3:]
    per_row = heads * keys
    for dim in batch:
        per_row = per_row * dim
    block = ROW_BLOCK if not isinstance(per_row, int) else MATERIALISE // per_row
    block = max(SMALLEST_ROW_BLOCK, block // SMALLEST_ROW_BLOCK * SMALLEST_ROW_BLOCK)
    return min(block, rows) if isinstance(rows, int) else rows


def pad(o: Operands, axes: dict[str, int], size: int, block: int) -> Operands:
    """Operands with the dimension of length `size` padded to a multiple of `block`."""
    if size == block or not size % block:
        return o
    extra = -size % block
    result = dict(o)
    for name, axis in axes.items():
        if name in o and o[name].shape[axis] == size:
            x = o[name]
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, extra)
            result[name] = jnp.pad(x, widths)
    return result


def split(o: Operands, axes: dict[str, int], size: int, block: int) -> Operands:
    """The operands along `axes`, each as [size // block, ..., block, ...]."""
    result = {}
    for name, axis in axes.items():
        if name in o and o[name].shape[axis] == size:
            x = o[name]
            axis = axis % x.ndim
            shape = (*x.shape[:axis], size // block, block, *x.shape[axis + 1 :])
            result[name] = jnp.moveaxis(x.reshape(shape), axis, 0)
    return result


def join(x: jax.Array, axis: int) -> jax.Array:
    """[blocks, ..., block, ...] -> [..., blocks * block, ...], the inverse of `split`.

    `axis` is negative: the position of the block dimension, counted from the end.
    """
    axis = axis % (x.ndim - 1)
    x = jnp.moveaxis(x, 0, axis)
    size = x.shape[axis] * x.shape[axis + 1]
    return x.reshape((*x.shape[:axis], size, *x.shape[axis + 2 :]))
