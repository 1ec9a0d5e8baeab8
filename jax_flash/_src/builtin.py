"""The built-in backends: "cuda", "cudnn" and "xla".

Lives here: what each supports and how it runs. "cuda" and "xla" are one primitive,
which chooses when it is lowered; "cudnn" is the public function of `jax.nn`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from jax_flash._src import (
    few_queries,
    intervals,
    packed,
    plan,
    registry,
    row_bias,
)
from jax_flash._src.call import Backend, Call
from jax_flash._src.config import OPERANDS, QKV, UNBOUNDED, AttentionConfig
from jax_flash._src.flash_mha import flash_mha

NUMBERS: dict[str, Any] = {
    "is_causal": False,
    "window_size": None,
    "softcap": None,
    "dropout_rate": 0.0,
    "deterministic": False,
    "return_lse": False,
}
"""Options of a call that are no arrays, and their values if not given."""


def config_of(call: Call, implementations: tuple[str, ...]) -> AttentionConfig:
    """The static argument of the primitive for a call."""
    left, right = call.window_size or (None, None)
    if call.is_causal:
        right = 0
    order = tuple(range(len(call.query.shape)))
    return AttentionConfig(
        scale=call.scale,
        window_left=UNBOUNDED if left is None else left,
        window_right=UNBOUNDED if right is None else right,
        bottom_right=call.causal_alignment == "bottom_right",
        softcap=call.softcap,
        dropout_rate=call.dropout_rate,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        precision=call.precision,
        deterministic=call.deterministic,
        present=call.present,
        orders=(order,) * 3,
        implementations=implementations,
    )


def run_primitive(
    call: Call, operands: dict[str, jax.Array], implementations: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` by the first of `implementations` the lowering platform has.

    Operands may have "qkv" in place of query, key and value, which then is read in
    place where the kernels may.
    """
    config = config_of(call, implementations)
    if QKV in operands:
        heads = call.num_heads, call.num_kv_heads
        if "cuda" in implementations:
            config = packed.packed(config, heads)
        else:
            operands = packed.split_named(heads, operands)
    return flash_mha(config, operands)


def options_of(call: Call) -> dict[str, str]:
    """What a call has beyond query, key and value, with its value, by argument."""
    given = {}
    for name in call.present[3:]:
        if name != "dropout_seeds":
            given[name] = f"{name} (of shape {getattr(call, name).shape})"
    for name, default in NUMBERS.items():
        value = getattr(call, name)
        if value != default:
            given[name] = f"{name}={value}"
    return given


def cuda_supports(call: Call) -> str | None:
    """Why the kernels cannot run a call."""
    extension = registry.extension()
    if extension.missing is not None:
        return extension.missing
    is_f32 = str(call.dtype) == "float32"
    if plan.kernel_type(call.dtype, None) is None:
        return (
            f"query of dtype {call.dtype}: the kernels take bfloat16, float16 and "
            "float32"
        )
    for name, text in options_of(call).items():
        if not plan.supported(name):
            return f"{text} is not supported by the kernels yet"
    call = _without_row_bias(call)
    if call.precision is not None and not is_f32:
        return f"precision={call.precision!r}: the kernels round to {call.dtype}"
    if len(call.batch) > plan.MAX_BATCH_DIMS:
        return (
            f"query has {len(call.batch)} batch dimensions, the kernels take at most "
            f"{plan.MAX_BATCH_DIMS}"
        )
    op = plan.operation("mha_fwd", options_of(call))
    return plan.missing_kernel(
        op,
        call.dtype,
        call.head_dim,
        call.value_dim,
        extension.kernels,
        call.precision,
    )


def _without_row_bias(call: Call) -> Call:
    """The call that kernels run: a bias that keys share is joined to its results."""
    if row_bias.is_in({n: getattr(call, n) for n in call.present}, call.key_length):
        return dataclasses.replace(call, bias=None)
    return call


def cuda_details(call: Call) -> str:
    """Which kernels run a call that `cuda_supports`, and its gradients.

    Operands are taken to be row-major; the handler knows where `vmap` put a dimension.
    """
    joined = ["sinks"] if call.sinks is not None else []
    alone = _without_row_bias(call)
    if alone is not call:  # after which sinks are joined, too
        joined.insert(0, "bias")
        call = dataclasses.replace(alone, sinks=None)
    rest = f", {' and '.join(joined)} joined by XLA" if joined else ""
    batches = _batches(call)
    named = {name: getattr(call, name) for name in call.present}
    decode = few_queries.decode_config(config_of(call, ("cuda",)), named)
    if decode is not None:
        splits = few_queries.splits(decode, named)
        by = f"the decode kernel, {splits}{rest if 'bias' in joined else ''}"
        return f"{by}; gradients by {_gradients_by(call, batches)}"
    op = plan.operation("mha_fwd", options_of(call))
    forward = _kernels_named(op, call, plan.merged_batch_dims(batches))
    return f"{forward}{rest}; gradients by {_gradients_by(call, batches)}"


def _batches(call: Call) -> list[tuple[int, ...]]:
    """The batch dimensions of what the kernels of a call read."""

    def of(name: str) -> tuple[int, ...]:
        return tuple(getattr(call, name).shape[: len(call.batch)])

    batches = [of(name) for name in OPERANDS[:3]]
    names = (*intervals.OPERANDS, "mask")
    masks = [of(name) for name in names if name in call.present]
    if plan.needs_intervals(options_of(call)):
        masks = [np.broadcast_shapes((1,) * len(call.batch), *masks)]
    names = ("bias", "mask", "alibi_slopes", "dropout_seeds")
    others = [of(name) for name in names if name in call.present]
    return [*batches, *masks, *others]


def _gradients_by(call: Call, batches: list[tuple[int, ...]]) -> str:
    """Which kernels run the gradients of a call, or why none does."""
    extension = registry.extension()
    widths = call.head_dim, call.value_dim
    op = plan.operation("mha_bwd", options_of(call))
    missing = plan.missing_kernel(
        op, call.dtype, *widths, extension.kernels, call.precision
    )
    if missing is not None:
        return f"jnp: no kernel for {missing}"
    # Output and cotangents are never shared along a batch dimension.
    full = np.broadcast_shapes(*batches)
    named = _kernels_named(op, call, plan.merged_batch_dims([*batches, full]))
    if call.bias is not None:
        heads_and_rows = call.num_heads, call.query_length
        split = (*full, *heads_and_rows) == call.bias.shape[:-1]
        scores = math.prod((*full, *heads_and_rows, call.key_length))
        if plan.no_bias_gradient(call.deterministic, not split, scores):
            named += " (by jnp if bias has one)"
    return named


def _kernels_named(op: str, call: Call, batch_dims: int) -> str:
    """The kernels of an operation on Hopper and elsewhere."""
    hopper, other = (
        plan.choose(
            op,
            call.dtype,
            call.head_dim,
            call.value_dim,
            capability,
            precision=call.precision,
            batch_dims=batch_dims,
            force_sm80=registry.extension().force_sm80,
        )
        for capability in (plan.HOPPER, plan.OTHER)
    )
    if hopper == other:
        return str(other)
    return f"{hopper} on compute capability 9.0, {other} on others"


@functools.cache
def _has_cuda_device() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def cudnn_supports(call: Call) -> str | None:
    """Why `jax.nn`'s cuDNN attention cannot run a call with our semantics."""
    if str(call.dtype) not in plan.DTYPES:
        return f"query of dtype {call.dtype}: cuDNN takes bfloat16 and float16"
    for name, text in options_of(call).items():
        if name in call.present or name == "dropout_rate":
            return f"{text}: cuDNN's rule differs"
    if call.return_lse:
        return "return_lse=True: jax.nn rounds lse and stops its gradient"
    if call.softcap is not None:
        return f"softcap={call.softcap} is not offered by jax.nn"
    if call.precision is not None:
        return f"precision={call.precision!r} is not offered by jax.nn"
    if call.deterministic:
        return "deterministic=True is not promised by jax.nn"
    if call.head_dim != call.value_dim:
        return f"Hv={call.value_dim} of value differs from H={call.head_dim}"
    if call.head_dim % 8 or call.head_dim > 128:
        return f"H={call.head_dim} of query: a multiple of 8 up to 128 is needed"
    if len(call.batch) != 1:
        return f"query has batch dimensions {call.batch}: exactly one is needed"
    rows, keys = call.query_length, call.key_length
    if 0 in (*call.batch, rows, keys):
        return f"query {call.query.shape} or key {call.key.shape} is empty"
    aligned = call.is_causal or call.window_size is not None
    if aligned and call.causal_alignment == "bottom_right" and rows != keys:
        return (
            f"causal_alignment='bottom_right' with T={rows} and S={keys}: cuDNN aligns "
            "top-left"
        )
    if call.window_size is not None:
        left, right = call.window_size
        if left is None or not (call.is_causal or right == 0):
            return f"window_size={call.window_size}: only (left, 0) is offered"
        if rows != keys:
            return f"window_size={call.window_size} with T={rows} and S={keys}"
    return None if _has_cuda_device() else "there is no CUDA device in this process"


def run_cudnn(
    call: Call, operands: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """Runs cuDNN through `jax.nn`."""
    window = None
    if call.window_size is not None and call.window_size[0] is not None:
        window = (call.window_size[0], 0)
    out = jax.nn.dot_product_attention(
        operands["query"],
        operands["key"],
        operands["value"],
        scale=call.scale,
        is_causal=call.is_causal or window is not None,
        local_window_size=window,
        implementation="cudnn",
    )
    return out, None


CUDA = Backend(
    "cuda",
    ("cuda",),
    cuda_supports,
    functools.partial(run_primitive, implementations=("cuda",)),
    details=cuda_details,
)
CUDNN = Backend("cudnn", ("cuda",), cudnn_supports, run_cudnn)
XLA = Backend(
    "xla",
    (),
    lambda call: None,
    functools.partial(run_primitive, implementations=("xla",)),
)
