"""`rope_append_kv` as a transformable operation: the outer primitive and its rules.

Lives here: `rope_append_p`, lowered through the partitioning rule, its batching and its
derivative, which is that of the jnp specification.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jax_flash._src import (
    compat,
    derivatives,
    primitives,
    rope_inner,
    rope_partitioning,
    rope_reference,
)
from jax_flash._src.inner import new_primitive
from jax_flash._src.rope_reference import QKV, RopeConfig

READERS = {
    "query": ("cache_seqlens", "inv_freq"),
    QKV: ("cache_seqlens", "inv_freq"),
    "k_cache": (QKV, "k_new", "cache_seqlens", "inv_freq", "page_table"),
    "v_cache": (QKV, "v_new", "cache_seqlens", "page_table"),
}
"""What else the result of each of these operands depends on."""


def _rope_append(*operands: jax.Array, config: RopeConfig, needs_devices: Any) -> Any:
    return rope_partitioning.partitioned(config, *operands)


rope_append_p = new_primitive(
    "rope_append",
    rope_inner.abstract,
    mlir.lower_fun(_rope_append, multiple_results=True),
)


def _bind(config: RopeConfig, *operands: jax.Array) -> list[jax.Array]:
    return rope_append_p.bind(
        *operands, config=config, needs_devices=primitives.device_hint()
    )


def serves(query: Any, others: tuple[Any, ...]) -> bool:
    """Whether a call is one of the primitive: all arrays of one type of the kernel.

    Args:
      query: array or its type.
      others: new keys, new values and caches.
    """
    return str(query.dtype) in rope_inner.DTYPES and all(
        x.dtype == query.dtype for x in others
    )


def rope_append(
    operands: dict[str, jax.Array], *, interleaved: bool
) -> list[jax.Array]:
    """`[query, k_cache, v_cache]` under every JAX transformation.

    Args:
      operands: canonical operands, with qkv or its three parts; `page_table` may be
        missing.
      interleaved: whether neighbours are pairs.
    """
    config = RopeConfig(interleaved, "page_table" in operands, QKV in operands)
    o = dict(operands)
    for name, readers in READERS.items():
        if name not in operands:
            continue
        # Each result varies over the manual axes of what it is made of.
        made_of = [operands[n] for n in (name, *readers) if n in operands]
        o[name] = compat.vary_together(made_of)[0]
    return _bind(config, *(o[name] for name in config.present))


def _batch(args: tuple, axes: tuple, *, config: RopeConfig, **_: Any) -> Any:
    """One more dimension in front; where queries alone have it, more of their heads."""
    count = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    given = dict(zip(config.present, args, strict=True))
    mapped = {n: a for n, a in zip(config.present, axes, strict=True) if a is not None}
    if tuple(mapped) == ("query",):
        query = jnp.moveaxis(given["query"], mapped["query"], -3)
        *lead, copies, heads, width = query.shape
        given["query"] = query.reshape(*lead, copies * heads, width)
        query_out, *caches = _bind(config, *given.values())
        return [query_out.reshape(query.shape), *caches], [len(lead), None, None]

    def stacked(name: str, x: jax.Array) -> jax.Array:
        if name in mapped:
            x = jnp.moveaxis(x, mapped[name], 0)
        if name != "inv_freq":
            return x if name in mapped else jnp.broadcast_to(x, (count, *x.shape))
        if name not in mapped:
            x = x[None]
        if set(x.shape[:-1]) == {1}:
            return x
        batch = given["cache_seqlens"].shape
        if "cache_seqlens" in mapped:
            axis = mapped["cache_seqlens"]
            batch = batch[:axis] + batch[axis + 1 :]
        return jnp.broadcast_to(x, (count, *batch, x.shape[-1]))

    outs = _bind(config, *(stacked(name, x) for name, x in given.items()))
    return outs, [0] * len(outs)


def _jvp(
    primals: Any, tangents: Any, *, config: RopeConfig, needs_devices: Any
) -> tuple[Any, Any]:
    """Derivatives are those of jnp."""
    del needs_devices
    fun = functools.partial(rope_reference.rope_append, config=config)
    return _bind(config, *primals), derivatives._jvp_of(fun, primals, tangents)


batching.primitive_batchers[rope_append_p] = _batch
ad.primitive_jvps[rope_append_p] = _jvp
