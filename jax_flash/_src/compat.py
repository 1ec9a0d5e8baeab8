"""The only room that may look at JAX versions or reach into private JAX modules.

Everything here is public JAX today; it is gathered where a future version may differ.
"""

from collections.abc import Sequence

import jax
from jax import lax
from jax.extend.core import InconclusiveDimensionOperation


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


def without_mesh():
    """A context in which no mesh is set: what is traced is local to one device."""
    empty = jax.sharding.AbstractMesh((), ())
    return jax.sharding.use_abstract_mesh(empty)
