"""Combining attention over disjoint sets of keys, from outputs and log-sum-exps.

Lives here: the checks and the mathematics of `jax_flash.merge_partials`.
"""

import reprlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

LSE_DTYPES = ("float32", "float64")

Arrays = Sequence[jax.Array] | jax.Array


def _parts(name: str, given: Arrays) -> list[jax.Array]:
    """The parts of a sequence, or of an array along its first axis."""
    if isinstance(given, list | tuple):
        for i, part in enumerate(given):
            if not hasattr(part, "shape"):
                got = f"{type(part).__name__} {reprlib.repr(part)}"
                raise ValueError(f"{name}[{i}] must be an array, got {got}")
    elif (shape := getattr(given, "shape", None)) is None:
        raise ValueError(
            f"{name} must be a list or tuple of arrays, or an array of them along its "
            f"first axis, got {type(given).__name__}"
        )
    elif not shape:
        raise ValueError(f"{name} must have a first axis, got shape ()")
    parts = [jnp.asarray(part) for part in given]
    if not parts:
        raise ValueError(f"{name} must have at least one part, got none")
    return parts


def _check(outs: list[jax.Array], lses: list[jax.Array]) -> None:
    if len(outs) != len(lses):
        raise ValueError(
            f"lses must have as many parts as outs, {len(outs)}, got {len(lses)}"
        )
    first = outs[0]
    if first.ndim < 3:
        raise ValueError(f"outs[0] must be [*B, T, N, Hv], got shape {first.shape}")
    if not jnp.issubdtype(first.dtype, jnp.floating):
        raise ValueError(f"outs[0] must be floating, got {first.dtype}")
    *batch, rows, heads, _ = first.shape
    wanted = (*batch, heads, rows)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if (out.shape, out.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"outs[{i}] must have the shape and dtype of outs[0], {first.dtype}"
                f"{list(first.shape)}, got {out.dtype}{list(out.shape)}"
            )
        if lse.shape != wanted:
            raise ValueError(
                f"lses[{i}] must be [*B, N, T], {wanted} for outs of shape "
                f"{first.shape}, got {lse.shape}"
            )
        if str(lse.dtype) not in LSE_DTYPES or lse.dtype != lses[0].dtype:
            raise ValueError(
                f"lses[{i}] must be float32, as `mha` returns it, or all float64, got "
                f"{lse.dtype}"
            )


def merge_partials(outs: Arrays, lses: Arrays) -> tuple[jax.Array, jax.Array]:
    """See `jax_flash.merge_partials`."""
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    _check(outs, lses)
    dtype = lses[0].dtype
    top = lses[0]
    for lse in lses[1:]:
        top = jnp.maximum(top, lse)
    # A sink of +inf takes everything: beside its part, no other counts.
    infinite = jnp.isposinf(top)
    shares = [jnp.where(lse == top, 0, -jnp.inf).astype(dtype) for lse in lses]
    logits = [jnp.where(infinite, *both) for both in zip(shares, lses, strict=True)]
    # Any reference gives the same result, so it has no gradient.
    top = lax.stop_gradient(jnp.where(jnp.isinf(top), jnp.zeros_like(top), top))
    weights = [jnp.exp(logit - top) for logit in logits]
    total = sum(weights[1:], start=weights[0])
    empty = total == 0
    # Not 0, whose division and logarithm would send NaN backwards.
    safe = jnp.where(empty, jnp.ones_like(total), total)

    def by_row(x: jax.Array) -> jax.Array:  # [*B, N, T] -> [*B, T, N, 1]
        return jnp.swapaxes(x, -1, -2)[..., None]

    merged = jnp.zeros(outs[0].shape, dtype)
    for out, lse, weight in zip(outs, lses, weights, strict=True):
        # A part without keys does not count, whatever its output or cotangent holds.
        seen = ~jnp.isneginf(lse)
        share = by_row(jnp.where(seen, weight / safe, 0))
        term = jnp.where(by_row(seen), out.astype(dtype), jnp.zeros((), dtype))
        merged = merged + share * term
    lse = jnp.where(empty, jnp.full_like(total, -jnp.inf), top + jnp.log(safe))
    lse = jnp.where(infinite, jnp.full_like(total, jnp.inf), lse)
    return merged.astype(outs[0].dtype), lse
