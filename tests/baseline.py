"""The same mathematics as written in plain jnp, and the error bound taken from it.

`attention` is what XLA makes of attention with 16-bit inputs: products of the inputs
accumulated in float32, softmax in float32, weights rounded to the dtype of the inputs.
A result is accurate enough if its error against float64 is at most twice this one's.
`gradients` is the same for the backward.
"""

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
    groups = query.shape[2] // key.shape[2]
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    keys, values = jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)
    precision = jax.lax.Precision.HIGHEST
    batch, rows, heads, _ = query.shape
    ok = oracle.allowed((batch, heads, rows, key.shape[1]), given)
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with jax.numpy_dtype_promotion("standard"):
        s = jnp.einsum(
            "btnh,bsnh->bnts",
            query,
            keys,
            precision=precision,
            preferred_element_type=dtype,
        )
        s = s * scale
        if given.get("softcap") is not None:
            s = given["softcap"] * jnp.tanh(s / given["softcap"])
        if given.get("bias") is not None:
            s = s + given["bias"]
        p = jax.nn.softmax(jnp.where(ok, s, -1e30), axis=-1)
        p = jnp.where(ok, p, 0).astype(query.dtype)
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
    the dtype of the inputs, as products of 16-bit operands are. Without padding.
    """
    groups, dtype = query.shape[2] // key.shape[2], query.dtype
    ok = oracle.allowed(
        (query.shape[0], query.shape[2], query.shape[1], key.shape[1]), given
    )
    scale = given.get("scale")
    scale = np.float32(query.shape[-1] ** -0.5 if scale is None else scale)

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(np.float32)

    def by_head(x: np.ndarray) -> np.ndarray:  # [B, N, T or S, width]
        x = x.astype(np.float32).transpose(0, 2, 1, 3)
        return np.repeat(x, query.shape[2] // x.shape[1], axis=1)

    def by_group(x: np.ndarray) -> np.ndarray:
        batch, heads, *rest = x.shape
        x = x.reshape(batch, heads // groups, groups, *rest).sum(2)
        return x.transpose(0, 2, 1, 3).astype(dtype)

    q, k, v, do = map(by_head, (query, key, value, dout))
    s = np.where(ok, q @ k.swapaxes(2, 3) * scale, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    e = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    delta = (rounded(rounded(p) @ v) * do).sum(-1, keepdims=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    ds = scale * (p * (rounded(do @ v.swapaxes(2, 3)) - delta))
    return {
        "query": (ds @ k).transpose(0, 2, 1, 3).astype(dtype),
        "key": by_group(ds.swapaxes(2, 3) @ q),
        "value": by_group(rounded(p).swapaxes(2, 3) @ do),
    }


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
    out: Any, plain: Any, expected: Any, step: float = 0.0, extra: float = 0.0
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
    assert error.max(initial=0) <= FACTOR * largest + tiny, (
        f"largest error {error.max():.3e}, plain {largest:.3e}"
    )
    assert error.mean() <= FACTOR * mean + tiny, (
        f"mean error {error.mean():.3e}, plain {mean:.3e}"
    )
