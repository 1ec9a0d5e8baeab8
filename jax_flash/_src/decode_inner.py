"""The inner primitive of decoding: what the compiler sees, after partitioning.

Lives here: `decode_i` with its lowerings, the CUDA kernel where the call has one, else
the jnp specification; and what the kernel supports.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_flash._src import avals, decode_plan, decode_reference, inner, plan, registry
from jax_flash._src.config import UNBOUNDED
from jax_flash._src.decode_call import QUANTISED, DecodeConfig
from jax_flash._src.scores import accumulator

WIDEST = 256
MOST_ROWS = 2**31 - 1
"""Tokens that the caches may hold together."""


def abstract(*operands: Any, config: DecodeConfig, **_: Any) -> list[Any]:
    """Types of `[out, lse]`."""
    query, k_cache, v_cache = operands[:3]
    batch, tokens, heads, _ = query.shape
    by_batch, by_token, by_head, _ = query.sharding.spec
    quantised = str(k_cache.dtype) in QUANTISED
    lse_dtype = jnp.float32 if quantised else accumulator(query.dtype)
    out_shape = (batch, tokens, heads, v_cache.shape[-1])
    out_spec = (by_batch, by_token, by_head, None)
    lse_spec = (by_batch, by_head, by_token)
    return [
        avals._like(query, out_shape, query.dtype, out_spec),
        avals._like(query, (batch, heads, tokens), lse_dtype, lse_spec),
    ]


def cuda_supports(config: DecodeConfig, operands: dict[str, Any]) -> str | None:
    """Why the kernel cannot run a call of canonical operands, or None."""
    extension = registry.extension()
    if extension.missing is not None:
        return extension.missing
    query, k_cache, v_cache = (operands[n] for n in config.present[:3])
    if str(query.dtype) not in plan.DTYPES:
        return f"query of dtype {query.dtype}: the kernel takes bfloat16 and float16"
    quantised = str(k_cache.dtype) in QUANTISED
    if not quantised and k_cache.dtype != query.dtype:
        return (
            f"k_cache of dtype {k_cache.dtype}: the kernel takes that of query, "
            f"{query.dtype}, or {' or '.join(QUANTISED)}"
        )
    multiple = 16 if quantised else 8
    for name, width in (("k_cache", k_cache), ("v_cache", v_cache)):
        if width.shape[-1] % multiple or width.shape[-1] > WIDEST:
            return (
                f"{name} of width {width.shape[-1]}: the kernel takes multiples of "
                f"{multiple} up to {WIDEST} for {k_cache.dtype}"
            )
    if k_cache.shape[0] * k_cache.shape[1] > MOST_ROWS:
        return f"k_cache {k_cache.shape} holds more tokens than 31 bits can count"
    return None


_in_jnp = mlir.lower_fun(decode_reference.decode, multiple_results=True)


def _default(ctx: Any, *operands: Any, config: DecodeConfig) -> Any:
    """The specification, unless the caller restricted the call to the kernel."""
    inner._only_on_cuda(ctx, config)
    return _in_jnp(ctx, *operands, config=config)


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


def call_kernel(*operands: jax.Array, config: DecodeConfig) -> list[jax.Array]:
    """`[out, lse]` by one FFI call; what else it returns is workspace."""
    o = dict(zip(config.present, operands, strict=True))
    batch, tokens, heads, _ = o["query"].shape
    kv_heads, value_width = o["v_cache"].shape[2:]
    room = _room(o)
    rows = tokens * (heads // kv_heads)
    keys, splits = splits_of(config, o)
    places = (batch, kv_heads, splits if splits > 1 else 0, rows)
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
        has_k_scale="k_scale" in o,
        has_v_scale="v_scale" in o,
    )
    return [out, lse]


_by_kernel = mlir.lower_fun(call_kernel, multiple_results=True)


def _cuda(ctx: Any, *operands: Any, config: DecodeConfig) -> Any:
    """The kernel where the call may and can run it, else the specification."""
    shapes = [x.shape for x in (*ctx.avals_in, *ctx.avals_out)]
    named = dict(zip(config.present, ctx.avals_in, strict=True))
    empty = any(0 in shape for shape in shapes)
    reason = cuda_supports(config, named)
    if "cuda" not in config.implementations or empty:
        return _in_jnp(ctx, *operands, config=config)
    if reason is None:
        return _by_kernel(ctx, *operands, config=config)
    if "xla" not in config.implementations:
        raise NotImplementedError(f"implementation='cuda': {reason}")
    return _in_jnp(ctx, *operands, config=config)


decode_i = inner.new_primitive("flash_decode_inner", abstract, _default)
mlir.register_lowering(decode_i, _cuda, platform="cuda")
