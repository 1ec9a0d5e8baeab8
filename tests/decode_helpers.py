"""What tests of decoding share: problems, pages, quantised caches, rotary in jnp."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import append_kv, decode_mha, rope


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


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


def problem(page: int | None = None) -> tuple[Any, ...]:
    """(query, k, v, lengths), float32; with a page size (..., page table)."""
    rng = np.random.default_rng(0)
    query = normal(rng, 4, 3, 8, 16)
    k, v = normal(rng, 4, 24, 4, 16), normal(rng, 4, 24, 4, 8)
    lengths = np.array([0, 2, 13, 24], np.int32)
    if page is None:
        return query, k, v, lengths
    k, v, table = paged(rng, (k, v), lengths, page, np.nan)
    return query, k, v, lengths, table


def with_lse(query, k, v, lengths, page_table=None, **options):
    return decode_mha(
        query, k, v, lengths, page_table=page_table, return_lse=True, **options
    )


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


def joined(*parts: Any) -> jax.Array:
    """Query, new keys and new values as one projection writes them."""
    flat = [x.reshape(*x.shape[:-2], math.prod(x.shape[-2:])) for x in parts]
    return jnp.concatenate(flat, -1)


def of_one_projection(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `rope_append_qkvpacked` from those of `rope_append_kv`."""
    parts = ("query", "k_new", "v_new")
    rest = {n: x for n, x in given.items() if n not in parts}
    return {"qkv": joined(*(given[n] for n in parts)), **rest}


def rope_append_in_jnp(
    query: Any,
    k_new: Any,
    v_new: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    page_table: Any = None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """`rope_append_kv` by `rope` and `append_kv`, which are jnp: with float32 keys."""
    at = cache_seqlens
    if query.ndim == 4:
        at = at[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    key = rope(k_new.astype(jnp.float32), at, **options)
    caches = append_kv(
        k_cache, v_cache, key, v_new, cache_seqlens, page_table=page_table
    )
    return rope(query, at, **options), *caches
