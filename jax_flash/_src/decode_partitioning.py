"""Partitioning of decoding: sequences and heads stay sharded, everything else is whole.

Lives here: the sharding rule given to Shardy, and what each device computes. Pools of
pages belong to all sequences, so that they are sharded by heads alone.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_flash._src import compat, decode_inner, partitioning
from jax_flash._src.decode_call import DecodeConfig

RESULTS = ("out", "lse")
SHARDED = ("b", "n", "kh")
Axes = tuple[str, ...]


def _dimensions(config: DecodeConfig, heads: int, kv_heads: int) -> dict[str, tuple]:
    """Symbolic dimensions of operands and results; "n" is "kh" if they are as many."""
    k = "n" if heads == kv_heads else "kh"
    lead = ("p", "g") if "page_table" in config.present else ("b", "s")
    return {
        "query": ("b", "t", "n", "h"),
        "k_cache": (*lead, k, "h"),
        "v_cache": (*lead, k, "hv"),
        "cache_seqlens": ("b",),
        "page_table": ("b", "m"),
        "sinks": ("b", "n"),
        "alibi_slopes": ("b", "n"),
        "k_scale": ("b", k),
        "v_scale": ("b", k),
        "out": ("b", "t", "n", "hv"),
        "lse": ("b", "n", "t"),
    }


def _named(config: DecodeConfig, operands: Any, results: Any) -> list[tuple[str, Any]]:
    arrays = (*operands, *results)
    return list(zip((*config.present, *RESULTS), arrays, strict=True))


def _sharding_rule(config: DecodeConfig, mesh: Any, operands: Any, results: Any):
    """The einsum-like rule, with the factors that Shardy must leave whole."""
    del mesh
    dimensions = _dimensions(config, operands[0].shape[2], operands[1].shape[2])
    fresh = iter(f"u{i}" for i in range(10**6))
    order: list[str] = []
    texts = []
    for name, x in _named(config, operands, results):
        # A dimension of size 1 is shared: it may not take part in a larger factor.
        dims = [
            next(fresh) if size == 1 else dim
            for dim, size in zip(dimensions[name], x.shape, strict=True)
        ]
        order.extend(dim for dim in dims if dim not in order)
        texts.append(" ".join(dims))
    count = len(config.present)
    rule = f"{', '.join(texts[:count])} -> {', '.join(texts[count:])}"
    whole = tuple(d for d in order if d not in SHARDED and not d.startswith("u"))
    return rule, {"need_replication_factors": whole}


def _partition(config: DecodeConfig, mesh: Any, operands: Any, results: Any):
    """What each device computes, and the shardings under which it does."""
    mesh = partitioning.refined_mesh(mesh, operands)
    heads, kv_heads = operands[0].shape[2], operands[1].shape[2]
    dimensions = _dimensions(config, heads, kv_heads)
    proposals = [
        (dim, size, axes)
        for name, x in _named(config, operands, results)
        for dim, size, axes in zip(
            dimensions[name], x.shape, partitioning.axes_of(mesh, x), strict=True
        )
    ]
    used: set[str] = set()

    def take(dims: Iterable[str], size: int) -> Axes:
        """The longest usable prefix of the first proposal that has one."""
        for dim, _, axes in proposals:
            got: list[str] = []
            parts = 1
            for axis in axes if dim in dims else ():
                if axis in used or size % (parts * mesh.shape[axis]):
                    break
                got.append(axis)
                parts *= mesh.shape[axis]
            if got:
                used.update(got)
                return tuple(got)
        return ()

    batch = take(("b",), operands[0].shape[0])
    by_head = take(("n", "kh"), heads)
    # Key/value heads are split as the query heads while they divide; beyond that every
    # device needs exactly one of them, or query heads would miss the head they read.
    count = 0
    parts = 1
    while count < len(by_head) and kv_heads % (parts * mesh.shape[by_head[count]]) == 0:
        parts *= mesh.shape[by_head[count]]
        count += 1
    by_kv_head = by_head[:count]
    by_query_head = by_head if parts == kv_heads else by_kv_head
    chosen = {"b": batch, "n": by_query_head, "kh": by_kv_head}

    def local(name: str, x: Any) -> NamedSharding:
        spec = [
            chosen.get(dim, ()) if size > 1 else ()
            for dim, size in zip(dimensions[name], x.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))

    def run(*xs: jax.Array) -> tuple[jax.Array, ...]:
        with compat.without_mesh():
            return tuple(decode_inner.decode_i.bind(*xs, config=config))

    operand_shardings = tuple(map(local, config.present, operands))
    result_shardings = tuple(map(local, RESULTS, results))
    return mesh, run, result_shardings, operand_shardings


def _bind(config: DecodeConfig, *operands: jax.Array) -> list[jax.Array]:
    return decode_inner.decode_i.bind(*operands, config=config)


partitioned = partitioning.over_devices(_bind, _partition, _sharding_rule)
"""Runs the call, split over devices along sequences and heads."""
