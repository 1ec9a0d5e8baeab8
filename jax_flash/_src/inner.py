"""Inner primitives: what the compiler sees, after partitioning.

Lives here: `forward_i` and `backward_i` with their lowerings, the CUDA kernel where the
call was found to have one, else the jnp specification. Batching and derivatives belong
to the outer primitives (`primitives`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

from jax_flash._src import avals, plan, reference, reference_grad, registry
from jax_flash._src.config import AttentionConfig


def new_primitive(name: str, abstract: Callable, lowering: Callable) -> Primitive:
    """A primitive with several results, run eagerly by compiling it alone."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    mlir.register_lowering(primitive, lowering)
    return primitive


_reference_lowering = mlir.lower_fun(reference.forward, multiple_results=True)


def _forward_default(ctx: Any, *operands: Any, config: AttentionConfig) -> Any:
    """The specification, unless the caller restricted the call to the kernels."""
    if "xla" not in config.implementations:
        raise NotImplementedError(
            f"implementation={config.implementations[0]!r} runs on platform 'cuda' "
            f"only, this computation is lowered for {ctx.module_context.platforms}"
        )
    return _reference_lowering(ctx, *operands, config=config)


def _forward_cuda(ctx: Any, *operands: Any, config: AttentionConfig) -> Any:
    """One FFI call, reading query, key and value in the layout they have."""
    query, key, value = ctx.avals_in[:3]
    batch_dims = query.ndim - 3
    empty = 0 in query.shape + key.shape + value.shape + ctx.avals_out[0].shape
    if "cuda" not in config.implementations or empty:
        return _reference_lowering(ctx, *operands, config=config)
    if batch_dims > plan.MAX_BATCH_DIMS:
        if "xla" in config.implementations:
            return _reference_lowering(ctx, *operands, config=config)
        raise NotImplementedError(
            f"implementation='cuda' takes at most {plan.MAX_BATCH_DIMS} batch "
            f"dimensions (vmap adds one each), got {batch_dims}"
        )
    lengths = config.present[3:]
    # XLA wants layouts minor to major; lengths are row-major.
    layouts: list[Any] = [order[::-1] for order in config.orders]
    layouts += [tuple(reversed(range(batch_dims)))] * len(lengths)
    lower = jax.ffi.ffi_lowering(registry.FORWARD_TARGET, operand_layouts=layouts)
    # numpy scalars, because a Python float would become an f64 attribute.
    orders = [np.asarray(order, np.int64) for order in config.orders]
    return lower(
        ctx,
        *operands,
        scale=np.float32(config.scale),
        window_left=np.int64(config.window_left),
        window_right=np.int64(config.window_right),
        bottom_right=config.bottom_right,
        has_query_lengths="query_seq_lengths" in lengths,
        has_kv_lengths="key_value_seq_lengths" in lengths,
        query_order=orders[0],
        key_order=orders[1],
        value_order=orders[2],
    )


forward_i = new_primitive("flash_mha_fwd_inner", avals.forward, _forward_default)
mlir.register_lowering(forward_i, _forward_cuda, platform="cuda")

backward_i = new_primitive(
    "flash_mha_bwd_inner",
    avals.backward,
    mlir.lower_fun(reference_grad.backward, multiple_results=True),
)
