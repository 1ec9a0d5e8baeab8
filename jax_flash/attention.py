"""The public attention functions: `mha`, its packed forms, and a drop-in of `jax.nn`'s.

Lives here: the signatures, the docstrings and the way from user arrays to a validated
call. What runs it is chosen in `backends`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash import backends
from jax_flash._src import compat, packed, validate
from jax_flash._src.alibi import Alibi
from jax_flash._src.config import QKV

__all__ = ["dot_product_attention", "mha", "mha_qkvpacked", "mha_varlen"]


def mha(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
    implementation: backends.Implementation = None,
) -> Any:
    """Multi-head attention, `softmax(scale * query @ key^T + bias) @ value`.

    Shapes: *B any number of batch dimensions or none, T query length, S key length, N
    query heads, K key/value heads (N % K == 0; query head n reads key/value head
    n // (N // K)), H query/key width, Hv value width.

    The order is: `scale * q.k`, soft cap, bias, masks, softmax over the keys (and the
    sink). A query row that may attend no key returns 0, lse -inf and zero gradients.

    Args:
      query: [*B, T, N, H], bfloat16, float16 or float32.
      key: [*B, S, K, H], the dtype of query.
      value: [*B, S, K, Hv], the dtype of query.
      bias: floating, broadcastable to [*B, N, T, S], added to the logits after the soft
        cap. Its gradient is summed over the broadcast dimensions. Or `alibi(slopes)`.
      mask: bool, broadcastable to [*B, N, T, S], True = attend.
      scale: factor of the logits, H ** -0.5 if None.
      is_causal: a query sees no key after its own position.
      causal_alignment: "bottom_right" aligns the last valid query with the last valid
        key (by the lengths, where given); "top_left" the first with the first.
      window_size: (left, right): the query aligned with key p sees keys p - left to
        p + right, both inclusive; None = unbounded on that side.
      softcap: c of `c * tanh(logits / c)`.
      sinks: floating [N], or [..., N] broadcastable to [*B, N]: for each head a logit
        that takes part in the softmax and has no value.
      q_segment_ids: integers [*B, T]; a query attends keys with its own id. Negative
        ids are padding, which neither attends nor is attended.
      kv_segment_ids: integers [*B, S]; needed together with q_segment_ids.
      query_seq_lengths: int or integers broadcastable to [*B], the number of valid
        queries, clamped to [0, T]. What lies beyond is not read; its output is 0.
      key_value_seq_lengths: int or integers broadcastable to [*B], the number of valid
        keys, clamped to [0, S].
      dropout_rate: share of the probabilities that are dropped, rounded to a multiple
        of 1/256 (from 1/256 to 255/256 unless it is 0.0); the others are divided by the
        share that is kept. lse is that without dropout.
      dropout_key: one key of `jax.random`, or its uint32 words; may differ from call to
        call. What is dropped depends on it and on the indices of batch, head, row and
        key alone, also in gradients (docs/design/dropout.md). Under `vmap`, and in each
        part of a `shard_map`, indices start from 0. Unused while dropout_rate is 0.0.
      deterministic: ask for bitwise reproducible gradients from the kernels.
        XLA's `--xla_gpu_deterministic_ops=true` or
        `--xla_gpu_exclude_nondeterministic_ops=true` in the environment variable
        XLA_FLAGS does the same for every call lowered while it is set; options given to
        one compilation (`jax.jit(compiler_options=...)`) are not seen. The jnp path has
        one way to compute gradients, as reproducible as XLA's matrix products.
      precision: how exact products of float32 are. None: to about 2^-16 or better
        (docs/numerics.md); "highest": as float32; "tf32": factors may be rounded to
        TF32; "bf16", "f16": query, key and value are rounded to that type first, and
        the call, its gradients too, is one of that type (float16 ends at 65504). Other
        types: "highest" and "tf32" keep weights from being rounded, "bf16" and "f16"
        change nothing.
      return_lse: also return the log-sum-exp of the logits.
      implementation: None for the first backend that supports the call on the platform
        it is lowered for (`jax_flash.explain` tells), a name, or a tuple of names.

    Returns:
      out [*B, T, N, Hv] in the dtype of query; with `return_lse` `(out, lse)`, lse
      float32 [*B, N, T] (float64 for float64 inputs), natural logarithm,
      differentiable.

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported, by `implementation` or at all.
    """
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "sinks": sinks,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    options = {
        "scale": scale,
        "is_causal": is_causal,
        "causal_alignment": causal_alignment,
        "window_size": window_size,
        "softcap": softcap,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "deterministic": deterministic,
        "precision": precision,
        "return_lse": return_lse,
    }
    return _attend(arrays, options, implementation)


def mha_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    bias: Any = None,
    mask: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
    implementation: backends.Implementation = None,
) -> Any:
    """Multi-head attention of sequences of any lengths, packed one after the other.

    Shapes: Tq and Tk rows of all sequences, the others as for `mha`. Sequence i has
    queries `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1] - 1` and keys `cu_seqlens_k[i]` to
    `cu_seqlens_k[i + 1] - 1`, and attends its own keys alone. Sequences may be
    empty, and have queries without keys. Rows before the first offset or from the last
    on belong to no sequence: they are not read, and give 0, lse -inf and zero
    gradients.

    Offsets are read on the device and must not fall; that is not checked. They are
    clamped to [0, Tq] and [0, Tk].

    Args:
      query: [Tq, N, H], bfloat16, float16 or float32.
      key: [Tk, K, H], the dtype of query.
      value: [Tk, K, Hv], the dtype of query.
      cu_seqlens_q: integers [sequences + 1], offsets of the queries.
      cu_seqlens_k: the same for the keys, of the same shape; None = those of the
        queries.
      max_seqlen_q: no sequence has more queries: those beyond count as padding. None =
        no bound. Not needed by any implementation.
      max_seqlen_k: the same for keys.
      bias: floating, broadcastable to [N, Tq, Tk], or `alibi(slopes)`.
      mask: bool, broadcastable to [N, Tq, Tk], True = attend.
      scale: as for `mha`.
      is_causal: as for `mha`, within each sequence.
      causal_alignment: as for `mha`, within each sequence.
      window_size: as for `mha`, within each sequence.
      softcap: as for `mha`.
      sinks: floating [N].
      q_segment_ids: integers [Tq]; within a sequence equal ids attend.
      kv_segment_ids: integers [Tk].
      dropout_rate: as for `mha`.
      dropout_key: as for `mha`; rows and keys are counted in the packed arrays, so what
        is dropped in a sequence depends on where it stands.
      deterministic: as for `mha`.
      precision: as for `mha`.
      return_lse: as for `mha`.
      implementation: as for `mha`.

    Returns:
      out [Tq, N, Hv] in the dtype of query; with `return_lse` `(out, lse)`, lse float32
      [N, Tq].

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported, by `implementation` or at all.
    """
    validate.check_varlen(query, cu_seqlens_q)
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "sinks": sinks,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
    }
    options = {
        "scale": scale,
        "is_causal": is_causal,
        "causal_alignment": causal_alignment,
        "window_size": window_size,
        "softcap": softcap,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "deterministic": deterministic,
        "precision": precision,
        "return_lse": return_lse,
    }
    return _attend(arrays, options, implementation)


def mha_qkvpacked(
    qkv: Any, num_heads: int, num_kv_heads: int | None = None, **options: Any
) -> Any:
    """`mha` of queries, keys and values that one projection wrote side by side.

    The kernels read the three parts in place; for any other implementation they are
    copied first.

    Args:
      qkv: [*B, T, (N + 2 * K) * H]: N heads of queries, K of keys, K of values.
      num_heads: N.
      num_kv_heads: K, None = N.
      **options: every argument of `mha` after value, `bias` and `mask` included.

    Returns:
      As `mha`: out [*B, T, N, H], or `(out, lse)`.

    Raises:
      ValueError, NotImplementedError: as `mha`; also where the width of qkv is no
        multiple of N + 2 K.
      TypeError: an option that `mha` has not.
    """
    heads = validate.static_int("num_heads", num_heads)
    kv_heads = heads
    if num_kv_heads is not None:
        kv_heads = validate.static_int("num_kv_heads", num_kv_heads)
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, both at least 1, got "
            f"{heads} and {kv_heads}"
        )
    shape = getattr(qkv, "shape", None)
    if isinstance(qkv, jax.ShapeDtypeStruct):
        raise ValueError(f"qkv must be an array, got {qkv}")
    if shape is None or len(shape) < 2:
        raise ValueError(
            f"qkv must be [*B,T,(N+2K)*H], got {qkv if shape is None else shape}"
        )
    parts = heads + 2 * kv_heads
    if shape[-1] < parts or shape[-1] % parts:
        raise ValueError(
            f"qkv must have a width of (N+2K)*H with N={heads} and K={kv_heads}, got "
            f"shape {shape}"
        )
    qkv = validate.as_array("qkv", qkv)
    if not jnp.issubdtype(qkv.dtype, jnp.floating):
        raise ValueError(f"qkv must be floating, got dtype {qkv.dtype}")
    if str(qkv.dtype) not in validate.FLOAT_DTYPES:
        raise NotImplementedError(f"qkv of dtype {qkv.dtype} is not supported")
    implementation = options.pop("implementation", None)
    arrays = {n: options.pop(n, None) for n in ("bias", "mask", *backends.ARRAYS)}
    for name in options:
        if name not in backends.DEFAULTS:
            raise TypeError(
                f"mha_qkvpacked() got an argument that mha has not: {name!r}"
            )
    each = packed.shapes((heads, kv_heads), qkv.shape)
    for name, one in zip(packed.PARTS, each, strict=True):
        arrays[name] = jax.ShapeDtypeStruct(one, qkv.dtype)
    return _attend(arrays, backends.DEFAULTS | options, implementation, qkv)


def _attend(
    arrays: dict[str, Any],
    options: dict[str, Any],
    implementation: backends.Implementation,
    qkv: jax.Array | None = None,
) -> Any:
    """Checks a call and runs it: out, or `(out, lse)`.

    With `qkv` query, key and value are the types of its parts.
    """
    given = validate.check_call(arrays, options)
    call = validate.rounded(given)
    if qkv is not None:
        arrays = {**arrays, QKV: qkv}
    operands = validate.canonical(call, arrays, options["dropout_key"])
    out, lse = backends.run(call, operands, implementation)
    out = out.astype(given.dtype)
    if len(arrays["query"].shape) == 3:
        out, lse = out[0], None if lse is None else lse[0]
    return (out, lse) if call.return_lse else out


@compat.allows_rank_promotion
def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: backends.Implementation = None,
    return_residual: bool = False,
) -> Any:
    """A drop-in for `jax.nn.dot_product_attention`: its signature and its numbers.

    Where its rules differ from `mha` its own hold here: the causal mask and the window
    are aligned top-left, a query row whose keys are all masked returns the mean of
    value (0 at or beyond `query_seq_lengths`), and the residual is rounded to the dtype
    of key, [B, T, N], without gradient. Stricter: scale must be a Python number, flags
    must be bools, window sides must not be negative, and a row whose bias is -inf
    everywhere returns 0, not NaN.

    Args:
      query: [B, T, N, H], or [T, N, H] for B = 1.
      key: [B, S, K, H] or [S, K, H].
      value: [B, S, K, H] or [S, K, H].
      bias: broadcastable to [B, N, T, S].
      mask: bool, broadcastable to [B, N, T, S], True = attend.
      scale: factor of the logits, H ** -0.5 if None.
      is_causal: query i sees keys 0..i.
      query_seq_lengths: int32 [B].
      key_value_seq_lengths: int32 [B].
      local_window_size: (left, right), or an int for both: query i sees keys i - left
        to i + right.
      implementation: as for `mha`; "cudnn" is `jax.nn`'s own.
      return_residual: also return the log-sum-exp of the logits.

    Returns:
      out, the shape of query; with `return_residual` `(out, residual)`.

    Raises:
      ValueError, NotImplementedError: as `mha`.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation="cudnn",
            return_residual=return_residual,
        )
    return_residual = validate.flag("return_residual", return_residual)
    query = _array("query", query)
    if query.ndim not in (3, 4):
        raise ValueError(f"query must be [B,T,N,H] or [T,N,H], got shape {query.shape}")
    has_batch = query.ndim == 4
    query = _rank_4(query)
    key, value = _rank_4(_array("key", key)), _rank_4(_array("value", value))
    if mask is not None:
        mask = _rank_4(_array("mask", mask))
    if bias is not None and not isinstance(bias, Alibi):
        bias = _rank_4(_array("bias", bias))
        if bias.dtype == jnp.bool_ or jnp.issubdtype(bias.dtype, jnp.integer):
            bias = bias.astype(jnp.promote_types(query.dtype, jnp.float32))
    if query_seq_lengths is not None:
        query_seq_lengths = _array("query_seq_lengths", query_seq_lengths)
    if key_value_seq_lengths is not None:
        key_value_seq_lengths = _array("key_value_seq_lengths", key_value_seq_lengths)
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {key.shape}, got {value.shape}"
        )
    if isinstance(local_window_size, int) and not isinstance(local_window_size, bool):
        local_window_size = (local_window_size, local_window_size)
    window = validate.check_window("local_window_size", local_window_size)
    rows, keys = query.shape[-3], key.shape[-3]
    left = None if window is None else window[0]
    # Of no keys jax.nn has no mean either: 0, and -inf.
    some_row_is_empty = keys != 0 and (
        mask is not None
        or key_value_seq_lengths is not None
        or (left is not None and rows - 1 - left >= keys)
    )
    result = mha(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        causal_alignment="top_left",
        window_size=window,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        return_lse=some_row_is_empty or return_residual,
        implementation=implementation,
    )
    if not (some_row_is_empty or return_residual):
        return result if has_batch else result[0]
    out, lse = result
    lse = jnp.swapaxes(lse, -1, -2)
    if some_row_is_empty:
        empty = lse == -jnp.inf
        if bias is not None:
            # One whose bias is -inf has keys, and is no row of equal logits.
            empty = empty & ~_has_key(
                empty.shape, keys, mask, is_causal, window, key_value_seq_lengths
            )
        if query_seq_lengths is not None:
            row = jnp.arange(rows, dtype=jnp.int32).reshape(rows, 1)
            empty = empty & (row < query_seq_lengths[..., None, None])
        out = jnp.where(empty[..., None], _mean_value(value, query), out)
    out, lse = (out, lse) if has_batch else (out[0], lse[0])
    if not return_residual:
        return out
    if keys != 0:
        # What logsumexp gives for logits that are all the large negative of its mask.
        lse = jnp.maximum(lse, -0.7 * jnp.finfo(jnp.float32).max)
    return out, lax.stop_gradient(lse.astype(key.dtype))


def _has_key(
    shape: tuple[int, ...],
    keys: int,
    mask: jax.Array | None,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    lengths: jax.Array | None,
) -> jax.Array:
    """Which rows [B, T, N] may attend a key, whatever its bias."""
    row = jnp.arange(shape[1], dtype=jnp.int32)[:, None]
    key = jnp.arange(keys, dtype=jnp.int32)[None]
    seen = jnp.ones((1, 1, shape[1], keys), jnp.bool_)
    left, right = (None, None) if window is None else window
    if is_causal:
        seen = seen & (key <= row)[None, None]
    if left is not None:
        seen = seen & (key >= row - left)[None, None]
    if right is not None:
        seen = seen & (key <= row + right)[None, None]
    if lengths is not None:
        seen = seen & (key < lengths[:, None, None, None])
    if mask is not None:
        seen = seen & mask
    return jnp.broadcast_to(jnp.swapaxes(seen.any(-1), -1, -2), shape)


def _array(name: str, x: Any) -> jax.Array:
    """What `jax.nn` takes for an array: also a number, or a list of them."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        message = f"{name} must be an array, got {type(x).__name__}: {x!r}"
        raise ValueError(message) from error


def _rank_4(x: jax.Array) -> jax.Array:
    """Adds a batch of 1 where there is none, as `jax.nn` takes one beside any other."""
    return jnp.expand_dims(x, tuple(range(4 - x.ndim)))


def _mean_value(value: jax.Array, query: jax.Array) -> jax.Array:
    """Mean over the keys of the value head each query head reads, [*B, 1, N, Hv]."""
    mean = value.astype(jnp.float32).mean(-3, keepdims=True).astype(query.dtype)
    return jnp.repeat(mean, query.shape[-2] // value.shape[-2], axis=-2)
