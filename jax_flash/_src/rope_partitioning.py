"""Partitioning of `rope_append_kv`: sequences, heads, places and pages stay sharded.

Lives here: the sharding rule given to Shardy, and what each device computes. A device
that has some places of each sequence, or some of the pages, writes the tokens that
belong there: for it they are pages, and a table says which of them it has.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jax_flash._src import compat, partitioning
from jax_flash._src.rope_inner import rope_append_i
from jax_flash._src.rope_reference import RopeConfig

RESULTS = ("query", "k_cache", "v_cache")
CACHES = ("k_cache", "v_cache")
Axes = tuple[str, ...]


def _dimensions(config: RopeConfig, outer: int) -> dict[str, tuple[str, ...]]:
    """Symbolic dimensions of operands and results with `outer` ones that `vmap` added.

    Heads of queries and of keys have nothing to do with each other here. Any sequence
    may write to any page: new tokens of a call with pages are whole on every device.
    """
    b, lead = ("c", ("p", "g")) if config.paged else ("b", ("b", "p"))
    dimensions = {
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
    outer = len(operands[0].shape) - 4
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
    outer = len(operands[0].shape) - 4
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

    parts = math.prod(mesh.shape[axis] for axis in chosen["p"])

    def run(*xs: jax.Array) -> tuple[jax.Array, ...]:
        with compat.without_mesh():
            if parts == 1:
                return tuple(rope_append_i.bind(*xs, config=config))
            part = lax.axis_index(chosen["p"])
            return _run_part(config, part, parts, *xs)

    shardings = [local(name, x) for name, x in arrays]
    count = len(config.present)
    return mesh, run, tuple(shardings[count:]), tuple(shardings[:count])


def _run_part(
    config: RopeConfig, part: jax.Array, parts: int, *operands: jax.Array
) -> tuple[jax.Array, ...]:
    """The call on a device that has the `part`-th of `parts` of the caches."""
    named = dict(zip(config.present, operands, strict=True))
    *batch, own = named["k_cache"].shape[:-3]
    if config.paged:
        # What becomes negative, or no smaller than `own`, is on another device.
        table = named["page_table"] - part * own
    else:
        sequence = jnp.arange(own, dtype=jnp.int32)[:, None]
        is_own = jnp.arange(parts, dtype=jnp.int32)[None] == part
        table = jnp.where(is_own, sequence, jnp.int32(-1))
        table = jnp.broadcast_to(table, (*batch, own, parts))
    paged = RopeConfig(config.interleaved, True)
    operands = tuple(({**named, "page_table": table})[name] for name in paged.present)
    return tuple(rope_append_i.bind(*operands, config=paged))


@functools.cache
def _partitioned(config: RopeConfig) -> custom_partitioning:
    """The call as a function that the compiler may partition, made once for each."""

    @custom_partitioning
    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(rope_append_i.bind(*operands, config=config))

    run.def_partition(
        functools.partial(_partition, config),
        sharding_rule=functools.partial(_sharding_rule, config),
        decode_shardings=False,
    )
    return run


def partitioned(config: RopeConfig, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Runs the call, split over devices."""
    if compat.partly_manual():
        # The callback would be given shardings without a mesh.
        return tuple(rope_append_i.bind(*operands, config=config))
    return _partitioned(config)(*operands)
