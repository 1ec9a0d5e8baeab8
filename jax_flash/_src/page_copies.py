"""Copies of pages of a cache, one after the other.

Lives here: what `PagedKVCache.copy_pages` makes of its lists of pages.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._src import validate


def page_numbers(name: str, x: Any) -> jax.Array:
    """Pages to copy from or to as int32 [n]."""
    if isinstance(x, list | tuple):
        try:
            # NumPy has wider integers, but knows no traced ones.
            traced = any(isinstance(page, jax.Array) for page in x)
            x = (jnp if traced else np).asarray(x) if x else np.zeros(0, np.int32)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be integers [n], got {x!r}") from None
    got = validate.shape_of(name, x)
    if not jnp.issubdtype(got.dtype, jnp.integer) or len(got.shape) != 1:
        raise ValueError(f"{name} must be integers [n], got {got.dtype}{got.shape}")
    return jnp.asarray(validate.as_int32(x))


# Compiled as one for calls without jit, as are the seeds of dropout.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def in_order(
    source: jax.Array, target: jax.Array, pages: int
) -> tuple[jax.Array, jax.Array]:
    """Copies that may be done at once for copies that are done one after the other.

    Returns:
      Where each target's contents come from before all copies, in [0, pages), and the
      targets, each once, `pages` where nothing is to be written.
    """
    count = source.shape[0]
    exist = (source >= 0) & (source < pages) & (target >= 0) & (target < pages)
    target = jnp.where(exist, target, pages)
    at = jnp.arange(count, dtype=jnp.int32)
    earlier = at[None, :] < at[:, None]
    # What a copy reads was written by the last one before it that has it for target.
    writes = earlier & (target[None, :] == source[:, None])
    writer = jnp.max(jnp.where(writes, at[None, :], -1), axis=1)
    first = jnp.where(writer < 0, at, writer)
    # `jax.export` may leave the number of copies open.
    doublings = (count - 1).bit_length() if isinstance(count, int) else 31
    for _ in range(doublings):
        first = first[first]
    again = (earlier.T & (target[None, :] == target[:, None])).any(axis=1)
    origin = jnp.clip(source[first], 0, pages - 1)
    return origin, jnp.where(again, pages, target)
