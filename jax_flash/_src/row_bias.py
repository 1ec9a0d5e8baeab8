"""A bias that all keys of a row share, joined to what a kernel computed without it.

Softmax does not see such a number: out is that without it, and

    lse' = lse + bias,

but for rows of a bias of -inf, which see nothing. The weights, which the backward of a
kernel recomputes as `exp(logits - lse)`, are those without the bias, too, times what
sinks leave: a sink is smaller by the bias.

The gradient of the bias is the sum of those of a row's logits. With `delta =
sum(dout * out) - dlse` and the sink's probability p that is

    dlse + p * delta,

which needs nothing but the results and their cotangents. Without sinks p is 0.

Lives here: the formulas in jnp, and which calls they are for.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash._src import sinks
from jax_flash._src.config import AttentionConfig
from jax_flash._src.scores import Operands


def is_in(o: dict[str, Any], keys: Any) -> bool:
    """Whether operands, or their types, by name have such a bias; `keys` is S."""
    return "bias" in o and o["bias"].shape[-1] != keys


def without(config: AttentionConfig, *names: str) -> AttentionConfig:
    """A call without the bias, and without other operands."""
    dropped = ("bias", *names)
    present = tuple(name for name in config.present if name not in dropped)
    return dataclasses.replace(config, present=present)


def _by_row(o: Operands) -> jax.Array:
    """The bias as lse lies: float32 [*B, N|1, T|1]."""
    return o["bias"].astype(jnp.float32)[..., 0]


def join(
    config: AttentionConfig, o: Operands, out: jax.Array, lse: jax.Array
) -> list[jax.Array]:
    """Adds the bias, and then the sinks, to the results of a call without them.

    Args:
      config: the call.
      o: its canonical operands by name.
      out: [*B, T, N, Hv], without bias and sinks.
      lse: float32 [*B, N, T], the same; -inf in rows without keys.

    Returns:
      `[out, lse]` with the batch of all operands, of the same dtypes.
    """
    bias = _by_row(o)
    hidden = jnp.swapaxes(bias, -1, -2)[..., None] == -jnp.inf
    out, biased = jnp.where(hidden, 0, out), lse + bias
    if "sinks" not in o:
        return [out, biased]
    return sinks.join(config, o, out, biased, seen=lse)


def kernel_lse(o: Operands, lse: jax.Array) -> jax.Array:
    """What a kernel without the bias takes for the lse of the results: [*B, N, T].

    Args:
      o: the operands, and the lse of the results.
      lse: without bias and sinks. That of the results less the bias would be it, but
        for its rounding, which is as large as weights if the bias is.
    """
    if "sinks" in o:
        sink = o["sinks"].astype(lse.dtype)[..., None]
        lse = lse + jax.nn.softplus(sink - (lse + _by_row(o)))
    return jnp.where(o["lse"] == -jnp.inf, -jnp.inf, lse)


def gradient(o: Operands) -> jax.Array:
    """The gradient of the bias, not yet summed over batch dimensions that share it.

    Args:
      o: the operands, and out, lse and dout (and dlse, if there is one) with the full
        batch.

    Returns:
      float32 [*B, N|1, T|1, 1]. Rows without keys add nothing, whatever their
      cotangents hold.
    """
    dlse = jnp.where(o["lse"] == -jnp.inf, 0, o.get("dlse", 0.0))
    if "sinks" in o:
        dlse = dlse - sinks.gradients_by_row(o)
    heads, rows = o["bias"].shape[-3:-1]
    axes = [a for a, n in ((-2, heads), (-1, rows)) if n == 1]
    return dlse.sum(axes, keepdims=True)[..., None]
