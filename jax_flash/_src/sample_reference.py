"""The specification of `sample` and `top_k` in jnp; the kernels follow it bit by bit.

docs/design/sampling.md defines the draw and says why in integers. Lives here: the rows
of parameters (`parameters`), and what becomes of logits under them. A row of parameters
is six uint32, in the order of `csrc/host/params.h`:

    random high, random low   64 random bits
    factor                    f32: units of 2^-20 bits for each unit of the logits
    k                         tokens that top-k keeps
    p                         mass that top-p keeps, in 2^-20; more than 2^20 = all
    distance                  units by which min-p lets a token fall short of the best
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash._src import wide

PARAMETERS = 6
UNIT_BITS = 20
"""Distances to the best logit are counted in 2^-20 bits."""
WEIGHT_BITS = 30
"""The best token weighs 2^30."""
MAX_VOCABULARY = 1 << 20
ALL_MASS = 1 << 21
"""`p` of rows without top-p."""
MAX_DISTANCE = 2147483520
"""The largest float32 below 2^31."""
ORDER_OF_MINUS_INFINITY = 0x007FFFFF

# 2^-x on [0, 1] = 1 - x (c1 - x (c2 - ...)), in 2^-31, to 6e-8.
EXP2_COEFFICIENTS = (1488516314, 515797037, 118791696, 19817794, 2048773)

THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: tuple[Any, Any], counter: tuple[Any, Any]) -> wide.Wide:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): the generator of JAX."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for rotation in THREEFRY_ROTATIONS[block % 2]:
            x = x + y
            y = (y << rotation) | (y >> (32 - rotation))
            y = x ^ y
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return x, y


def parameters(
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array | None,
    top_p: jax.Array | None,
    min_p: jax.Array | None,
) -> jax.Array:
    """The rows of parameters.

    Args:
      key: uint32 [2].
      temperature: float32 [*R], of rows numbered in this order; 0 is greedy.
      top_k: int32 [*R] or None.
      top_p: float32 [*R] or None.
      min_p: float32 [*R] or None.

    Returns:
      uint32 [*R, 6].
    """
    rows = temperature.shape
    row = lax.iota(jnp.uint32, math.prod(rows)).reshape(rows)
    words = [jnp.broadcast_to(word, rows) for word in key]
    high, low = threefry((words[0], words[1]), (jnp.zeros_like(row), row))
    greedy = temperature <= 0
    scale = jnp.float32(math.log2(math.e) * 2**UNIT_BITS)
    factor = scale / jnp.where(greedy, jnp.float32(1), temperature)
    k = jnp.full(rows, MAX_VOCABULARY, jnp.int32) if top_k is None else top_k
    k = jnp.where(greedy, jnp.int32(1), jnp.maximum(k, 1))
    mass = jnp.full(rows, ALL_MASS, jnp.uint32)
    if top_p is not None:
        kept = jnp.ceil(jnp.clip(top_p, 0, 1) * jnp.float32(1 << UNIT_BITS))
        mass = jnp.where(top_p >= 1, mass, kept.astype(jnp.uint32))
    distance = jnp.full(rows, MAX_DISTANCE, jnp.uint32)
    if min_p is not None:
        bits = -jnp.log2(jnp.clip(min_p, jnp.float32(1e-30), 1))
        units = jnp.floor(bits * jnp.float32(1 << UNIT_BITS)).astype(jnp.uint32)
        distance = jnp.where(min_p > 0, units, distance)
    columns = (
        high,
        low,
        lax.bitcast_convert_type(factor, jnp.uint32),
        k.astype(jnp.uint32),
        mass,
        distance,
    )
    # Under explicit mesh axes all columns must be sharded alike.
    nothing = functools.reduce(jnp.bitwise_or, columns) & jnp.uint32(0)
    return jnp.stack([column | nothing for column in columns], -1)


def order(logits: jax.Array) -> jax.Array:
    """uint32 in the order of the logits: zeros are equal, NaN comes below -inf."""
    x = logits.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    # By its bits, since a compiler may assume what it likes of x != x.
    nan = (bits & ~sign) > jnp.uint32(0x7F800000)
    return jnp.where(nan, jnp.uint32(0), ordered)


def weight(distance: jax.Array) -> jax.Array:
    """2^30 * 2^-distance of distances in units, in integers."""
    fraction = distance << (32 - UNIT_BITS)
    value = jnp.full_like(distance, EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        value = jnp.uint32(coefficient) - wide.multiply_high(fraction, value)
    value = jnp.uint32(1 << 31) - wide.multiply_high(fraction, value)
    octaves = distance >> UNIT_BITS
    shift = jnp.minimum(octaves + 1, jnp.uint32(31))
    return jnp.where(octaves < 31, value >> shift, jnp.uint32(0))


def distances(logits: jax.Array, best: jax.Array, factor: jax.Array) -> jax.Array:
    """uint32 units by which logits fall short of `best`, saturated."""
    units = (best - logits) * factor
    units = jnp.where(units < MAX_DISTANCE, units, jnp.float32(MAX_DISTANCE))
    # The best itself may be infinite, and so may the factor.
    return jnp.where(logits == best, jnp.float32(0), units).astype(jnp.uint32)


def sample(
    logits: jax.Array, table: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """One token for each row.

    Args:
      logits: [rows, V], f32, bf16 or f16.
      table: uint32 [rows, 6], see `parameters`.
      mask: bool [rows, V] or None, True = allowed.

    Returns:
      int32 [rows]; -1 where no token is allowed.
    """
    rows, size = logits.shape
    high, low, factor, k, mass, reach = (table[:, i, None] for i in range(PARAMETERS))
    factor = lax.bitcast_convert_type(factor, jnp.float32)
    x = logits.astype(jnp.float32)
    keys = order(x)
    allowed = keys > ORDER_OF_MINUS_INFINITY
    if mask is not None:
        allowed &= mask
    keys = jnp.where(allowed, keys, jnp.uint32(0))
    best = jnp.where(allowed, x, -jnp.inf).max(-1, keepdims=True)
    distance = jnp.where(allowed, distances(x, best, factor), jnp.uint32(MAX_DISTANCE))
    weights = jnp.where(allowed, weight(distance), jnp.uint32(0))

    # Best first, of equals the one with the lower index.
    index = lax.broadcasted_iota(jnp.int32, (rows, size), 1)
    _, ranked = lax.sort((~keys, index), dimension=1, num_keys=2)
    by_rank = jnp.take_along_axis(weights, ranked, axis=1)
    rank = lax.broadcasted_iota(jnp.uint32, (rows, size), 1)
    by_rank = jnp.where(rank < k, by_rank, jnp.uint32(0))
    before = wide.cumulative(jnp.pad(by_rank, ((0, 0), (1, 0)))[:, :-1])
    limit = nucleus(wide.total(by_rank), mass)
    kept = (rank < k) & ((mass > 1 << UNIT_BITS) | wide.less(before, limit))
    kept = jnp.zeros_like(kept).at[jnp.arange(rows)[:, None], ranked].set(kept)
    weights = jnp.where(kept & (distance <= reach), weights, jnp.uint32(0))

    # The inverse of the cumulative weight, in the order of the vocabulary.
    target = wide.multiply_wide_high((high, low), wide.total(weights))
    passed = wide.less(target, wide.cumulative(weights))
    token = jnp.argmax(passed, -1).astype(jnp.int32)
    return jnp.where(passed[:, -1], token, jnp.int32(-1))


def nucleus(total: wide.Wide, mass: jax.Array) -> wide.Wide:
    """max(1, floor(mass * total / 2^20)): the weight that top-p fills."""
    upper = (total[0] << (32 - UNIT_BITS)) | (total[1] >> UNIT_BITS)
    rest = wide.multiply(mass, total[1] & jnp.uint32((1 << UNIT_BITS) - 1))
    rest_low = (rest[0] << (32 - UNIT_BITS)) | (rest[1] >> UNIT_BITS)
    limit = wide.add(wide.multiply(mass, upper), (jnp.zeros_like(rest_low), rest_low))
    one = jnp.zeros_like(limit[0]), jnp.ones_like(limit[1])
    return wide.where(wide.less(limit, one), one, limit)


def top_k(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row [rows, V] and where they are, int32."""
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    _, ranked = lax.sort((~order(logits), index), dimension=1, num_keys=2)
    ranked = ranked[:, :k]
    return jnp.take_along_axis(logits, ranked, axis=1), ranked
