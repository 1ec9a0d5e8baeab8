"""The mask: one interval of keys for each query row.

Lives here: the interval formula (also in C++, `jax_flash._kernels.key_interval`) and
the elementwise mask built on it. Causal, window and lengths all reduce to it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash._src.config import UNBOUNDED, AttentionConfig


def key_interval(
    row: Any,
    query_length: Any,
    key_length: Any,
    window_left: int,
    window_right: int,
    bottom_right: bool,
) -> tuple[Any, Any]:
    """First key and end (exclusive) of the keys that a query row may attend.

    Args:
      row: int32 query rows, any shape.
      query_length: valid queries, broadcastable with `row`.
      key_length: valid keys, broadcastable with `row`.
      window_left: keys visible before the aligned position, -1 = unbounded.
      window_right: keys visible after it, -1 = unbounded.
      bottom_right: aligns the last valid query with the last valid key.

    Returns:
      `(first, end)`; the interval is empty where `end <= first`, (0, 0) for a row at or
      beyond `query_length`.
    """
    position = row + (key_length - query_length if bottom_right else 0)
    first = jnp.zeros_like(position)
    if window_left != UNBOUNDED:
        first = jnp.maximum(first, position - window_left)
    end = key_length + jnp.zeros_like(position)
    if window_right != UNBOUNDED:
        end = jnp.minimum(end, position + window_right + 1)
    alive = row < query_length
    return jnp.where(alive, first, 0), jnp.where(alive, end, 0)


def lengths(
    operands: dict[str, jax.Array], rows: int, keys: int
) -> tuple[jax.Array, jax.Array]:
    """Valid queries and keys of every batch element, int32 [*B] or []."""
    limits = jnp.asarray(rows, jnp.int32), jnp.asarray(keys, jnp.int32)
    names = "query_seq_lengths", "key_value_seq_lengths"
    query_length, key_length = (
        jnp.clip(operands.get(name, limit), 0, limit)
        for name, limit in zip(names, limits, strict=True)
    )
    return query_length, key_length


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where some query rows stand; int32, broadcastable to [*B, t].

    Attributes:
      position: the key that a row is aligned with, maybe beyond the keys there are.
      first: the first key that a row may attend.
      end: the key after the last; the interval is empty where `end <= first`.
    """

    position: jax.Array
    first: jax.Array
    end: jax.Array


def locate(
    config: AttentionConfig,
    operands: dict[str, jax.Array],
    row: jax.Array,
    rows: int,
    keys: int,
) -> Rows:
    """Position and interval of query rows.

    Args:
      config: the call.
      operands: the canonical operands.
      row: int32 [t], indices of the rows; a row >= `rows` is padding.
      rows: T of the whole problem.
      keys: S of the whole problem.
    """
    query_length, key_length = (x[..., None] for x in lengths(operands, rows, keys))
    first, end = key_interval(
        row,
        query_length,
        key_length,
        config.window_left,
        config.window_right,
        config.bottom_right,
    )
    shift = key_length - query_length if config.bottom_right else 0
    return Rows(row + shift, first, end)


def distance(where: Rows, key: jax.Array) -> jax.Array:
    """How far each key `key` [s] is from the one a row is aligned with: [*B|(), t, s]."""
    return jnp.abs(where.position[..., None] - key)


def allowed(operands: dict[str, jax.Array], where: Rows, key: jax.Array) -> jax.Array:
    """Which keys some rows may attend.

    Args:
      operands: the canonical operands; those along rows or keys hold only the rows and
        keys asked for.
      where: the rows.
      key: int32 [s], indices of the keys.

    Returns:
      bool, broadcastable to [*B, N, t, s].
    """
    ok = (key >= where.first[..., None]) & (key < where.end[..., None])
    if "q_segment_ids" in operands:
        q_ids = operands["q_segment_ids"][..., :, None]
        ok = ok & (q_ids == operands["kv_segment_ids"][..., None, :]) & (q_ids >= 0)
    ok = ok[..., None, :, :]
    return ok & operands["mask"] if "mask" in operands else ok


def zero_padding(operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Operands (or their tangents) with zeros where a row or key is padding.

    Padding may hold anything, NaN included, and 0 * NaN would leak into valid rows.
    Names along query rows: query, dout; along keys: key, value.
    """
    result = dict(operands)
    for names, length, ids in (
        (("query", "dout"), "query_seq_lengths", "q_segment_ids"),
        (("key", "value"), "key_value_seq_lengths", "kv_segment_ids"),
    ):
        for name in names:
            x = operands.get(name)
            if x is None:
                continue
            valid = None
            if length in operands:
                valid = (
                    jnp.arange(x.shape[-3], dtype=jnp.int32)
                    < operands[length][..., None]
                )
            if ids in operands:
                real = operands[ids] >= 0
                valid = real if valid is None else valid & real
            if valid is not None:
                result[name] = jnp.where(valid[..., None, None], x, 0)
    return result
