"""Partitioning: batch and heads stay sharded, sequence and width never are.

Lives here: the sharding rule given to Shardy, and the callback that decides, from the
shardings the compiler proposes, what each device computes; and what every partitioned
operation shares (meshes, `over_devices`). What a device runs is an inner primitive
(`inner`) on its local shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_flash._src import avals, compat, inner, packed
from jax_flash._src.config import QKV, RESIDUALS, TRAILING, AttentionConfig, Backward

WHOLE = ("t", "s", "h", "hv", "c", "w", "p")
"""Dimensions along sequences and widths, offsets of sequences, words of a seed,
and that of all heads in one array."""

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The static argument of a partitioned call: a forward, or a backward."""

    config: AttentionConfig
    backward: Backward | None

    @property
    def operands(self) -> tuple[str, ...]:
        if self.backward is None:
            return self.config.present
        return avals.backward_operands(self.config, self.backward)

    @property
    def results(self) -> tuple[str, ...]:
        return RESIDUALS if self.backward is None else self.backward.perturbed

    @property
    def batch_dims(self) -> int:
        return len(self.config.orders[0]) - TRAILING[self.config.present[0]]

    def heads(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """N and K of operands of these shapes."""
        return self.config.qkv_heads or (shapes[0][-2], shapes[1][-2])

    def unpacked(self) -> "Stage":
        """The same with query, key and value in place of the array of all three."""
        which = self.backward and packed.unpacked_backward(self.backward)
        return Stage(packed.unpacked(self.config), which)


def _bind(stage: Stage, *operands: jax.Array) -> tuple[jax.Array, ...]:
    if stage.backward is None:
        return tuple(inner.forward_i.bind(*operands, config=stage.config))
    return tuple(
        inner.backward_i.bind(*operands, config=stage.config, backward=stage.backward)
    )


def _trailing(name: str, query_heads: int, kv_heads: int) -> tuple[str, ...]:
    """Symbolic dimensions after the batch.

    Query and key/value heads are separate factors, not the compound "(kv group)": a
    mesh axis larger than the number of kv heads would be split into sub-axes, which JAX
    cannot write as a PartitionSpec. The callback ties the two instead.
    """
    n, k = "n", "n" if kv_heads == query_heads else "kh"
    return {
        "query": ("t", n, "h"),
        "key": ("s", k, "h"),
        "value": ("s", k, "hv"),
        "qkv": ("t", "p"),
        "bias": (n, "t", "s"),
        "mask": (n, "t", "s"),
        "sinks": (n,),
        "alibi_slopes": (n,),
        "dropout_seeds": (n, "w"),
        "q_segment_ids": ("t",),
        "kv_segment_ids": ("s",),
        "query_seq_lengths": (),
        "key_value_seq_lengths": (),
        "cu_seqlens_q": ("c",),
        "cu_seqlens_k": ("c",),
        "out": ("t", n, "hv"),
        "dout": ("t", n, "hv"),
        "lse": (n, "t"),
        "dlse": (n, "t"),
    }[name]


def _sharding_rule(stage: Stage, mesh: Any, operands: Any, results: Any):
    """The einsum-like rule, with the factors that Shardy must leave whole."""
    del mesh
    names = stage.operands + stage.results
    shapes = [tuple(x.shape) for x in (*operands, *results)]
    heads = stage.heads(shapes)
    batch = [f"b{i}" for i in range(stage.batch_dims)]
    fresh = iter(f"u{i}" for i in range(10**6))
    order: list[str] = []

    def text(name: str, shape: tuple[int, ...]) -> str:
        dims = (*batch, *_trailing(name, *heads))
        # A dimension of size 1 is shared: it may not take part in a larger factor.
        dims = [next(fresh) if n == 1 else d for d, n in zip(dims, shape, strict=True)]
        order.extend(d for d in dims if d not in order)
        return " ".join(dims)

    texts = [text(name, shape) for name, shape in zip(names, shapes, strict=True)]
    count = len(stage.operands)
    rule = f"{', '.join(texts[:count])} -> {', '.join(texts[count:])}"
    # Factors must be named in the order of their first appearance.
    whole = tuple(d for d in order if d in WHOLE)
    return rule, {"need_replication_factors": whole}


@functools.cache
def refine(mesh: Mesh) -> Mesh:
    """The mesh with axes split into primes: Shardy may shard by part of an axis."""
    names, sizes = [], []
    for axis in mesh.axis_names:
        for prime in _prime_factors(mesh.shape[axis]):
            names.append(f"{axis}_{len(names)}")
            sizes.append(prime)
    return Mesh(mesh.devices.reshape(sizes), tuple(names))


def _prime_factors(n: int) -> Iterator[int]:
    prime = 2
    while n > 1:
        if n % prime:
            prime += 1
        else:
            yield prime
            n //= prime


def refined_mesh(mesh: Mesh, arrays: Sequence[Any]) -> Mesh:
    """`refine`, also where the compiler's shardings come without a mesh.

    JAX takes the mesh from the arguments of a program: under `jax.set_mesh` there is
    none if none of these is on it yet.
    """
    if mesh.empty:
        x = arrays[0]
        # Every number of parts divides this. In the order of the program's devices.
        shape = tuple(len(x.sharding.device_set) if n else 0 for n in x.shape)
        devices = list(x.sharding.devices_indices_map(shape))
        mesh = Mesh(np.array(devices), ("devices",))
    return refine(mesh)


def axes_of(mesh: Mesh, x: Any) -> list[Axes]:
    """For each dimension of x the axes of `mesh` that split it, major to minor.

    They are those of an array that every number of parts divides: the compiler may
    split a dimension unevenly, and then JAX does not name indices.
    """
    shape = tuple(mesh.size if n else 0 for n in x.shape)
    where = x.sharding.devices_indices_map(shape)
    spec = []
    for dim in range(len(x.shape)):
        starts = [where[device][dim].start or 0 for device in mesh.devices.flat]
        start = np.reshape(starts, mesh.devices.shape)
        step = {
            name: np.abs(np.diff(start, axis=i)).max()
            for i, name in enumerate(mesh.axis_names)
        }
        split = sorted((a for a in step if step[a]), key=lambda a: -step[a])
        spec.append(tuple(split))
    return spec


def over_devices(
    bind: Callable[..., Iterable[jax.Array]],
    partition: Callable[..., Any],
    sharding_rule: Callable[..., Any],
) -> Callable[..., tuple[jax.Array, ...]]:
    """`call(config, *operands)`, which the compiler may split over devices.

    There is one `custom_partitioning` for each config, because one with static
    arguments keeps what it was last traced with.

    Args:
      bind: of config, hashable, and operands: the results, on one device.
      partition: of config, mesh, operands and results, as for `custom_partitioning`.
      sharding_rule: the same.
    """

    @functools.cache
    def of(config: Any) -> custom_partitioning:
        @custom_partitioning
        def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(bind(config, *operands))

        run.def_partition(
            functools.partial(partition, config),
            sharding_rule=functools.partial(sharding_rule, config),
            decode_shardings=False,
        )
        return run

    def call(config: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
        if compat.partly_manual():
            # The callback would be given shardings without a mesh.
            return tuple(bind(config, *operands))
        return of(config)(*operands)

    return call


@dataclasses.dataclass(frozen=True)
class _Split:
    """Mesh axes that split each batch dimension, the query heads and the kv heads."""

    batch: tuple[Axes, ...]
    query_heads: Axes
    kv_heads: Axes


def _choose(stage: Stage, mesh: Mesh, arrays: list[tuple[str, Any]]) -> _Split:
    """The sharding every device works under, from those the compiler proposes."""
    proposals = [(name, tuple(x.shape), axes_of(mesh, x)) for name, x in arrays]
    batch_dims = stage.batch_dims
    query_heads, kv_heads = stage.heads([shape for _, shape, _ in proposals])
    used: set[str] = set()

    def take(candidates: Iterator[Axes], size: int) -> Axes:
        """The longest usable prefix of the first candidate that has one."""
        for candidate in candidates:
            got: list[str] = []
            parts = 1
            for axis in candidate:
                if axis in used or size % (parts * mesh.shape[axis]):
                    break
                got.append(axis)
                parts *= mesh.shape[axis]
            if got:
                used.update(got)
                return tuple(got)
        return ()

    batch = tuple(
        take(
            (axes[i] for _, s, axes in proposals if s[i] > 1),
            max(s[i] for _, s, _ in proposals),
        )
        for i in range(batch_dims)
    )
    with_heads = ("query", "out", "dout", "key", "value")
    heads = take(
        (axes[batch_dims + 1] for name, _, axes in proposals if name in with_heads),
        query_heads,
    )
    # Key/value heads are split as the query heads while they divide; beyond that every
    # device needs exactly one of them, or query heads would miss the head they read.
    kv: list[str] = []
    parts = 1
    for axis in heads:
        if kv_heads % (parts * mesh.shape[axis]):
            break
        kv.append(axis)
        parts *= mesh.shape[axis]
    if parts < kv_heads:
        heads = tuple(kv)
    return _Split(batch, heads, tuple(kv))


def _bind_parts(
    mesh: Mesh, split: _Split, heads: tuple[int, int], stage: Stage, *args: jax.Array
) -> list[jax.Array]:
    """`_bind` of a device's own heads, cut from an array that holds those of all.

    A gradient of that array is zero but for these heads.
    """
    axes = dict(
        zip(packed.PARTS, (split.query_heads, *(split.kv_heads,) * 2), strict=True)
    )

    def begin(name: str, count: int) -> Any:
        return lax.axis_index(axes[name]) * count if axes[name] else 0

    def own(name: str, x: jax.Array) -> jax.Array:
        count = x.shape[-2] // math.prod(mesh.shape[axis] for axis in axes[name])
        return lax.dynamic_slice_in_dim(x, begin(name, count), count, x.ndim - 2)

    parts = dict(zip(packed.PARTS, packed.split(heads, args[0]), strict=True))
    local = (own(name, x) for name, x in parts.items())
    unpacked = stage.unpacked()
    outs = list(_bind(unpacked, *local, *args[1:]))
    if stage.backward is None:
        return outs

    def among_zeros(name: str, x: jax.Array) -> jax.Array:
        if name not in axes:
            return x
        count = parts[name].shape[-2]
        zeros = jnp.zeros((*x.shape[:-2], count, x.shape[-1]), x.dtype)
        start = begin(name, x.shape[-2])
        return lax.dynamic_update_slice_in_dim(zeros, x, start, x.ndim - 2)

    placed = map(among_zeros, unpacked.results, outs)
    return packed.join_gradients(stage.backward, list(placed))


def _partition(stage: Stage, mesh: Mesh, operands: Any, results: Any):
    """What each device computes, and the shardings under which it does."""
    mesh = refined_mesh(mesh, operands)
    arrays = list(
        zip((*stage.operands, *stage.results), (*operands, *results), strict=True)
    )
    split = _choose(stage, mesh, arrays)
    shape = {name: tuple(x.shape) for name, x in reversed(arrays)}
    heads = stage.heads([tuple(x.shape) for x in operands])
    batch_dims = len(split.batch)
    by_parts = stage.config.qkv_heads is not None and len(split.query_heads) > 0

    def local(name: str, x: Any) -> NamedSharding:
        batch = zip(split.batch, x.shape[:batch_dims], strict=True)
        spec = [axes if n > 1 else () for axes, n in batch]
        for size, dim in zip(
            x.shape[batch_dims:], _trailing(name, *heads), strict=True
        ):
            is_head = dim in ("n", "kh") and size > 1
            axes = split.kv_heads if name in ("key", "value") else split.query_heads
            spec.append(axes if is_head else ())
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))

    def partial_over(name: str) -> Axes:
        """Mesh axes over which the gradient of `name` is a sum of local parts."""
        assert stage.backward is not None
        axes: Axes = ()
        which = stage.backward
        for axis in which.shared[which.perturbed.index(name)]:
            axes += split.batch[axis]
        if name == QKV:
            return axes + split.query_heads
        if name in ("key", "value"):
            return axes + split.query_heads[len(split.kv_heads) :]
        if name == "bias" and shape["bias"][-3] == 1:
            return axes + split.query_heads
        return axes

    def run(*xs: jax.Array) -> tuple[jax.Array, ...]:
        with compat.without_mesh():
            if by_parts:
                outs = _bind_parts(mesh, split, heads, stage, *xs)
            else:
                outs = list(_bind(stage, *xs))
            if stage.backward is not None:
                for i, name in enumerate(stage.results):
                    axes = partial_over(name)
                    if axes:
                        outs[i] = lax.psum(outs[i], axes)
        return tuple(outs)

    operand_shardings = tuple(map(local, stage.operands, operands))
    result_shardings = tuple(map(local, stage.results, results))
    return mesh, run, result_shardings, operand_shardings


partitioned = over_devices(_bind, _partition, _sharding_rule)
"""Runs a stage on its operands, split over devices along batch and heads."""


@custom_partitioning
def identity(x: jax.Array) -> jax.Array:
    """A call that needs the list of devices; see `primitives.device_hint`."""
    return x


identity.def_partition(
    lambda mesh, args, result: (
        mesh,
        lambda x: x,
        result.sharding,
        (args[0].sharding,),
    ),
    sharding_rule="i -> i",
)
