"""The inner primitive of `rope_append_kv`: what the compiler sees, after partitioning.

Lives here: `rope_append_i` with its lowerings, one FFI call of the CUDA kernel where
that runs the call, else the jnp specification.
"""

import math
from typing import Any

import jax
from jax.interpreters import mlir

from jax_flash._src import inner, registry, rope_reference
from jax_flash._src.rope_reference import QKV, RopeConfig

RESULTS = ("query", "k_cache", "v_cache")
DTYPES = ("float32", "bfloat16", "float16")
"""Of queries, new keys and values, and caches: one for all of them."""
MOST_ELEMENTS = 2**22
"""Of the queries, keys and values of a token."""
MOST_PAIRS = 4096
"""Whose angles fit the shared memory of a thread block."""
MOST_ROWS = 2**31 - 1
"""New tokens, sequences, pages, and tokens of a page."""


def abstract(*operands: Any, config: RopeConfig, **_: Any) -> list[Any]:
    """Types of `[query, k_cache, v_cache]`: those of the operands."""
    named = dict(zip(config.present, operands, strict=True))
    if config.packed:
        qkv = named[QKV]
        caches = named["k_cache"], named["v_cache"]
        shape = rope_reference.part_shapes(qkv, *caches)[0]
        named["query"] = rope_reference.part_type(qkv, shape)
    return [named[n].update(weak_type=False) for n in RESULTS]


def _is_above(size: Any, limit: int) -> bool:
    """Of a size that is known; the call itself checks one that is symbolic (export)."""
    return isinstance(size, int) and size > limit


def why_not(named: dict[str, Any]) -> str | None:
    """Why the kernel cannot run a call, or None.

    Args:
      named: canonical operands, with the turned query.
    """
    extension = registry.extension()
    if extension.missing is not None:
        return extension.missing
    *batch, tokens, heads, width = named["query"].shape
    *pages, page, kv_heads, value_width = named["v_cache"].shape
    elements = (heads + kv_heads) * width + kv_heads * value_width
    if _is_above(elements, MOST_ELEMENTS):
        return f"tokens of {elements} elements: the kernel takes {MOST_ELEMENTS}"
    pairs = named["inv_freq"].shape[-1]
    if _is_above(pairs, MOST_PAIRS):
        return f"rotary_dim={2 * pairs}: the kernel takes up to {2 * MOST_PAIRS}"
    for size in (math.prod(batch) * tokens, math.prod(pages), page):
        if _is_above(size, MOST_ROWS):
            return f"{size} tokens or pages are more than 31 bits can count"
    return None


def call_kernel(*operands: jax.Array, config: RopeConfig) -> list[jax.Array]:
    """`[query, k_cache, v_cache]` by one FFI call, which writes the caches in place."""
    types = abstract(*map(jax.typeof, operands), config=config)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types]
    call = jax.ffi.ffi_call(
        registry.ROPE_APPEND_TARGET,
        results,
        # XLA copies caches that somebody else still reads.
        input_output_aliases={1: 1, 2: 2},
    )
    attributes = {
        "interleaved": config.interleaved,
        "is_packed": config.packed,
        "has_page_table": config.paged,
    }
    return list(call(*operands, **attributes))


_in_jnp = mlir.lower_fun(rope_reference.rope_append, multiple_results=True)
_by_kernel = mlir.lower_fun(call_kernel, multiple_results=True)


def _cuda(ctx: Any, *operands: Any, config: RopeConfig) -> Any:
    """The kernel where it can run the call, else the specification."""
    named = dict(zip(config.present, ctx.avals_in, strict=True))
    named["query"] = ctx.avals_out[0]
    empty = any(0 in x.shape for x in ctx.avals_in)
    lower = _in_jnp if empty or why_not(named) is not None else _by_kernel
    return lower(ctx, *operands, config=config)


rope_append_i = inner.new_primitive("rope_append_inner", abstract, _in_jnp)
mlir.register_lowering(rope_append_i, _cuda, platform="cuda")
