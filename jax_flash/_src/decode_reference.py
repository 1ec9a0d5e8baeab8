"""The specification of decoding in jnp: attention to caches, and writing to them.

Lives here: caches of pages read and written through page tables, quantised caches.
Attention itself is `reference.forward`, causal and aligned by the lengths.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash._src import compat, reference
from jax_flash._src.config import AttentionConfig
from jax_flash._src.decode_call import QUANTISED, DecodeConfig

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""What values are clamped to before they are rounded to these dtypes."""


def gather(pages: jax.Array, page_table: jax.Array) -> jax.Array:
    """[pages, page, K, C] by int32 [B, max_pages] -> [B, max_pages * page, K, C].

    An index out of range reads some page: beyond the length nothing of it is used.
    """
    count, page, *rest = pages.shape
    batch, slots = page_table.shape
    if count == 0:
        return jnp.zeros((batch, 0, *rest), pages.dtype)
    index = jnp.clip(page_table, 0, count - 1)
    return pages[index].reshape(batch, slots * page, *rest)


def _dequantised(cache: jax.Array, scale: jax.Array | None) -> jax.Array:
    """A cache in the dtype of arithmetic: float32 if it was quantised."""
    if str(cache.dtype) not in QUANTISED:
        return cache
    values = cache.astype(jnp.float32)
    return values if scale is None else values * scale[:, None, :, None]


@compat.allows_rank_promotion
def as_attention(
    *operands: jax.Array, config: DecodeConfig
) -> tuple[AttentionConfig, dict[str, jax.Array]]:
    """A call of decoding as one of attention: its config and its operands by name.

    Args:
      *operands: the arrays named in `config.present`.
      config: the call.
    """
    o = dict(zip(config.present, operands, strict=True))
    caches = {n: o[n] for n in ("k_cache", "v_cache")}
    if "page_table" in o:
        caches = {n: gather(x, o["page_table"]) for n, x in caches.items()}
    key = _dequantised(caches["k_cache"], o.get("k_scale"))
    value = _dequantised(caches["v_cache"], o.get("v_scale"))
    given = {"query": o["query"].astype(key.dtype), "key": key, "value": value}
    given |= {n: o[n] for n in ("sinks", "alibi_slopes") if n in o}
    given["key_value_seq_lengths"] = o["cache_seqlens"]
    attention = AttentionConfig(
        scale=config.scale,
        window_left=config.window_left,
        window_right=0,
        softcap=config.softcap,
        present=tuple(given),
    )
    return attention, given


def decode(*operands: jax.Array, config: DecodeConfig) -> list[jax.Array]:
    """Attention of canonical operands of decoding.

    Args:
      *operands: the arrays named in `config.present`.
      config: the call.

    Returns:
      `[out, lse]`: [B, T, N, Hv] in the dtype of query, and float32 [B, N, T].
    """
    attention, given = as_attention(*operands, config=config)
    out, lse = reference.forward(*given.values(), config=attention)
    return [out.astype(operands[0].dtype), lse]


def quantised(x: jax.Array, dtype: jnp.dtype, scale: jax.Array | None) -> jax.Array:
    """`x / scale` in the dtype of a cache: clamped, rounded to nearest even.

    Args:
      x: [B, T, K, C].
      dtype: of the cache.
      scale: float32 [1, K], None = 1.
    """
    if str(dtype) not in LARGEST:
        return x.astype(dtype)
    values = x.astype(jnp.float32)
    if scale is not None:
        values = values / scale[:, None, :, None]
    limit = LARGEST[str(dtype)]
    values = jnp.clip(values, -limit, limit)
    return (jnp.rint(values) if dtype == jnp.int8 else values).astype(dtype)


@compat.allows_rank_promotion
def append(
    cache: jax.Array,
    new: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array | None,
) -> jax.Array:
    """Writes new [B, T, K, C] behind the first `lengths` tokens of each sequence.

    What has no place is dropped: beyond the cache or the page table, in a page that
    does not exist, in a sequence of negative length.
    """
    if cache.dtype == jnp.float8_e4m3fn:
        # XLA would compute a scatter of this type in a wider one: on the whole cache.
        cache, new = (lax.bitcast_convert_type(x, jnp.uint8) for x in (cache, new))
        result = append(cache, new, lengths, page_table)
        return lax.bitcast_convert_type(result, jnp.float8_e4m3fn)
    # Without a bitcast, which would stop gradients.
    if 0 in cache.shape:  # the gradient of a scatter would take from it
        return cache
    given = [cache, new, lengths] + ([] if page_table is None else [page_table])
    return compat.on_auto_axes(_written, [jax.typeof(cache)])(*given)[0]


def _written(
    cache: jax.Array,
    new: jax.Array,
    lengths: jax.Array,
    page_table: jax.Array | None = None,
) -> list[jax.Array]:
    position = lengths[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)
    active = (lengths >= 0)[:, None]
    # Of a single token XLA would make the update of a slice, and a kernel ahead of it
    # that asks whether there is a place. So it gets company, which has none.
    alone = position.size == 1
    if alone:
        new = jnp.concatenate([new, new], axis=1)
    if page_table is None:
        beyond = jnp.int32(cache.shape[1])
        position = jnp.where(active, position, beyond)
        if alone:
            position = jnp.concatenate(
                [position, jnp.full_like(position, cache.shape[1] + 1)], axis=1
            )

        def write(one: jax.Array, at: jax.Array, x: jax.Array) -> jax.Array:
            return one.at[at].set(x, mode="drop", unique_indices=True)

        return [jax.vmap(write)(cache, position, new)]
    count, page = cache.shape[:2]
    slots = page_table.shape[1]
    if slots == 0:
        return [cache]
    slot = position // page
    index = jnp.take_along_axis(page_table, jnp.clip(slot, 0, slots - 1), axis=1)
    # A position past the largest int32 is negative.
    writes = active & (position >= 0) & (slot < slots) & (index >= 0)
    index = jnp.where(writes, index, jnp.int32(count))
    if alone:
        index = jnp.concatenate([index, jnp.full_like(index, count)], axis=1)
        position = jnp.concatenate([position, position], axis=1)
    return [cache.at[index, position % page].set(new, mode="drop")]
