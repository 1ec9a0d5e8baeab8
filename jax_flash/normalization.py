"""`rms_norm` with a fused residual, and the small operations around it.

Lives here: signatures, docstrings, and the checks of the arguments.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jax_flash._src import compat, norm_op, validate

__all__ = ["rms_norm", "silu_mul", "split_qkv"]


@compat.allows_rank_promotion
def rms_norm(x: Any, weight: Any, *, residual: Any = None, eps: float = 1e-6) -> Any:
    """RMSNorm, `x / sqrt(mean(x ** 2) + eps) * weight`, of `x + residual` if given.

    Computed in float32 (float64 for float64) and rounded once; with a residual the sum
    is rounded to the dtype of x first, and what is normalised is the rounded sum, the
    second result. Zhang and Sennrich 2019 (arXiv:1910.07467).

    Args:
      x: [*B, C], floating.
      weight: floating [C]. Add 1 yourself where a model stores it without.
      residual: [*B, C], the dtype of x.
      eps: number, not negative. Where it is 0, or too small for the arithmetic, rows of
        zeros give NaN.

    Returns:
      y [*B, C] in the dtype of x; with a residual (y, x + residual).

    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: a dtype that is not supported.
    """
    eps = validate.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    x = _floating("x", x)
    weight = _floating("weight", weight)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [*B,C] with C of at least 1, got shape {x.shape}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be [C] = {x.shape[-1:]}, got shape {weight.shape}"
        )
    if residual is not None:
        residual = _floating("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x, {x.shape}, got {residual.shape}"
            )
        if residual.dtype != x.dtype:
            raise ValueError(
                f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}"
            )
    outs = norm_op.rms_norm(x, weight, residual, eps)
    return outs[0] if residual is None else (outs[0], outs[1])


def silu_mul(gate: Any, up: Any) -> jax.Array:
    """`silu(gate) * up`, in float32 and rounded once; XLA makes one kernel of it.

    Args:
      gate: floating, of any shape.
      up: the shape and dtype of gate.

    Returns:
      An array of the shape and dtype of gate.

    Raises:
      ValueError: an argument is wrong.
    """
    gate, up = _floating("gate", gate), _floating("up", up)
    if (up.shape, up.dtype) != (gate.shape, gate.dtype):
        raise ValueError(
            f"up must have the shape and dtype of gate, {gate.shape} {gate.dtype}, got "
            f"{up.shape} {up.dtype}"
        )
    wide = norm_op.widened(gate)
    return (wide * jax.nn.sigmoid(wide) * norm_op.widened(up)).astype(gate.dtype)


def split_qkv(
    qkv: Any, q_size: int, kv_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of a packed projection.

    Args:
      qkv: [*B, q_size + 2 * kv_size].
      q_size: width of all query heads.
      kv_size: width of all key heads, and of all value heads.

    Returns:
      [*B, q_size], [*B, kv_size], [*B, kv_size].

    Raises:
      ValueError: an argument is wrong.
    """
    sizes = {
        name: validate.static_int(name, size)
        for name, size in (("q_size", q_size), ("kv_size", kv_size))
    }
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
    if not hasattr(qkv, "shape"):
        raise ValueError(f"qkv must be an array, got {type(qkv).__name__}: {qkv!r}")
    qkv = jnp.asarray(qkv)
    q_size, kv_size = sizes.values()
    width = q_size + 2 * kv_size
    if qkv.shape[-1:] != (width,):
        raise ValueError(
            f"qkv must be [*B, q_size + 2 * kv_size] = [*B, {width}], got shape "
            f"{qkv.shape}"
        )
    query, key, value = jnp.split(qkv, (q_size, q_size + kv_size), axis=-1)
    return query, key, value


def _floating(name: str, x: Any) -> jax.Array:
    validate.shape_of(name, x)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got dtype {x.dtype}")
    if str(x.dtype) not in validate.FLOAT_DTYPES:
        raise NotImplementedError(f"{name} of dtype {x.dtype} is not supported")
    return x
