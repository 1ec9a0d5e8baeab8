"""Derivative rules of the outer primitives.

The forward's tangent is one primitive, linear in the tangents of the operands, and its
transpose is the backward primitive. So jvp, linearize and jacfwd run jnp, grad runs the
backward, and vmap commutes with both. Second and higher orders are derivatives of the
jnp tangent and backward.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from jax_flash._src import primitives
from jax_flash._src.config import RESIDUALS, TRAILING, AttentionConfig, Backward

Values = Sequence[Any]
Names = tuple[str, ...]

RESIDUAL_NAMES = ("jax_flash_out", "jax_flash_lse")
"""Names of out and lse for checkpoint policies."""


def _is_zero(t: Any) -> bool:
    return isinstance(t, ad.Zero)


def _jvp_of(fun: Callable, primals: Values, tangents: Values) -> Any:
    """Tangents of `fun`, differentiated only where a tangent is not zero."""
    live = [i for i, t in enumerate(tangents) if not _is_zero(t)]

    def of_live(*xs: Any) -> Any:
        full = list(primals)
        for i, x in zip(live, xs, strict=True):
            full[i] = x
        return fun(*full)

    return jax.jvp(of_live, [primals[i] for i in live], [tangents[i] for i in live])[1]


def _forward_jvp(
    primals: Values, tangents: Values, *, config: AttentionConfig, needs_devices: Any
) -> tuple[Any, Any]:
    del needs_devices
    results = primitives.forward(config, *primals)
    out, lse = (
        checkpoint_name(x, n) for x, n in zip(results, RESIDUAL_NAMES, strict=True)
    )
    live = [
        (n, t) for n, t in zip(config.present, tangents, strict=True) if not _is_zero(t)
    ]
    if not live:
        return [out, lse], [
            ad.Zero(jax.typeof(x).to_tangent_aval()) for x in (out, lse)
        ]
    names = tuple(n for n, _ in live)
    given = (t for _, t in live)
    return [out, lse], primitives.tangent(config, names, *primals, out, lse, *given)


def _tangent_jvp(
    primals: Values, tangents: Values, *, config: AttentionConfig, perturbed: Names
) -> tuple[Any, Any]:
    count = len(config.present) + len(RESIDUALS)
    out = primitives.tangent(config, perturbed, *primals)
    if all(_is_zero(t) for t in tangents[:count]):
        # Still linear, so still the primitive whose transpose is the backward.
        linear = [ad.instantiate_zeros(t) for t in tangents[count:]]
        return out, primitives.tangent(config, perturbed, *primals[:count], *linear)
    fun = functools.partial(
        primitives.tangent_in_jnp, config=config, perturbed=perturbed
    )
    return out, _jvp_of(fun, primals, tangents)


def _tangent_transpose(
    cts: Values, *args: Any, config: AttentionConfig, perturbed: Names
) -> list[Any]:
    count = len(config.present) + len(RESIDUALS)
    residuals, linear = args[:count], args[count:]
    dout, dlse = cts
    wanted = [
        (name, x.aval)
        for name, x in zip(perturbed, linear, strict=True)
        if ad.is_undefined_primal(x)
    ]
    # An unused lse gives the backward no operand, not an array of zeros.
    has_dlse = not _is_zero(dlse)
    cotangents = [ad.instantiate_zeros(dout)] + ([dlse] if has_dlse else [])
    batch = cotangents[0].shape[: -TRAILING["dout"]]
    which = Backward(
        tuple(name for name, _ in wanted),
        tuple(_shared(name, aval, batch) for name, aval in wanted),
        has_dlse,
    )
    grads = iter(primitives.backward(config, which, *residuals, *cotangents))
    return [None] * count + [
        next(grads) if ad.is_undefined_primal(x) else None for x in linear
    ]


def _shared(name: str, aval: Any, batch: tuple[int, ...]) -> tuple[int, ...]:
    """Batch dimensions, counted from the last, along which an operand is shared."""
    own = aval.shape[: aval.ndim - TRAILING[name]]
    return tuple(
        i - len(batch)
        for i, (mine, full) in enumerate(zip(own, batch, strict=True))
        if mine == 1 and full != 1
    )


def _backward_jvp(
    primals: Values,
    tangents: Values,
    *,
    config: AttentionConfig,
    backward: Backward,
    needs_devices: Any,
) -> tuple[Any, Any]:
    del needs_devices
    out = primitives.backward(config, backward, *primals)
    fun = functools.partial(
        primitives.backward_in_jnp, config=config, backward=backward
    )
    return out, _jvp_of(fun, primals, tangents)


ad.primitive_jvps[primitives.forward_p] = _forward_jvp
ad.primitive_jvps[primitives.tangent_p] = _tangent_jvp
ad.primitive_transposes[primitives.tangent_p] = _tangent_transpose
ad.primitive_jvps[primitives.backward_p] = _backward_jvp
