"""The same mathematics as written in plain jnp, and the error bound taken from it.

`attention` is what XLA makes of attention with 16-bit inputs: products of the inputs
accumulated in float32, softmax in float32, weights rounded to the dtype of the inputs.
A result is accurate enough if its error against float64 is at most twice this one's.
`gradients` is the same for the backward.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

FACTOR = 2.0
TINY = {"bfloat16": 1e-5, "float16": 1e-5, "float32": 2e-6, "float64": 1e-14}


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, **given: Any
) -> jax.Array:
    """Attention of [B, T, N, H], [B, S, K, H], [B, S, K, Hv]; arguments as `mha`."""
    batch, rows, heads, width = query.shape
    ok = oracle.allowed((batch, heads, rows, key.shape[1]), given)
    if ok.strides[1] == 0:  # the same for all heads: one copy goes to the device
        ok = ok[:, :1]
    scale = given.get("scale")
    scale = width**-0.5 if scale is None else scale
    softcap = given.get("softcap")
    bias = oracle.bias_of((batch, heads, rows, key.shape[1]), given)
    if bias is not None:
        bias = bias.astype(np.float32)
    sinks = given.get("sinks")
    if sinks is not None:
        sinks = np.broadcast_to(np.asarray(sinks, np.float32), (batch, heads))
    with jax.numpy_dtype_promotion("standard"):
        return _attention(query, key, value, ok, scale, softcap, bias, sinks)


@jax.jit
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ok: jax.Array,
    scale: jax.Array,
    softcap: jax.Array | None,
    bias: jax.Array | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """One program for a shape, whatever the mask and the scale."""
    groups = query.shape[2] // key.shape[2]
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    keys, values = jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)
    precision = jax.lax.Precision.HIGHEST
    s = jnp.einsum(
        "btnh,bsnh->bnts",
        query,
        keys,
        precision=precision,
        preferred_element_type=dtype,
    )
    s = s * scale
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    s = jnp.where(ok, s, -1e30)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[..., None, None], (*s.shape[:-1], 1))
        s = jnp.concatenate([s, column], -1)
    p = jax.nn.softmax(s, axis=-1)[..., : ok.shape[-1]]
    # The barrier keeps the rounding, which XLA may drop where it computes in float32.
    p = jax.lax.optimization_barrier(jnp.where(ok, p, 0).astype(query.dtype))
    return jnp.einsum("bnts,bsnh->btnh", p, values, precision=precision)


def gradients(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    **given: Any,
) -> dict[str, np.ndarray]:
    """The textbook backward from the output, in NumPy: no program for each shape.

    Sums and exponentials in float32; output, weights and `dout @ value^T` rounded to
    the dtype of the inputs, as products of 16-bit operands are. Without padding. The
    gradient of sinks is float32 [B, N], that of an array of biases [B, N, T, S].
    """
    dtype = query.dtype
    scale = scale_of(query, given)

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(np.float32)

    q, k, v, do = (x.astype(np.float32) for x in (query, key, value, dout))
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    dsinks = np.zeros((query.shape[0], query.shape[2]), np.float32)
    shape = (*dsinks.shape, query.shape[1], key.shape[1])
    factors = oracle.kept_of(shape, given)
    has_bias = given.get("bias") is not None and not hasattr(given["bias"], "slopes")
    dbias = np.zeros(shape if has_bias else 0, np.float32)
    for index, pair, p, slope in weights(q, k, scale, given):
        b, rows, n = index
        kept = np.float32(1)
        if factors is not None:
            kept = factors[b, n, rows].astype(np.float32)
        delta = (rounded(rounded(p * kept) @ v[pair]) * do[index]).sum(
            -1, keepdims=True
        )
        if dlse is not None:
            delta = delta - dlse[b, n, rows, None]
        if "sinks" in given:
            live = p.any(-1, keepdims=True)
            share = np.where(live, 1 - p.sum(-1, keepdims=True, dtype=np.float64), 0)
            dsinks[b, n] -= (share * delta).sum()
        dv[pair] += rounded(p * kept).T @ do[index]
        ds = rounded(do[index] @ v[pair].T)
        ds *= kept
        ds -= delta
        ds *= p
        if has_bias:
            dbias[b, n, rows] = ds
        ds *= scale * slope
        dq[index] = ds @ k[pair]
        dk[pair] += ds.T @ q[index]
    result = {
        name: x.astype(dtype) for name, x in (("query", dq), ("key", dk), ("value", dv))
    }
    result |= {"sinks": dsinks} if "sinks" in given else {}
    return result | ({"bias": dbias} if has_bias else {})


def scale_of(query: np.ndarray, given: dict[str, Any]) -> np.float32:
    """The scale of the logits."""
    scale = given.get("scale")
    return np.float32(query.shape[-1] ** -0.5 if scale is None else scale)


def weights(
    query: np.ndarray, key: np.ndarray, scale: np.float32, given: dict[str, Any]
) -> Iterator[tuple[Any, Any, np.ndarray, Any]]:
    """The softmax in NumPy, in the dtype of query and key, by blocks of a head's rows.

    Yields:
      The index of the block's rows in arrays [B, T, N, width], that of its head in
      arrays [B, S, K, width], the weights [t, S], 0 in rows that attend nothing, and
      the derivative of the soft cap [t, S], or 1.
    """
    batch, rows, heads, _ = query.shape
    groups = heads // key.shape[2]
    shape = (batch, heads, rows, key.shape[1])
    ok = oracle.allowed(shape, given)
    softcap, bias = given.get("softcap"), oracle.bias_of(shape, given)
    sinks = np.broadcast_to(
        np.asarray(given.get("sinks", -np.inf), query.dtype), shape[:2]
    )
    for b, n, part in oracle.blocks(shape):
        index, pair = (b, part, n), (b, slice(None), n // groups)
        e = query[index] @ key[pair].T
        e *= scale
        slope: Any = np.float32(1)
        if softcap is not None:
            e = np.tanh(e / np.float32(softcap))
            slope = 1 - e * e
            e *= np.float32(softcap)
        if bias is not None:
            e += bias[b, n, part].astype(e.dtype)
        np.copyto(e, -np.inf, where=~ok[b, n, part])
        top = np.maximum(e.max(-1, keepdims=True, initial=-np.inf), sinks[b, n])
        top = np.where(np.isfinite(top), top, 0)
        e -= top
        np.exp(e, out=e)
        total = e.sum(-1, keepdims=True) + np.exp(sinks[b, n] - top)
        total[total == 0] = 1
        e /= total
        yield index, pair, e, slope


def assert_accurate(
    out: Any, query: Any, key: Any, value: Any, expected: Any = None, **given: Any
) -> None:
    """Error of `out` against float64 is at most twice the baseline's.

    Args:
      out: the result under test, [B, T, N, Hv].
      query: what it was computed from.
      key: what it was computed from.
      value: what it was computed from.
      expected: the float64 result, computed if not given.
      **given: the other arguments it was computed from.
    """
    if expected is None:
        expected = oracle.attention(query, key, value, **given).out
    plain = np.asarray(attention(*map(jnp.asarray, (query, key, value)), **given))
    assert_within(out, plain, expected)


def assert_within(
    out: Any,
    plain: Any,
    expected: Any,
    step: float = 0.0,
    extra: float = 0.0,
    factor: float = FACTOR,
) -> None:
    """Error of `out` is at most twice that of `plain`, which has its dtype.

    Args:
      out: the result under test.
      plain: the same in plain jnp or NumPy operations.
      expected: the float64 result.
      step: distance of two neighbouring numbers at 1. If given, `plain` counts as no
        better than a result that is rounded: it may be spared that by luck, as where
        one weight is 1 and the output one of the values.
      extra: error allowed beyond that.
      factor: instead of twice.
    """
    out, plain = np.asarray(out), np.asarray(plain)
    tiny = TINY[str(plain.dtype)] + extra
    size = step * np.abs(expected)
    error = np.abs(out.astype(np.float64) - expected)
    bound = np.abs(plain.astype(np.float64) - expected)
    # A step is 1/2 to 1 of `size`, so the largest rounding error is half of it, and the
    # mean is an eighth of it or more.
    largest = max(bound.max(initial=0), size.max(initial=0) / 2)
    mean = max(bound.mean(), size.mean() / 8)
    assert np.isfinite(error).all(), "NaN or inf in the output"
    assert error.max(initial=0) <= factor * largest + tiny, (
        f"largest error {error.max():.3e}, plain {largest:.3e}"
    )
    assert error.mean() <= factor * mean + tiny, (
        f"mean error {error.mean():.3e}, plain {mean:.3e}"
    )
