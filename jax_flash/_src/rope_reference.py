"""The specification of rotary embedding in jnp, alone and with writing to caches.

Lives here: `turned`, what `rope` computes, `split` of a projection's result into its
parts, and `rope_append` of canonical operands.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash._src import avals, compat, decode_reference, norm_op

QKV = "qkv"
OPERANDS: tuple[str, ...] = (
    QKV,  # [*V, B, T, N H + K H + K Hv], in place of query, k_new and v_new
    "query",  # [*V, B, T, N, H]
    "k_cache",  # [*V, B, S, K, H], or [*V, pages, page, K, H] with a page table
    "v_cache",  # [*V, B, S, K, Hv], or [*V, pages, page, K, Hv]
    "cache_seqlens",  # [*V, B] int32, before the new tokens
    "inv_freq",  # [*V, B, R / 2] float32, or 1 for each of *V and B
    "k_new",  # [*V, B, T, K, H]
    "v_new",  # [*V, B, T, K, Hv]
    "page_table",  # [*V, B, max_pages] int32
)
"""Every operand in the order in which the primitive and the kernel take them.

*V are dimensions that `vmap` added. They stay apart, because a reshape of a cache would
make XLA copy it, donated or not.
"""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Everything static about one call.

    Attributes:
      interleaved: whether neighbours are pairs, else elements of two halves.
      paged: whether there is a page table.
      packed: whether query, new keys and new values are one array.
    """

    interleaved: bool
    paged: bool
    packed: bool = False

    @property
    def present(self) -> tuple[str, ...]:
        """The operands there are, in the order of `OPERANDS`."""
        absent = {"query", "k_new", "v_new"} if self.packed else {QKV}
        if not self.paged:
            absent.add("page_table")
        return tuple(name for name in OPERANDS if name not in absent)


def turned(
    x: jax.Array, positions: jax.Array, inv_freq: jax.Array, interleaved: bool
) -> jax.Array:
    """Pairs of x turned by their angles, in the dtype of arithmetic.

    Args:
      x: [*B, N, H].
      positions: integers, broadcastable to [*B].
      inv_freq: floating, broadcastable to [*B, 1, R / 2].
      interleaved: whether neighbours are pairs.
    """
    wide = norm_op.widened(x)
    turn = functools.partial(_turned_pairs, interleaved=interleaved)
    on_axes = compat.on_auto_axes(turn, [jax.typeof(wide)])
    return on_axes(wide, positions, inv_freq)[0]


@compat.allows_rank_promotion
def _turned_pairs(
    wide: jax.Array, positions: jax.Array, inv_freq: jax.Array, *, interleaved: bool
) -> list[jax.Array]:
    angles = positions.astype(wide.dtype)[..., None, None] * inv_freq.astype(wide.dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    half = inv_freq.shape[-1]
    turned, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    a, b = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        turned = jnp.stack([a, b], -1).reshape(turned.shape)
        return [jnp.concatenate([turned, rest], -1)]
    return [jnp.concatenate([a, b, rest], -1)]


def positions(lengths: jax.Array, tokens: int) -> jax.Array:
    """Where new tokens stand: [B, T]."""
    return lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]


def part_shapes(qkv: Any, k_cache: Any, v_cache: Any) -> list[tuple[int, ...]]:
    """Shapes of query, new keys and new values in qkv, from those of the caches."""
    (kv_heads, width), value_width = k_cache.shape[-2:], v_cache.shape[-1]
    of_keys = kv_heads * (width + value_width)
    heads = ((qkv.shape[-1] - of_keys) // width, kv_heads, kv_heads)
    widths = (width, width, value_width)
    lead = tuple(qkv.shape[:-1])
    return [(*lead, n, h) for n, h in zip(heads, widths, strict=True)]


def split(qkv: jax.Array, k_cache: Any, v_cache: Any) -> list[jax.Array]:
    """Query, new keys and new values of qkv, for these caches.

    Along explicit mesh axes they are sharded as qkv is, but for its width.
    """
    shapes = part_shapes(qkv, k_cache, v_cache)

    def parts(qkv: jax.Array) -> list[jax.Array]:
        ends = list(itertools.accumulate(n * h for *_, n, h in shapes[:2]))
        flat = jnp.split(qkv, ends, axis=-1)
        return [x.reshape(shape) for x, shape in zip(flat, shapes, strict=True)]

    types = [part_type(jax.typeof(qkv), shape) for shape in shapes]
    return compat.on_auto_axes(parts, types)(qkv)


def part_type(qkv: Any, shape: tuple[int, ...]) -> Any:
    """The type of a part [*B, N, H] of qkv."""
    return avals.like(qkv, shape, qkv.dtype, (*qkv.sharding.spec[:-1], None, None))


def rope_append(*operands: jax.Array, config: RopeConfig) -> list[jax.Array]:
    """`[query, k_cache, v_cache]` of canonical operands.

    Args:
      *operands: the arrays named in `config.present`.
      config: the call.
    """
    o = dict(zip(config.present, operands, strict=True))
    if o["k_cache"].ndim > 4:
        shared = o["inv_freq"].shape[0] == 1
        if shared:
            o["inv_freq"] = o["inv_freq"][0]
        axes = [None if shared and n == "inv_freq" else 0 for n in o]
        fun = functools.partial(rope_append, config=config)
        return jax.vmap(fun, axes)(*o.values())
    if config.packed:
        caches = o["k_cache"], o["v_cache"]
        o["query"], o["k_new"], o["v_new"] = split(o[QKV], *caches)
    lengths, table = o["cache_seqlens"], o.get("page_table")
    at = positions(lengths, o["query"].shape[1])
    inv_freq = o["inv_freq"][:, None, None]
    query, key = (
        turned(o[n], at, inv_freq, config.interleaved) for n in ("query", "k_new")
    )
    caches = [
        decode_reference.append(o[name], x.astype(o[name].dtype), lengths, table)
        for name, x in (("k_cache", key), ("v_cache", o["v_new"]))
    ]
    return [query.astype(o["query"].dtype), *caches]
