"""Derivatives of the specification in jnp, by blocks of query rows.

Lives here: the tangent (forward mode, also what higher orders differentiate) and the
backward. Both recompute the probabilities from lse, hold one block of scores at a time,
and are themselves differentiable with the same memory: the block is checkpointed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash._src import blocks, compat, dropout, mask, packed
from jax_flash._src.config import RESIDUALS, TRAILING, AttentionConfig, Backward
from jax_flash._src.scores import (
    Operands,
    accumulator,
    batch_shape,
    logits,
    query_key,
    sink_probability,
    weights_query,
    weights_value,
)

COTANGENTS: tuple[str, ...] = ("dout", "dlse")

Body = Callable[[Operands, Operands, jax.Array], tuple[Operands, Operands]]


def _by_row_blocks(o: Operands, others: Operands, body: Body):
    """Runs `body(operands, others, row) -> (kept, summed)` over blocks of rows.

    Args:
      o: operands and residuals.
      others: tangents or cotangents, named after what they belong to.
      body: the work on the rows `row` [t].

    Returns:
      `(kept, summed)`: kept with a leading dimension of blocks, summed over blocks.
    """
    rows = o["query"].shape[-3]
    block = rows if blocks.small(o) else blocks.row_block(o, o["key"].shape[-3])
    if block == rows:
        kept, summed = body(o, others, jnp.arange(rows, dtype=jnp.int32))
        return {name: x[None] for name, x in kept.items()}, summed
    o = blocks.pad(o, blocks.ROW_AXIS, rows, block)
    others = blocks.pad(others, blocks.ROW_AXIS, rows, block)
    rows = o["query"].shape[-3]
    by_row = blocks.split(o, blocks.ROW_AXIS, rows, block)
    others_by_row = blocks.split(others, blocks.ROW_AXIS, rows, block)
    rest = {n: x for n, x in o.items() if n not in by_row}
    others_rest = {n: x for n, x in others.items() if n not in others_by_row}

    @jax.checkpoint
    def work(
        mine: Operands,
        others_mine: Operands,
        rest: Operands,
        others_rest: Operands,
        index: jax.Array,
    ) -> tuple[Operands, Operands]:
        row = index * block + jnp.arange(block, dtype=jnp.int32)
        return body({**rest, **mine}, {**others_rest, **others_mine}, row)

    def step(
        total: Operands, xs: tuple[Operands, Operands, jax.Array]
    ) -> tuple[Operands, Operands]:
        kept, summed = work(*xs[:2], rest, others_rest, xs[2])
        return {name: total[name] + summed[name] for name in total}, kept

    count = rows // block
    xs = by_row, others_by_row, jnp.arange(count, dtype=jnp.int32)
    like = jax.eval_shape(
        lambda xs: work(*xs[:2], rest, others_rest, xs[2])[1],
        jax.tree.map(lambda x: x[0], xs),
    )
    zeros = {
        name: compat.vary_like(jnp.zeros(x.shape, x.dtype), o["query"])
        for name, x in like.items()
    }
    summed, kept = lax.scan(step, zeros, xs)
    return kept, summed


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The softmax of some rows, recomputed from lse.

    Attributes:
      p: probabilities [*B, N, t, S].
      live: [*B, N, t], False where the row attends nothing.
      slope: derivative of the soft cap, 1.0 without one.
      distance: of each key from the row's own, in the dtype of p [*B|(), 1, t, S].
      kept: what dropout multiplies p by, 1.0 without it.
    """

    p: jax.Array
    live: jax.Array
    slope: jax.Array | float
    distance: jax.Array
    kept: jax.Array | float


def _weights(
    config: AttentionConfig, o: Operands, row: jax.Array, rows: int
) -> _Weights:
    """The softmax of the rows `row` [t] of T = `rows`."""
    keys = o["key"].shape[-3]
    key = jnp.arange(keys, dtype=jnp.int32)
    where = mask.locate(config, o, row, rows, keys)
    ok = mask.allowed(o, where, key)
    s, slope = logits(config, o, where, key)
    live = o["lse"] != -jnp.inf
    shift = jnp.where(live, o["lse"], 0)[..., None]
    # The inner `where` keeps the derivative of exp finite where the logit is masked.
    p = jnp.where(ok, jnp.exp(jnp.where(ok, s - shift, 0)), 0)
    distance = mask.distance(where, key)[..., None, :, :].astype(p.dtype)
    kept = dropout.factors(config, o, where, key)
    return _Weights(p, live, slope, distance, kept)


@compat.allows_rank_promotion
@packed.splits_tangent
def tangent(
    *args: jax.Array, config: AttentionConfig, perturbed: tuple[str, ...]
) -> list[jax.Array]:
    """Tangents of out and lse, linear in the tangents of the operands.

    Args:
      *args: operands, out, lse, then a tangent for each name in `perturbed`.
      config: the call.
      perturbed: the operands that have a tangent.

    Returns:
      `[dout, dlse]` with the shapes and dtypes of out and lse and the batch of all.
    """
    names = config.present + RESIDUALS
    o = dict(zip(names, args[: len(names)], strict=True))
    t = dict(zip(perturbed, args[len(names) :], strict=True))
    batch = jnp.broadcast_shapes(batch_shape(o), batch_shape(t))
    out_shape, lse_shape = batch + o["out"].shape[-3:], batch + o["lse"].shape[-2:]
    out_dtype, lse_dtype = o["out"].dtype, o["lse"].dtype
    if 0 in lse_shape or 0 in o["key"].shape:
        dout, dlse = jnp.zeros(out_shape, out_dtype), jnp.zeros(lse_shape, lse_dtype)
        return [compat.vary_like(x, o["query"]) for x in (dout, dlse)]
    rows = o["query"].shape[-3]
    dtype = accumulator(out_dtype)
    o = mask.zero_padding(config, o)
    padding = {n: x for n, x in o.items() if n not in perturbed}
    t = {n: x for n, x in mask.zero_padding(config, {**padding, **t}).items() if n in t}

    def body(o: Operands, t: Operands, row: jax.Array) -> tuple[Operands, Operands]:
        w = _weights(config, o, row, rows)
        ds = jnp.zeros((), dtype)
        for a, b in ((t.get("query"), o["key"]), (o["query"], t.get("key"))):
            if a is not None and b is not None:
                ds = ds + config.scale * query_key(config, a, b) * w.slope
        if "bias" in t:
            ds = ds + t["bias"].astype(dtype)
        if "alibi_slopes" in t:
            slopes = t["alibi_slopes"].astype(dtype)[..., None, None]
            ds = ds - slopes * w.distance
        pds = w.p * ds
        dlse = pds.sum(-1)
        if "sinks" in t:
            sink = sink_probability(o, w.live)
            dlse = dlse + sink * t["sinks"].astype(dtype)[..., None]
        dout = weights_value(config, pds * w.kept, o["value"])
        dout = dout - jnp.swapaxes(dlse, -1, -2)[..., None] * o["out"].astype(dtype)
        if "value" in t:
            dout = dout + weights_value(config, w.p * w.kept, t["value"])
        # As in the backward, which this is transposed to: any cotangent of a dead row.
        live = jnp.swapaxes(w.live, -1, -2)[..., None]
        dout = jnp.where(live, dout, 0).astype(out_dtype)
        return {"dout": dout, "dlse": jnp.where(w.live, dlse, 0)}, {}

    kept, _ = _by_row_blocks(o, t, body)
    dout = blocks.join(kept["dout"], -3)[..., :rows, :, :]
    dlse = blocks.join(kept["dlse"], -1)[..., :rows]
    return [jnp.broadcast_to(dout, out_shape), jnp.broadcast_to(dlse, lse_shape)]


@compat.allows_rank_promotion
@packed.splits_backward
def backward(
    *args: jax.Array, config: AttentionConfig, backward: Backward
) -> list[jax.Array]:
    """Gradients of the operands in `backward.perturbed`.

    Args:
      *args: operands, out, lse, dout and, if `backward.has_dlse`, dlse.
      config: the call.
      backward: which gradients, and over which batch dimensions each is summed.

    Returns:
      A gradient for each perturbed operand, in its dtype: its trailing shape behind
      the full batch, size 1 where it was summed over. Sums are in float32 or wider.
    """
    names = config.present + RESIDUALS
    o = dict(zip(names, args[: len(names)], strict=True))
    cts: Operands = dict(zip(COTANGENTS, args[len(names) :], strict=False))
    batch = jnp.broadcast_shapes(batch_shape(o), batch_shape(cts))
    shapes = {n: o[n].shape[o[n].ndim - TRAILING[n] :] for n in backward.perturbed}
    shared = dict(zip(backward.perturbed, backward.shared, strict=True))
    dtypes = {n: o[n].dtype for n in backward.perturbed}

    def summed_over_batch(name: str, x: jax.Array) -> jax.Array:
        """Broadcasts x to the full batch, then sums the shared dimensions."""
        x = jnp.broadcast_to(x, batch + x.shape[x.ndim - TRAILING[name] :])
        axes = tuple(len(batch) + axis for axis in shared[name])
        return x.sum(axes, keepdims=True) if axes else x

    if 0 in batch + o["out"].shape[-3:-1] + o["key"].shape:
        zeros = [
            summed_over_batch(n, jnp.zeros(batch + shapes[n], dtypes[n]))
            for n in shapes
        ]
        return [compat.vary_like(x, o["query"]) for x in zeros]
    rows = o["query"].shape[-3]
    dtype = accumulator(dtypes.get("query", o["query"].dtype))
    kv_heads = o["key"].shape[-2]
    o = mask.zero_padding(config, o)
    bias_by_row = "bias" in shapes and o["bias"].shape[-2] == rows

    def body(o: Operands, cts: Operands, row: jax.Array) -> tuple[Operands, Operands]:
        w = _weights(config, o, row, rows)
        # A dead row may carry any cotangent: lse is -inf there, its slope undefined.
        dout = jnp.where(jnp.swapaxes(w.live, -1, -2)[..., None], cts["dout"], 0)
        delta = (dout.astype(dtype) * o["out"].astype(dtype)).sum(-1)
        delta = jnp.swapaxes(delta, -1, -2)
        if backward.has_dlse:
            delta = delta - jnp.where(w.live, cts["dlse"], 0)
        kept, summed = {}, {}
        if "value" in shapes:
            summed["value"] = weights_query(config, w.p * w.kept, dout, kv_heads)
        if "sinks" in shapes:
            summed["sinks"] = -(sink_probability(o, w.live) * delta).sum(-1)
        if {"query", "key", "bias", "alibi_slopes"} & set(shapes):
            dp = query_key(config, dout, o["value"]) * w.kept
            ds = w.p * (dp - delta[..., None])
            if "bias" in shapes:
                whole = (ds.shape[-3], rows, ds.shape[-1])
                axes = [a for a in (0, 2) if shapes["bias"][a] != whole[a]]
                axes += [] if bias_by_row else [1]
                dbias = ds.sum([a - 3 for a in axes], keepdims=True)
                (kept if bias_by_row else summed)["bias"] = dbias
            if "alibi_slopes" in shapes:
                summed["alibi_slopes"] = -(ds * w.distance).sum((-1, -2))
            ds = config.scale * ds * w.slope
            if "query" in shapes:
                kept["query"] = weights_value(config, ds, o["key"])
            if "key" in shapes:
                summed["key"] = weights_query(config, ds, o["query"], kv_heads)
        kept, summed = (
            {n: summed_over_batch(n, x) for n, x in d.items()} for d in (kept, summed)
        )
        return {n: x.astype(dtypes[n]) for n, x in kept.items()}, summed

    kept, summed = _by_row_blocks(o, cts, body)
    grads = summed
    if "query" in kept:
        grads["query"] = blocks.join(kept["query"], -3)[..., :rows, :, :]
    if "bias" in kept:
        grads["bias"] = blocks.join(kept["bias"], -2)[..., :rows, :]
    return [grads[n].astype(dtypes[n]) for n in backward.perturbed]
