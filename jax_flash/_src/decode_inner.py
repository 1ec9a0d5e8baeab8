"""The inner primitive of decoding: what the compiler sees, after partitioning.

Lives here: `decode_i` with its lowerings, the CUDA kernel (`decode_kernel`) where the
call has one, else the jnp specification.
"""

from typing import Any

import jax.numpy as jnp
from jax.interpreters import mlir

from jax_flash._src import avals, decode_kernel, decode_reference, inner
from jax_flash._src.decode_call import QUANTISED, DecodeConfig
from jax_flash._src.scores import accumulator


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
        avals.like(query, out_shape, query.dtype, out_spec),
        avals.like(query, (batch, heads, tokens), lse_dtype, lse_spec),
    ]


_in_jnp = mlir.lower_fun(decode_reference.decode, multiple_results=True)


def _default(ctx: Any, *operands: Any, config: DecodeConfig) -> Any:
    """The specification, unless the caller restricted the call to the kernel."""
    inner._only_on_cuda(ctx, config)
    return _in_jnp(ctx, *operands, config=config)


_by_kernel = mlir.lower_fun(decode_kernel.call_kernel, multiple_results=True)


def _cuda(ctx: Any, *operands: Any, config: DecodeConfig) -> Any:
    """The kernel where the call may and can run it, else the specification."""
    shapes = [x.shape for x in (*ctx.avals_in, *ctx.avals_out)]
    named = dict(zip(config.present, ctx.avals_in, strict=True))
    empty = any(0 in shape for shape in shapes)
    reason = decode_kernel.cuda_supports(config, named)
    if "cuda" not in config.implementations or empty:
        return _in_jnp(ctx, *operands, config=config)
    if reason is None:
        return _by_kernel(ctx, *operands, config=config)
    if "xla" not in config.implementations:
        raise NotImplementedError(f"implementation='cuda': {reason}")
    return _in_jnp(ctx, *operands, config=config)


decode_i = inner.new_primitive("flash_decode_inner", abstract, _default)
mlir.register_lowering(decode_i, _cuda, platform="cuda")
