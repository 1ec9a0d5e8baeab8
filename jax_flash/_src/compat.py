"""The only room that may look at JAX versions or reach into private JAX modules.

All that the package uses is public JAX today; it is gathered where a future version may
differ. The one private module here is for the benchmarks.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import jax
from jax import lax
from jax.extend.core import InconclusiveDimensionOperation

Fun = TypeVar("Fun", bound=Callable)

DETERMINISTIC_FLAGS = (
    "--xla_gpu_deterministic_ops",
    "--xla_gpu_exclude_nondeterministic_ops",
)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Names of the manual mesh axes (inside `shard_map`) along which `x` varies."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_together(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Makes every operand vary over the union of the operands' manual axes.

    The casts are what JAX transposes into the sum of gradients over devices.
    """
    axes = [varying_axes(x) for x in operands]
    union = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, axes, strict=True)
    ]


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, a fresh constant, varying over the same manual axes as `like`."""
    missing = varying_axes(like) - varying_axes(x)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def at_most(size: int, limit: int) -> bool:
    """`size <= limit`, False where `size` is symbolic (export) and may be larger."""
    try:
        return bool(size <= limit)
    except InconclusiveDimensionOperation:
        return False


def partly_manual() -> bool:
    """Whether tracing happens in a `shard_map` over some but not all mesh axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return 0 < len(mesh.manual_axes) < len(mesh.axis_names)


def on_auto_axes(fun: Callable, results: Sequence[Any]) -> Callable:
    """`fun`, which knows nothing of explicit mesh axes, for operands that have them.

    Inside, the compiler chooses shardings; the results get those of `results`.
    """
    mesh = results[0].sharding.mesh
    if not mesh.explicit_axes:
        return fun
    shardings = [x.sharding for x in results]
    mapped = jax.sharding.auto_axes(
        fun, axes=mesh.explicit_axes, out_sharding=shardings
    )

    def under_mesh(*args: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return mapped(*args)

    return under_mesh


def sharded_like(x: jax.Array, like: Any) -> jax.Array:
    """`x` with the sharding of the type `like` along explicit mesh axes."""
    wanted = like.sharding
    if not wanted.mesh.explicit_axes or jax.typeof(x).sharding == wanted:
        return x
    return jax.reshard(x, wanted)


def on_one_mesh(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays, those without explicit mesh axes on the mesh of those that have some."""
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    explicit = [mesh for mesh in meshes if mesh.explicit_axes]
    if not explicit:
        return list(arrays)
    whole = jax.sharding.NamedSharding(explicit[0], jax.sharding.PartitionSpec())
    return [
        x if mesh.explicit_axes else jax.reshard(x, whole)
        for x, mesh in zip(arrays, meshes, strict=True)
    ]


def allows_rank_promotion(fun: Fun) -> Fun:
    """Keeps a user's `jax_numpy_rank_promotion="raise"` out of our own code."""

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return fun(*args, **kwargs)

    return cast(Fun, wrapped)


def without_mesh() -> AbstractContextManager:
    """A context in which no mesh is set: what is traced is local to one device."""
    empty = jax.sharding.AbstractMesh((), ())
    return jax.sharding.use_abstract_mesh(empty)


def cudnn_attention() -> Any:
    """JAX's private module of cuDNN's attention.

    Benchmarks compare with its paged and packed calls, which `jax.nn` does not offer.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def deterministic_ops() -> bool:
    """Whether the user asked XLA for deterministic operations on GPUs.

    JAX has no setting of its own, and shows a lowering neither XLA's flags nor the
    `compiler_options` of a `jit`. What is left is the environment: `XLA_FLAGS`, or the
    file that it names, where the last mention of a flag counts.
    """
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-"):
        path = pathlib.Path(text)
        text = path.read_text() if path.is_file() else ""
    on = dict.fromkeys(DETERMINISTIC_FLAGS, False)
    for word in text.split():
        name, _, value = word.partition("=")
        if name in on:
            on[name] = value.lower() in ("", "1", "true")
    return any(on.values())
