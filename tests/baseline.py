"""The same mathematics as written in plain jnp, and the error bound taken from it.

`attention` is what XLA makes of attention with 16-bit inputs: products of the inputs
accumulated in float32, softmax in float32, weights rounded to the dtype of the inputs.
A result is accurate enough if its error against float64 is at most twice this one's.
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
