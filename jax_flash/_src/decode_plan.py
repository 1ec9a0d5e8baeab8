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

UNITS = 264
"""Thread blocks wanted for one long sequence: two on each of 132 multiprocessors."""

FEW_ROWS, MANY_ROWS = 16, 64
"""Rows (tokens x query heads of a key/value head) of the kernel's two kinds of tile."""

MHA_KEYS = 32768
"""Keys from which the decode kernel runs the few queries of a call of `mha`.

The forward kernel for Hopper cuts the keys of a head into at most 8 splits of at least
4 tiles: with more than 4096 keys of width 128 each of its thread blocks reads more,
while decoding has up to 64 splits. Kernels for other GPUs do not split at all, but
"which GPU" may not be asked here. At 4096 and 8192 keys the forward was measured to be
faster; where lines through these times meet is about 32768, see docs/design/decode.md.
"""


def serves_mha(tokens: int, group: int, keys: int, window_left: int) -> bool:
    """Whether the decode kernel runs a forward that it can run.

    Args:
      tokens: queries T of a sequence.
      group: query heads of a key/value head.
      keys: length S of the sequence of keys.
      window_left: keys seen before a query's own, -1 = unbounded.
    """
    if window_left != UNBOUNDED:
        keys = min(keys, window_left + tokens)
    return tokens * group <= FEW_ROWS and keys >= MHA_KEYS


def enough_splits(rows: int, kv_heads: int) -> int:
    """Splits of one sequence that fill a GPU."""
    tile = FEW_ROWS if rows <= FEW_ROWS else MANY_ROWS
    return min(MOST_SPLITS, max(1, UNITS // (kv_heads * -(-rows // tile))))


def _least_keys(width: int, cache_bytes: int, rows: int) -> int:
    """Two tiles of a thread block: fewer do not pay for the end of a split.

    As csrc/decode/config.cuh has them, but for widths above 128, where one split unit
    is no less.
    """
    if width > 128:
        return SPLIT_UNIT
    of_warps = 4 * 16 if cache_bytes > 1 else 4 * 32
    return 2 * (of_warps if rows <= FEW_ROWS else 64)


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
    span = max(room, 1)
    if window_left != UNBOUNDED:
        span = min(span, window_left + tokens)
    least = SPLIT_UNIT
    if num_splits is None:
        num_splits = enough_splits(rows, kv_heads)
        least = _least_keys(width, cache_bytes, rows)
    units = -(-span // SPLIT_UNIT)
    keys = max(least, SPLIT_UNIT * -(-units // num_splits))
    if span == max(room, 1):
        return keys, -(-span // keys)
    # A window may begin anywhere in its first split.
    return keys, min(-(-room // keys), (span - 2) // keys + 2 if span > 1 else 1)
