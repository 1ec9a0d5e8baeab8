"""Calls of `mha` with few queries on many keys, which the decode kernel runs.

Lives here: which calls are decoding in all but name, and their way into that kernel and
back. Only the forward is run by it; its out and lse are what the kernels of the
backward take. Whether it is worth it says `decode_plan.serves_mha`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._src import compat, decode_kernel, decode_plan, plan
from jax_flash._src.config import UNBOUNDED, AttentionConfig
from jax_flash._src.decode_call import OPERANDS, DecodeConfig

TENSORS = ("query", "key", "value")
OPTIONAL = ("sinks", "key_value_seq_lengths")


def decode_config(
    config: AttentionConfig, operands: dict[str, Any]
) -> DecodeConfig | None:
    """The call of the decode kernel that runs a call of `mha`, or None.

    Args:
      config: the call.
      operands: its canonical operands by name, or their types.
    """
    if config.qkv_heads is not None or not {*operands} <= {*TENSORS, *OPTIONAL}:
        return None
    query, key, value = (operands[name] for name in TENSORS)
    if str(query.dtype) not in plan.DTYPES:
        return None  # nobody has compared the kernels of float32
    shapes = [x.shape for x in (query, key, value)]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return None  # lengths of an exported program
    batches = {shape[:-3] for shape in shapes}
    row_major = all(order == tuple(range(query.ndim)) for order in config.orders)
    if len(batches) > 1 or not row_major:
        return None
    (batch,) = batches
    others = [operands[n].shape for n in OPTIONAL if n in operands]
    if any(np.broadcast_shapes(batch, x[: len(batch)]) != batch for x in others):
        return None
    if not _sees_a_cache(config, query.shape[-3]):
        return None
    (tokens, heads), (keys, kv_heads) = query.shape[-3:-1], key.shape[-3:-1]
    group = heads // kv_heads
    if not decode_plan.serves_mha(tokens, group, keys, config.window_left):
        return None
    present = OPERANDS[:4] + (("sinks",) if "sinks" in operands else ())
    decode = DecodeConfig(
        scale=config.scale,
        window_left=config.window_left,
        softcap=config.softcap,
        present=present,
        implementations=config.implementations,
    )
    reason = decode_kernel.cuda_supports(decode, _types(operands))
    return decode if reason is None else None


def splits(decode: DecodeConfig, operands: dict[str, Any]) -> str:
    """Into what the kernel cuts the keys, in words."""
    return decode_kernel.splits_text(decode, _types(operands))


def _types(operands: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Types of query and caches, all batch dimensions one, by their names there."""
    tensors = [operands[name] for name in TENSORS]
    shapes = [(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in tensors]
    return {
        name: jax.ShapeDtypeStruct(shape, x.dtype)
        for name, shape, x in zip(OPERANDS[:3], shapes, tensors, strict=True)
    }


def _sees_a_cache(config: AttentionConfig, tokens: int) -> bool:
    """Whether queries see what the last tokens of a cache see.

    These see no key after their own position, and stand at the last ones. A single one
    sees all keys, if no mask aligns it elsewhere.
    """
    right, aligned = config.window_right, config.bottom_right
    if tokens == 1:
        return aligned or config.window_left == right == UNBOUNDED
    return aligned and right == 0


def call(operands: dict[str, jax.Array], decode: DecodeConfig) -> list[jax.Array]:
    """`[out, lse]` by the decode kernel, to which all batch dimensions are one.

    Args:
      operands: canonical operands by name.
      decode: what `decode_config` made of the call.
    """
    query, key, value = (operands[name] for name in TENSORS)
    batch = query.shape[:-3]
    count = math.prod(batch)
    lengths = operands.get("key_value_seq_lengths", jnp.int32(key.shape[-3]))
    lengths = jnp.broadcast_to(lengths, batch).reshape(count)
    given = [x.reshape(count, *x.shape[-3:]) for x in (query, key, value)]
    given.append(compat.vary_like(lengths, query))
    if "sinks" in operands:
        sinks = operands["sinks"].astype(jnp.float32)
        shape = (*batch, sinks.shape[-1])
        given.append(jnp.broadcast_to(sinks, shape).reshape(count, -1))
    out, lse = decode_kernel.call_kernel(*given, config=decode)
    return [x.reshape(*batch, *x.shape[1:]) for x in (out, lse)]
