"""Attention of new tokens to caches, writing to caches, and attention in parts.

Lives here: `decode_mha`, `append_kv` and `merge_partials`, their docstrings and the way
from user arrays to a validated call. The caches as pytrees are in `cache`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash._src import (
    decode_call,
    decode_kernel,
    decode_reference,
    merge,
    validate,
)
from jax_flash._src.decode_call import OPERANDS
from jax_flash._src.flash_decode import flash_decode

__all__ = ["append_kv", "decode_mha", "merge_partials"]


def decode_mha(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    *,
    page_table: Any = None,
    bias: Any = None,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    implementation: str | tuple[str, ...] | None = None,
) -> Any:
    """Attention of the last tokens of each sequence to its cached keys and values.

    Shapes: B sequences, T new tokens of each (1 to 64), S places of a cache, N query
    heads, K key/value heads (N % K == 0; query head n reads head n // (N // K)), H
    query/key width, Hv value width.

    `cache_seqlens` counts the tokens of a sequence with the new ones, whose keys and
    values are in the cache already (`append_kv`). Queries stand at the last T
    positions, and each sees the keys up to its own: query t of a sequence of length n
    sees keys 0..n - T + t. A query that sees no key (an empty sequence, or t < T - n)
    gives 0 and lse -inf.

    The kernel ("cuda") takes queries of bfloat16, float16 and float32 and caches of the
    same dtype, with queries of 16 bits also of float8_e4m3fn and int8: widths up to
    256 whose rows are multiples of 16 bytes. jnp ("xla") runs everything else. Products
    of float32 are exact to 2^-21. Derivatives are those of jnp.

    Args:
      query: [B, N, H] or [B, T, N, H], bfloat16, float16 or float32.
      k_cache: [B, S, K, H]; with a page table [pages, page, K, H], pages of any size.
        The dtype of query, or float8_e4m3fn or int8.
      v_cache: [B, S, K, Hv] or [pages, page, K, Hv], the dtype of k_cache.
      cache_seqlens: integers [B], clamped to [0, S]; read on the device. What the cache
        holds beyond is not used, whatever it is.
      page_table: integers [B, max_pages]: page i of a sequence holds its tokens
        i * page to (i + 1) * page - 1, so that S = max_pages * page. Sequences may
        share pages. Entries beyond the length may be anything; so may those of pages
        wholly before the window, if what pages hold is finite.
      bias: None or `jax_flash.alibi(slopes)`, slopes floating [N] or [B, N]: adds
        `-slope * (p - s)` for a query at p and key s.
      scale: factor of the logits, H ** -0.5 if None.
      window_size: (left, right): a query at p sees no key before p - left. Right only
        says what causality says already; None = unbounded.
      softcap: c of `c * tanh(logits / c)`.
      sinks: floating [N] or [B, N]: for each head a logit that takes part in the
        softmax and has no value.
      k_scale: floating, a number or [K], for quantised caches: keys are
        `k_scale * k_cache`. None = 1.
      v_scale: the same for values.
      num_splits: into how many parts the kernel cuts the keys of a sequence of full
        length, None for its own choice. Changes speed and rounding; jnp does not split,
        whatever it is.
      return_lse: also return the log-sum-exp of the logits. Results of a query
        [B, T, N, H] go into `merge_partials`.
      implementation: None for the kernel where it can run the call, else jnp; "cuda" or
        "xla" for one of them, a tuple for the first of it that can.

    Returns:
      out, [B, N, Hv] or [B, T, N, Hv], in the dtype of query; with `return_lse`
      `(out, lse)`, lse float32 [B, N] or [B, N, T], natural logarithm, sink included.

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported.
    """
    arrays = dict(
        zip(
            OPERANDS,
            (
                query,
                k_cache,
                v_cache,
                cache_seqlens,
                page_table,
                sinks,
                decode_call.slopes_of(bias),
                k_scale,
                v_scale,
            ),
            strict=True,
        )
    )
    options = {
        "scale": scale,
        "window_size": window_size,
        "softcap": softcap,
        "num_splits": num_splits,
        "implementation": implementation,
    }
    wants_lse = validate.flag("return_lse", return_lse)
    config, operands = decode_call.check_call(arrays, options)
    if config.implementations == ("cuda",):
        reason = decode_kernel.cuda_supports(config, operands)
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r}: {reason}")
    out, lse = flash_decode(config, operands)
    if len(query.shape) == 3:
        out, lse = out[:, 0], lse[:, :, 0]
    return (out, lse) if wants_lse else out


def append_kv(
    k_cache: Any,
    v_cache: Any,
    k_new: Any,
    v_new: Any,
    cache_seqlens: Any,
    *,
    page_table: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes new keys and values behind those in the caches.

    Token t of a sequence goes to position `cache_seqlens + t`: lengths are those
    *before* the new tokens, so decoding goes on with `cache_seqlens + T`. Under `jit`
    with the caches donated they are written in place, nothing else of them is touched.
    What has no place is dropped: positions beyond the cache or the page table, pages
    that do not exist, sequences whose length is negative (which switches them off).

    Gradients reach new tokens and caches, not through 8-bit ones.

    Two sequences that write to the same place of a shared page leave one of the values
    there; `PageAllocator.extend` says which pages to copy before.

    Args:
      k_cache: as for `decode_mha`.
      v_cache: as for `decode_mha`.
      k_new: floating [B, K, H] or [B, T, K, H], rounded to the dtype of the cache;
        for float8_e4m3fn and int8 divided by the scale, clamped to 448 or 127, and
        rounded to nearest even.
      v_new: floating [B, K, Hv] or [B, T, K, Hv].
      cache_seqlens: integers [B].
      page_table: as for `decode_mha`.
      k_scale: as for `decode_mha`.
      v_scale: as for `decode_mha`.

    Returns:
      `(k_cache, v_cache)` with the new tokens.

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported.
    """
    arrays = k_cache, v_cache, k_new, v_new, cache_seqlens, page_table
    lengths, table = decode_call.check_append(*arrays)

    def written(cache: Any, x: Any, name: str, scale: Any) -> jax.Array:
        cache, x = jnp.asarray(cache), jnp.asarray(x)
        if x.ndim == 3:
            x = x[:, None]
        if scale is not None:
            scale = decode_call.canonical_scale(name, scale, cache)
        x = decode_reference.quantised(x, cache.dtype, scale)
        return decode_reference.append(cache, x, lengths, table)

    return (
        written(k_cache, k_new, "k_scale", k_scale),
        written(v_cache, v_new, "v_scale", v_scale),
    )


def merge_partials(
    outs: Sequence[jax.Array] | jax.Array, lses: Sequence[jax.Array] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Combines attention of the same queries over disjoint sets of keys.

    With the parts `mha(query, key_i, value_i, return_lse=True)` the result is that of
    `mha` over all the keys: each output weighs as much as its keys have of the softmax.
    The result merges again, in any order. Differentiable in every argument, to any
    order; computed in the type of lses.

    A part with lse -inf has no keys: it counts for nothing, whatever its output holds,
    and gets zero gradients. A row without keys in any part gives 0 and -inf. A part
    with lse +inf, by a sink of +inf, takes everything.

    A sink counts once: pass `sinks` to one of the parts only. Parts by `decode_mha` are
    those of a query [B, T, N, H], with T = 1 for a single token.

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
