"""`sample` and `top_k`: from logits to tokens.

Lives here: signatures, docstrings, and the checks of the arguments. What is drawn is
defined in `_src/sample_reference` and docs/design/sampling.md.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._src import compat, sample_op, sample_reference, validate

__all__ = ["sample", "top_k"]

FLOATING = ("float32", "bfloat16", "float16")
LARGEST = float(np.finfo(np.float32).max)


@compat.allows_rank_promotion
def sample(
    logits: Any,
    key: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    mask: Any = None,
) -> jax.Array:
    """Draws one token for each row of logits.

    Tokens are ordered by their logits, of equal ones the lower index first. Of the
    distribution `softmax(logits / temperature)` the first `top_k` tokens remain; of
    those the shortest beginning that has at least the share `top_p` of their
    probability; of those the ones with at least `min_p` times the largest probability.
    One of them is drawn with its probability, renormalised.

    The token depends on the row's logits and parameters, the key, and the row's index
    in the batch; not on the size of the batch nor on other rows. Every option is an
    array operand: another value does not compile again.

    Args:
      logits: [*B, V], float32, bfloat16 or float16; V at most 2^20. NaN and -inf are
        never drawn. Rows are numbered in the order of the batch. Sizes may be symbolic
        (`jax.export`), V with the constraint that it is at most 2^20.
      key: a typed key (`jax.random.key`) or uint32 [2] (`jax.random.PRNGKey`) of the
        generator threefry2x32.
      temperature: number, or array broadcastable to [*B]; 0 takes the largest logit.
      top_k: integers broadcastable to [*B], clamped to [1, V]; None = all tokens.
      top_p: broadcastable to [*B]; at or below 0 only the first token remains, at or
        above 1 all do. Rounded up to a multiple of 2^-20.
      min_p: broadcastable to [*B], from 0 (all tokens) to 1.
      mask: bool [V], or broadcastable to [*B, V] with an entry for each token: True =
        may be drawn.

    Returns:
      int32 [*B]. -1 where no token may be drawn.

    Raises:
      ValueError: an argument is wrong; numbers are checked, arrays (which may be
        traced) only for shape and dtype: temperatures below 0 are taken for 0.
      NotImplementedError: a dtype, vocabulary or generator that is not supported.
    """
    logits = _check_logits(logits)
    batch, size = logits.shape[:-1], logits.shape[-1]
    degrees = _parameter("temperature", temperature, batch, (0, math.inf))
    if degrees is None:
        raise ValueError("temperature must be a number or an array, got None")
    parameters = {
        "top_k": _parameter("top_k", top_k, batch, (1, math.inf), integer=True),
        "top_p": _parameter("top_p", top_p, batch, (0, 1)),
        "min_p": _parameter("min_p", min_p, batch, (0, 1)),
    }
    table = sample_reference.parameters(_key_words(key), degrees, **parameters)
    if mask is not None:
        mask = _check_mask(mask, (*batch, size))
        mask = mask.reshape((1,) * (logits.ndim - mask.ndim) + mask.shape)
    if size == 0:
        return jnp.full(batch, -1, jnp.int32)
    return sample_op.sample(logits, table, mask)


@compat.allows_rank_promotion
def top_k(logits: Any, k: int) -> tuple[jax.Array, jax.Array]:
    """The largest logits of each row and where they are.

    Args:
      logits: [*B, V], float32, bfloat16 or float16; V at most 2^20.
      k: int from 0 to V, static. Symbolic sizes are as for `sample`, V with the
        constraint that it is at least k, too.

    Returns:
      values [*B, k] in the dtype of logits, largest first, and indices int32 [*B, k].
      Of equal values (0 and -0 are) the lower index comes first; NaN comes last. The
      values are differentiable.

    Raises:
      ValueError: an argument is wrong.
      NotImplementedError: a dtype or vocabulary that is not supported.
    """
    logits = _check_logits(logits)
    k = validate.static_int("k", k)
    size = logits.shape[-1]
    if not (k >= 0 and compat.at_most(k, size)):
        if k >= 0 and not isinstance(size, int) and not compat.at_most(size, k - 1):
            raise NotImplementedError(
                f"k={k} of logits of shape {logits.shape} is not supported: the "
                f"symbolic V needs the constraint {f'{size} >= {k}'!r}"
            )
        raise ValueError(f"k must be from 0 to V={size}, got {k}")
    return sample_op.top_k(logits, k)


def _check_logits(logits: Any) -> jax.Array:
    validate.shape_of("logits", logits)
    logits = jnp.asarray(logits)
    if logits.ndim < 1:
        raise ValueError("logits must have at least 1 dimension, [*B,V], got shape ()")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating, got dtype {logits.dtype}")
    if str(logits.dtype) not in FLOATING:
        raise NotImplementedError(f"logits of dtype {logits.dtype} is not supported")
    size, most = logits.shape[-1], sample_reference.MAX_VOCABULARY
    if not compat.at_most(size, most):
        symbolic = f"; symbolic, it needs the constraint {f'{size} <= {most}'!r}"
        raise NotImplementedError(
            f"logits of shape {logits.shape}: a vocabulary V of more than {most} is "
            f"not supported{'' if isinstance(size, int) else symbolic}"
        )
    return logits


def _key_words(key: Any) -> jax.Array:
    """The two words of a threefry key."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        name = str(jax.random.key_impl(key))
        if name != "threefry2x32":
            raise NotImplementedError(
                f"key of the generator {name} is not supported, only threefry2x32"
            )
        if key.shape:
            raise ValueError(
                f"key must be one key, got an array of keys of shape {key.shape}"
            )
        return jax.random.key_data(key)
    if dtype != jnp.uint32 or key.shape != (2,):
        got = repr(key) if dtype is None else f"{dtype}{list(key.shape)}"
        raise ValueError(f"key must be a typed key or uint32 [2], got {got}")
    return jnp.asarray(key)


def _parameter(
    name: str,
    x: Any,
    batch: tuple[int, ...],
    limits: tuple[float, float],
    *,
    integer: bool = False,
) -> jax.Array | None:
    """A parameter as an array of one number for each row, [*B]."""
    if x is None:
        return None
    kind = "an integer" if integer else "a number"
    if isinstance(x, np.generic):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = int(x)
        elif jnp.issubdtype(x.dtype, jnp.floating):
            x = float(x)
    if isinstance(x, bool) or not (
        isinstance(x, int | float) or (hasattr(x, "shape") and hasattr(x, "dtype"))
    ):
        raise ValueError(f"{name} must be {kind} or an array, got {x!r}")
    if isinstance(x, int | float):
        if integer and not isinstance(x, int):
            raise ValueError(f"{name} must be an integer, got {x!r}")
        if not limits[0] <= x <= limits[1]:
            raise ValueError(
                f"{name} must be from {limits[0]} to {limits[1]}, got {x!r}"
            )
        most = sample_reference.MAX_VOCABULARY if integer else LARGEST
        x = np.asarray(min(x, most), np.int32 if integer else np.float32)
    wanted = jnp.integer if integer else jnp.number
    if not jnp.issubdtype(x.dtype, wanted) or jnp.iscomplexobj(x):
        raise ValueError(f"{name} must be {kind} or an array, got dtype {x.dtype}")
    if not validate.broadcasts(x.shape, batch):
        raise ValueError(
            f"{name} must broadcast to [*B] = {batch}, got shape {x.shape}"
        )
    x = validate.as_int32(x) if integer else jnp.asarray(x).astype(jnp.float32)
    return jnp.broadcast_to(jnp.asarray(x), batch)


def _check_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    if getattr(mask, "dtype", None) != jnp.bool_:
        got = getattr(mask, "dtype", None) or repr(mask)
        raise ValueError(f"mask must be bool (True = may be drawn), got {got}")
    if not validate.broadcasts(mask.shape, shape):
        raise ValueError(
            f"mask must broadcast to [*B,V] = {shape}, got shape {mask.shape}"
        )
    if mask.shape[-1:] != shape[-1:]:
        raise ValueError(
            f"mask must have an entry for each of the V={shape[-1]} tokens, got shape "
            f"{mask.shape}"
        )
    return jnp.asarray(mask)
