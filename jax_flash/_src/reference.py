"""The specification of attention in jnp: `scale, softcap, bias, masks, softmax`.

Lives here: the forward, materialised for small problems and chunked (online softmax,
memory linear in T and S) for large ones. It is what every platform without a kernel
runs, and the oracle of the kernels. Its derivatives are in `reference_grad`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash._src import blocks, compat, dropout, mask, packed
from jax_flash._src.config import AttentionConfig
from jax_flash._src.scores import (
    Operands,
    accumulator,
    batch_shape,
    logits,
    sink_share,
    weights_value,
)

State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@compat.allows_rank_promotion
@packed.splits_forward
def forward(*operands: jax.Array, config: AttentionConfig) -> list[jax.Array]:
    """Attention of canonical operands.

    Args:
      *operands: the arrays named in `config.present`.
      config: the call.

    Returns:
      `[out, lse]`: out [*B, T, N, Hv] in the dtype of query, lse [*B, N, T] in the
      accumulator dtype. A row that may attend nothing has out 0 and lse -inf.
    """
    o = dict(zip(config.present, operands, strict=True))
    batch = batch_shape(o)
    rows, heads, _ = o["query"].shape[-3:]
    out_shape = (*batch, rows, heads, o["value"].shape[-1])
    lse_shape = (*batch, heads, rows)
    dtype = accumulator(o["query"].dtype)
    if 0 in lse_shape or 0 in o["key"].shape:
        out, lse = jnp.zeros(out_shape, dtype), jnp.full(lse_shape, -jnp.inf, dtype)
        out, lse = (compat.vary_like(x, o["query"]) for x in (out, lse))
    else:
        o = mask.zero_padding(config, o)
        out, lse = (materialised if blocks.small(o) else chunked)(config, o)
        out, lse = jnp.broadcast_to(out, out_shape), jnp.broadcast_to(lse, lse_shape)
    return [out.astype(o["query"].dtype), lse]


def materialised(config: AttentionConfig, o: Operands) -> tuple[jax.Array, jax.Array]:
    """The definition, with all scores [*B, N, T, S] held at once."""
    rows, keys = o["query"].shape[-3], o["key"].shape[-3]
    key = jnp.arange(keys, dtype=jnp.int32)
    where = mask.locate(config, o, jnp.arange(rows, dtype=jnp.int32), rows, keys)
    ok = mask.allowed(o, where, key)
    s, _ = logits(config, o, where, key)
    s = jnp.where(ok, s, -jnp.inf)
    top = jnp.max(s, -1)
    some = ok.any(-1)
    if "sinks" in o:
        top = jnp.maximum(top, o["sinks"].astype(s.dtype)[..., None])
    shift = jnp.where(top == -jnp.inf, 0, top)
    e = jnp.exp(s - shift[..., None])
    total = e.sum(-1)
    if "sinks" in o:
        total = total + sink_share(o, shift)
    kept = e * dropout.factors(config, o, where, key)
    return _finish(weights_value(config, kept, o["value"]), shift, total, some)


def _finish(
    acc: jax.Array, shift: jax.Array, total: jax.Array, some: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Normalises: acc [*B, T, N, Hv]; shift, total and some [*B, N, T]."""
    live = some & (total != 0)
    divisor = jnp.where(live, total, 1)
    lse = jnp.where(live, shift + jnp.log(divisor), -jnp.inf)
    return acc / jnp.swapaxes(divisor, -1, -2)[..., None], lse


def chunked(config: AttentionConfig, o: Operands) -> tuple[jax.Array, jax.Array]:
    """The same by blocks of rows and keys, keys outside the mask never visited."""
    rows, keys = o["query"].shape[-3], o["key"].shape[-3]
    key_block = min(blocks.KEY_BLOCK, keys) if isinstance(keys, int) else keys
    row_block = blocks.row_block(o, key_block)
    padded = blocks.pad(o, blocks.ROW_AXIS, rows, row_block)
    padded = blocks.pad(padded, blocks.KEY_AXIS, keys, key_block)
    all_rows = padded["query"].shape[-3]
    by_row = blocks.split(padded, blocks.ROW_AXIS, all_rows, row_block)
    rest = {name: x for name, x in padded.items() if name not in by_row}

    def one_row_block(args: tuple[jax.Array, Operands]) -> tuple[jax.Array, jax.Array]:
        index, mine = args
        row = index * row_block + jnp.arange(row_block, dtype=jnp.int32)
        return _online(config, {**rest, **mine}, row, rows, keys, key_block)

    count = all_rows // row_block
    out, lse = lax.map(one_row_block, (jnp.arange(count, dtype=jnp.int32), by_row))
    out, lse = blocks.join(out, -3), blocks.join(lse, -1)
    return out[..., :rows, :, :], lse[..., :rows]


def _online(
    config: AttentionConfig,
    o: Operands,
    row: jax.Array,
    rows: int,
    keys: int,
    key_block: int,
) -> tuple[jax.Array, jax.Array]:
    """Online softmax of the rows `row` [t] over blocks of keys.

    State: the largest logit so far, the sum and the weighted values relative to it, and
    whether any key was allowed. The empty state is (-inf, 0, 0, False).
    """
    dtype = accumulator(o["query"].dtype)
    all_keys = o["key"].shape[-3]
    by_key = [
        n for n, a in blocks.KEY_AXIS.items() if n in o and o[n].shape[a] == all_keys
    ]
    shape = (*batch_shape(o), o["query"].shape[-2], row.size)
    top = jnp.full(shape, -jnp.inf, dtype)
    total = jnp.zeros(shape, dtype)
    if "sinks" in o:
        top = jnp.broadcast_to(o["sinks"].astype(dtype)[..., None], shape)
        total = jnp.ones(shape, dtype)
    acc = jnp.zeros((*shape[:-2], row.size, shape[-2], o["value"].shape[-1]), dtype)
    where = mask.locate(config, o, row, rows, keys)
    state = (top, total, acc, jnp.zeros(shape, bool))
    state = tuple(compat.vary_like(x, o["query"]) for x in state)

    def one_key_block(index: jax.Array, state: State) -> State:
        top, total, acc, some = state
        start = index * key_block
        mine = dict(o)
        for name in by_key:
            mine[name] = lax.dynamic_slice_in_dim(
                o[name], start, key_block, o[name].ndim + blocks.KEY_AXIS[name]
            )
        key = start + jnp.arange(key_block, dtype=jnp.int32)
        ok = mask.allowed(mine, where, key)
        s, _ = logits(config, mine, where, key)
        s = jnp.where(ok, s, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(s, -1))
        shift = jnp.where(new_top == -jnp.inf, 0, new_top)
        e = jnp.exp(s - shift[..., None])
        # An infinite sink stays on top of all keys.
        decay = jnp.where(top == jnp.inf, 1, jnp.exp(top - shift))
        total = total * decay + e.sum(-1)
        acc = acc * jnp.swapaxes(decay, -1, -2)[..., None]
        kept = e * dropout.factors(config, mine, where, key)
        acc = acc + weights_value(config, kept, mine["value"])
        return new_top, total, acc, some | ok.any(-1)

    begin = jnp.min(jnp.where(where.first < where.end, where.first, keys)) // key_block
    stop = (jnp.max(where.end) + key_block - 1) // key_block
    top, total, acc, some = lax.fori_loop(begin, stop, one_key_block, state)
    return _finish(acc, jnp.where(top == -jnp.inf, 0, top), total, some)
