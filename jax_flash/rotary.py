"""Rotary position embedding, alone and together with writing to a cache.

Lives here: `rope`, `rope_append_kv` and `rope_append_qkvpacked`, their docstrings and
checks. `rope` is jnp, which XLA fuses; the others have a kernel (`_src/rope_op`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import decode
from jax_flash._src import (
    compat,
    decode_call,
    norm_op,
    rope_op,
    rope_reference,
    validate,
)

__all__ = ["rope", "rope_append_kv", "rope_append_qkvpacked"]

THETA = 10000.0


def rope(
    x: Any,
    positions: Any,
    *,
    theta: float | None = None,
    inv_freq: Any = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> jax.Array:
    """Rotary position embedding: pairs turned by angles that grow with the position.

    Pair i of a head at position p turns by `p * inv_freq[i]`: (a, b) becomes
    (a cos - b sin, a sin + b cos). Angles and products are float32 (float64 for
    float64), the result is rounded once. Su et al. 2021 (arXiv:2104.09864).

    Args:
      x: [*B, N, H], floating: queries or keys, any number of heads N.
      positions: integers, broadcastable to [*B]: `jnp.arange(T)` for [B, T, N, H].
      theta: number above 0, the base: `inv_freq[i] = theta ** (-2 * i / rotary_dim)`.
        None = 10000. Not with inv_freq.
      inv_freq: floating [rotary_dim / 2], frequencies of the pairs in radians a token:
        how models with longer contexts stretch them is up to the caller.
      rotary_dim: how many of the H elements are turned, the first ones; the others stay
        as they are. Even, None = twice the length of inv_freq, else H.
      interleaved: whether neighbours are pairs, (0, 1), (2, 3), ..., as in GPT-J and in
        Llama's own layout. By default elements of the two halves are, (0, R / 2),
        (1, R / 2 + 1), ..., as in GPT-NeoX and in Llama's weights for transformers.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported.
    """
    given = _floating("x", x)
    if len(given.shape) < 2:
        raise ValueError(f"x must be [*B,N,H], got shape {given.shape}")
    frequencies = _frequencies(given, theta, inv_freq, rotary_dim)
    interleaved = validate.flag("interleaved", interleaved)
    at = validate.shape_of("positions", positions)
    if not jnp.issubdtype(at.dtype, jnp.integer):
        raise ValueError(f"positions must be integers, got dtype {at.dtype}")
    if not validate.broadcasts(at.shape, given.shape[:-2]):
        raise ValueError(
            f"positions must broadcast to [*B] = {given.shape[:-2]} of x "
            f"{given.shape}, got shape {at.shape}"
        )
    # Wider than int32 where JAX has wider integers.
    if not jax.config.jax_enable_x64:
        positions = validate.as_int32(positions)
    positions, x = jnp.asarray(positions), jnp.asarray(x)
    turned = rope_reference.turned(x, positions, frequencies, interleaved)
    return turned.astype(x.dtype)


def rope_append_kv(
    query: Any,
    k_new: Any,
    v_new: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    *,
    page_table: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    theta: float | None = None,
    inv_freq: Any = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rope` of queries and new keys, which then are written behind those in the cache.

    Token t of a sequence stands at position `cache_seqlens + t`: lengths are those
    *before* the new tokens, as for `append_kv`, and `decode_mha` goes on with
    `cache_seqlens + T`. What `append_kv` says about donated caches, tokens without a
    place and negative lengths holds here. A turned key is rounded once, to the dtype of
    the cache.

    On GPUs one kernel does it where query, new keys and values, and caches have one
    type, bfloat16, float16 or float32. jnp runs everything else.

    Args:
      query: floating [B, N, H] or [B, T, N, H], N a multiple of K.
      k_new: floating [B, K, H] or [B, T, K, H]; T as in query.
      v_new: floating [B, K, Hv] or [B, T, K, Hv].
      k_cache: as for `append_kv`.
      v_cache: as for `append_kv`.
      cache_seqlens: integers [B].
      page_table: as for `append_kv`.
      k_scale: as for `append_kv`.
      v_scale: as for `append_kv`.
      theta: as for `rope`.
      inv_freq: as for `rope`.
      rotary_dim: as for `rope`.
      interleaved: as for `rope`.

    Returns:
      `(query, k_cache, v_cache)`: the turned query in its shape and dtype, and the
      caches with the new tokens.

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported.
    """
    q, key = _floating("query", query), _floating("k_new", k_new)
    for name, x in (("query", q), ("k_new", key)):
        if len(x.shape) not in (3, 4):
            heads = "N" if name == "query" else "K"
            raise ValueError(
                f"{name} must be [B,{heads},H] or [B,T,{heads},H], got shape {x.shape}"
            )
    if (q.shape[:-2], q.shape[-1]) != (key.shape[:-2], key.shape[-1]):
        raise ValueError(
            f"k_new must have all but the heads of query {q.shape}, got {key.shape}"
        )
    if not key.shape[-2] or q.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query must have a multiple of k_new's heads, got N={q.shape[-2]} and "
            f"K={key.shape[-2]}"
        )
    frequencies = _frequencies(q, theta, inv_freq, rotary_dim)
    interleaved = validate.flag("interleaved", interleaved)
    arrays = k_cache, v_cache, k_new, v_new, cache_seqlens, page_table
    lengths, table = decode_call.check_append(*arrays)
    query, k_new, v_new = (jnp.asarray(x) for x in (query, k_new, v_new))
    one = query.ndim == 3
    if one:
        query, k_new, v_new = (x[:, None] for x in (query, k_new, v_new))
    unscaled = k_scale is None and v_scale is None
    if unscaled and rope_op.serves(query, (k_new, v_new, k_cache, v_cache)):
        new = {"query": query, "k_new": k_new, "v_new": v_new}
        query, k_cache, v_cache = rope_op.rope_append(
            new | _places(k_cache, v_cache, lengths, table, frequencies),
            interleaved=interleaved,
        )
    else:
        at = rope_reference.positions(lengths, query.shape[1])
        turned, key = (
            rope_reference.turned(x, at, frequencies, interleaved)
            for x in (query, k_new)
        )
        k_cache, v_cache = decode.append_kv(
            k_cache,
            v_cache,
            key,
            v_new,
            lengths,
            page_table=page_table,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        query = turned.astype(q.dtype)
    return (query[:, 0] if one else query), k_cache, v_cache


def rope_append_qkvpacked(
    qkv: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    *,
    page_table: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    theta: float | None = None,
    inv_freq: Any = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rope_append_kv` of query, new keys and values that one projection wrote.

    The kernel reads the three parts in place, where slices of the array would be
    copied first. It serves qkv and caches of one type, bfloat16, float16 or float32;
    else, and where devices have some heads of the caches each, the parts are copied.

    Args:
      qkv: floating [B, W] or [B, T, W] with W = N * H + K * H + K * Hv: N heads of
        queries, K of new keys, K of new values, side by side. K, H and Hv are those of
        the caches, N is what is left, a multiple of K.
      k_cache: as for `append_kv`.
      v_cache: as for `append_kv`.
      cache_seqlens: integers [B], tokens before the new ones.
      page_table: as for `append_kv`.
      k_scale: as for `append_kv`.
      v_scale: as for `append_kv`.
      theta: as for `rope`.
      inv_freq: as for `rope`.
      rotary_dim: as for `rope`.
      interleaved: as for `rope`.

    Returns:
      `(query, k_cache, v_cache)`: the turned query [B, N, H] or [B, T, N, H] in the
      dtype of qkv, and the caches with the new tokens.

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported.
    """
    given = _floating("qkv", qkv)
    if len(given.shape) not in (2, 3):
        raise ValueError(f"qkv must be [B,W] or [B,T,W], got shape {given.shape}")
    decode_call.check_caches(k_cache, v_cache, page_table is not None)
    shapes = rope_reference.part_shapes(given, k_cache, v_cache)
    heads, kv_heads = shapes[0][-2], shapes[1][-2]
    width = sum(n * h for *_, n, h in shapes)
    (*_, k, h), (*_, v) = shapes[1:]
    has_heads = compat.at_most(1, heads)
    if not has_heads and not compat.at_most(heads, 0):
        least = f"{given.shape[-1]} >= {(2 * k) * h + k * v}"
        raise NotImplementedError(
            f"qkv of shape {given.shape} is not supported: its symbolic width needs "
            f"the constraint {least!r}"
        )
    if width != given.shape[-1] or not has_heads or heads % kv_heads:
        raise ValueError(
            "qkv must have a width of N*H + K*H + K*Hv, N a multiple of K, with the "
            f"caches' K={k}, H={h} and Hv={v}, got shape {given.shape}"
        )
    batch = given.shape[0]
    lengths, table = decode_call.check_places(
        "qkv", batch, k_cache, cache_seqlens, page_table
    )
    unscaled = k_scale is None and v_scale is None
    if not (unscaled and rope_op.serves(given, (k_cache, v_cache))):
        query, k_new, v_new = rope_reference.split(jnp.asarray(qkv), k_cache, v_cache)
        return rope_append_kv(
            query,
            k_new,
            v_new,
            k_cache,
            v_cache,
            lengths,
            page_table=table,
            k_scale=k_scale,
            v_scale=v_scale,
            theta=theta,
            inv_freq=inv_freq,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
        )
    query = jax.ShapeDtypeStruct(shapes[0], given.dtype)
    frequencies = _frequencies(query, theta, inv_freq, rotary_dim)
    qkv = jnp.asarray(qkv)
    one = qkv.ndim == 2
    new = {rope_reference.QKV: qkv[:, None] if one else qkv}
    turned, k_cache, v_cache = rope_op.rope_append(
        new | _places(k_cache, v_cache, lengths, table, frequencies),
        interleaved=validate.flag("interleaved", interleaved),
    )
    return (turned[:, 0] if one else turned), k_cache, v_cache


def _places(
    k_cache: Any,
    v_cache: Any,
    lengths: jax.Array,
    table: jax.Array | None,
    frequencies: jax.Array,
) -> dict[str, jax.Array]:
    """Canonical operands of `rope_op.rope_append` but for what is new."""
    given = {
        "k_cache": jnp.asarray(k_cache),
        "v_cache": jnp.asarray(v_cache),
        "cache_seqlens": lengths,
        "inv_freq": frequencies.astype(jnp.float32)[None],
    }
    return given if table is None else given | {"page_table": table}


def _frequencies(
    x: jax.ShapeDtypeStruct, theta: Any, inv_freq: Any, rotary_dim: Any
) -> jax.Array:
    """Radians a token of each pair, floating [R / 2], from the arguments of `rope`."""
    width = x.shape[-1]
    if rotary_dim is not None:
        rotary_dim = validate.static_int("rotary_dim", rotary_dim)
        if rotary_dim % 2 or not 2 <= rotary_dim <= width:
            raise ValueError(
                f"rotary_dim must be even, from 2 to the width H={width}, got "
                f"{rotary_dim}"
            )
    if inv_freq is None:
        theta = THETA if theta is None else validate.positive_number("theta", theta)
        if rotary_dim is None:
            rotary_dim = width
            if width % 2 or not width:
                raise ValueError(
                    f"rotary_dim must be given for an odd width H={width}, got None"
                )
        powers = theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
        return jnp.asarray(powers, norm_op.accumulator(x.dtype))
    if theta is not None:
        raise ValueError(f"theta must be None where inv_freq is given, got {theta!r}")
    given = _floating("inv_freq", inv_freq)
    wanted = width // 2 if rotary_dim is None else rotary_dim // 2
    right = len(given.shape) == 1 and 1 <= given.shape[0] <= wanted
    if not right or (rotary_dim is not None and given.shape[0] != wanted):
        most = "at most " * (rotary_dim is None)
        raise ValueError(
            f"inv_freq must be [{most}{wanted}], one number for each pair of "
            f"rotary_dim={rotary_dim} and H={width}, got shape {given.shape}"
        )
    return jnp.asarray(inv_freq)


def _floating(name: str, x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a floating argument."""
    got = validate.shape_of(name, x)
    if not jnp.issubdtype(got.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got dtype {got.dtype}")
    if str(got.dtype) not in validate.FLOAT_DTYPES:
        raise NotImplementedError(f"{name} of dtype {got.dtype} is not supported")
    return got
