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
      row: [t], their indices.
      position: the key that a row is aligned with, maybe beyond the keys there are.
      first: the first key that a row may attend.
      end: the key after the last; the interval is empty where `end <= first`.
    """

    row: jax.Array
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
    if "cu_seqlens_q" in operands:
        offsets = operands["cu_seqlens_q"], operands["cu_seqlens_k"]
        bounds = config.max_seqlen_q, config.max_seqlen_k
        place, query_length, start, key_length = _packed(
            *offsets, row, rows, keys, *bounds
        )
    else:
        query_length, key_length = (x[..., None] for x in lengths(operands, rows, keys))
        place, start = row, jnp.zeros_like(row)
    first, end = key_interval(
        place,
        query_length,
        key_length,
        config.window_left,
        config.window_right,
        config.bottom_right,
    )
    shift = key_length - query_length if config.bottom_right else 0
    position = start + place + shift
    return Rows(row, position, start + first, start + end)


def _packed(
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    row: jax.Array,
    rows: int,
    keys: int,
    most_queries: int | None,
    most_keys: int | None,
) -> tuple[jax.Array, ...]:
    """Sequences of rows of a packed batch; [*B, t] each.

    Offsets never fall, so the sequence of a row is the last that begins at or before
    it (those of no rows begin where the next one does), and offsets of that sequence
    are the largest of those before and the smallest of those after.

    Returns:
      `(place, query_length, start, key_length)`: the place in the sequence, its
      queries, its first key and its keys. A row of no sequence has `query_length` 0 and
      a place that is not negative.
    """
    queries = jnp.clip(cu_seqlens_q, 0, rows)[..., None, :]
    columns = jnp.clip(cu_seqlens_k, 0, keys)[..., None, :]
    before = queries <= row[:, None]

    def around(offsets: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
        start = jnp.where(before, offsets, 0).max(-1)
        end = jnp.where(before, limit, offsets).min(-1)
        return start, jnp.maximum(start, end)

    query_start, query_end = around(queries, rows)
    key_start, key_end = around(columns, keys)
    sequence = before.sum(-1, dtype=jnp.int32) - 1
    inside = (sequence >= 0) & (sequence < queries.shape[-1] - 1)
    query_length = jnp.where(inside, query_end - query_start, 0)
    key_length = key_end - key_start
    if most_queries is not None:
        query_length = jnp.minimum(query_length, most_queries)
    if most_keys is not None:
        key_length = jnp.minimum(key_length, most_keys)
    return row - query_start, query_length, key_start, key_length


def in_sequence(cu_seqlens: jax.Array, size: int, most: int | None) -> jax.Array:
    """Which places of a packed dimension belong to a sequence: bool [*B, size]."""
    place = jnp.arange(size, dtype=jnp.int32)
    offsets = (cu_seqlens, cu_seqlens)
    own, length, _, _ = _packed(*offsets, place, size, size, most, None)
    return own < length


def distance(where: Rows, key: jax.Array) -> jax.Array:
    """Of each key `key` [s] from the one a row is aligned with: [*B|(), t, s]."""
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


def zero_padding(
    config: AttentionConfig, operands: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Operands (or their tangents) with zeros where a row or key is padding.

    Padding may hold anything, NaN included, and 0 * NaN would leak into valid rows.
    Names along query rows: query, dout; along keys: key, value.
    """
    result = dict(operands)
    for names, length, ids, offsets, most in (
        (
            ("query", "dout"),
            "query_seq_lengths",
            "q_segment_ids",
            "cu_seqlens_q",
            config.max_seqlen_q,
        ),
        (
            ("key", "value"),
            "key_value_seq_lengths",
            "kv_segment_ids",
            "cu_seqlens_k",
            config.max_seqlen_k,
        ),
    ):
        for name in names:
            x = operands.get(name)
            if x is None:
                continue
            size = x.shape[-3]
            valid = []
            if length in operands:
                place = jnp.arange(size, dtype=jnp.int32)
                valid.append(place < operands[length][..., None])
            if ids in operands:
                valid.append(operands[ids] >= 0)
            if offsets in operands:
                valid.append(in_sequence(operands[offsets], size, most))
            for one in valid:
                result[name] = jnp.where(one[..., None, None], result[name], 0)
    return result
