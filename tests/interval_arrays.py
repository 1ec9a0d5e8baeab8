"""The arrays that kernels with intervals read, from a dense mask: literal and slow.

csrc/host/intervals.h says what each field holds. Nothing here shares code with the
package, which computes the arrays without a dense mask. At the end, masks and biases.
"""

import jax.numpy as jnp
import numpy as np

TILE = 64
"""Rows, and keys, that one record sums up."""

MAX_LENGTH = 1 << 30


def interval_arrays(
    seen: np.ndarray,
    q_ids: np.ndarray,
    kv_ids: np.ndarray,
    position: np.ndarray,
    wide: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays `rows`, `row_tiles`, `keys` and `key_tiles`, all int32.

    Args:
      seen: bool [B, T, S], which keys each row sees; only such with its own id, and all
        of those between the first and the last.
      q_ids: int [B, T], not negative where a row sees something.
      kv_ids: int [B, S], negative where a key is dead.
      position: int [B, T], the key that each row is aligned with.
      wide: intervals reach as far over keys with other ids as they may, instead of from
        the first key seen to the last.
    """
    parts = [
        _sequence(seen[b], q_ids[b], kv_ids[b], position[b], wide)
        for b in range(len(seen))
    ]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _sequence(
    seen: np.ndarray,
    q_ids: np.ndarray,
    kv_ids: np.ndarray,
    position: np.ndarray,
    wide: bool,
) -> dict[str, np.ndarray]:
    rows, keys = seen.shape
    all_rows, all_keys = (-(-n // TILE) * TILE for n in (rows, keys))
    key_ids = np.full(all_keys, -1)
    key_ids[:keys] = np.maximum(kv_ids, -1)
    records = np.tile([0, 0, -1, 0], (all_rows, 1))
    for r in range(rows):
        records[r, 3] = position[r]
        if seen[r].any():
            records[r, :3] = (
                *_interval(seen[r], q_ids[r], key_ids[:keys], wide),
                q_ids[r],
            )
    sees = np.zeros((all_rows, all_keys), bool)
    sees[:rows, :keys] = seen
    alive = sees.any(1)
    interval = np.zeros_like(sees)
    for r in range(rows):
        interval[r, records[r, 0] : records[r, 1]] = True
    dead_key = key_ids < 0
    row_tiles = np.zeros((all_rows // TILE, 8), int)
    for i, tile in enumerate(row_tiles):
        part = slice(i * TILE, (i + 1) * TILE)
        live = records[part][alive[part]]
        mixed = (interval[part] & ~sees[part]).any()
        hull, core = (0, 0), (0, MAX_LENGTH)
        if len(live):
            hull = live[:, 0].min(), live[:, 1].max()
            core = (0, 0) if mixed else (live[:, 0].max(), live[:, 1].min())
        tile[:6] = *hull, *core, not alive[part].all(), mixed
    key_tiles = np.zeros((all_keys // TILE, 8), int)
    for i, tile in enumerate(key_tiles):
        part = slice(i * TILE, (i + 1) * TILE)
        meets = (row_tiles[:, 0] < part.stop) & (row_tiles[:, 1] > part.start)
        meets = np.flatnonzero(meets & (row_tiles[:, 0] < row_tiles[:, 1]))
        if len(meets):
            tile[:2] = meets[0] * TILE, (meets[-1] + 1) * TILE
        tile[2] = dead_key[part].any()
    return {
        "rows": records.astype(np.int32),
        "row_tiles": row_tiles.astype(np.int32),
        "keys": key_ids.astype(np.int32),
        "key_tiles": key_tiles.astype(np.int32),
    }


def hidden(mask: np.ndarray, rows: int) -> np.ndarray:
    """The last two fields of `row_tiles`, int32 [B, tiles of rows, 2].

    Args:
      mask: bool [B, 1 or N, 1 or T, S].
      rows: T.
    """
    batch, heads, _, keys = mask.shape
    mask = np.broadcast_to(mask, (batch, heads, rows, keys)).any(1)
    part = TILE
    while part * 64 < keys:
        part *= 2
    words = np.full((batch, -(-rows // TILE), 2), 0, np.uint32)
    for b, tile, bit in np.ndindex(batch, words.shape[1], 64):
        some_rows = slice(tile * TILE, (tile + 1) * TILE)
        if not mask[b, some_rows, bit * part : (bit + 1) * part].any():
            words[b, tile, bit // 32] |= np.uint32(1 << bit % 32)
    return words.view(np.int32)


def _interval(
    seen: np.ndarray, row_id: int, key_ids: np.ndarray, wide: bool
) -> tuple[int, int]:
    """A row's first key and end."""
    first, end = np.flatnonzero(seen)[[0, -1]] + [0, 1]
    expected = np.zeros_like(seen)
    expected[first:end] = key_ids[first:end] == row_id
    np.testing.assert_array_equal(seen, expected, "no interval of one id")
    while wide and first > 0 and key_ids[first - 1] != row_id:
        first -= 1
    while wide and end < len(seen) and key_ids[end] != row_id:
        end += 1
    return first, end


def random_mask(shape: tuple[int, int, int, int]) -> np.ndarray:
    """Half of the keys, none in every seventh row that has a mask of its own."""
    mask = np.random.default_rng(3).random(shape) < 0.5
    if shape[2] > 1:
        mask[:, :, ::7] = False
    return mask


def striped_mask(shape: tuple[int, int, int, int]) -> np.ndarray:
    """As `random_mask`, but for runs of keys that all rows see, or two of three do."""
    mask = random_mask(shape)
    mask[..., 128:400] = True
    mask[:, :, ::3, 330:] = False
    return mask


def mask_of_blocks(shape: tuple[int, int, int, int], share: float) -> np.ndarray:
    """Blocks of 64 rows and 64 keys, most of them hidden, at odd ends seen in part."""
    rng = np.random.default_rng(5)
    batch, heads, rows, keys = shape
    drawn = rng.random((batch, heads, -(-rows // 64), -(-keys // 64))) < share
    mask = drawn.repeat(64, -1).repeat(64, -2)[..., :rows, :keys]
    return mask & (rng.random(shape) < 0.9)


def random_bias(shape: tuple[int, int, int, int], dtype: str) -> np.ndarray:
    """Random normal, with -inf here and there, and all over every ninth row."""
    rng = np.random.default_rng(4)
    bias = rng.standard_normal(shape, np.float32)
    bias[rng.random(shape) < 0.05] = -np.inf
    if shape[2] > 1:
        bias[:, :, ::9] = -np.inf
    return bias.astype(jnp.dtype(dtype))
