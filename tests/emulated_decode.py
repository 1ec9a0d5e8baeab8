"""The decode kernels' own source on the CPU: a call, and what it is compared with."""

import ctypes
from typing import Any

import numpy as np
import oracle
from emulated import aligned

from jax_flash import alibi
from jax_flash._src import decode_plan

# fmt: off
_POINTERS = (
    "query", "key", "value", "lengths", "page_table", "sinks", "slopes", "k_scale",
    "v_scale", "out", "lse", "partial_out", "partial_state", "counters",
)
_INTS = (
    "batch", "tokens", "heads", "kv_heads", "head_dim", "head_dim_v", "room", "pages",
    "page_size", "max_pages", "sink_stride", "slope_stride", "k_scale_stride",
    "v_scale_stride", "window_left", "split_keys", "splits", "query_bf16",
)
# fmt: on


CACHE_TYPES = ("bfloat16", "float16", "float8_e4m3fn", "int8", "float32")
"""As CacheType in csrc/decode/params.h."""
QUANTISED = CACHE_TYPES[2:4]
TOLERANCES = {"bfloat16": 1.2e-2, "float16": 2e-3, "float32": 2e-6}
"""Of outputs, in units of the largest one, at least 1."""


class Params(ctypes.Structure):
    """As DecodeParams in csrc/decode/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _INTS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("set_by_launch", ctypes.c_uint32 * 28),
    )


def run(
    library: ctypes.CDLL,
    query: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: np.ndarray,
    *,
    page_table: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    slopes: np.ndarray | None = None,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    window: int = -1,
    softcap: float = 0.0,
    scale: float | None = None,
    num_splits: int | None = None,
    capability: int = 90,
    multiprocessors: int = 3,
    order: int = 0,
    counters: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse); everything the kernel writes holds NaN before.

    `order` is that of thread blocks: 0 = as they are numbered, else a seed. `counters`
    are those of an earlier launch, None = new ones.
    """
    batch, tokens, heads, width = query.shape
    kv_heads, value_width = v.shape[2:]
    room = k.shape[1] * (1 if page_table is None else page_table.shape[1])
    rows = tokens * heads // kv_heads
    keys, splits = decode_plan.splits_of(
        room,
        tokens,
        window,
        rows,
        kv_heads,
        num_splits,
        max(width, value_width),
        k.dtype.itemsize,
    )
    places = (batch, kv_heads, splits, rows)
    arrays = {"query": query, "key": k, "value": v, "lengths": lengths}
    if page_table is not None:
        arrays["page_table"] = page_table
    rows_of = {"sink": sinks, "slope": slopes, "k_scale": k_scale, "v_scale": v_scale}
    strides = {}
    for name, x in rows_of.items():
        if x is not None:
            arrays[name if name.endswith("scale") else f"{name}s"] = x
        strides[f"{name}_stride"] = x.shape[1] if x is not None and len(x) > 1 else 0
    held = {}
    for name, x in arrays.items():
        held[name] = aligned(x.shape, x.dtype, 0)
        held[name][...] = x
    held["out"] = aligned((batch, tokens, heads, value_width), query.dtype)
    held["lse"] = aligned((batch, heads, tokens), np.float32)
    held["partial_out"] = aligned((*places, value_width), np.float32)
    held["partial_state"] = aligned((*places, 2), np.float32)
    if counters is None:
        counters = np.zeros(library.counters_of(multiprocessors), np.uint32)
    held["counters"] = counters
    params = Params(
        **{name: x.ctypes.data for name, x in held.items()},
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        head_dim_v=value_width,
        room=room,
        pages=len(k),
        page_size=1 if page_table is None else k.shape[1],
        max_pages=0 if page_table is None else page_table.shape[1],
        **strides,
        window_left=window,
        split_keys=keys,
        splits=splits,
        query_bf16=query.dtype != np.float16,
        scale=width**-0.5 if scale is None else scale,
        softcap=softcap,
    )
    cache = CACHE_TYPES.index(str(k.dtype))
    device = capability, multiprocessors
    assert library.decode(ctypes.byref(params), cache, *device, order) == 0
    np.testing.assert_array_equal(counters, 0)  # as the next launch needs them
    return held["out"], held["lse"]


def check(
    got: tuple[np.ndarray, np.ndarray],
    query: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: np.ndarray,
    window: int = -1,
    softcap: float | None = None,
    slopes: np.ndarray | None = None,
    **options: Any,
) -> None:
    if slopes is not None:
        options["bias"] = alibi(slopes)
    want = oracle.attention(
        query,
        k,
        v,
        key_value_seq_lengths=lengths,
        is_causal=True,
        window_size=None if window < 0 else (window, None),
        softcap=softcap,
        **options,
    )
    out, lse = got
    assert np.isfinite(out.astype(np.float64)).all()
    tolerance = TOLERANCES[str(query.dtype)]
    largest = max(1.0, np.abs(want.out).max(initial=0))
    assert (
        np.abs(out.astype(np.float64) - want.out).max(initial=0) < tolerance * largest
    )
    empty = np.isneginf(want.lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (np.moveaxis(out, 1, 2)[empty] == 0).all()
    difference = np.where(empty, 0, lse) - np.where(empty, 0, want.lse)
    # Logits are rounded to f32.
    logits = np.abs(np.where(empty, 0, want.lse)).max(initial=1)
    assert np.abs(difference).max(initial=0) < 5e-6 + 5e-7 * logits


def problem(
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    room: int,
    *widths: int,
    dtype: str = "float16",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    width, value_width = widths[0], widths[-1]
    query, k, v = (
        rng.standard_normal(shape, np.float32).astype(dtype)
        for shape in (
            (batch, tokens, heads, width),
            (batch, room, kv_heads, width),
            (batch, room, kv_heads, value_width),
        )
    )
    return query, k, v
