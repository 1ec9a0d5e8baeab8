"""Which probabilities dropout keeps: a function of key and position alone.

Lives here: the generators, the seeds of the heads, and the factors of a block of
probabilities. docs/design/dropout.md has the definition to the last bit.

Seeds of heads are drawn by Philox4x32 with 7 rounds: Salmon, Moraes, Dror and Shaw,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. What is dropped of a head is a
hash of its seed and of the place of 256 probabilities, times numbers of each four of
them, with 8 bits for each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash._src import compat, mask, wide
from jax_flash._src.config import AttentionConfig
from jax_flash._src.scores import accumulator

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85

ROW_STEP, KEY_STEP = 0x165667B1, 0x27D4EB2F
"""What a group of rows or keys adds to the place that is hashed."""

ROW_FACTORS = 0x752DE713, 0xFE0AAFC3, 0xFE3662D1
KEY_FACTORS = 0x3C7D16C7, 0x76F2D33F, 0xF97BB491
"""What the hash is multiplied by if bits 0, 4 and 5 of a row or key are set."""

LEVELS = 256
"""A rate is a multiple of one part in so many."""

Words = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def philox(counter: Words, key: tuple[jax.Array, jax.Array]) -> Words:
    """Four random words of a counter and a key, uint32 that broadcast together."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = wide.multiply(x0, jnp.uint32(MULTIPLIERS[0]))
        high1, low1 = wide.multiply(x2, jnp.uint32(MULTIPLIERS[1]))
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = k0 + jnp.uint32(INCREMENTS[0]), k1 + jnp.uint32(INCREMENTS[1])
    return x0, x1, x2, x3


def hashed(
    row: jax.Array, key: jax.Array, seed: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """A random word for a row and a key, all uint32 that broadcast together.

    Four probabilities share a word: those whose row and key differ in bit 3 alone.
    """
    x = seed[0] + _group(row) * jnp.uint32(ROW_STEP)
    x = x + _group(key) * jnp.uint32(KEY_STEP)
    x = (x ^ x >> 17) * jnp.uint32(0xED5AD4BB) + seed[1]
    x = (x ^ x >> 11) * jnp.uint32(0xAC4C1B51)
    x = x ^ x >> 15
    x = x * _factor(row, ROW_FACTORS) * _factor(key, KEY_FACTORS)
    return x ^ x >> 14


def _group(index: jax.Array) -> jax.Array:
    return (index >> 6 << 2) | ((index >> 1) & 3)


def _factor(index: jax.Array, factors: tuple[int, int, int]) -> jax.Array:
    result = jnp.uint32(1)
    for bit, factor in zip((0, 4, 5), factors, strict=True):
        result = result * jnp.where((index >> bit) & 1, jnp.uint32(factor), 1)
    return result


def threshold(rate: float) -> int:
    """How many of 256 bytes drop: `rate` in parts of 256, from 1 to 255."""
    return min(max(round(rate * LEVELS), 1), LEVELS - 1)


# Compiled as one for calls without jit: its operations take far longer one by one.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
@compat.allows_rank_promotion
def seeds(words: jax.Array, batch: tuple[Any, ...], heads: int) -> jax.Array:
    """A seed for each head of each batch entry: uint32 [*batch, heads, 2].

    Args:
      words: uint32 [2] or [4], the data of the user's key.
      batch: the batch dimensions of the call, before any `vmap`.
      heads: number of query heads N.
    """
    size = 1
    for dim in batch:
        size = size * dim
    entry = jnp.arange(size, dtype=jnp.uint32).reshape(*batch, 1)
    head = jnp.arange(heads, dtype=jnp.uint32)
    if words.shape[-1] == 4:
        rest = words[2], words[3]
    else:
        rest = jnp.uint32(0), jnp.uint32(0)
    x0, x1, _, _ = philox((head, entry, *rest), (words[0], words[1]))
    return jnp.stack([x0, x1], -1)


def factors(
    config: AttentionConfig, operands: dict[str, Any], where: mask.Rows, key: jax.Array
) -> jax.Array | float:
    """What dropout multiplies probabilities by: 0, or 1 over the share that is kept.

    Args:
      config: the call.
      operands: the canonical operands.
      where: the rows.
      key: int32 [s], indices of the keys.

    Returns:
      Broadcastable to [*B, N, t, s], in the dtype of arithmetic; 1.0 without dropout.
    """
    if "dropout_seeds" not in operands:
        return 1.0
    seed = operands["dropout_seeds"][..., None, None, :]
    row, key = where.row[:, None].astype(jnp.uint32), key.astype(jnp.uint32)
    word = hashed(row, key, (seed[..., 0], seed[..., 1]))
    byte = (word >> (((row >> 3 & 1) * 2 + (key >> 3 & 1)) * 8)) & 255
    count = threshold(config.dropout_rate)
    kept = byte >= count if 2 * count <= LEVELS else byte < LEVELS - count
    dtype = accumulator(operands["query"].dtype)
    return jnp.where(kept, LEVELS / (LEVELS - count), 0.0).astype(dtype)
