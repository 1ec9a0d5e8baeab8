"""64-bit unsigned integers as pairs of uint32 (high, low), which every platform has.

Lives here: the exact arithmetic of `sample_reference`. JAX has no 64-bit integers
unless they were enabled for the whole process.
"""

import jax
import jax.numpy as jnp

Wide = tuple[jax.Array, jax.Array]
"""(high, low), uint32 of one shape."""

LIMB = 10
"""Bits of the pieces that are summed: 2^22 numbers of so many bits fit in 32."""


def multiply(x: jax.Array, y: jax.Array) -> Wide:
    """The product of two uint32."""
    half = jnp.uint32(0xFFFF)
    xh, xl, yh, yl = x >> 16, x & half, y >> 16, y & half
    low, cross1, cross2 = xl * yl, xh * yl, xl * yh
    middle = (low >> 16) + (cross1 & half) + (cross2 & half)
    high = xh * yh + (cross1 >> 16) + (cross2 >> 16) + (middle >> 16)
    return high, (middle << 16) | (low & half)


def multiply_high(x: jax.Array, y: jax.Array) -> jax.Array:
    """The upper half of the product of two uint32."""
    return multiply(x, y)[0]


def add(x: Wide, y: Wide) -> Wide:
    low = x[1] + y[1]
    return x[0] + y[0] + (low < x[1]).astype(jnp.uint32), low


def less(x: Wide, y: Wide) -> jax.Array:
    return (x[0] < y[0]) | ((x[0] == y[0]) & (x[1] < y[1]))


def where(condition: jax.Array, x: Wide, y: Wide) -> Wide:
    return jnp.where(condition, x[0], y[0]), jnp.where(condition, x[1], y[1])


def multiply_wide_high(x: Wide, y: Wide) -> Wide:
    """The upper 64 of the 128 bits of a product."""
    zero = jnp.zeros_like(x[1])
    lowest = multiply(x[1], y[1])
    first, second = multiply(x[0], y[1]), multiply(x[1], y[0])
    # Bits 32 and up of the sum of the lower three products.
    carry = add((zero, lowest[0]), (zero, first[1]))
    carry = add(carry, (zero, second[1]))
    total = add(multiply(x[0], y[0]), (zero, first[0]))
    total = add(total, (zero, second[0]))
    return add(total, (zero, carry[0]))


def _joined(pieces: list[jax.Array]) -> Wide:
    """From sums of the three pieces of 10 bits to one number."""
    mask = jnp.uint32((1 << LIMB) - 1)
    first, second, third = pieces
    second = second + (first >> LIMB)
    third = third + (second >> LIMB)
    low = ((second & mask) << LIMB) | (first & mask)
    return third >> (32 - 2 * LIMB), (third << (2 * LIMB)) | low


def _pieces(x: jax.Array) -> list[jax.Array]:
    mask = jnp.uint32((1 << LIMB) - 1)
    return [x & mask, (x >> LIMB) & mask, x >> (2 * LIMB)]


def total(x: jax.Array) -> Wide:
    """The sum along the last axis, kept, of numbers below 2^31."""
    return _joined(
        [p.sum(-1, keepdims=True, dtype=jnp.uint32) for p in _pieces(x)],
    )


def cumulative(x: jax.Array) -> Wide:
    """Running sums along the last axis of numbers below 2^31."""
    return _joined([jnp.cumsum(p, -1, dtype=jnp.uint32) for p in _pieces(x)])
