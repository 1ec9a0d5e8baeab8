"""What the tests of decoding share: caches cut into pages, and quantised ones."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def paged(
    rng: np.random.Generator,
    caches: tuple[np.ndarray, np.ndarray],
    lengths: np.ndarray,
    page: int,
    fill: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same caches as pages in random order: pools and a page table.

    Entries that no length reaches are out of range, both ways.
    """
    batch, room = caches[0].shape[:2]
    slots = -(-room // page)
    pages = batch * slots + 3
    table = rng.permutation(pages)[: batch * slots].reshape(batch, slots)
    table = table.astype(np.int32)
    pools = []
    for cache in caches:
        pool = np.full((pages, page, *cache.shape[2:]), fill, cache.dtype)
        for b in range(batch):
            for slot in range(slots):
                part = cache[b, slot * page : (slot + 1) * page]
                pool[table[b, slot], : len(part)] = part
        pools.append(pool)
    for b in range(batch):
        used = min(-(-max(int(lengths[b]), 0) // page), slots)
        table[b, used:] = rng.choice([-(2**31), -1, pages, 2**31 - 1], slots - used)
    return pools[0], pools[1], table


def quantised(
    dtype: str, x: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A cache [B, S, K, C] of `dtype`, and the float32 values that it stands for.

    `scale` is float32 [B, K] or [1, K].
    """
    values = x.astype(np.float32) / scale[:, None, :, None]
    if dtype == "int8":
        values = np.rint(np.clip(values, -127, 127))
    cache = np.clip(values, -448, 448).astype(jnp.dtype(dtype))
    return cache, cache.astype(np.float32) * scale[:, None, :, None]
