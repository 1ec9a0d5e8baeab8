"""Attention in float64 NumPy, written apart from the package.

Written from the definition: which keys a row sees, a softmax over them, the textbook
formulas of the gradients. Nothing here shares code with the package.
"""

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
    """Output [*B, T, N, Hv] and log-sum-exp [*B, N, T], both float64."""

    out: Array
    lse: Array


def visible(
    rows: int,
    keys: int,
    query_length: int,
    key_length: int,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_size: tuple[int | None, int | None] | None = None,
) -> Array:
    """Which keys each query row sees by position alone: bool [rows, keys]."""
    row, key = np.arange(rows)[:, None], np.arange(keys)[None, :]
    ok = (row < query_length) & (key < key_length)
    # How far the key lies after the key that the row is aligned with.
    ahead = key - row
    if causal_alignment == "bottom_right":
        ahead = (key - (key_length - 1)) - (row - (query_length - 1))
    if is_causal:
        ok &= ahead <= 0
    left, right = window_size or (None, None)
    if left is not None:
        ok &= ahead >= -left
    if right is not None:
        ok &= ahead <= right
    return ok


def allowed(shape: tuple[int, int, int, int], given: dict[str, Any]) -> Array:
    """What may be attended: bool of `shape` [B, N, T, S], for arguments of `mha`."""
    batch, _, rows, keys = shape
    ok = np.ones(shape, bool)
    if given.get("mask") is not None:
        ok &= _spread(given["mask"], shape, bool)
    lengths = []
    for name, size in (("query_seq_lengths", rows), ("key_value_seq_lengths", keys)):
        length = size if given.get(name) is None else given[name]
        lengths.append(np.clip(_spread(length, (batch,), np.int64), 0, size))
    positions = ("is_causal", "causal_alignment", "window_size")
    options = {name: given[name] for name in positions if name in given}
    for b in range(batch):
        ok[b] &= visible(rows, keys, lengths[0][b], lengths[1][b], **options)
    if given.get("q_segment_ids") is not None:
        q_ids = _spread(given["q_segment_ids"], (batch, rows), np.int64)
        kv_ids = _spread(given["kv_segment_ids"], (batch, keys), np.int64)
        same = q_ids[:, :, None] == kv_ids[:, None, :]
        ok &= (same & (q_ids >= 0)[:, :, None])[:, None]
    return ok


def _spread(x: Any, shape: tuple[int, ...], dtype: Any = np.float64) -> Array:
    return np.broadcast_to(np.asarray(x).astype(dtype), shape)


def _scores(
    query: Array, key: Array, given: dict[str, Any]
) -> tuple[Array, Array, Array]:
    """Logits, what each row may attend, and the slope of the soft cap, [B, N, T, S]."""
    groups = query.shape[2] // key.shape[2]
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = np.repeat(key, groups, axis=2)
    s = scale * np.einsum("btnh,bsnh->bnts", query, keys, optimize=True)
    slope = np.ones_like(s)
    softcap = given.get("softcap")
    if softcap is not None:
        slope = 1 - np.tanh(s / softcap) ** 2
        s = softcap * np.tanh(s / softcap)
    if given.get("bias") is not None:
        s = s + _spread(given["bias"], s.shape)
    return s, allowed(s.shape, given), slope


def _softmax(s: Array, ok: Array, sinks: Any) -> tuple[Array, Array]:
    """Probabilities [B, N, T, S] and lse [B, N, T], 0 and -inf in empty rows."""
    s = np.where(ok, s, -np.inf)
    empty = ~ok.any(-1)
    top = s.max(-1, initial=-np.inf)
    if sinks is not None:
        sinks = _spread(sinks, s.shape[:2])[..., None]
        top = np.maximum(top, sinks)
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(s - top[..., None])
    total = e.sum(-1)
    if sinks is not None:
        total = total + np.exp(sinks - top)
    empty |= total == 0
    total = np.where(empty, 1, total)
    lse = np.where(empty, -np.inf, top + np.log(total))
    return np.where(empty[..., None], 0, e / total[..., None]), lse


def attention(query: Any, key: Any, value: Any, **given: Any) -> Result:
    """Attention of [B, T, N, H], [B, S, K, H], [B, S, K, Hv]; arguments as for `mha`.

    Padding beyond the lengths may hold NaN.
    """
    query, key, value = _float64(query, key, value)
    query, key, value = without_padding(query, key, value, given)
    s, ok, _ = _scores(query, key, given)
    p, lse = _softmax(s, ok, given.get("sinks"))
    value = np.repeat(value, query.shape[2] // value.shape[2], axis=2)
    return Result(np.einsum("bnts,bsnh->btnh", p, value, optimize=True), lse)


def gradients(
    query: Any, key: Any, value: Any, dout: Any, dlse: Any = None, **given: Any
) -> dict[str, Array]:
    """Gradients of `sum(out * dout) + sum(lse * dlse)` by the textbook formulas.

    Returns:
      query, key, value; bias ([B, N, T, S], not reduced) and sinks ([B, N]) if given.
    """
    query, key, value, dout = _float64(query, key, value, dout)
    query, key, value = without_padding(query, key, value, given)
    heads, width, groups = (
        query.shape[2],
        query.shape[3],
        query.shape[2] // key.shape[2],
    )
    scale = given.get("scale")
    scale = width**-0.5 if scale is None else scale
    s, ok, slope = _scores(query, key, given)
    p, lse = _softmax(s, ok, given.get("sinks"))
    values = np.repeat(value, groups, axis=2)
    keys = np.repeat(key, groups, axis=2)
    out = np.einsum("bnts,bsnh->btnh", p, values, optimize=True)
    dp = np.einsum("btnh,bsnh->bnts", dout, values, optimize=True)
    delta = np.einsum("btnh,btnh->bnt", out, dout)
    if dlse is not None:
        delta = delta - np.where(np.isinf(lse), 0, np.asarray(dlse, np.float64))
    ds = p * (dp - delta[..., None])
    dz = scale * ds * slope
    dkeys = np.einsum("bnts,btnh->bsnh", dz, query, optimize=True)
    dvalues = np.einsum("bnts,btnh->bsnh", p, dout, optimize=True)

    def by_group(x: Array) -> Array:
        return x.reshape(*x.shape[:2], heads // groups, groups, x.shape[-1]).sum(3)

    result = {
        "query": np.einsum("bnts,bsnh->btnh", dz, keys, optimize=True),
        "key": by_group(dkeys),
        "value": by_group(dvalues),
    }
    if given.get("bias") is not None:
        result["bias"] = ds
    if given.get("sinks") is not None:
        sinks = _spread(given["sinks"], s.shape[:2])[..., None]
        empty = np.isinf(lse)
        share = np.where(empty, 0, np.exp(sinks - np.where(empty, 0, lse)))
        result["sinks"] = -(share * delta).sum(-1)
    return result


def reduced_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums the dimensions of x along which an array of `shape` was broadcast."""
    shape = (1,) * (x.ndim - len(shape)) + tuple(shape)
    axes = tuple(
        i for i, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n != m
    )
    return x.sum(axes, keepdims=True)


def _float64(*arrays: Any) -> list[Array]:
    return [np.asarray(x).astype(np.float64) for x in arrays]


def without_padding(
    query: Array, key: Array, value: Array, given: dict[str, Any]
) -> tuple[Array, Array, Array]:
    """Zeros in place of what may not be read."""

    def cut(x: Array, length_name: str, ids_name: str) -> Array:
        valid = np.ones(x.shape[:2], bool)
        if given.get(length_name) is not None:
            lengths = _spread(given[length_name], x.shape[:1], np.int64)
            valid &= np.arange(x.shape[1]) < lengths[:, None]
        if given.get(ids_name) is not None:
            valid &= _spread(given[ids_name], x.shape[:2], np.int64) >= 0
        return np.where(valid[..., None, None], x, 0)

    query = cut(query, "query_seq_lengths", "q_segment_ids")
    key = cut(key, "key_value_seq_lengths", "kv_segment_ids")
    return query, key, cut(value, "key_value_seq_lengths", "kv_segment_ids")
