"""Attention in parts: what decoding and rings of devices are built on."""

from collections.abc import Sequence

import jax

from jax_flash._src import merge

__all__ = ["merge_partials"]


def merge_partials(
    outs: Sequence[jax.Array] | jax.Array, lses: Sequence[jax.Array] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Combines attention of the same queries over disjoint sets of keys.

    With the parts `mha(query, key_i, value_i, return_lse=True)` the result is that of
    `mha` over all the keys: each output weighs as much as its keys have of the softmax.
    The result merges again, in any order. Differentiable in every argument, to any
    order; computed in the type of lses.

    A part with lse -inf has no keys: it counts for nothing, whatever its output holds,
    and gets zero gradients. A row without keys in any part gives 0 and -inf.

    A sink counts once: pass `sinks` to one of the parts only.

    Args:
      outs: a list or tuple of [*B, T, N, Hv], or one array [parts, *B, T, N, Hv].
      lses: of [*B, N, T], or one array [parts, *B, N, T]; float32, natural logarithm.

    Returns:
      `(out, lse)`: [*B, T, N, Hv] in the type of outs, and [*B, N, T] in that of lses.

    Raises:
      ValueError: no parts, or numbers of parts, shapes or types that do not match.

    Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax",
    arXiv:1805.02867.
    """
    return merge.merge_partials(outs, lses)
