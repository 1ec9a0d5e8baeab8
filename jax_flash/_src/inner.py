"""Inner primitives: what the compiler sees, after partitioning.

Lives here: `forward_i` and `backward_i` with their lowerings, the CUDA kernel where the
call was found to have one, else the jnp specification. Batching and derivatives belong
to the outer primitives (`primitives`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

from jax_flash._src import (
    avals,
    compat,
    dropout,
    few_queries,
    intervals,
    packed,
    plan,
    reference,
    reference_grad,
    registry,
    row_bias,
    sinks,
)
from jax_flash._src.config import (
    OPERANDS,
    QKV,
    TRAILING,
    UNBOUNDED,
    AttentionConfig,
    Backward,
)
from jax_flash._src.decode_call import DecodeConfig

TENSORS = OPERANDS[:3]
"""Query, key and value: what the kernels read in any layout and differentiate."""

LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")


def new_primitive(name: str, abstract: Callable, lowering: Callable) -> Primitive:
    """A primitive with several results, run eagerly by compiling it alone."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    mlir.register_lowering(primitive, lowering)
    return primitive


_forward_in_jnp = mlir.lower_fun(reference.forward, multiple_results=True)
_backward_in_jnp = mlir.lower_fun(reference_grad.backward, multiple_results=True)


def _only_on_cuda(ctx: Any, config: AttentionConfig | DecodeConfig) -> None:
    """Raises if the caller restricted the call to the kernels."""
    if "xla" not in config.implementations:
        raise NotImplementedError(
            f"implementation={config.implementations[0]!r} runs on platform 'cuda' "
            f"only, this computation is lowered for {ctx.module_context.platforms}"
        )


def _options(config: AttentionConfig) -> tuple[str, ...]:
    """What a call has beyond query, key and value, as far as kernels differ by it."""
    numbers = () if config.softcap is None else ("softcap",)
    numbers += ("dropout_rate",) if config.dropout_rate else ()
    return config.present[len(config.orders) :] + numbers


def _runs_kernel(
    ctx: Any, config: AttentionConfig, op: str, backward: Backward | None = None
) -> bool:
    """Whether a call lowered for CUDA runs the kernel of `op`, or jnp.

    `backward` says which gradients are wanted, if `op` is "mha_bwd".

    Raises:
      NotImplementedError: neither may.
    """
    query = ctx.avals_in[0]
    if config.qkv_heads is None:
        widths = query.shape[-1], ctx.avals_in[2].shape[-1]
    else:
        width = packed.shapes(config.qkv_heads, query.shape)[0][-1]
        widths = width, width
    shapes = [x.shape for x in (*ctx.avals_in, *ctx.avals_out)]
    if "cuda" not in config.implementations or any(0 in shape for shape in shapes):
        return False
    batch_dims = query.ndim - TRAILING[config.present[0]]
    avals_of = dict(zip(config.present, ctx.avals_in, strict=False))
    ops = [op]
    if row_bias.is_in(avals_of, _lengths(config, avals_of)[1]):
        config = row_bias.without(config)
        ops = ["mha_fwd", op]  # a backward begins with the forward
    ops = [plan.operation(op, _options(config)) for op in ops]
    if backward and (clash := _clash_of_gradients(ctx, config, backward)):
        reason = f"has no kernel for {clash}"
    elif batch_dims > plan.MAX_BATCH_DIMS:
        reason = (
            f"takes at most {plan.MAX_BATCH_DIMS} batch dimensions (vmap adds one "
            f"each), got {batch_dims}"
        )
    else:
        reason = None
        for op in ops:
            missing = plan.missing_kernel(
                op,
                query.dtype,
                *widths,
                registry.extension().kernels,
                config.precision,
            )
            if missing is not None:
                reason = f"has no {op} kernel for {missing}"
    if reason is not None and "xla" not in config.implementations:
        raise NotImplementedError(f"implementation='cuda' {reason}")
    return reason is None


def _tensors(
    config: AttentionConfig, given: dict[str, jax.Array]
) -> tuple[list[jax.Array], list[tuple[int, ...]]]:
    """What the kernel takes for query, key and value, and the shape of each of them.

    An array of all three is given three times; the kernel finds the heads in it.
    """
    if config.qkv_heads is None:
        tensors = [given[name] for name in TENSORS]
        return tensors, [x.shape for x in tensors]
    whole = given[QKV]
    return [whole] * 3, packed.shapes(config.qkv_heads, whole.shape)


def _clash_of_gradients(
    ctx: Any, config: AttentionConfig, backward: Backward
) -> str | None:
    """What gradients no kernel has, in words, if there are any.

    `config` has no bias that the kernel does not read.
    """
    if "bias" not in config.present or "bias" not in backward.perturbed:
        return None
    names = avals.backward_operands(config, backward)
    given = dict(zip(names, ctx.avals_in, strict=True))
    rows, keys = _lengths(config, given)
    batch = _full_batch(given, names)
    heads = (config.qkv_heads or ctx.avals_in[0].shape[-2:])[0]
    axes = dict(zip(backward.perturbed, backward.shared, strict=True))["bias"]
    shared = bool(axes) or given["bias"].shape[-3:-1] != (heads, rows)
    scores = math.prod((*batch, heads, rows, keys))
    return plan.no_bias_gradient(_is_deterministic(config), shared, scores)


def _is_deterministic(config: AttentionConfig) -> bool:
    return config.deterministic or compat.deterministic_ops()


def _lengths(config: AttentionConfig, given: dict[str, Any]) -> tuple[Any, Any]:
    """T and S, of operands or their types."""
    names = TENSORS[:2] if config.qkv_heads is None else (QKV, QKV)
    rows, keys = (given[name].shape[-TRAILING[name]] for name in names)
    return rows, keys


def _mask_operands(
    config: AttentionConfig, given: dict[str, jax.Array]
) -> list[jax.Array]:
    """What a kernel is given besides arrays of rows, keys and values.

    The lengths, or what lengths, ids, offsets and windows come to: see `intervals`.
    """
    if not plan.needs_intervals(_options(config)):
        return [given[name] for name in LENGTHS if name in given]
    arrays = [*intervals.by_kernel(config, given)]
    if "alibi_slopes" in given:
        arrays.append(given["alibi_slopes"].astype(jnp.float32))
    if "dropout_seeds" in given:
        arrays.append(given["dropout_seeds"])
    if "mask" in given:
        keys = _lengths(config, given)[1]
        arrays.append(intervals.mask_bits(given["mask"], keys))
    if "bias" in given:
        arrays.append(intervals.bias_rows(given["bias"]))
    return arrays


def _orders(config: AttentionConfig) -> tuple[tuple[int, ...], ...]:
    """Physical order, major to minor, of what is given for query, key and value."""
    return config.orders * (3 // len(config.orders))


def _layouts(
    config: AttentionConfig, others: Sequence[jax.Array]
) -> list[tuple[int, ...]]:
    """Physical orders of these, and of `others`, which are row-major."""
    return [*_orders(config), *(tuple(range(x.ndim)) for x in others)]


def _attributes(config: AttentionConfig) -> dict[str, Any]:
    """What forward and backward tell the kernel about the mask and the operands."""
    query_order, key_order, value_order = (
        np.asarray(order, np.int64) for order in _orders(config)
    )
    has_intervals = plan.needs_intervals(_options(config))
    left, right = config.window_left, config.window_right
    if has_intervals:
        left = right = UNBOUNDED
    heads, kv_heads = config.qkv_heads or (0, 0)
    # numpy scalars, because a Python float would become an f64 attribute.
    return {
        "scale": np.float32(config.scale),
        "window_left": np.int64(left),
        "window_right": np.int64(right),
        "bottom_right": config.bottom_right or has_intervals,
        "has_query_lengths": LENGTHS[0] in config.present and not has_intervals,
        "has_kv_lengths": LENGTHS[1] in config.present and not has_intervals,
        "has_intervals": has_intervals,
        "has_slopes": "alibi_slopes" in config.present,
        "softcap": np.float32(0 if config.softcap is None else config.softcap),
        "tf32": config.precision == "tf32",
        "dropout": np.int64(
            dropout.threshold(config.dropout_rate) if config.dropout_rate else 0
        ),
        "has_mask": "mask" in config.present,
        "has_bias": "bias" in config.present,
        "packed_heads": np.int64(heads),
        "packed_kv_heads": np.int64(kv_heads),
        "query_order": query_order,
        "key_order": key_order,
        "value_order": value_order,
    }


def _forward_default(ctx: Any, *operands: Any, config: AttentionConfig) -> Any:
    """The specification, unless the caller restricted the call to the kernels."""
    _only_on_cuda(ctx, config)
    return _forward_in_jnp(ctx, *operands, config=config)


def _full_batch(given: dict[str, jax.Array], names: Iterable[str]) -> tuple[int, ...]:
    """The batch dimensions of some operands together."""
    shapes = {name: given[name].shape for name in names}
    return jnp.broadcast_shapes(
        *(shape[: len(shape) - TRAILING[name]] for name, shape in shapes.items())
    )


@compat.allows_rank_promotion
def call_forward(*args: jax.Array, config: AttentionConfig) -> list[jax.Array]:
    """`[out, lse]` by one FFI call, which reads operands in the layout they have.

    Few queries on many keys are a call of the decode kernel. The others' kernel gets no
    sinks: they are joined to its results.
    """
    given = dict(zip(config.present, args, strict=True))
    if row_bias.is_in(given, _lengths(config, given)[1]):
        alone = row_bias.without(config, "sinks")
        out, lse = call_forward(*(given[n] for n in alone.present), config=alone)
        out, lse = (compat.vary_like(x, args[0]) for x in (out, lse))
        return row_bias.join(config, given, out, lse)
    decode = few_queries.decode_config(config, given)
    if decode is not None:
        return few_queries.call(given, decode)
    batch = _full_batch(given, (name for name in given if name != "sinks"))
    tensors, (query_shape, key_shape, value_shape) = _tensors(config, given)
    query, (rows, heads, _) = args[0], query_shape[-3:]
    results = [
        jax.ShapeDtypeStruct((*batch, rows, heads, value_shape[-1]), query.dtype),
        jax.ShapeDtypeStruct((*batch, heads, rows), jnp.float32),
    ]
    if plan.needs_intervals(_options(config)):
        queue = plan.row_list_size(math.prod(batch), rows)
        results.append(jax.ShapeDtypeStruct((queue,), jnp.int32))
    op = plan.operation("mha_fwd", _options(config))
    if plan.may_split(op, query.dtype, config.precision):
        parts = plan.split_elements(op, (query_shape, key_shape, value_shape))
        if parts is not None:
            results.append(jax.ShapeDtypeStruct((parts,), jnp.bfloat16))
    others = _mask_operands(config, given)
    run = jax.ffi.ffi_call(
        registry.FORWARD_TARGET, results, input_layouts=_layouts(config, others)
    )
    out, lse, *_ = run(*tensors, *others, **_attributes(config))
    if "sinks" not in given:
        return [out, lse]
    out, lse = (compat.vary_like(x, query) for x in (out, lse))
    return sinks.join(config, given, out, lse)


_forward_by_kernel = mlir.lower_fun(call_forward, multiple_results=True)


def _forward_cuda(ctx: Any, *operands: Any, config: AttentionConfig) -> Any:
    """The kernel where the call has one, else the specification."""
    runs = _runs_kernel(ctx, config, "mha_fwd")
    lower = _forward_by_kernel if runs else _forward_in_jnp
    return lower(ctx, *operands, config=config)


forward_i = new_primitive("flash_mha_fwd_inner", avals.forward, _forward_default)
mlir.register_lowering(forward_i, _forward_cuda, platform="cuda")


@compat.allows_rank_promotion
def call_backward(
    *args: jax.Array, config: AttentionConfig, backward: Backward
) -> list[jax.Array]:
    """The gradients of `backward.perturbed` by one FFI call.

    Query, key and value are read in the layout they have. The kernel writes gradients
    with the full batch: in float32 where XLA then sums over batch dimensions. That of
    the sinks is no work of the kernel.
    """
    names = avals.backward_operands(config, backward)
    given = dict(zip(names, args, strict=True))
    batch = _full_batch(given, names)
    for name in names[len(config.present) :]:
        trailing = given[name].shape[len(batch) :]
        given[name] = jnp.broadcast_to(given[name], batch + trailing)
    shared = dict(zip(backward.perturbed, backward.shared, strict=True))
    by_name = {}
    dtypes = {name: given[name].dtype for name in shared}
    if "sinks" in shared:
        by_name["sinks"] = sinks.gradient(given)
    by_row = row_bias.is_in(given, _lengths(config, given)[1])
    if by_row and "bias" in shared:
        by_name["bias"] = row_bias.gradient(given)
    wanted = {n: axes for n, axes in shared.items() if n not in by_name}
    if by_row and wanted:
        config, given = _without_row_bias(given, batch, config)
    if wanted:
        by_name |= _run_backward(given, batch, wanted, config, backward)

    def finished(name: str) -> jax.Array:
        gradient, axes = by_name[name], shared[name]
        if axes and not (name == "bias" and name in wanted):  # the kernel sums up that
            gradient = gradient.sum([len(batch) + axis for axis in axes], keepdims=True)
        return gradient.astype(dtypes[name])

    return [finished(name) for name in backward.perturbed]


def _without_row_bias(
    given: dict[str, jax.Array], batch: tuple[int, ...], config: AttentionConfig
) -> tuple[AttentionConfig, dict[str, jax.Array]]:
    """A call without the bias that keys share, and what its backward is given.

    Runs the forward once more, for its lse.
    """
    alone = row_bias.without(config, "sinks")
    _, lse = call_forward(*(given[n] for n in alone.present), config=alone)
    lse = row_bias.kernel_lse(given, compat.vary_like(lse, given["lse"]))
    lse = jnp.broadcast_to(lse, batch + lse.shape[-2:])
    rest = {name: x for name, x in given.items() if name != "bias"}
    return row_bias.without(config), rest | {"lse": lse}


def _run_backward(
    given: dict[str, jax.Array],
    batch: tuple[int, ...],
    shared: dict[str, tuple[int, ...]],
    config: AttentionConfig,
    backward: Backward,
) -> dict[str, jax.Array]:
    """The FFI call: gradients of query, key and value, each with the full batch.

    And those of the bias, summed up, and of slopes, if they are wanted, in float32.
    """
    residuals = avals.backward_operands(config, backward)[len(config.present) :]
    others = [given[name] for name in residuals] + _mask_operands(config, given)
    tensors, shapes = _tensors(config, given)
    dtype = tensors[0].dtype
    dtypes = [
        jnp.float32 if shared.get(name) or shared.get(QKV) else dtype
        for name in TENSORS
    ]
    results = [
        jax.ShapeDtypeStruct(batch + shape[len(batch) :], one)
        for shape, one in zip(shapes, dtypes, strict=True)
    ]
    count = math.prod(batch)
    rows, heads, width = shapes[0][-3:]
    keys, kv_heads, _ = shapes[1][-3:]
    width_v = shapes[2][-1]
    has_intervals = plan.needs_intervals(_options(config))
    queue = plan.queue_size(count, keys) if has_intervals else None
    workspace = plan.backward_workspace(
        count, heads, rows, dtype, width, width_v, queue
    )
    deterministic = _is_deterministic(config)
    workspace += plan.backward_parts(
        count,
        heads,
        kv_heads,
        keys,
        dtype,
        width,
        width_v,
        has_intervals,
        deterministic,
    )
    results.append(jax.ShapeDtypeStruct((workspace,), jnp.float32))
    op = plan.operation("mha_bwd", _options(config))

    more = {}
    if "bias" in shared:
        sizes = list(batch)
        for axis in shared["bias"]:
            sizes[axis] = 1
        shape = (*sizes, *given["bias"].shape[len(batch) :])
        # In an order only what nothing shares is added up.
        more["bias"] = (*batch, heads, rows, keys) if deterministic else shape
    if "alibi_slopes" in shared:
        more["alibi_slopes"] = (*batch, heads, plan.SLOPE_PARTS, keys)

    def run(more: dict[str, tuple[int, ...]]) -> Sequence[jax.Array]:
        added = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in more.values()]
        call = jax.ffi.ffi_call(
            registry.BACKWARD_TARGET,
            results + added,
            input_layouts=_layouts(config, others),
        )
        return call(
            *tensors,
            *others,
            **_attributes(config),
            has_dlse=backward.has_dlse,
            has_dbias="bias" in more,
            has_dslopes="alibi_slopes" in more,
            deterministic=deterministic,
            may_split=plan.may_split(op, dtype, config.precision),
        )

    gradients = run(more)
    by_name = dict(zip(more, gradients[len(results) :], strict=True))
    if "bias" in by_name:
        summed = [i for i, n in enumerate(shape) if n != more["bias"][i]]
        by_name["bias"] = by_name["bias"].sum(summed, keepdims=True)
    if "alibi_slopes" in by_name:
        by_name["alibi_slopes"] = -by_name["alibi_slopes"].sum((-2, -1))
    if more and config.softcap is not None and len(shared) > len(more):
        gradients = run({})  # with a soft cap, a call has those of what is added alone
    if config.qkv_heads is None:
        return by_name | dict(zip(TENSORS, gradients, strict=False))
    return by_name | {QKV: packed.join(gradients[:3])}


_backward_by_kernel = mlir.lower_fun(call_backward, multiple_results=True)


def _backward_default(
    ctx: Any, *operands: Any, config: AttentionConfig, backward: Backward
) -> Any:
    """The specification, unless the caller restricted the call to the kernels."""
    _only_on_cuda(ctx, config)
    return _backward_in_jnp(ctx, *operands, config=config, backward=backward)


def _backward_cuda(
    ctx: Any, *operands: Any, config: AttentionConfig, backward: Backward
) -> Any:
    """The kernel where the call has one, else the specification."""
    runs = _runs_kernel(ctx, config, "mha_bwd", backward)
    lower = _backward_by_kernel if runs else _backward_in_jnp
    return lower(ctx, *operands, config=config, backward=backward)


backward_i = new_primitive("flash_mha_bwd_inner", avals.backward, _backward_default)
mlir.register_lowering(backward_i, _backward_cuda, platform="cuda")
