"""Attention in float64 NumPy, written apart from the package.

Written from the definition: which keys a row sees, a softmax over them, the textbook
formulas of the gradients. Nothing here shares code with the package.

Works on blocks of rows of one head, which stay in the cache: arrays [B, N, T, S] would
spend most of the time on fresh memory.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray

BLOCK = 1 << 18
"""Elements of a block of scores: 2 MB."""


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
    # The key that each row is aligned with.
    aligned = row
    if causal_alignment == "bottom_right":
        aligned = (key_length - 1) - (query_length - 1 - row)
    if is_causal:
        ok &= key <= aligned
    left, right = window_size or (None, None)
    if left is not None:
        ok &= key >= aligned - left
    if right is not None:
        ok &= key <= aligned + right
    return ok


def allowed(shape: tuple[int, int, int, int], given: dict[str, Any]) -> Array:
    """What may be attended: bool of `shape` [B, N, T, S], for arguments of `mha`.

    Read-only, and one copy for all heads unless they have masks of their own.
    """
    batch, _, rows, keys = shape
    mask = np.asarray(True if given.get("mask") is None else given["mask"])
    heads = mask.shape[-3] if mask.ndim > 2 else 1
    ok = _spread(mask, (batch, heads, rows, keys), bool).copy()
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
    return np.broadcast_to(ok, shape)


def aligned(shape: tuple[int, int, int, int], given: dict[str, Any]) -> Array:
    """The key that each row is aligned with: int [B, T]."""
    batch, _, rows, keys = shape
    lengths = []
    for name, size in (("query_seq_lengths", rows), ("key_value_seq_lengths", keys)):
        length = size if given.get(name) is None else given[name]
        lengths.append(np.clip(_spread(length, (batch,), np.int64), 0, size)[:, None])
    row = np.broadcast_to(np.arange(rows), (batch, rows))
    if given.get("causal_alignment", "bottom_right") == "top_left":
        return row
    return row + lengths[1] - lengths[0]


def bias_of(shape: tuple[int, int, int, int], given: dict[str, Any]) -> Array | None:
    """What is added to the logits, [B, N, T, S], or None; slopes are spread out."""
    bias = given.get("bias")
    if bias is None:
        return None
    if not hasattr(bias, "slopes"):
        return _spread(bias, shape)
    slopes = _spread(bias.slopes, shape[:2])
    return -slopes[:, :, None, None] * distances(shape, given)


def kept_of(shape: tuple[int, int, int, int], given: dict[str, Any]) -> Array | None:
    """What dropout multiplies probabilities by, [B, N, T, S], or None.

    From docs/design/dropout.md; `dropout_key` is the words of a key, uint32 [2].
    """
    if not given.get("dropout_rate"):
        return None
    words = [np.uint64(word) for word in given["dropout_key"]]
    batch, heads, rows, keys = shape
    b, n = np.ogrid[:batch, :heads]
    seeds = _philox([n, b, 0 * n, 0 * n], words)[:2]
    i, j = np.ogrid[:rows, :keys]
    row, key = (x // 64 * 4 + x // 2 % 4 for x in (i, j))
    low = np.uint64(0xFFFFFFFF)
    first, second = (x[..., None, None] for x in seeds)
    x = first + row.astype(np.uint64) * np.uint64(0x165667B1)
    x = x + key.astype(np.uint64) * np.uint64(0x27D4EB2F) & low
    x = (x ^ x >> np.uint64(17)) * np.uint64(0xED5AD4BB) + second & low
    x = (x ^ x >> np.uint64(11)) * np.uint64(0xAC4C1B51) & low
    x = x ^ x >> np.uint64(15)
    for index, factors in (
        (i, (0x752DE713, 0xFE0AAFC3, 0xFE3662D1)),
        (j, (0x3C7D16C7, 0x76F2D33F, 0xF97BB491)),
    ):
        for bit, factor in zip((1, 16, 32), factors, strict=True):
            x = x * np.where(index & bit, np.uint64(factor), np.uint64(1)) & low
    word = x ^ x >> np.uint64(14)
    shift = 8 * (2 * (i // 8 % 2) + j // 8 % 2)
    byte = word >> shift.astype(np.uint64) & np.uint64(255)
    count = threshold(given["dropout_rate"])
    kept = byte >= count if count <= 128 else byte < 256 - count
    return np.where(kept, 256 / (256 - count), 0)


def threshold(rate: float) -> int:
    """How many of 256 bytes drop."""
    return int(np.clip(np.round(256 * rate), 1, 255))


def _philox(counter: list[Any], key: list[Any]) -> list[Array]:
    """Philox4x32 with 7 rounds, in the lower halves of uint64."""
    low = np.uint64(0xFFFFFFFF)
    x, k = (
        [np.asarray(c).astype(np.uint64) for c in list_] for list_ in (counter, key)
    )
    for _ in range(7):
        first, second = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [
            (second >> np.uint64(32)) ^ x[1] ^ k[0],
            second & low,
            (first >> np.uint64(32)) ^ x[3] ^ k[1],
            first & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return x


def distances(shape: tuple[int, int, int, int], given: dict[str, Any]) -> Array:
    """Of each key from the one that a row is aligned with: [B, 1, T, S]."""
    return np.abs(aligned(shape, given)[..., None] - np.arange(shape[3]))[:, None]


def blocks(shape: tuple[int, int, int, int]) -> Iterator[tuple[int, int, slice]]:
    """Cuts scores [B, N, T, S] into (batch entry, head, rows)."""
    batch, heads, rows, keys = shape
    step = max(1, BLOCK // max(1, keys))
    for b, n, start in itertools.product(
        range(batch), range(heads), range(0, rows, step)
    ):
        yield b, n, slice(start, start + step)


def _spread(x: Any, shape: tuple[int, ...], dtype: Any = np.float64) -> Array:
    return np.broadcast_to(np.asarray(x).astype(dtype), shape)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows of a head: where they are, and what they make of the keys.

    Attributes:
      index: (batch entry, rows, query head), of arrays [B, T, N, width].
      pair: (batch entry, all keys, key/value head), of arrays [B, S, K, width].
      weights: softmax [t, S], 0 in rows that may attend nothing.
      lse: log-sum-exp [t], -inf in such rows.
      slope: derivative of the soft cap [t, S], or 1.
      kept: what dropout multiplies weights by [t, S], or 1.
    """

    index: tuple[int, slice, int]
    pair: tuple[int, slice, int]
    weights: Array
    lse: Array
    slope: Any
    kept: Any

    @property
    def by_head(self) -> tuple[int, int, slice]:
        """(batch entry, query head, rows), of arrays [B, N, T, ...]."""
        b, rows, n = self.index
        return b, n, rows


def _blocks(query: Array, key: Array, given: dict[str, Any]) -> Iterator[_Block]:
    """The softmax, block by block."""
    batch, rows, heads, width = query.shape
    keys, groups = key.shape[1], heads // key.shape[2]
    shape = (batch, heads, rows, keys)
    scale, softcap = given.get("scale"), given.get("softcap")
    scale = width**-0.5 if scale is None else scale
    ok = allowed(shape, given)
    bias, kept = bias_of(shape, given), kept_of(shape, given)
    sinks = None if given.get("sinks") is None else _spread(given["sinks"], shape[:2])
    for b, n, part in blocks(shape):
        pair = b, slice(None), n // groups
        s = query[b, part, n] @ key[pair].T
        s *= scale
        slope: Any = 1.0
        if softcap is not None:
            s = np.tanh(s / softcap)
            slope = 1 - s**2
            s *= softcap
        if bias is not None:
            s += bias[b, n, part]
        sink = None if sinks is None else sinks[b, n]
        p, lse = _softmax(s, ok[b, n, part], sink)
        factor = 1.0 if kept is None else kept[b, n, part]
        yield _Block((b, part, n), pair, p, lse, slope, factor)


def _softmax(s: Array, ok: Array, sink: float | None) -> tuple[Array, Array]:
    """Probabilities [t, S], written over s, and lse [t]; 0 and -inf in empty rows."""
    np.copyto(s, -np.inf, where=~ok)
    top = s.max(-1, initial=-np.inf)
    if sink is not None:
        top = np.maximum(top, sink)
    top = np.where(np.isfinite(top), top, 0)
    s -= top[:, None]
    np.exp(s, out=s)
    total = s.sum(-1)
    if sink is not None:
        total += np.exp(sink - top)
    empty = ~ok.any(-1) | (total == 0)
    total[empty] = 1
    s /= total[:, None]
    s[empty] = 0
    return s, np.where(empty, -np.inf, top + np.log(total))


def attention(query: Any, key: Any, value: Any, **given: Any) -> Result:
    """Attention of [B, T, N, H], [B, S, K, H], [B, S, K, Hv]; arguments as for `mha`.

    Padding beyond the lengths may hold NaN.
    """
    query, key, value = _float64(query, key, value)
    query, key, value = without_padding(query, key, value, given)
    batch, rows, heads, _ = query.shape
    out = np.empty((batch, rows, heads, value.shape[-1]))
    lse = np.empty((batch, heads, rows))
    for block in _blocks(query, key, given):
        out[block.index] = (block.weights * block.kept) @ value[block.pair]
        lse[block.by_head] = block.lse
    return Result(out, lse)


def gradients(
    query: Any, key: Any, value: Any, dout: Any, dlse: Any = None, **given: Any
) -> dict[str, Array]:
    """Gradients of `sum(out * dout) + sum(lse * dlse)` by the textbook formulas.

    Returns:
      query, key, value; bias ([B, N, T, S], not reduced; of slopes [B, N]) and sinks
      ([B, N]) if given.
    """
    query, key, value, dout = _float64(query, key, value, dout)
    query, key, value = without_padding(query, key, value, given)
    batch, rows, heads, width = query.shape
    scale = given.get("scale")
    scale = width**-0.5 if scale is None else scale
    result = {
        "query": np.zeros_like(query),
        "key": np.zeros_like(key),
        "value": np.zeros_like(value),
    }
    if given.get("bias") is not None:
        result["bias"] = np.empty((batch, heads, rows, key.shape[1]))
    if given.get("sinks") is not None:
        result["sinks"] = np.zeros((batch, heads))
        sinks = _spread(given["sinks"], (batch, heads))
    for block in _blocks(query, key, given):
        index, pair, p, lse = block.index, block.pair, block.weights, block.lse
        do = dout[index]
        dropped = p * block.kept
        delta = ((dropped @ value[pair]) * do).sum(-1)
        if dlse is not None:
            one = np.asarray(dlse, np.float64)[block.by_head]
            delta -= np.where(np.isinf(lse), 0, one)
        result["value"][pair] += dropped.T @ do
        ds = do @ value[pair].T
        ds *= block.kept
        ds -= delta[:, None]
        ds *= p
        if "bias" in result:
            result["bias"][block.by_head] = ds
        if "sinks" in result:
            b, _, n = index
            empty = np.isinf(lse)
            share = np.where(empty, 0, np.exp(sinks[b, n] - np.where(empty, 0, lse)))
            result["sinks"][b, n] -= (share * delta).sum()
        ds *= scale * block.slope
        result["query"][index] = ds @ key[pair]
        result["key"][pair] += ds.T @ query[index]
    if hasattr(given.get("bias"), "slopes"):
        shape = result["bias"].shape
        result["bias"] = -(result["bias"] * distances(shape, given)).sum((2, 3))
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
