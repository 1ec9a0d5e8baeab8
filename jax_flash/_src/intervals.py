"""Masks as data: what kernels with intervals read besides query, key and value.

Lives here: the four arrays that describe the mask of a call, computed from its
canonical operands. `mask` is what they mean, csrc/host/intervals.h lists their fields,
docs/design/intervals.md says how they are found. There is no array [T, S] on the way.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._src import compat, mask, registry
from jax_flash._src.config import QKV, TRAILING, UNBOUNDED, AttentionConfig
from jax_flash._src.scores import Operands

OPERANDS = (
    "q_segment_ids",
    "kv_segment_ids",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "cu_seqlens_q",
    "cu_seqlens_k",
)
"""The operands that masks depend on."""

RANGES, HIDDEN = "mask_ranges", "mask_hidden"
"""What stands for a boolean mask among them: see `mask_ranges` and `mask_hidden`."""

_TRAILING = TRAILING | {RANGES: 2, HIDDEN: 2}

FIELDS = (
    "window_left",
    "window_right",
    "bottom_right",
    "max_seqlen_q",
    "max_seqlen_k",
)
"""The fields of the config that they depend on."""

TILE = 64
"""Rows, and keys, that one record sums up."""

BIAS_DTYPES = ("bfloat16", "float16", "float32")
"""Of biases that kernels read as they are."""

MAX_LENGTH = 1 << 30
"""An end beyond all keys; a larger length is no problem for the kernels."""


def mask_bits(mask: jax.Array, keys: int) -> jax.Array:
    """A boolean mask [..., S|1] as bits: uint32 [..., words], the lowest bit first.

    Rows are whole 16 bytes. `keys` is S.
    """
    words = -(-keys // 128) * 4
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], keys))
    pad = [(0, 0)] * (mask.ndim - 1) + [(0, words * 32 - keys)]
    bits = jnp.pad(mask, pad).reshape(*mask.shape[:-1], words, 32).astype(jnp.uint32)
    return (bits << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def seen_by_heads(mask: jax.Array, keys: int) -> jax.Array:
    """Bits [*B, T|1, words] of what a mask [*B, N|1, T|1, S|1] shows to some head.

    Made of the bits that the kernels read, so that its bytes are read once.
    """
    words = mask_bits(mask, keys)
    return jax.lax.reduce(words, np.uint32(0), jax.lax.bitwise_or, (words.ndim - 3,))


def mask_ranges(words: jax.Array, rows: int) -> jax.Array:
    """Which keys rows see, int32 [*B, T, 2], by `seen_by_heads`.

    From the first key that a row sees to the end of the last one; MAX_LENGTH and 0 if
    it sees none. `rows` is T.
    """
    place = 32 * jnp.arange(words.shape[-1], dtype=jnp.int32)
    # The lowest bit that is set has as many bits below it.
    low = jax.lax.population_count((words & (~words + 1)) - 1).astype(jnp.int32)
    high = 32 - jax.lax.clz(words).astype(jnp.int32)
    first = jnp.where(words == 0, MAX_LENGTH, place + low).min(-1)
    end = jnp.where(words == 0, 0, place + high).max(-1)
    ranges = jnp.stack([first, end], -1)
    return jnp.broadcast_to(ranges, (*ranges.shape[:-2], rows, 2))


def mask_hidden(words: jax.Array, rows: int, keys: int) -> jax.Array:
    """Which of 64 parts of all keys tiles of rows see nothing of, by `seen_by_heads`.

    Returns:
      int32 [*B, tiles of rows, 2], the lowest bit first. A part has 64 keys, or the
      next power of two with which there are at most 64 parts. Zeros, that nothing is
      known, while T or S (`rows`, `keys`) is a symbol.
    """
    count = -(-rows // TILE)
    if not (isinstance(rows, int) and isinstance(keys, int)):
        return jnp.zeros((*words.shape[:-2], count, 2), jnp.int32)
    size = max(TILE, 1 << (-(-keys // 64) - 1).bit_length()) // 32
    pad = [(0, 0)] * (words.ndim - 2)
    own = words.shape[-2]
    pad += [(0, -own % TILE if own > 1 else 0), (0, 64 * size - words.shape[-1])]
    words = jnp.pad(words, pad)
    by_part = (words.reshape(*words.shape[:-1], 64, size) != 0).any(-1)
    lead = by_part.shape[:-2]
    by_tile = by_part.reshape(*lead, -1, TILE if own > 1 else 1, 64).any(-2)
    hidden = ~by_tile.reshape(*lead, -1, 2, 32)
    bits = hidden.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
    packed = jax.lax.bitcast_convert_type(bits.sum(-1, dtype=jnp.uint32), jnp.int32)
    return jnp.broadcast_to(packed, (*lead, count, 2))


def bias_rows(bias: jax.Array) -> jax.Array:
    """A bias [..., S] as kernels read it: of 16 or 32 bits, rows of whole eights."""
    if str(bias.dtype) not in BIAS_DTYPES:
        bias = bias.astype(jnp.float32)
    pad = [(0, 0)] * (bias.ndim - 1) + [(0, -bias.shape[-1] % 8)]
    return jnp.pad(bias, pad)


class Intervals(NamedTuple):
    """int32 arrays with the same batch dimensions, of size 1 where sequences share one.

    Attributes:
      rows: [*B, R, 4], first key, end, id and aligned position of each row; R is T in
        whole tiles.
      row_tiles: [*B, R / TILE, 8], hull and core of the keys of the rows of a tile (two
        numbers each), whether some are dead, whether ids count, and `mask_hidden`.
      keys: [*B, S'], the id of each key, -1 if it is dead; S' is S in whole tiles.
      key_tiles: [*B, S' / TILE, 8], rows that may see some key of a tile (two numbers),
        whether some are dead, and five zeros.
    """

    rows: jax.Array
    row_tiles: jax.Array
    keys: jax.Array
    key_tiles: jax.Array


def intervals(config: AttentionConfig, o: Operands) -> Intervals:
    """The mask of a call by segment ids, lengths, offsets, windows and a mask.

    Args:
      config: the call.
      o: its canonical operands by name, none of them empty.
    """
    return _called(_intervals, config, o)


def by_kernel(config: AttentionConfig, o: Operands) -> Intervals:
    """The same, number for number, by an FFI call: for CUDA, with the extension."""
    return _called(_by_kernel, config, o)


def _called(f: Callable, config: AttentionConfig, o: Operands) -> Intervals:
    """The results of `f` of the operands that the mask depends on."""
    given = {name: o[name] for name in OPERANDS if name in o}
    names = (QKV, QKV) if QKV in o else ("query", "key")
    sizes = tuple(o[name].shape[-TRAILING[name]] for name in names)
    whole = o[names[0]]
    if "mask" in o:
        words = seen_by_heads(o["mask"], sizes[1])
        given[RANGES] = mask_ranges(words, sizes[0])
        given[HIDDEN] = mask_hidden(words, *sizes)
    # What has nothing to do with the mask should not keep equal masks apart.
    relevant = AttentionConfig(
        scale=1.0,
        present=tuple(given),
        **{name: getattr(config, name) for name in FIELDS},
    )
    made = f(given, relevant, sizes, whole.ndim - TRAILING[names[0]])
    return Intervals(*(compat.vary_like(x, whole) for x in made))


# One function of the program, however many calls have such a mask.
@functools.partial(jax.jit, static_argnames=("config", "sizes", "batch_dims"))
@compat.allows_rank_promotion
def _intervals(
    o: Operands, config: AttentionConfig, sizes: tuple[int, int], batch_dims: int
) -> Intervals:
    """The same from the operands that the mask depends on, T, S, and the rank of *B."""
    rows, keys = sizes
    row_count, key_count = -(-rows // TILE), -(-keys // TILE)
    row = jnp.arange(row_count * TILE, dtype=jnp.int32)
    where = mask.locate(config, o, row, rows, keys)
    limit = jnp.asarray(keys, jnp.int32)
    first, end = (jnp.clip(x, 0, limit) for x in (where.first, where.end))
    if RANGES in o:
        tail = [(0, 0)] * (o[RANGES].ndim - 2) + [(0, row_count * TILE - rows), (0, 0)]
        seen = jnp.pad(o[RANGES], tail)
        first = jnp.minimum(jnp.maximum(first, seen[..., 0]), limit)
        end = jnp.minimum(end, seen[..., 1])
    if "q_segment_ids" in o:
        row_ids = _padded(o["q_segment_ids"], row_count * TILE - rows)
        kv_ids = o["kv_segment_ids"]
        first, end, count = _narrowed(row_ids, kv_ids, first, end, keys)
        live = (row_ids >= 0) & (count > 0)
        mixed = live & (count < end - first)
    else:
        row_ids = jnp.zeros_like(row)
        live = first < end
        mixed = jnp.zeros_like(live)
    key_ids = _padded(_key_ids(config, o, keys), key_count * TILE - keys)
    columns = [
        jnp.where(live, x, dead)
        for x, dead in ((first, 0), (end, 0), (row_ids, -1), (where.position, 0))
    ]

    shapes = [x.shape[:-1] for x in (key_ids, *columns)]
    batch = jnp.broadcast_shapes((1,) * batch_dims, *shapes)
    live, mixed, key_ids, *columns = (
        jnp.broadcast_to(x, batch + x.shape[-1:])
        for x in (live, mixed, key_ids, *columns)
    )
    by_tile = (*batch, row_count, TILE)
    hidden = o.get(HIDDEN, jnp.zeros((1, 2), jnp.int32))
    hidden = jnp.broadcast_to(hidden, (*batch, row_count, 2))
    tiles = _row_tiles(
        *(x.reshape(by_tile) for x in (*columns[:2], live, mixed)), hidden=hidden
    )
    dead_keys = (key_ids < 0).reshape(*batch, key_count, TILE).any(-1)
    return Intervals(
        jnp.stack(columns, -1), tiles, key_ids, _key_tiles(tiles, dead_keys)
    )


@functools.partial(jax.jit, static_argnames=("config", "sizes", "batch_dims"))
@compat.allows_rank_promotion
def _by_kernel(
    o: Operands, config: AttentionConfig, sizes: tuple[int, int], batch_dims: int
) -> Intervals:
    """Operands with their batch in one dimension, and the results of the FFI call."""
    order = (*OPERANDS, RANGES, HIDDEN)
    given = {name: o[name] for name in order if name in o}
    heads = [x.shape[: x.ndim - _TRAILING[name]] for name, x in given.items()]
    batch = jnp.broadcast_shapes((1,) * batch_dims, *heads)
    count = math.prod(batch)
    # The last number makes it a constant that XLA keeps. Of equal ones alone it makes a
    # broadcast, a kernel of its own.
    operands = [jnp.stack([jnp.asarray(n, jnp.int32) for n in (*sizes, 0)])]
    for name, x in given.items():
        trailing = x.shape[x.ndim - _TRAILING[name] :]
        full = jnp.broadcast_to(x, batch + trailing)
        operands.append(full.reshape(count, *trailing))
    row_count, key_count = (-(-n // TILE) for n in sizes)
    trailing = (
        (row_count * TILE, 4),
        (row_count, 8),
        (key_count * TILE,),
        (key_count, 8),
    )
    shapes = [jax.ShapeDtypeStruct((count, *x), jnp.int32) for x in trailing]
    run = jax.ffi.ffi_call(registry.INTERVALS_TARGET, shapes)

    def most(size: int | None) -> np.int64:
        return np.int64(UNBOUNDED if size is None else size)

    made = run(
        *operands,
        window_left=np.int64(config.window_left),
        window_right=np.int64(config.window_right),
        bottom_right=config.bottom_right,
        max_seqlen_q=most(config.max_seqlen_q),
        max_seqlen_k=most(config.max_seqlen_k),
        has_ids="q_segment_ids" in o,
        has_query_lengths="query_seq_lengths" in o,
        has_kv_lengths="key_value_seq_lengths" in o,
        has_offsets="cu_seqlens_q" in o,
        has_mask=RANGES in o,
    )
    return Intervals(
        *(x.reshape(batch + t) for x, t in zip(made, trailing, strict=True))
    )


def _padded(ids: jax.Array, count: int) -> jax.Array:
    """Ids [*B, n] and `count` more of -1."""
    tail = jnp.full((*ids.shape[:-1], count), -1, jnp.int32)
    return jnp.concatenate([ids, tail], -1)


def _key_ids(config: AttentionConfig, o: Operands, keys: int) -> jax.Array:
    """The id of each key, 0 where there are no segments, -1 if padding: [*B|(), S]."""
    place = jnp.arange(keys, dtype=jnp.int32)
    ids = jnp.maximum(o.get("kv_segment_ids", jnp.zeros_like(place)), -1)
    if "key_value_seq_lengths" in o:
        ids = jnp.where(place < o["key_value_seq_lengths"][..., None], ids, -1)
    if "cu_seqlens_k" in o:
        valid = mask.in_sequence(o["cu_seqlens_k"], keys, config.max_seqlen_k)
        ids = jnp.where(valid, ids, -1)
    return ids


def _narrowed(
    row_ids: jax.Array,
    kv_ids: jax.Array,
    first: jax.Array,
    end: jax.Array,
    keys: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Intervals from the first to the last key in them that has the row's id.

    Among keys sorted by id, then position, those that a row sees are neighbours: from
    the first that is not before (id, first) to the last before (id, end).

    Args:
      row_ids: [*B, R].
      kv_ids: [*B, S].
      first: [*B, R].
      end: [*B, R].
      keys: S.

    Returns:
      `(first, end, count)`, how many keys a row sees; 0 or less if there are none.
    """
    place = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), kv_ids.shape)
    ids, places = jax.lax.sort((kv_ids, place), num_keys=1, is_stable=True)
    limit = jnp.asarray(keys, jnp.int32)

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        index = jnp.clip(index, 0, limit - 1)
        x = x.reshape((1,) * (index.ndim - x.ndim) + x.shape)
        return jnp.take_along_axis(x, index, -1, mode="promise_in_bounds")

    # How many sorted keys come before (id, bound): binary search, unrolled.
    bounds = jnp.stack(jnp.broadcast_arrays(first, end, row_ids)[:2])
    count = jnp.zeros(bounds.shape, jnp.int32)
    bits = keys.bit_length() if isinstance(keys, int) else MAX_LENGTH.bit_length()
    for bit in reversed(range(bits)):
        more = count + (1 << bit)
        an_id, a_place = at(ids, more - 1), at(places, more - 1)
        less = (an_id < row_ids) | ((an_id == row_ids) & (a_place < bounds))
        count = jnp.where((more <= limit) & less, more, count)
    start, stop = count[0], count[1]
    return at(places, start), at(places, stop - 1) + 1, stop - start


def _row_tiles(
    first: jax.Array,
    end: jax.Array,
    live: jax.Array,
    mixed: jax.Array,
    hidden: jax.Array,
) -> jax.Array:
    """Records of tiles of rows from their rows [*B, tiles, TILE], and `mask_hidden`."""
    some = live.any(-1)
    ids_count = mixed.any(-1)
    hull_first = jnp.where(some, jnp.where(live, first, MAX_LENGTH).min(-1), 0)
    core_first = jnp.where(live, first, 0).max(-1)
    core_end = jnp.where(live, end, MAX_LENGTH).min(-1)
    # Where ids count, a row need not see what lies in its interval.
    core_first, core_end = (jnp.where(ids_count, 0, x) for x in (core_first, core_end))
    fields = (
        hull_first,
        jnp.where(live, end, 0).max(-1),
        core_first,
        core_end,
        ~live.all(-1),
        ids_count,
        hidden[..., 0],
        hidden[..., 1],
    )
    return _records(fields)


def _key_tiles(row_tiles: jax.Array, dead: jax.Array) -> jax.Array:
    """Records of tiles of keys.

    Args:
      row_tiles: [*B, row tiles, 8].
      dead: bool [*B, key tiles].

    Looks at every pair of tiles, T * S / TILE^2 of them, in sums that XLA fuses.
    """
    hull_first, hull_end = row_tiles[..., 0, None], row_tiles[..., 1, None]
    row_count, key_count = row_tiles.shape[-2], dead.shape[-1]
    tile = jnp.arange(row_count, dtype=jnp.int32)[:, None]
    beyond = jnp.asarray(row_count, jnp.int32)
    key = TILE * jnp.arange(key_count, dtype=jnp.int32)
    meets = (hull_first < hull_end) & (hull_first < key + TILE) & (hull_end > key)
    first = jnp.where(meets, tile, beyond).min(-2)
    end = jnp.where(meets, tile + 1, 0).max(-2)
    return _records((jnp.where(end == 0, 0, first) * TILE, end * TILE, dead))


def _records(fields: tuple[jax.Array, ...]) -> jax.Array:
    """Eight int32 of each tile, zeros after the fields."""
    zeros = jnp.zeros_like(fields[0])
    columns = [*fields, *[zeros] * (8 - len(fields))]
    return jnp.stack([x.astype(jnp.int32) for x in columns], -1)
