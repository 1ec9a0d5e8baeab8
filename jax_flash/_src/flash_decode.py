"""Decoding as a transformable operation: the outer primitive and its rules.

Lives here: `decode_p`, lowered through the partitioning rule, its batching and its
derivative. `vmap` over caches puts their axis into the batch; queries that share a
cache become sequences that share its pages, so that nothing of a cache is copied.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jax_flash._src import (
    compat,
    decode_inner,
    decode_partitioning,
    decode_reference,
    derivatives,
    primitives,
)
from jax_flash._src.decode_call import OPERANDS, DecodeConfig
from jax_flash._src.flash_mha import flash_mha
from jax_flash._src.inner import new_primitive

CACHES = ("k_cache", "v_cache")


def _decode(*operands: jax.Array, config: DecodeConfig, needs_devices: Any) -> Any:
    return decode_partitioning.partitioned(config, *operands)


decode_p = new_primitive(
    "flash_decode",
    decode_inner.abstract,
    mlir.lower_fun(_decode, multiple_results=True),
)


def _bind(config: DecodeConfig, *operands: jax.Array) -> list[jax.Array]:
    return decode_p.bind(
        *operands, config=config, needs_devices=primitives.device_hint()
    )


def flash_decode(config: DecodeConfig, operands: dict[str, jax.Array]) -> list:
    """`[out, lse]` of canonical operands under every JAX transformation.

    Args:
      config: the call.
      operands: canonical operands, those named in `config.present`.
    """
    ordered = [operands[name] for name in config.present]
    return _bind(config, *compat.vary_together(ordered))


def _folded(x: jax.Array, size: int) -> jax.Array:
    """[V, B|1, ...] -> [V * size, ...]."""
    x = jnp.broadcast_to(x, (x.shape[0], size, *x.shape[2:]))
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


@compat.allows_rank_promotion
def _batch(args: tuple, axes: tuple, *, config: DecodeConfig, **_: Any) -> Any:
    """The mapped axis V joins the batch B."""
    count = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    mapped = {n: a is not None for n, a in zip(config.present, axes, strict=True)}
    o = {
        name: x if axis is None else jnp.moveaxis(x, axis, 0)
        for name, x, axis in zip(config.present, args, axes, strict=True)
    }
    batch = o["query"].shape[1 if mapped["query"] else 0]

    def stacked(name: str) -> jax.Array:
        x = o[name]
        return x if mapped[name] else jnp.broadcast_to(x, (count, *x.shape))

    cache_is_mapped = any(mapped[name] for name in CACHES)
    table = stacked("page_table") if "page_table" in o else None
    if cache_is_mapped:
        pages = o["k_cache"].shape[1 if mapped["k_cache"] else 0]
        for name in CACHES:
            x = stacked(name)
            o[name] = x.reshape(count * x.shape[1], *x.shape[2:])
        if table is not None:
            start = pages * jnp.arange(count, dtype=jnp.int32)
            table = jnp.clip(table, 0, pages - 1) + start[:, None, None]
    elif table is None:
        # A sequence is one page, as long as it is.
        page = jnp.arange(batch, dtype=jnp.int32)[:, None]
        table = jnp.broadcast_to(page, (count, batch, 1))
    if table is not None:
        o["page_table"] = table.reshape(count * batch, table.shape[2])
    for name in ("query", "cache_seqlens"):
        o[name] = _folded(stacked(name), batch)
    for name in ("sinks", "alibi_slopes", "k_scale", "v_scale"):
        if name in o and (mapped[name] or o[name].shape[0] != 1):
            o[name] = _folded(stacked(name), batch)
    present = tuple(name for name in OPERANDS if name in o)
    outs = _bind(
        dataclasses.replace(config, present=present), *(o[name] for name in present)
    )
    return [x.reshape(count, batch, *x.shape[1:]) for x in outs], [0] * len(outs)


def _as_mha(*operands: jax.Array, config: DecodeConfig) -> list[jax.Array]:
    """The call as one of `mha` in jnp, whose derivatives are linear in memory."""

    def attend(*operands: jax.Array) -> list[jax.Array]:
        attention, given = decode_reference.as_attention(*operands, config=config)
        out, lse = flash_mha(attention, given)
        return [out.astype(operands[0].dtype), lse]

    results = decode_inner.abstract(*map(jax.typeof, operands), config=config)
    return compat.on_auto_axes(attend, results)(*operands)


def _jvp(
    primals: Any, tangents: Any, *, config: DecodeConfig, needs_devices: Any
) -> tuple[Any, Any]:
    """Derivatives are those of `mha`."""
    del needs_devices
    fun = functools.partial(_as_mha, config=config)
    return _bind(config, *primals), derivatives._jvp_of(fun, primals, tangents)


batching.primitive_batchers[decode_p] = _batch
ad.primitive_jvps[decode_p] = _jvp
