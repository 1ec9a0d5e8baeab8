"""The decode kernel as XLA calls it: what it supports, and its FFI call.

Lives here: what `decode_inner` lowers `decode_mha` to, and `few_queries` some calls of
`mha`. How keys are cut into splits is in `decode_plan`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._src import decode_plan, plan, registry
from jax_flash._src.config import UNBOUNDED
from jax_flash._src.decode_call import OPERANDS, QUANTISED, DecodeConfig

DTYPES = (*plan.DTYPES, "float32")
"""Of queries."""
WIDEST = 256
MOST_ROWS = 2**31 - 1
"""Tokens that the caches may hold together."""
MOST_BYTES = 2**36
"""Of a cache: 32 bits count pieces of 16 bytes."""


def cuda_supports(config: DecodeConfig, operands: dict[str, Any]) -> str | None:
    """Why the kernel cannot run a call of canonical operands, or None."""
    extension = registry.extension()
    if extension.missing is not None:
        return extension.missing
    query, k_cache, v_cache = (operands[n] for n in config.present[:3])
    if str(query.dtype) not in DTYPES:
        return (
            f"query of dtype {query.dtype}: the kernel takes bfloat16, float16 and "
            "float32"
        )
    quantised = str(k_cache.dtype) in QUANTISED
    if quantised and str(query.dtype) not in plan.DTYPES:
        return (
            f"k_cache of dtype {k_cache.dtype} with query of dtype {query.dtype}: the "
            "kernel takes it with bfloat16 and float16"
        )
    if not quantised and k_cache.dtype != query.dtype:
        return (
            f"k_cache of dtype {k_cache.dtype}: the kernel takes that of query, "
            f"{query.dtype}, or {' or '.join(QUANTISED)}"
        )
    multiple = 16 // k_cache.dtype.itemsize
    for name, width in (("k_cache", k_cache), ("v_cache", v_cache)):
        if width.shape[-1] % multiple or width.shape[-1] > WIDEST:
            return (
                f"{name} of width {width.shape[-1]}: the kernel takes multiples of "
                f"{multiple} up to {WIDEST} for {k_cache.dtype}"
            )
    if k_cache.shape[0] * k_cache.shape[1] > MOST_ROWS:
        return f"k_cache {k_cache.shape} holds more tokens than 31 bits can count"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if math.prod(cache.shape) * cache.dtype.itemsize > MOST_BYTES:
            return f"{name} {cache.shape} has more than {MOST_BYTES} bytes"
    return None


def _room(operands: dict[str, Any]) -> int:
    """Keys that a sequence can have."""
    room = operands["k_cache"].shape[1]
    return room * operands["page_table"].shape[1] if "page_table" in operands else room


def splits_of(config: DecodeConfig, operands: dict[str, Any]) -> tuple[int, int]:
    """Keys of a split of a call, and the most splits that a sequence can need."""
    _, tokens, heads, _ = operands["query"].shape
    k_cache, v_cache = operands["k_cache"], operands["v_cache"]
    kv_heads = k_cache.shape[2]
    return decode_plan.splits_of(
        _room(operands),
        tokens,
        config.window_left,
        tokens * (heads // kv_heads),
        kv_heads,
        config.num_splits,
        max(k_cache.shape[-1], v_cache.shape[-1]),
        k_cache.dtype.itemsize,
    )


def by_forward(config: DecodeConfig, operands: dict[str, Any]) -> bool:
    """Whether a GPU of compute capability 9.0 runs a call by its forward kernel."""
    _, tokens, heads, _ = operands["query"].shape
    k_cache = operands["k_cache"]
    kv_heads = k_cache.shape[2]
    plain = config.softcap is None and config.num_splits is None
    if not plain or config.present != OPERANDS[:4]:
        return False
    return str(k_cache.dtype) in plan.DTYPES and decode_plan.serves_forward(
        tokens, heads // kv_heads, kv_heads, k_cache.shape[1], config.window_left
    )


def forward_parts(config: DecodeConfig, operands: dict[str, Any]) -> int:
    """Parts of the keys of a call in the forward kernel, 0 if that does not run it."""
    if not by_forward(config, operands):
        return 0
    _, tokens, heads, width = operands["query"].shape
    _, room, kv_heads, value_width = operands["v_cache"].shape
    return decode_plan.forward_parts(
        tokens,
        heads // kv_heads,
        kv_heads,
        room,
        config.window_left,
        max(width, value_width),
    )


def splits_text(config: DecodeConfig, operands: dict[str, Any]) -> str:
    """Into what a sequence of full length is cut, in words."""
    keys, splits = splits_of(config, operands)
    text = "one split" if splits == 1 else f"up to {splits} splits of {keys} keys"
    text = f"{text} for each sequence"
    if parts := forward_parts(config, operands):
        text += "; on compute capability 9.0 the forward kernel"
        text += f", {parts} parts of the keys" if parts > 1 else ""
    return text


def call_kernel(*operands: jax.Array, config: DecodeConfig) -> list[jax.Array]:
    """`[out, lse]` by one FFI call; what else it returns is workspace."""
    o = dict(zip(config.present, operands, strict=True))
    batch, tokens, heads, _ = o["query"].shape
    kv_heads, value_width = o["v_cache"].shape[2:]
    room = _room(o)
    rows = tokens * (heads // kv_heads)
    keys, splits = splits_of(config, o)
    parts = forward_parts(config, o)
    # Parts have half the bytes of a split: outputs of 16 bits, and lse alone.
    room_of = (splits if splits > 1 else 0, -(-parts // 2) if parts > 1 else 0)
    places = (batch, kv_heads, max(room_of), rows)
    results = [
        jax.ShapeDtypeStruct((batch, tokens, heads, value_width), o["query"].dtype),
        jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        jax.ShapeDtypeStruct((*places, value_width), jnp.float32),
        jax.ShapeDtypeStruct((*places, 2), jnp.float32),
    ]
    window = config.window_left
    # numpy scalars, because a Python float would become an f64 attribute. A window that
    # reaches every key is none.
    out, lse, _, _ = jax.ffi.ffi_call(registry.DECODE_TARGET, results)(
        *operands,
        scale=np.float32(config.scale),
        softcap=np.float32(config.softcap or 0.0),
        window_left=np.int64(UNBOUNDED if window >= room else window),
        split_keys=np.int64(keys),
        splits=np.int64(splits),
        has_page_table="page_table" in o,
        has_sinks="sinks" in o,
        has_slopes="alibi_slopes" in o,
        has_k_scale="k_scale" in o,
        has_v_scale="v_scale" in o,
        forward_parts=np.int64(parts),
    )
    return [out, lse]
