"""Sinks, joined to what a kernel computed without them.

The kernels know no sinks. A sink only adds `exp(sink)` to the sum that the weights of a
row are divided by, so a call with sinks is the kernel's call without them, and then

    lse' = log(exp(lse) + exp(sink)),  out' = out * exp(lse - lse').

The backward of a kernel recomputes the weights as `exp(logits - lse)` and needs besides
only `delta = sum(dout * out) - dlse`. Called with out', lse' and the cotangents of both
it returns the gradients of query, key and value with sinks. That of a sink is
`-sum(exp(sink - lse') * delta)` over the rows.

Lives here: the two formulas in jnp, which XLA fuses into one pass over out each.
"""

import jax
import jax.numpy as jnp

from jax_flash._src import mask
from jax_flash._src.config import AttentionConfig
from jax_flash._src.scores import Operands, sink_probability


def join(
    config: AttentionConfig,
    o: Operands,
    out: jax.Array,
    lse: jax.Array,
    seen: jax.Array | None = None,
) -> list[jax.Array]:
    """Adds the sinks to the results of a call without them.

    Args:
      config: the call.
      o: its canonical operands by name, sinks [*B, N] among them.
      out: [*B, T, N, Hv], without sinks.
      lse: float32 [*B, N, T], without sinks; -inf in rows without keys.
      seen: what says of rows that they have none, if lse does not.

    Returns:
      `[out, lse]` with sinks, of the same dtypes and the batch of all operands. Rows
      without keys stay 0 and -inf; one that has keys, all with logits of -inf, has the
      sink as its lse.
    """
    sink = o["sinks"].astype(lse.dtype)[..., None]
    total = jnp.logaddexp(lse, sink)
    has_keys = _has_keys(config, o, lse if seen is None else seen, seen is not None)
    live = has_keys & (total != -jnp.inf)
    share = jnp.where(live, jnp.exp(lse - jnp.where(live, total, 0)), 0)
    by_row = jnp.swapaxes(share, -1, -2)[..., None]
    joined = (out.astype(lse.dtype) * by_row).astype(out.dtype)
    return [joined, jnp.where(live, total, -jnp.inf)]


def _has_keys(
    config: AttentionConfig, o: Operands, lse: jax.Array, unbiased: bool
) -> jax.Array:
    """Which rows may attend a key, [*B, N|1, T].

    As far as `lse` tells, where that saves reading a mask or ids: but for logits beyond
    float32 it is -inf in rows without keys alone, unless a bias counts in it, as it
    does if it is not `unbiased`.
    """
    by_scores = {"mask", "q_segment_ids"} & set(o)
    if by_scores and (unbiased or "bias" not in o):
        return lse != -jnp.inf
    rows = lse.shape[-1]
    keys = o["key"].shape[-3] if "key" in o else rows  # where one array has both
    where = mask.locate(config, o, jnp.arange(rows, dtype=jnp.int32), rows, keys)
    if by_scores:
        return mask.allowed(o, where, jnp.arange(keys, dtype=jnp.int32)).any(-1)
    return (where.first < where.end)[..., None, :]


def gradient(o: Operands) -> jax.Array:
    """The gradient of the sinks, not yet summed over batch dimensions they share.

    Args:
      o: sinks, and out, lse and dout (and dlse, if there is one) with the full batch.

    Returns:
      float32 [*B, N]. Rows without keys add nothing, whatever their cotangents hold.
    """
    return gradients_by_row(o).sum(-1)


def gradients_by_row(o: Operands) -> jax.Array:
    """What each row adds to it: float32 [*B, N, T]."""
    lse = o["lse"]
    live = lse != -jnp.inf
    by_row = jnp.swapaxes(live, -1, -2)[..., None]
    dout = jnp.where(by_row, o["dout"].astype(lse.dtype), 0)
    delta = jnp.swapaxes((dout * o["out"].astype(lse.dtype)).sum(-1), -1, -2)
    if "dlse" in o:
        delta = delta - jnp.where(live, o["dlse"], 0)
    return -(sink_probability(o, live) * delta)
