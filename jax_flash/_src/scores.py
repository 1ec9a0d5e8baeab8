"""Products and logits shared by the forward specification and its derivatives.

All of it in float32 (float64 for float64 inputs). Query heads are grouped by the
key/value head they read, so keys and values are never repeated.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash._src import mask
from jax_flash._src.config import TRAILING, AttentionConfig

Operands = dict[str, jax.Array]


def accumulator(dtype: Any) -> Any:
    """The dtype of all arithmetic on inputs of `dtype`."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def batch_shape(operands: Operands) -> tuple[int, ...]:
    """The full batch dimensions of canonical operands (and residuals)."""
    return jnp.broadcast_shapes(
        *(x.shape[: x.ndim - TRAILING[name]] for name, x in operands.items())
    )


def matmul(config: AttentionConfig, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of a [..., M, L] and b [..., L, C] in the accumulator dtype.

    A 16-bit factor is exact in every format a DEFAULT float32 product may use, so
    only wide inputs and precision="highest" need the slow one. HIGH is TF32 on GPUs,
    and more than that elsewhere.
    """
    wide = min(a.dtype.itemsize, b.dtype.itemsize) > 2 or config.precision == "highest"
    double = jnp.float64 in (a.dtype, b.dtype)
    dtype = jnp.float64 if double else jnp.float32
    precision = lax.Precision.DEFAULT
    if wide:
        tf32 = config.precision == "tf32"
        precision = lax.Precision.HIGH if tf32 else lax.Precision.HIGHEST
    return jnp.matmul(a.astype(dtype), b.astype(dtype), precision=precision)


def heads_first(x: jax.Array, groups: int) -> jax.Array:
    """[*B, T, N, C] -> [*B, K, groups * T, C], the heads of one group together."""
    x = jnp.swapaxes(x, -3, -2)
    *batch, heads, rows, width = x.shape
    return x.reshape(*batch, heads // groups, groups * rows, width)


def query_key(config: AttentionConfig, query: jax.Array, key: jax.Array) -> jax.Array:
    """[*B, T, N, H] x [*B, S, K, H] -> [*B, N, T, S], also for dout x value."""
    groups = query.shape[-2] // key.shape[-2]
    keys = jnp.swapaxes(jnp.swapaxes(key, -3, -2), -1, -2)
    s = matmul(config, heads_first(query, groups), keys)
    *batch, kv_heads, _, length = s.shape
    return s.reshape(*batch, kv_heads * groups, query.shape[-3], length)


def weights_value(config: AttentionConfig, p: jax.Array, value: jax.Array) -> jax.Array:
    """[*B, N, T, S] x [*B, S, K, C] -> [*B, T, N, C], also for dlogits x key."""
    *batch, heads, rows, length = p.shape
    kv_heads = value.shape[-2]
    p = p.reshape(*batch, kv_heads, heads // kv_heads * rows, length)
    o = matmul(config, p, jnp.swapaxes(value, -3, -2))
    o = o.reshape(*o.shape[:-3], heads, rows, o.shape[-1])
    return jnp.swapaxes(o, -3, -2)


def weights_query(
    config: AttentionConfig, p: jax.Array, x: jax.Array, kv_heads: int
) -> jax.Array:
    """[*B, N, T, S] x [*B, T, N, C] -> [*B, S, K, C], summed over rows and group."""
    *batch, heads, rows, length = p.shape
    p = p.reshape(*batch, kv_heads, heads // kv_heads * rows, length)
    x = heads_first(x, heads // kv_heads)
    return jnp.swapaxes(matmul(config, jnp.swapaxes(p, -1, -2), x), -3, -2)


def logits(
    config: AttentionConfig, o: Operands, where: mask.Rows, key: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Logits before masking of the rows and keys in `o`.

    Args:
      config: the call.
      o: the operands; those along rows or keys hold only the rows and keys asked for.
      where: the rows.
      key: int32 [s], indices of the keys.

    Returns:
      `(logits, slope)`: the logits [*B, N, t, s], and the derivative of the
      soft cap at the scaled product (1.0 without a cap).
    """
    s = config.scale * query_key(config, o["query"], o["key"])
    slope: jax.Array | float = 1.0
    if config.softcap is not None:
        capped = jnp.tanh(s / config.softcap)
        slope = 1.0 - capped * capped
        s = config.softcap * capped
    if "bias" in o:
        s = s + o["bias"].astype(s.dtype)
    if "alibi_slopes" in o:
        slopes = o["alibi_slopes"].astype(s.dtype)[..., None, None]
        s = s - slopes * mask.distance(where, key)[..., None, :, :].astype(s.dtype)
    return s, slope


def sink_share(o: Operands, shift: jax.Array) -> jax.Array:
    """`exp(sinks - shift)`, 1 where the sink is inf: nothing can be above it.

    Args:
      o: the operands, sinks [*B, N] among them.
      shift: [*B, N, T], at least the sink, in the dtype of the result.
    """
    sink = o["sinks"].astype(shift.dtype)[..., None]
    return jnp.exp(jnp.where(sink == jnp.inf, 0, sink - shift))


def sink_probability(o: Operands, live: jax.Array) -> jax.Array:
    """Probability of the sink logit, [*B, N, T], 0 in rows that attend nothing."""
    sink = o["sinks"].astype(o["lse"].dtype)[..., None]
    # Finite in other rows as well, whose derivatives are multiplied by 0.
    shift = jnp.where(live, o["lse"], jnp.maximum(sink, 0))
    return jnp.where(live, sink_share(o, shift), 0)
