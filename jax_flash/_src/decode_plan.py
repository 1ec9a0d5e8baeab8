"""How the decode kernel cuts keys into splits, and which calls of `mha` it runs.

Pure functions of static facts. The number of sequences and their lengths are not among
these facts, so that a result depends neither on its neighbours nor on how many there
are. Nor is the device, which is unknown when a program is lowered.
"""

from jax_flash._src.config import UNBOUNDED

SPLIT_UNIT = 64
"""A split starts at a multiple of this many keys."""

MOST_SPLITS = 64
"""A row's partial results are added up by few threads; more would take long."""

MULTIPROCESSORS = 132
UNITS = 2 * MULTIPROCESSORS
"""Thread blocks wanted for one long sequence."""

LEAST_BYTES = 1 << 16
"""Keys and values of a split of few rows: less does not pay for its end. Twice that, if
one sequence still has a split for 7 of 8 multiprocessors."""

FEW_ROWS, MANY_ROWS, F32_ROWS = 16, 64, 8
"""Rows (tokens x query heads of a key/value head) of the kernel's two kinds of tile,
and of the one kind for float32. Over `FEW_ROWS` a second kernel adds up the splits."""

WARPGROUP_ROWS, WARPGROUP_KEYS = 8, 4096
"""Beyond so many rows and this room for keys, Hopper's kernels of a warpgroup run, and
the second one, too: `has_warpgroup` of csrc/decode/config.cuh."""

MHA_KEYS = 1024
"""Keys from which the decode kernel runs the few queries of a call of `mha`.

Proposed by times of few cells, see docs/design/decode.md: several sequences gain, and
one of 4096 keys takes as long as by the forward kernel for Hopper. Kernels for other
GPUs do not split the keys at all, but "which GPU" may not be asked here, and neither
may the batch, on which results must not depend.
"""


def serves_mha(tokens: int, group: int, keys: int, window_left: int) -> bool:
    """Whether the decode kernel runs a forward that it can run.

    Args:
      tokens: queries T of a sequence.
      group: query heads of a key/value head.
      keys: length S of the sequence of keys.
      window_left: keys seen before a query's own, -1 = unbounded.
    """
    few = tokens * group <= FEW_ROWS
    return few and _seen(keys, tokens, window_left) >= MHA_KEYS


FORWARD_ROWS, FORWARD_BLOCKS, FORWARD_KEYS = 16, 8, 4096
"""What the forward kernel for Hopper needs to be used for decoding: more rows than
this, at least so many blocks of them, and keys."""

MOST_PARTS = 16
"""kMaxKeyParts of csrc/sm90/fwd_parts.h."""

PART_TILES, PART_COST = 8, 1.5
"""Tiles of keys that a part has at least, and how many its start and end take as long
as. Its results are written and read again, too, for several sequences from memory."""


def serves_forward(
    tokens: int, group: int, kv_heads: int, keys: int, window_left: int
) -> bool:
    """Whether Hopper's forward kernel runs a call of `decode_mha` that it can run.

    It multiplies up to 128 rows at once, where the decode kernel reads the keys for
    each 64, and adds up fewer parts. Its cut of the keys (`forward_parts`) does not
    depend on the batch either. It has the heads of a group in the rows of a block if
    the group is a power of two.

    Args:
      tokens: new tokens T.
      group: query heads of a key/value head.
      kv_heads: key/value heads K.
      keys: that a sequence can have.
      window_left: keys seen before a query's own, -1 = unbounded.
    """
    rows = tokens * group
    packs = group & (group - 1) == 0
    return (
        packs
        and rows > FORWARD_ROWS
        and kv_heads * -(-rows // 128) >= FORWARD_BLOCKS
        and _seen(keys, tokens, window_left) >= FORWARD_KEYS
    )


def _seen(keys: int, tokens: int, window_left: int) -> int:
    """Keys that the new tokens of a sequence can see."""
    return keys if window_left == UNBOUNDED else min(keys, window_left + tokens)


def _forward_blocks(rows: int, kv_heads: int, width: int) -> int:
    """Blocks of rows of one sequence in the forward kernel."""
    return kv_heads * -(-rows // (192 if width <= 64 else 128))


def forward_parts(
    tokens: int, group: int, kv_heads: int, keys: int, window_left: int, width: int
) -> int:
    """Into how many parts Hopper's forward kernel cuts the keys of a sequence.

    One sequence of full length is done soonest by them: 16 blocks of rows on 132
    multiprocessors want 8 parts. Several sequences have as many each.

    Args:
      tokens: as of `serves_forward`, as are the next.
      group: query heads of a key/value head.
      kv_heads: key/value heads K.
      keys: that a sequence can have.
      window_left: keys seen before a query's own, -1 = unbounded.
      width: the larger one of H and Hv.
    """
    blocks = _forward_blocks(tokens * group, kv_heads, width)
    tile = 128 if width <= 128 else 64
    tiles = -(-_seen(keys, tokens, window_left) // tile)

    def time(parts: int) -> float:
        rounds = -(-blocks * parts // MULTIPROCESSORS)
        return rounds * (-(-tiles // parts) + PART_COST)

    most = max(1, min(MOST_PARTS, tiles // PART_TILES))
    return min(range(1, most + 1), key=time)


def row_tiles(rows: int, cache_bytes: int) -> int:
    """Tiles of the rows of a key/value head; bytes of an element of the caches."""
    if cache_bytes == 4:
        return -(-rows // F32_ROWS)
    return -(-rows // (FEW_ROWS if rows <= FEW_ROWS else MANY_ROWS))


def enough_splits(rows: int, kv_heads: int, cache_bytes: int) -> int:
    """Splits of one sequence that fill a GPU."""
    tiles = kv_heads * row_tiles(rows, cache_bytes)
    return min(MOST_SPLITS, max(1, UNITS // tiles))


def _least_keys(span: int, width: int, cache_bytes: int, rows: int, heads: int) -> int:
    """Keys of the shortest split that pays for its end.

    Args:
      span: keys that a sequence reads.
      width: as of `splits_of`.
      cache_bytes: as of `splits_of`.
      rows: as of `splits_of`.
      heads: key/value heads times tiles of rows.
    """
    tiles = 64 if width <= 64 else 128 if width <= 128 else 256
    warpgroup = rows > WARPGROUP_ROWS and span > WARPGROUP_KEYS and cache_bytes == 2
    if (warpgroup and tiles <= 128) or (rows > FEW_ROWS and cache_bytes < 4):
        return 2 * SPLIT_UNIT if tiles > 128 else 4 * SPLIT_UNIT
    keys = max(SPLIT_UNIT, LEAST_BYTES // (2 * tiles * cache_bytes))
    fills = 8 * heads * -(-span // (2 * keys)) >= 7 * MULTIPROCESSORS
    return 2 * keys if fills else keys


def splits_of(
    room: int,
    tokens: int,
    window_left: int,
    rows: int,
    kv_heads: int,
    num_splits: int | None,
    width: int,
    cache_bytes: int,
) -> tuple[int, int]:
    """Keys of a split, and the most splits that a sequence can need.

    Args:
      room: keys that a sequence can have.
      tokens: new tokens T.
      window_left: keys seen before a query's own, -1 = unbounded.
      rows: T times the query heads of a key/value head.
      kv_heads: key/value heads K.
      num_splits: splits that the user asks for, None = enough of them to fill a GPU
        with one sequence of full length.
      width: the larger one of H and Hv.
      cache_bytes: of an element of the caches.
    """
    span = _seen(max(room, 1), tokens, window_left)
    least = SPLIT_UNIT
    if num_splits is None:
        num_splits = enough_splits(rows, kv_heads, cache_bytes)
        heads = kv_heads * row_tiles(rows, cache_bytes)
        least = _least_keys(span, width, cache_bytes, rows, heads)
    units = -(-span // SPLIT_UNIT)
    keys = max(least, SPLIT_UNIT * -(-units // num_splits))
    if span == max(room, 1):
        return keys, -(-span // keys)
    # A window may begin anywhere in its first split.
    return keys, min(-(-room // keys), (span - 2) // keys + 2 if span > 1 else 1)
