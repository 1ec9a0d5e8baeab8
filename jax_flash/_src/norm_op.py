"""RMSNorm as operations on rows; `rowwise` has what makes them primitives.

Lives here: forward, tangent and backward, their derivatives, the FFI calls of their
kernels. The tangent is linear in the tangents and its transpose is the backward, as for
attention (`derivatives`), so forward mode and higher orders run jnp and gradients the
kernel.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad
from jax.sharding import PartitionSpec

from jax_flash._src import compat, registry, rowwise
from jax_flash._src.rowwise import Result, RowOp
from jax_flash._src.scores import accumulator

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
KERNEL_MAX_BYTES = {"forward": 32768, "backward": 24576}
"""Bytes of a row that a thread block holds in registers."""
BACKWARD_BLOCKS = 396
"""Thread blocks, at most, that each add up a gradient of the weight."""


@dataclasses.dataclass(frozen=True)
class NormOptions:
    """Static facts of a call.

    Attributes:
      eps: added to the mean square.
      stage: "forward", "tangent" or "backward".
      perturbed: tangent: which of ("x", "weight") have a tangent.
      with_sum: forward: there is a residual, and the sum is a result; tangent: the
        tangent of x is a result; backward: the sum has a cotangent.
    """

    eps: float
    stage: str
    with_sum: bool = False
    perturbed: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.stage == "forward":
            return ("row", "group", "row") if self.with_sum else ("row", "group")
        given = ("row", "group", "row")  # x, weight, 1 / rms
        if self.stage == "tangent":
            kind = {"x": "row", "weight": "group"}
            return given + tuple(kind[name] for name in self.perturbed)
        return (*given, "row", "row") if self.with_sum else (*given, "row")

    @property
    def result_kinds(self) -> tuple[str, ...]:
        if self.stage == "backward":
            return ("row", "group")
        count = 1 + self.with_sum + (self.stage == "forward")
        return ("row",) * count


def widened(x: jax.Array) -> jax.Array:
    return x.astype(accumulator(x.dtype))


def _scale(x: jax.Array, eps: float) -> jax.Array:
    """1 / rms of rows [..., C], as [..., 1]."""
    x = widened(x)
    return jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + jnp.asarray(eps, x.dtype))


def _of_rows(weight: jax.Array, like: jax.Array) -> jax.Array:
    """A weight [G, C] beside rows [G, *R, C], in their dtype."""
    rows = tuple(range(1, like.ndim - 1))
    return jnp.expand_dims(weight.astype(like.dtype), rows)


def _forward_results(*avals: Any, options: NormOptions) -> list[Result]:
    x = avals[0]
    width = x.shape[-1:]
    results = [Result(width, x.dtype)]
    if options.with_sum:
        results.append(Result(width, x.dtype))
    return [*results, Result((), accumulator(x.dtype))]


def _forward(*operands: jax.Array, options: NormOptions) -> list[jax.Array]:
    """[y, sum if there is a residual, 1 / rms]."""
    x, weight = operands[:2]
    sizes = rowwise.leading_sizes(options, [a.shape for a in operands])
    if options.with_sum:
        x = (widened(x) + widened(operands[2])).astype(x.dtype)
    scale = _scale(x, options.eps)
    y = widened(x) * scale * _of_rows(weight, scale)
    rows = [jnp.broadcast_to(y.astype(x.dtype), (*sizes, x.shape[-1]))]
    if options.with_sum:
        rows.append(jnp.broadcast_to(x, (*sizes, x.shape[-1])))
    return [*rows, jnp.broadcast_to(scale[..., 0], sizes)]


def _tangent_results(*avals: Any, options: NormOptions) -> list[Result]:
    result = Result(avals[0].shape[-1:], avals[0].dtype)
    return [result, result] if options.with_sum else [result]


def _tangent(
    *operands: jax.Array, options: NormOptions, saved: bool = True
) -> list[jax.Array]:
    """[dy], [dy, dx] with `with_sum`.

    Args:
      operands: x, weight, 1 / rms, then the tangents of `options.perturbed`.
      options: of stage "tangent".
      saved: use the 1 / rms given, rather than compute it again so that it, too, has a
        derivative.
    """
    x, weight, scale = operands[:3]
    sizes = rowwise.leading_sizes(options, [a.shape for a in operands])
    given = dict(zip(options.perturbed, operands[3:], strict=True))
    scale = scale[..., None] if saved else _scale(x, options.eps)
    unit = widened(x) * scale
    dy = jnp.zeros((), scale.dtype)
    if "x" in given:
        dx = widened(given["x"])
        along = jnp.mean(unit * dx, -1, keepdims=True)
        dy += scale * (dx - unit * along) * _of_rows(weight, unit)
    if "weight" in given:
        dy += unit * _of_rows(given["weight"], unit)
    full = (*sizes, x.shape[-1])
    results = [jnp.broadcast_to(dy.astype(x.dtype), full)]
    if options.with_sum:
        dx = given.get("x", jnp.zeros((), x.dtype))
        results.append(jnp.broadcast_to(dx, full))
    return results


def _backward_results(*avals: Any, options: NormOptions) -> list[Result]:
    x, weight = avals[:2]
    width = x.shape[-1:]
    return [Result(width, x.dtype), Result(width, weight.dtype)]


def _backward(
    *operands: jax.Array, options: NormOptions, saved: bool = True
) -> list[jax.Array]:
    """[gradient of x, gradient of weight], each with all groups.

    Operands: x, weight, 1 / rms, the cotangent of y, that of the sum if `with_sum`.
    """
    x, weight, scale, dy = operands[:4]
    sizes = rowwise.leading_sizes(options, [a.shape for a in operands])
    scale = scale[..., None] if saved else _scale(x, options.eps)
    unit, dy = widened(x) * scale, widened(dy)
    dunit = dy * _of_rows(weight, unit)
    dx = scale * (dunit - unit * jnp.mean(unit * dunit, -1, keepdims=True))
    if options.with_sum:
        dx += widened(operands[4])
    full = (*sizes, x.shape[-1])
    dweight = jnp.broadcast_to(dy * unit, full).sum(tuple(range(1, len(sizes))))
    return [
        jnp.broadcast_to(dx.astype(x.dtype), full),
        dweight.astype(weight.dtype),
    ]


def _why_not(*avals: Any, options: NormOptions) -> str | None:
    x, weight = avals[:2]
    for name, operand in (("x", x), ("weight", weight)):
        if str(operand.dtype) not in KERNEL_DTYPES:
            return f"{name} of dtype {operand.dtype}"
    if weight.dtype not in (x.dtype, jnp.float32):
        return f"weight of dtype {weight.dtype} beside x of dtype {x.dtype}"
    most = KERNEL_MAX_BYTES[options.stage] // x.dtype.itemsize
    if x.shape[-1] > most:
        return f"x of width {x.shape[-1]}: at most {most} is supported"
    return None


def _forward_kernel(*operands: jax.Array, options: NormOptions) -> list[jax.Array]:
    sizes = rowwise.leading_sizes(options, [x.shape for x in operands])
    results = [
        jax.ShapeDtypeStruct((*sizes, *r.trailing), r.dtype)
        for r in _forward_results(*operands, options=options)
    ]
    call = jax.ffi.ffi_call(registry.RMS_NORM_TARGET, results)
    eps = np.float32(options.eps)
    return list(call(*operands, eps=eps, has_residual=options.with_sum))


def _backward_kernel(*operands: jax.Array, options: NormOptions) -> list[jax.Array]:
    """The kernel adds up the weight's gradient by thread block, XLA over those."""
    x, weight = operands[:2]
    groups, rows = rowwise.leading_sizes(options, [a.shape for a in operands])
    blocks = max(1, min(rows, BACKWARD_BLOCKS // groups))
    width = x.shape[-1]
    results = [
        jax.ShapeDtypeStruct((groups, rows, width), x.dtype),
        jax.ShapeDtypeStruct((groups, blocks, width), jnp.float32),
    ]
    call = jax.ffi.ffi_call(registry.RMS_NORM_BACKWARD_TARGET, results)
    dx, parts = call(*operands, has_sum=options.with_sum)
    return [dx, parts.sum(1).astype(weight.dtype)]


FORWARD = RowOp("flash_rms_norm", _forward_results, _forward, _forward_kernel, _why_not)
TANGENT = RowOp("flash_rms_norm_tangent", _tangent_results, _tangent)
BACKWARD = RowOp(
    "flash_rms_norm_bwd", _backward_results, _backward, _backward_kernel, _why_not
)


def _is_zero(t: Any) -> bool:
    return isinstance(t, ad.Zero)


def _no_tangent(x: jax.Array) -> Any:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _sharded_as(total: jax.Array, part: jax.Array) -> jax.Array:
    """One of what is added up, under explicit mesh axes sharded as the sum is."""
    aval, like = jax.typeof(part), jax.typeof(total)
    spec = [
        axes if size == n else None
        for axes, size, n in zip(
            like.sharding.spec, like.shape, aval.shape, strict=True
        )
    ]
    sharding = like.sharding.update(spec=PartitionSpec(*spec))
    return compat.sharded_like(part, aval.update(sharding=sharding))


def _forward_jvp(
    primals: Any, tangents: Any, *, options: NormOptions, needs_devices: Any
) -> tuple[Any, Any]:
    outs = rowwise.primitive(FORWARD).bind(
        *primals, options=options, needs_devices=needs_devices
    )
    x = outs[1] if options.with_sum else primals[0]
    dx, dweight = tangents[:2]
    if options.with_sum and not _is_zero(tangents[2]):
        # Groups share one of them, perhaps: a plain sum broadcasts it.
        dx = (
            tangents[2]
            if _is_zero(dx)
            else _sharded_as(outs[1], dx) + _sharded_as(outs[1], tangents[2])
        )
    live = [(n, t) for n, t in (("x", dx), ("weight", dweight)) if not _is_zero(t)]
    which = NormOptions(
        options.eps, "tangent", options.with_sum, tuple(n for n, _ in live)
    )
    # 1 / rms is for our own rules, which never ask for its tangent.
    if not live:
        return outs, [_no_tangent(y) for y in outs]
    given = rowwise.bind(TANGENT, which, x, primals[1], outs[-1], *(t for _, t in live))
    return outs, [*given, _no_tangent(outs[-1])]


def _jnp_jvp(
    fun: Any, primals: Any, tangents: Any, options: NormOptions
) -> list[jax.Array]:
    """Tangents of a stage by jnp, through 1 / rms as well."""
    live = [i for i, t in enumerate(tangents) if not _is_zero(t)]

    def of_live(*xs: Any) -> Any:
        full = list(primals)
        for i, x in zip(live, xs, strict=True):
            full[i] = x
        return fun(*full, options=options, saved=False)

    return jax.jvp(of_live, [primals[i] for i in live], [tangents[i] for i in live])[1]


def _tangent_jvp(
    primals: Any, tangents: Any, *, options: NormOptions, needs_devices: Any
) -> tuple[Any, Any]:
    bind = functools.partial(
        rowwise.primitive(TANGENT).bind, options=options, needs_devices=needs_devices
    )
    outs = bind(*primals)
    if all(_is_zero(t) for t in tangents[:3]):
        # Still linear, so still the primitive whose transpose is the backward.
        return outs, bind(*primals[:3], *map(ad.instantiate_zeros, tangents[3:]))
    return outs, _jnp_jvp(_tangent, primals, tangents, options)


def _tangent_transpose(
    cts: Any, *args: Any, options: NormOptions, needs_devices: Any
) -> list[Any]:
    del needs_devices
    x, weight, scale = args[:3]
    dy = ad.instantiate_zeros(cts[0])
    has_sum = options.with_sum and not _is_zero(cts[1])
    which = NormOptions(options.eps, "backward", has_sum)
    grads = rowwise.bind(BACKWARD, which, x, weight, scale, dy, *cts[1 : 1 + has_sum])
    by_name: dict[str, jax.Array] = dict(zip(("x", "weight"), grads, strict=True))

    def of(name: str, linear: Any) -> Any:
        if not ad.is_undefined_primal(linear):
            return None
        gradient, shape = by_name[name], linear.aval.shape
        # What is shared along groups or rows has the sum of their gradients.
        axes = [i for i, n in enumerate(shape) if n != gradient.shape[i]]
        gradient = gradient.sum(axes, keepdims=True) if axes else gradient
        return compat.sharded_like(gradient, linear.aval)

    return [None] * 3 + [
        of(name, linear)
        for name, linear in zip(options.perturbed, args[3:], strict=True)
    ]


def _backward_jvp(
    primals: Any, tangents: Any, *, options: NormOptions, needs_devices: Any
) -> tuple[Any, Any]:
    outs = rowwise.primitive(BACKWARD).bind(
        *primals, options=options, needs_devices=needs_devices
    )
    return outs, _jnp_jvp(_backward, primals, tangents, options)


ad.primitive_jvps[rowwise.primitive(FORWARD)] = _forward_jvp
ad.primitive_jvps[rowwise.primitive(TANGENT)] = _tangent_jvp
ad.primitive_transposes[rowwise.primitive(TANGENT)] = _tangent_transpose
ad.primitive_jvps[rowwise.primitive(BACKWARD)] = _backward_jvp


def rms_norm(
    x: jax.Array, weight: jax.Array, residual: jax.Array | None, eps: float
) -> list[jax.Array]:
    """[y] or [y, x + residual] of rows [*R, C] and a weight [C]."""
    options = NormOptions(eps, "forward", residual is not None)
    operands = [x[None], weight[None]]
    if residual is not None:
        operands.append(residual[None])
    outs = rowwise.bind(FORWARD, options, *operands)
    return [y[0] for y in outs[:-1]]
