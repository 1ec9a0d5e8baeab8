"""`sample` and `top_k` as operations on rows; `rowwise` has what makes them primitives.

Lives here: their descriptions, the FFI calls of their kernels, and their derivatives.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_flash._src import avals, compat, registry, rowwise, sample_reference
from jax_flash._src.rowwise import Result, RowOp

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
KERNEL_MAX_K = 256
"""The kernel of `top_k` ranks so many candidates at least in shared memory."""


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """logits [G, R, V], table [G, R, 6], then the mask [G, R, V] if there is one."""

    has_mask: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("row",) * (3 if self.has_mask else 2)

    @property
    def result_kinds(self) -> tuple[str, ...]:
        return ("row",)


@dataclasses.dataclass(frozen=True)
class TopKOptions:
    """logits [G, R, V]."""

    k: int

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("row",)

    @property
    def result_kinds(self) -> tuple[str, ...]:
        return ("row", "row")


def _flat(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    x = jnp.broadcast_to(x, (*sizes, x.shape[-1]))
    return x.reshape(math.prod(sizes), x.shape[-1])


def _sample_results(*avals: Any, options: SampleOptions) -> list[Result]:
    return [Result((), jnp.int32)]


def _sample_reference(*operands: jax.Array, options: SampleOptions) -> list[jax.Array]:
    sizes = rowwise.leading_sizes(options, [x.shape for x in operands])
    tokens = sample_reference.sample(*(_flat(x, sizes) for x in operands))
    return [tokens.reshape(sizes)]


def _why_not_sample(*avals: Any, options: SampleOptions) -> str | None:
    logits = avals[0]
    if str(logits.dtype) not in KERNEL_DTYPES:
        return f"logits of dtype {logits.dtype}"
    return None


def _sample_kernel(*operands: jax.Array, options: SampleOptions) -> list[jax.Array]:
    sizes = rowwise.leading_sizes(options, [x.shape for x in operands])
    result = jax.ShapeDtypeStruct(sizes, jnp.int32)
    call = jax.ffi.ffi_call(registry.SAMPLE_TARGET, [result])
    return list(call(*operands, has_mask=options.has_mask))


def _top_k_results(*avals: Any, options: TopKOptions) -> list[Result]:
    return [
        Result((options.k,), avals[0].dtype),
        Result((options.k,), jnp.int32),
    ]


def _top_k_reference(logits: jax.Array, *, options: TopKOptions) -> list[jax.Array]:
    sizes = logits.shape[0], logits.shape[1]
    results = sample_reference.top_k(_flat(logits, sizes), options.k)
    return [x.reshape(*sizes, options.k) for x in results]


def _why_not_top_k(*avals: Any, options: TopKOptions) -> str | None:
    if str(avals[0].dtype) not in KERNEL_DTYPES:
        return f"logits of dtype {avals[0].dtype}"
    if options.k > KERNEL_MAX_K:
        return f"k={options.k}: the kernel sorts at most {KERNEL_MAX_K}"
    return None


def _top_k_kernel(logits: jax.Array, *, options: TopKOptions) -> list[jax.Array]:
    shape = (*logits.shape[:2], options.k)
    results = [
        jax.ShapeDtypeStruct(shape, logits.dtype),
        jax.ShapeDtypeStruct(shape, jnp.int32),
    ]
    return list(jax.ffi.ffi_call(registry.TOP_K_TARGET, results)(logits))


SAMPLE = RowOp(
    "flash_sample", _sample_results, _sample_reference, _sample_kernel, _why_not_sample
)
TOP_K = RowOp(
    "flash_top_k", _top_k_results, _top_k_reference, _top_k_kernel, _why_not_top_k
)


def _sample_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    """A token has no derivative."""
    del tangents
    outs = rowwise.primitive(SAMPLE).bind(*primals, **params)
    return outs, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in outs]


def _top_k_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    """The values are taken from where they are."""
    values, indices = rowwise.primitive(TOP_K).bind(*primals, **params)
    zero = ad.Zero(jax.typeof(indices).to_tangent_aval())
    (tangent,) = tangents
    if isinstance(tangent, ad.Zero):
        taken: Any = ad.Zero(jax.typeof(values).to_tangent_aval())
    else:
        # Along explicit mesh axes a sharded vocabulary is gathered, as for the values.
        own = jax.typeof(tangent)
        spec = (*own.sharding.spec[:-1], None)
        whole = avals.like(own, own.shape, own.dtype, spec)
        tangent = compat.sharded_like(tangent, whole)
        taken = jnp.take_along_axis(tangent, indices, axis=-1)
    return [values, indices], [taken, zero]


ad.primitive_jvps[rowwise.primitive(SAMPLE)] = _sample_jvp
ad.primitive_jvps[rowwise.primitive(TOP_K)] = _top_k_jvp


def sample(logits: jax.Array, table: jax.Array, mask: jax.Array | None) -> jax.Array:
    """int32 [*R] from logits [*R, V], parameters [*R, 6] and a mask [*R, V].

    Sizes of the mask's rows may be 1: the same for all.
    """
    operands = [logits[None], table[None]]
    if mask is not None:
        operands.append(mask[None])
    return rowwise.bind(SAMPLE, SampleOptions(mask is not None), *operands)[0][0]


def top_k(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Values and indices [*R, k] of logits [*R, V]."""
    values, indices = rowwise.bind(TOP_K, TopKOptions(k), logits[None])
    return values[0], indices[0]
