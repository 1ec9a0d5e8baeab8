"""Ring attention: queries stay, keys and values go round the devices of a mesh axis.

Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite
Context", 2023, arXiv:2310.01889. A device computes its queries on the keys that are
there with the attention primitive, and merges the parts by their lse. The gradient goes
round once more: the backward primitive needs the lse and the output of the whole row
alone, and the sums for keys and values travel with them, in float32. So no device ever
holds more than a few shards, in the gradient neither.

Lives here: which part of a block is seen, and the two walks. All devices run the same
program. What some of them see and others do not (keys from before their queries, or
from behind) the others run, too, with a key length of 0, which costs a kernel next to
nothing: a branch would have the host wait for the device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_flash._src import avals, compat, dropout, merge, primitives
from jax_flash._src.config import OPERANDS, UNBOUNDED, AttentionConfig, Backward
from jax_flash._src.derivatives import RESIDUAL_NAMES
from jax_flash._src.scores import accumulator

Arrays = dict[str, jax.Array]

KEY_LENGTHS = "key_value_seq_lengths"
TRAVELLING = {"key": -3, "value": -3, "kv_segment_ids": -1}
"""What goes round, and its dimension of keys."""
TENSORS = OPERANDS[:3]

ROW_AXES = {
    "query": -3,
    "out": -3,
    "dout": -3,
    "lse": -1,
    "dlse": -1,
    "q_segment_ids": -1,
    "mask": -2,
}
RESULT_AXES = -3, -1
"""Rows of out and lse."""
KEY_AXES = TRAVELLING | {"mask": -1}


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is seen of a block: some of its rows, some of its keys, and a window.

    Attributes:
      rows: first and end of the rows of a shard.
      keys: first and end of the keys of a shard.
      window: of row and key 0 of the piece on, aligned top-left; None = unbounded.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    window: tuple[int | None, int | None] = (None, None)


def piece_of(
    shift: int, window: tuple[int | None, int | None], rows: int, keys: int
) -> Piece | None:
    """What row p sees of keys k with p + shift - left <= k <= p + shift + right.

    Args:
      shift: the position of row 0 less that of key 0.
      window: (left, right), None = unbounded.
      rows: number of rows.
      keys: number of keys.

    Returns:
      The piece; None where nothing is seen.
    """
    left, right = window
    first_row = 0 if right is None else max(0, -shift - right)
    end_row = rows if left is None else min(rows, keys - shift + left)
    if first_row >= end_row:
        return None
    shift += first_row
    first_key = 0 if left is None else max(0, shift - left)
    last_row = shift + end_row - first_row - 1
    end_key = keys if right is None else min(keys, last_row + right + 1)
    shift -= first_key
    if left is not None:
        left = left - shift if end_row - first_row + shift > left + 1 else None
    if right is not None:
        right = shift + right if shift + right < end_key - first_key - 1 else None
    return Piece((first_row, end_row), (first_key, end_key), (left, right))


@dataclasses.dataclass(frozen=True)
class Step:
    """What devices do with the keys that have come so far.

    Attributes:
      distance: how far they have come.
      before: what is seen of them by devices of at least that index, whose keys come
        from before their queries.
      behind: what by the others, whose keys come from behind.
    """

    distance: int
    before: Piece | None
    behind: Piece | None

    @property
    def parts(self) -> list[tuple[Piece, str | None]]:
        """What is computed, and who sees it, "before" or "behind"; None = all."""
        if self.before == self.behind:
            return [] if self.before is None else [(self.before, None)]
        both = (self.before, "before"), (self.behind, "behind")
        return [(piece, who) for piece, who in both if piece is not None]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Everything static about a walk.

    Attributes:
      axis: the mesh axis, or several.
      size: its number of devices.
      config: of a call on one block, but for the window.
      steps: in the order in which keys come.
      wants_lse: whether lse is a result, and may have a cotangent.
    """

    axis: str | tuple[str, ...]
    size: int
    config: AttentionConfig
    steps: tuple[Step, ...]
    wants_lse: bool


def contiguous_steps(
    size: int, window: tuple[int | None, int | None], rows: int, keys: int
) -> tuple[Step, ...]:
    """The steps where device i has rows i * rows on; none where nobody sees anything.

    With a window rows and keys are as many, and aligned.
    """
    steps = []
    for step in range(size):
        before = piece_of(step * rows, window, rows, keys)
        behind = piece_of((step - size) * rows, window, rows, keys) if step else before
        if before or behind:
            steps.append(Step(step, before, behind))
    return tuple(steps)


def zigzag_steps(size: int, rows: int) -> tuple[Step, ...]:
    """The steps of a causal mask where device i has chunks i and 2 * size - 1 - i.

    Every device has the same work at every step: all of its rows see the first chunk of
    keys from before, and its second chunk of rows all keys from behind.
    """
    whole, half = (0, rows), rows // 2
    own = Piece(whole, whole, (None, 0))
    before = Piece(whole, (0, half))
    behind = Piece((half, rows), whole)
    later = (Step(distance, before, behind) for distance in range(1, size))
    return (Step(0, own, own), *later)


def lengths_as_ids(
    operands: Arrays, axis: str | tuple[str, ...], size: int, zigzag: bool
) -> Arrays:
    """Canonical operands with segment ids in place of lengths: padding has none."""
    o = dict(operands)
    here = lax.axis_index(axis)
    for length_name, ids_name, like in (
        ("query_seq_lengths", "q_segment_ids", "query"),
        ("key_value_seq_lengths", "kv_segment_ids", "key"),
    ):
        count = o[like].shape[-3]
        position = jnp.arange(count, dtype=jnp.int32)
        if zigzag:
            half = count // 2
            first = jnp.where(position < half, here, 2 * size - 2 - here)
            position = position + first * half
        else:
            position = position + here * count
        ids = o.get(ids_name, jnp.zeros((1,) * (o[like].ndim - 2), jnp.int32))
        if length_name in o:
            valid = position < o.pop(length_name)[..., None]
            ids = jnp.where(valid, ids, jnp.int32(-1))
        full = jnp.broadcast_shapes(ids.shape, (count,))
        o[ids_name] = jnp.broadcast_to(ids, full)
    return {name: o[name] for name in OPERANDS if name in o}


def _cut(x: jax.Array, axis: int, part: tuple[int, int]) -> jax.Array:
    """A part of one dimension, unless that is shared (of size 1)."""
    if x.shape[axis] == 1 or part == (0, x.shape[axis]):
        return x
    return lax.slice_in_dim(x, *part, axis=x.ndim + axis)


def _grown(x: jax.Array, axis: int, part: tuple[int, int], size: int) -> jax.Array:
    """The inverse of `_cut`: zeros around it."""
    before, behind = part[0], size - part[1]
    if not (before or behind):
        return x
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (before, behind, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _rotate(ring: Ring, x: Any, distance: int) -> Any:
    """Sends arrays to the device `distance` further on."""
    distance %= ring.size
    if distance == 0:
        return x
    pairs = [(i, (i + distance) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, ring.axis, pairs), x)


def _block(
    ring: Ring, step: Step, part: tuple[Piece, str | None], operands: Arrays
) -> tuple[AttentionConfig, Arrays]:
    """The call of a part, and its part of the operands and of what else there is."""
    piece, who = part
    cut = dict(operands)
    for axes, span in ((ROW_AXES, piece.rows), (KEY_AXES, piece.keys)):
        cut |= {n: _cut(cut[n], axis, span) for n, axis in axes.items() if n in cut}
    if who is not None:
        is_before = lax.axis_index(ring.axis) >= step.distance
        sees = is_before if who == "before" else ~is_before
        keys = jnp.where(sees, jnp.int32(piece.keys[1] - piece.keys[0]), jnp.int32(0))
        keys = compat.vary_like(keys, operands["query"])
        cut[KEY_LENGTHS] = keys.reshape((1,) * (operands["query"].ndim - 3))
    left, right = piece.window
    config = dataclasses.replace(
        ring.config,
        window_left=UNBOUNDED if left is None else left,
        window_right=UNBOUNDED if right is None else right,
        bottom_right=False,
        present=tuple(name for name in OPERANDS if name in cut),
    )
    return config, cut


def _at_step(ring: Ring, operands: Arrays, travelling: Arrays, step: int) -> Arrays:
    """The operands of the block that is here after `step` steps.

    Of a mask the columns of its keys; of dropout seeds of its own.
    """
    given = operands | travelling
    if "mask" not in given and "dropout_seeds" not in given:
        return given
    here = lax.axis_index(ring.axis)
    origin = (here - step) % ring.size
    keys = travelling["key"].shape[-3]
    if "mask" in given and given["mask"].shape[-1] != 1:
        first = origin * keys
        mask = given["mask"]
        given["mask"] = lax.dynamic_slice_in_dim(mask, first, keys, mask.ndim - 1)
    if "dropout_seeds" in given:
        seeds = given["dropout_seeds"]
        zero = jnp.uint32(0)
        counter = here.astype(jnp.uint32), origin.astype(jnp.uint32), zero, zero
        words = dropout.philox(counter, (seeds[..., 0], seeds[..., 1]))
        given["dropout_seeds"] = jnp.stack(words[:2], -1)
    return given


def _forward(
    ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, others: Arrays
) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of this device's rows."""
    dtype = accumulator(query.dtype)
    batch, (rows, heads) = query.shape[:-3], query.shape[-3:-1]
    out = jnp.zeros((*batch, rows, heads, value.shape[-1]), dtype)
    lse = jnp.full((*batch, heads, rows), -jnp.inf, dtype)
    out, lse = (compat.vary_like(x, query) for x in (out, lse))
    operands = {"query": query, "key": key, "value": value, **others}
    travelling = {n: operands[n] for n in TRAVELLING if n in operands}
    at = 0
    for step in ring.steps:
        travelling = _rotate(ring, travelling, step.distance - at)
        at = step.distance
        given = _at_step(ring, operands, travelling, at)
        for part in step.parts:
            config, block = _block(ring, step, part, given)
            own = primitives.forward(config, *(block[n] for n in config.present))
            rows = part[0].rows
            earlier = [
                _cut(x, axis, rows)
                for x, axis in zip((out, lse), RESULT_AXES, strict=True)
            ]
            both = merge.merge_partials(
                [earlier[0], own[0].astype(dtype)], [earlier[1], own[1]]
            )
            out, lse = (
                lax.dynamic_update_slice_in_dim(x, new, rows[0], x.ndim + axis)
                for x, new, axis in zip((out, lse), both, RESULT_AXES, strict=True)
            )
    return out.astype(query.dtype), lse


def _backward(ring: Ring, residuals: Any, cotangents: Any) -> Any:
    """Gradients of query, key and value."""
    query, key, value, others, out, lse = residuals
    dout, dlse = cotangents
    dtype = accumulator(query.dtype)
    operands = {"query": query, "key": key, "value": value, **others}
    operands |= {"out": out, "lse": lse, "dout": dout}
    if ring.wants_lse:
        operands["dlse"] = dlse
    which = Backward(TENSORS, ((),) * 3, ring.wants_lse)
    travelling = {n: operands[n] for n in TRAVELLING if n in operands}
    dquery, *sums = (
        compat.vary_like(jnp.zeros(x.shape, dtype), query) for x in (query, key, value)
    )
    at = 0
    for step in ring.steps:
        travelling = _rotate(ring, travelling, step.distance - at)
        sums, at = _rotate(ring, sums, step.distance - at), step.distance
        given = _at_step(ring, operands, travelling, at)
        for part in step.parts:
            config, block = _block(ring, step, part, given)
            names = avals.backward_operands(config, which)
            terms = primitives.backward(config, which, *(block[n] for n in names))
            spans = part[0].rows, part[0].keys, part[0].keys
            dquery, *sums = (
                x + _grown(term.astype(dtype), -3, span, x.shape[-3])
                for x, term, span in zip((dquery, *sums), terms, spans, strict=True)
            )
    sums = _rotate(ring, sums, -at)
    return tuple(x.astype(query.dtype) for x in (dquery, *sums))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def walk(
    ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, others: Arrays
) -> tuple[jax.Array, jax.Array]:
    """Attention of this device's rows on the keys of all devices.

    Args:
      ring: the walk.
      query: [*B, T, N, H], this device's.
      key: [*B, S, K, H], this device's.
      value: [*B, S, K, Hv], this device's.
      others: canonical operands by name, of this device's rows; a mask has the columns
        of all devices. Without gradients.

    Returns:
      `(out, lse)`: [*B, T, N, Hv] in the dtype of query and [*B, N, T].
    """
    return _forward(ring, query, key, value, others)


def _walk_forward(
    ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, others: Arrays
) -> tuple[Any, Any]:
    results = _forward(ring, query, key, value, others)
    out, lse = (
        checkpoint_name(x, n) for x, n in zip(results, RESIDUAL_NAMES, strict=True)
    )
    return (out, lse), (query, key, value, others, out, lse)


def _walk_backward(ring: Ring, residuals: Any, cotangents: Any) -> Any:
    return *_backward(ring, residuals, cotangents), None


walk.defvjp(_walk_forward, _walk_backward)
