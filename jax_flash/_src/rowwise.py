"""Operations on rows: one primitive each under every transformation, as for attention.

Lives here: what `sample`, `top_k` and `rms_norm` share (abstract evaluation, batching,
sharding, lowering). Each of them describes itself by a `RowOp`.

Operands are of two kinds. One of rows is [G, *R, ...]: G groups of rows, numbered by
any number of dimensions. One of groups is [G, ...], such as the weight of a norm. Each
of these sizes is 1 where the operand is shared along it. `vmap` only makes more groups,
so it copies nothing that it does not map, and a result of groups (the gradient of a
weight) stays apart for each of its elements. Every dimension of rows may be sharded;
they become one only on a device, for jnp and the kernels, which see [G, R, ...].
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_flash._src import compat, partitioning, registry
from jax_flash._src.avals import like, mesh_axes
from jax_flash._src.inner import new_primitive
from jax_flash._src.primitives import device_hint

Axes = partitioning.Axes


class Options(Protocol):
    """The static argument of an operation: frozen, hashable."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each operand."""
        ...

    @property
    def result_kinds(self) -> tuple[str, ...]:
        """The kind of each result."""
        ...


@dataclasses.dataclass(frozen=True)
class Result:
    """A result: its dimensions after the leading ones."""

    trailing: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class RowOp:
    """One operation.

    Attributes:
      name: of the primitive.
      results: (*operand types, options) -> its results. The first operand is one of
        rows with one dimension more, [G, *R, V].
      reference: (*operands, options) -> the results in jnp.
      kernel: the same through an FFI call; None where there is no kernel.
      why_not: (*operand types, options) -> why the kernel cannot run it, or None.
    """

    name: str
    results: Callable[..., list[Result]]
    reference: Callable[..., list[jax.Array]]
    kernel: Callable[..., list[jax.Array]] | None = None
    why_not: Callable[..., str | None] = lambda *avals, options: None


def _leading(kind: str, shapes: Sequence[tuple]) -> int:
    """How many dimensions, of group and rows, an operand of a call begins with."""
    return len(shapes[0]) - 1 if kind == "row" else 1


def leading_sizes(options: Options, shapes: Sequence[tuple]) -> tuple[int, ...]:
    """G and the sizes of the dimensions of rows of a call."""
    count = _leading("row", shapes)
    sizes = [
        shape[:count] if kind == "row" else (shape[0], *(1,) * (count - 1))
        for kind, shape in zip(options.kinds, shapes, strict=True)
    ]
    return jnp.broadcast_shapes(*sizes)


def _abstract(op: RowOp, *avals: Any, options: Options, **_: Any) -> list[Any]:
    shapes = [x.shape for x in avals]
    sizes = leading_sizes(options, shapes)
    spec: list[Any] = [None] * len(sizes)
    for kind, x in zip(options.kinds, avals, strict=True):
        for i, size in enumerate(sizes[: _leading(kind, shapes)]):
            axes = mesh_axes([x.sharding.spec[i]])
            # An axis splits one dimension only.
            if spec[i] is None and x.shape[i] == size and not axes & mesh_axes(spec):
                spec[i] = x.sharding.spec[i]

    def result(kind: str, r: Result) -> Any:
        count = _leading(kind, shapes)
        own = (*spec[:count], *(None,) * len(r.trailing))
        return like(avals[0], sizes[:count] + r.trailing, r.dtype, own)

    results = op.results(*avals, options=options)
    return list(map(result, options.result_kinds, results))


def _batch(
    primitive: Primitive, args: Any, axes: Any, *, options: Options, **params: Any
) -> tuple[Any, list[int]]:
    """Folds the mapped axis into the groups."""
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    moved = [
        x[None] if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(args, axes, strict=True)
    ]
    groups = leading_sizes(options, [x.shape[1:] for x in moved])[0]

    def folded(x: jax.Array) -> jax.Array:
        if x.shape[:2] == (1, 1):
            return x[0]
        x = jnp.broadcast_to(x, (size, groups, *x.shape[2:]))
        return x.reshape(size * groups, *x.shape[2:])

    operands = [folded(x) for x in moved]
    outs = primitive.bind(*operands, options=options, **params)
    outs = [x.reshape(size, groups, *x.shape[1:]) for x in outs]
    return outs, [0] * len(outs)


def _sharding_rule(options: Options, mesh: Any, args: Any, results: Any):
    """Groups and rows may be split, nothing else; sizes of 1 take no part."""
    del mesh
    fresh = iter(f"u{i}" for i in range(10**6))
    whole: list[str] = []
    shapes = [tuple(x.shape) for x in args]

    def text(kind: str, shape: tuple[int, ...]) -> str:
        dims = []
        for i, size in enumerate(shape):
            if i < _leading(kind, shapes) and size != 1:
                dims.append(f"r{i}" if i else "g")
            else:
                dims.append(next(fresh))
                whole.append(dims[-1])
        return " ".join(dims)

    left = [text(k, shape) for k, shape in zip(options.kinds, shapes, strict=True)]
    kinds = options.result_kinds
    right = [text(k, tuple(x.shape)) for k, x in zip(kinds, results, strict=True)]
    rule = f"{', '.join(left)} -> {', '.join(right)}"
    return rule, {"need_replication_factors": tuple(whole)}


def _take(mesh: Mesh, candidates: Iterator[Axes], size: int, used: set[str]) -> Axes:
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


def _partition(op: RowOp, options: Options, mesh: Mesh, args: Any, results: Any):
    """What each device computes, and the shardings under which it does."""
    mesh = partitioning.refined_mesh(mesh, args)
    shapes = [tuple(x.shape) for x in args]
    sizes = leading_sizes(options, shapes)
    kinds = options.result_kinds
    arrays = [*zip(options.kinds, args, strict=True), *zip(kinds, results, strict=True)]
    proposals = [(k, tuple(x.shape), partitioning.axes_of(mesh, x)) for k, x in arrays]
    used: set[str] = set()
    split = [
        _take(
            mesh,
            (
                axes[i]
                for kind, shape, axes in proposals
                if i < _leading(kind, shapes) and shape[i] > 1
            ),
            size,
            used,
        )
        for i, size in enumerate(sizes)
    ]

    def local(kind: str, x: Any) -> NamedSharding:
        spec = [
            (split[i] or None) if i < _leading(kind, shapes) and size > 1 else None
            for i, size in enumerate(x.shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    over_rows = tuple(axis for axes in split[1:] for axis in axes)

    def run(*xs: jax.Array) -> tuple[jax.Array, ...]:
        with compat.without_mesh():
            outs = _of_flat_rows(op, options, *xs)
            # What devices add up over rows of a group is partial.
            return tuple(
                lax.psum(x, over_rows) if kind == "group" and over_rows else x
                for kind, x in zip(kinds, outs, strict=True)
            )

    shardings = [local(kind, x) for kind, x in arrays]
    count = len(options.kinds)
    return mesh, run, tuple(shardings[count:]), tuple(shardings[:count])


def _of_flat_rows(op: RowOp, options: Options, *operands: jax.Array) -> list[jax.Array]:
    """The operation on one device, where rows have one dimension."""
    sizes = leading_sizes(options, [x.shape for x in operands])
    count, rows = len(sizes), math.prod(sizes[1:])

    def flat(kind: str, x: jax.Array) -> jax.Array:
        if kind == "group":
            return x
        shared = math.prod(x.shape[1:count]) == 1
        if not shared:
            x = jnp.broadcast_to(x, (x.shape[0], *sizes[1:], *x.shape[count:]))
        return x.reshape(x.shape[0], 1 if shared else rows, *x.shape[count:])

    flattened = [flat(k, x) for k, x in zip(options.kinds, operands, strict=True)]
    outs = _inner(op).bind(*flattened, options=options)
    return [
        x.reshape(*sizes, *x.shape[2:]) if kind == "row" else x
        for kind, x in zip(options.result_kinds, outs, strict=True)
    ]


def _whole(op: RowOp, options: Options, *operands: jax.Array) -> list[jax.Array]:
    """The operation where nobody splits it."""
    results = _abstract(op, *map(jax.typeof, operands), options=options)
    fun = functools.partial(_of_flat_rows, op, options)
    return compat.on_auto_axes(fun, results)(*operands)


@functools.cache
def _inner(op: RowOp) -> Primitive:
    """What the compiler sees after partitioning: the kernel on CUDA, else jnp."""
    in_jnp = mlir.lower_fun(op.reference, multiple_results=True)
    primitive = new_primitive(
        f"{op.name}_inner", functools.partial(_abstract, op), in_jnp
    )
    if op.kernel is not None:
        by_kernel = mlir.lower_fun(op.kernel, multiple_results=True)

        def on_cuda(ctx: Any, *operands: Any, options: Options) -> Any:
            extension = registry.extension()
            shapes = [x.shape for x in (*ctx.avals_in, *ctx.avals_out)]
            runs = (
                extension.missing is None
                and not any(0 in shape for shape in shapes)
                and op.why_not(*ctx.avals_in, options=options) is None
            )
            lower = by_kernel if runs else in_jnp
            return lower(ctx, *operands, options=options)

        mlir.register_lowering(primitive, on_cuda, platform="cuda")
    return primitive


@functools.cache
def primitive(op: RowOp) -> Primitive:
    """What JAX transforms. Its derivatives are for whoever describes the operation."""
    partitioned = partitioning.over_devices(
        functools.partial(_whole, op), functools.partial(_partition, op), _sharding_rule
    )

    def lowered(*operands: Any, options: Options, needs_devices: Any) -> Any:
        return partitioned(options, *operands)

    outer = new_primitive(
        op.name,
        functools.partial(_abstract, op),
        mlir.lower_fun(lowered, multiple_results=True),
    )
    batching.primitive_batchers[outer] = functools.partial(_batch, outer)
    return outer


def bind(op: RowOp, options: Options, *operands: jax.Array) -> list[jax.Array]:
    """The results of a call, under whatever transformation it is traced."""
    operands = tuple(compat.vary_together(operands))
    return primitive(op).bind(*operands, options=options, needs_devices=device_hint())
