"""Partitioning of `rope_append_kv`: sequences, heads, places and pages stay sharded.

Lives here: the sharding rule given to Shardy, and what each device computes. A device
that has some places of each sequence, or some of the pages, writes the tokens that
belong there: for it they are pages, and a table says which of them it has.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_flash._src import compat, partitioning, rope_reference
from jax_flash._src.rope_inner import RESULTS, rope_append_i
from jax_flash._src.rope_reference import QKV, RopeConfig

CACHES = ("k_cache", "v_cache")
Axes = tuple[str, ...]


def _dimensions(config: RopeConfig, outer: int) -> dict[str, tuple[str, ...]]:
    """Symbolic dimensions of operands and results with `outer` ones that `vmap` added.

    Heads of queries and of keys have nothing to do with each other here. Any sequence
    may write to any page: new tokens of a call with pages are whole on every device.
    Side by side in one array they are whole as far as heads go.
    """
    b, lead = ("c", ("p", "g")) if config.paged else ("b", ("b", "p"))
    dimensions = {
        QKV: (b, "t", "w"),
        "query": (b, "t", "n", "h"),
        "k_new": (b, "t", "k", "h"),
        "v_new": (b, "t", "k", "hv"),
        "k_cache": (*lead, "k", "h"),
        "v_cache": (*lead, "k", "hv"),
        "cache_seqlens": (b,),
        "inv_freq": (b, "f"),
        "page_table": (b, "m"),
    }
    return {name: (*_batch_dims(outer), *own) for name, own in dimensions.items()}


def _batch_dims(outer: int) -> tuple[str, ...]:
    return tuple(f"v{i}" for i in range(outer))


def _sharded(outer: int) -> tuple[str, ...]:
    """What may be sharded: of a contiguous cache "p" are the places of a sequence."""
    return (*_batch_dims(outer), "b", "p", "n", "k")


APART = ({"n", "k"}, {"n", "p"})
"""Dimensions that no array has both of, so that one mesh axis may split both."""


def _sharding_rule(config: RopeConfig, mesh: Any, operands: Any, results: Any):
    """The einsum-like rule, with the factors that Shardy must leave whole."""
    del mesh
    outer = len(results[0].shape) - 4
    dimensions = _dimensions(config, outer)
    fresh = iter(f"u{i}" for i in range(10**6))
    order: list[str] = []
    texts = []
    arrays = (*operands, *results)
    for name, x in zip((*config.present, *RESULTS), arrays, strict=True):
        # A dimension of size 1 is shared: it may not take part in a larger factor.
        dims = [
            next(fresh) if size == 1 else dim
            for dim, size in zip(dimensions[name], x.shape, strict=True)
        ]
        order.extend(dim for dim in dims if dim not in order)
        texts.append(" ".join(dims))
    count = len(config.present)
    rule = f"{', '.join(texts[:count])} -> {', '.join(texts[count:])}"
    sharded = _sharded(outer)
    whole = tuple(d for d in order if d not in sharded and not d.startswith("u"))
    return rule, {"need_replication_factors": whole}


def _partition(config: RopeConfig, mesh: Any, operands: Any, results: Any):
    """What each device computes, and the shardings under which it does."""
    mesh = partitioning.refined_mesh(mesh, operands)
    outer = len(results[0].shape) - 4
    dimensions = _dimensions(config, outer)
    arrays = list(zip((*config.present, *RESULTS), (*operands, *results), strict=True))
    proposals = [
        (name, dim, size, axes)
        for name, x in arrays
        for dim, size, axes in zip(
            dimensions[name], x.shape, partitioning.axes_of(mesh, x), strict=True
        )
    ]
    chosen: dict[str, Axes] = dict.fromkeys(_sharded(outer), ())

    def take(dim: str, names: tuple[str, ...]) -> None:
        """The longest usable prefix of the first proposal that has one."""
        if chosen[dim]:
            return
        others = (other for other in chosen if {dim, other} not in APART)
        used = {axis for other in others for axis in chosen[other]}
        for name, of, size, axes in proposals:
            got: list[str] = []
            parts = 1
            for axis in axes if name in names and of == dim else ():
                if axis in used or size % (parts * mesh.shape[axis]):
                    break
                got.append(axis)
                parts *= mesh.shape[axis]
            if got:
                chosen[dim] = tuple(got)
                return

    # Caches are what is large: they stay as they are.
    for dim in chosen:
        take(dim, CACHES)
    for dim in chosen:
        take(dim, config.present)

    def local(name: str, x: Any) -> NamedSharding:
        spec = [
            chosen.get(dim, ()) if size > 1 else ()
            for dim, size in zip(dimensions[name], x.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))

    parts = {
        dim: math.prod(mesh.shape[axis] for axis in axes)
        for dim, axes in chosen.items()
    }

    def run(*xs: jax.Array) -> tuple[jax.Array, ...]:
        named, own = dict(zip(config.present, xs, strict=True)), config
        with compat.without_mesh():
            if config.packed and parts["k"] > 1:
                named = _own_heads(named, lax.axis_index(chosen["k"]), parts["k"])
                own = dataclasses.replace(own, packed=False)
            if parts["p"] > 1:
                named = _own_places(named, lax.axis_index(chosen["p"]), parts["p"])
                own = dataclasses.replace(own, paged=True)
            operands = (named[name] for name in own.present)
            return tuple(rope_append_i.bind(*operands, config=own))

    shardings = [local(name, x) for name, x in arrays]
    count = len(config.present)
    return mesh, run, tuple(shardings[count:]), tuple(shardings[:count])


def _own_heads(
    named: dict[str, jax.Array], part: jax.Array, parts: int
) -> dict[str, jax.Array]:
    """Operands with parts of qkv, for the `part`-th of `parts` of the cached heads."""
    own = named["k_cache"].shape[-2]
    whole = (
        jax.ShapeDtypeStruct((own * parts, named[n].shape[-1]), named[n].dtype)
        for n in CACHES
    )
    query, *new = rope_reference.split(named[QKV], *whole)
    key, value = (lax.dynamic_slice_in_dim(x, part * own, own, -2) for x in new)
    return named | {"query": query, "k_new": key, "v_new": value}


def _own_places(
    named: dict[str, jax.Array], part: jax.Array, parts: int
) -> dict[str, jax.Array]:
    """Operands with a page table, for the `part`-th of `parts` of the places."""
    *batch, own = named["k_cache"].shape[:-3]
    if "page_table" in named:
        # What becomes negative, or no smaller than `own`, is on another device.
        table = named["page_table"] - part * own
    else:
        sequence = jnp.arange(own, dtype=jnp.int32)[:, None]
        is_own = jnp.arange(parts, dtype=jnp.int32)[None] == part
        table = jnp.where(is_own, sequence, jnp.int32(-1))
        table = jnp.broadcast_to(table, (*batch, own, parts))
    return named | {"page_table": table}


def _bind(config: RopeConfig, *operands: jax.Array) -> list[jax.Array]:
    return rope_append_i.bind(*operands, config=config)


partitioned = partitioning.over_devices(_bind, _partition, _sharding_rule)
"""Runs the call, split over devices."""
