"""Attention of sequences that are sharded over devices: `ring_mha`, `ulysses_mha`.

Lives here: the signatures, the docstrings and the checks. Both are for the inside of
`jax.shard_map`, with the sequence dimension of query, key and value sharded along a
mesh axis. Outside of one `mha` needs neither: what is sharded there over batch and
heads stays so, and a sharded sequence is gathered by the compiler.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flash import backends
from jax_flash._src import builtin, compat, merge, ring, ulysses, validate
from jax_flash._src.call import Call

__all__ = ["ring_mha", "ulysses_mha", "zigzag_order"]

LAYOUTS = ("contiguous", "zigzag")

Axis = str | tuple[str, ...]


@compat.allows_rank_promotion
def ring_mha(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    axis_name: Axis,
    layout: str = "contiguous",
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
    implementation: backends.Implementation = None,
) -> Any:
    """`mha` of sequences sharded along a mesh axis, inside `jax.shard_map`.

    Queries stay; keys and values go round the devices, in as many steps as there are
    devices whose keys anyone sees (with a window, fewer). No device holds more than a
    few shards of them, in the gradient neither. (Ring attention: Liu, Zaharia and
    Abbeel 2023, arXiv:2310.01889.)

    Shapes are those of a device: T queries and S keys of the P * T and P * S of all P
    devices of the axis, the others as for `mha`.

    The gradient is that of `mha`, in reverse mode; forward mode (`jax.jvp`) is refused
    by JAX. Outputs of single steps are rounded to the dtype of query before they are
    summed in float32.

    Args:
      query: [*B, T, N, H], bfloat16, float16 or float32.
      key: [*B, S, K, H], the dtype of query.
      value: [*B, S, K, Hv], the dtype of query.
      bias: None; `ulysses_mha` takes one.
      mask: bool, broadcastable to [*B, N, T, P * S]: the rows of this device, the keys
        of all, in the order in which the devices have them.
      axis_name: the axis of the mesh (or several, major to minor) along which the
        sequences are sharded.
      layout: "contiguous": device i has rows and keys i * T on. "zigzag": of a sequence
        cut into 2 * P chunks it has chunks i and 2 * P - 1 - i (`zigzag_order`), so
        that a causal mask leaves all devices the same work: about half of it, where
        the contiguous layout has the last device do everything.
      scale: as for `mha`.
      is_causal: a query sees no key after its own position; T must be S.
      causal_alignment: as for `mha`; of whole sequences both are the same, with lengths
        it must be "top_left".
      window_size: as for `mha`; T must be S.
      softcap: as for `mha`.
      sinks: as for `mha`, the same on every device.
      q_segment_ids: integers [*B, T], as for `mha`, of a type that int32 holds.
      kv_segment_ids: integers [*B, S].
      query_seq_lengths: as for `mha`: of the whole sequences, at most P * T.
      key_value_seq_lengths: the same for keys, at most P * S.
      dropout_rate: as for `mha`.
      dropout_key: as for `mha`, the same on every device. Each pair of shards has draws
        of its own: other ones than `mha` has for the whole.
      deterministic: as for `mha`.
      precision: as for `mha`.
      return_lse: as for `mha`.
      implementation: None, "cuda", "xla", or a tuple of them.

    Returns:
      out [*B, T, N, Hv] in the dtype of query; with `return_lse` `(out, lse)`, lse
      float32 [*B, N, T], natural logarithm, differentiable.

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported.
    """
    size = _axis_size(axis_name)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if bias is not None:
        raise NotImplementedError(
            f"bias={type(bias).__name__} is not supported by ring_mha, only None; "
            "ulysses_mha takes one"
        )
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "sinks": sinks,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    options = backends.DEFAULTS | {
        "scale": scale,
        "is_causal": is_causal,
        "causal_alignment": causal_alignment,
        "window_size": window_size,
        "softcap": softcap,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "deterministic": deterministic,
        "precision": precision,
        "return_lse": return_lse,
    }
    given, call, operands = _canonical(arrays, options, size)
    rows, keys = call.query_length, operands["key"].shape[-3]
    left, right = call.window_size or (None, None)
    window = (left, 0 if call.is_causal else right)
    if window != (None, None) and rows != keys:
        raise NotImplementedError(
            f"is_causal={is_causal!r}, window_size={window_size!r} with T={rows} "
            f"queries and S={keys} keys on a device is not supported: they must be as "
            "many"
        )
    if layout == "zigzag":
        if window != (None, 0):
            raise NotImplementedError(
                "layout='zigzag' is for is_causal=True without a window, got "
                f"is_causal={is_causal!r}, window_size={window_size!r}"
            )
        if rows % 2:
            raise ValueError(
                "layout='zigzag' needs two chunks of rows on a device, got T="
                f"{rows} of query's shape {given.query.shape}"
            )
        steps = ring.zigzag_steps(size, rows)
    else:
        steps = ring.contiguous_steps(size, window, rows, keys)
    if {"query_seq_lengths", "key_value_seq_lengths"} & set(operands):
        if window != (None, None) and call.causal_alignment != "top_left":
            raise NotImplementedError(
                "query_seq_lengths and key_value_seq_lengths with "
                f"causal_alignment={causal_alignment!r} and is_causal={is_causal!r}, "
                f"window_size={window_size!r} are not supported, only 'top_left'"
            )
        operands = ring.lengths_as_ids(operands, axis_name, size, layout == "zigzag")
    # The sinks join at the end, once.
    types: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in operands.items()
    }
    absent = dict.fromkeys(("sinks", "query_seq_lengths", "key_value_seq_lengths"))
    local = dataclasses.replace(
        call,
        **types | absent,
        is_causal=False,
        window_size=None,
        return_lse=True,
    )
    chosen = backends.primitives(local, implementation)
    # Through the logsumexp sinks pass gradients on, too.
    wants_lse = call.return_lse or "sinks" in operands
    config = builtin.config_of(local, chosen)
    walk = ring.Ring(axis_name, size, config, steps, wants_lse)
    names = tuple(operands)
    # Also over the axis itself, if JAX keeps account of that.
    *varying, _ = compat.vary_together([*operands.values(), lax.axis_index(axis_name)])
    others = dict(zip(names, varying, strict=True))
    sink = others.pop("sinks", None)
    tensors = [others.pop(name) for name in ring.TENSORS]
    out, lse = ring.walk(walk, *tensors, others)
    if sink is not None:
        sink = jnp.broadcast_to(sink.astype(lse.dtype)[..., None], lse.shape)
        sink = jnp.where(jnp.isneginf(lse), lse, sink)
        out, lse = merge.merge_partials([out, jnp.zeros_like(out)], [lse, sink])
    out = out.astype(given.dtype)
    if len(query.shape) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if call.return_lse else out


@compat.allows_rank_promotion
def ulysses_mha(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    axis_name: Axis,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
    implementation: backends.Implementation = None,
) -> Any:
    """`mha` of sequences sharded along a mesh axis, inside `jax.shard_map`.

    An all-to-all gives each device whole sequences of its share of the heads, and
    another one takes the results back, so every option and every derivative of `mha`
    is there. (DeepSpeed Ulysses: Jacobs et al. 2023, arXiv:2309.14509.)

    Shapes are those of a device: T queries and S keys of the P * T and P * S of all P
    devices of the axis, device i those from i * T and i * S on; the others as for
    `mha`. The query heads must divide among the devices, and the key/value heads, too,
    or their number must divide P: then each is sent to P / K devices.

    Args:
      query: [*B, T, N, H], bfloat16, float16 or float32.
      key: [*B, S, K, H], the dtype of query.
      value: [*B, S, K, Hv], the dtype of query.
      bias: floating, broadcastable to [*B, N, T, P * S]: the rows of this device, the
        keys of all. Or `alibi(slopes)`, the same on every device.
      mask: bool, broadcastable to [*B, N, T, P * S].
      axis_name: the axis of the mesh (or several, major to minor) along which the
        sequences are sharded.
      scale: as for `mha`.
      is_causal: as for `mha`.
      causal_alignment: as for `mha`.
      window_size: as for `mha`.
      softcap: as for `mha`.
      sinks: as for `mha`, the same on every device.
      q_segment_ids: integers [*B, T], as for `mha`, of a type that int32 holds.
      kv_segment_ids: integers [*B, S].
      query_seq_lengths: as for `mha`: of the whole sequences, at most P * T.
      key_value_seq_lengths: the same for keys, at most P * S.
      dropout_rate: as for `mha`.
      dropout_key: as for `mha`, the same on every device; the draws are those of `mha`
        for the whole sequences.
      deterministic: as for `mha`.
      precision: as for `mha`.
      return_lse: as for `mha`.
      implementation: as for `mha`.

    Returns:
      out [*B, T, N, Hv] in the dtype of query; with `return_lse` `(out, lse)`, lse
      float32 [*B, N, T].

    Raises:
      ValueError: an argument is wrong; the message names it and its value.
      NotImplementedError: it is right but unsupported, by `implementation` or at all.
    """
    size = _axis_size(axis_name)
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "sinks": sinks,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    options = backends.DEFAULTS | {
        "scale": scale,
        "is_causal": is_causal,
        "causal_alignment": causal_alignment,
        "window_size": window_size,
        "softcap": softcap,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "deterministic": deterministic,
        "precision": precision,
        "return_lse": return_lse,
    }
    given, call, operands = _canonical(arrays, options, size)
    out, lse = ulysses.attend(
        call,
        operands,
        axis_name,
        size,
        lambda whole, moved: backends.run(whole, moved, implementation),
    )
    out = out.astype(given.dtype)
    if len(query.shape) == 3:
        out, lse = out[0], None if lse is None else lse[0]
    return (out, lse) if call.return_lse else out


def zigzag_order(length: int, num_shards: int) -> np.ndarray:
    """The positions of a sequence in the order of `ring_mha(layout="zigzag")`.

    `x[:, zigzag_order(x.shape[1], P)]`, sharded along dimension 1 over P devices, gives
    device i chunks i and 2 * P - 1 - i of 2 * P. `np.argsort` of it is the way back;
    the positions for rotary embeddings are the order itself.

    Args:
      length: of the whole sequence, a multiple of 2 * num_shards.
      num_shards: P.

    Returns:
      int32 [length].

    Raises:
      ValueError: the length is no such multiple.
    """
    length = validate.static_int("length", length)
    shards = validate.static_int("num_shards", num_shards)
    if shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {shards}")
    if length < 0 or length % (2 * shards):
        raise ValueError(
            f"length must be a multiple of 2 * num_shards = {2 * shards}, got {length}"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    order = [chunk for i in range(shards) for chunk in (i, 2 * shards - 1 - i)]
    return chunks[order].reshape(-1)


def _axis_size(axis_name: Any) -> int:
    """The number of devices along a mesh axis of the `shard_map` around."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"axis_name must be the name of a mesh axis, or a tuple, got {axis_name!r}"
        )
    try:
        return int(lax.axis_size(axis_name))
    except NameError:
        raise ValueError(
            "axis_name must be an axis of a jax.shard_map around the call, got "
            f"{axis_name!r}"
        ) from None


def _canonical(
    arrays: dict[str, Any], options: dict[str, Any], size: int
) -> tuple[Call, Call, dict[str, jax.Array]]:
    """Checks a call: that given, that run, and its canonical operands.

    The calls have the query's length on a device, and the key's on all of them.
    """
    whole = dict(arrays)
    for name, axis in ring.TRAVELLING.items():
        x: Any = arrays.get(name)
        shape = list(getattr(x, "shape", ()))
        if len(shape) >= -axis:
            shape[axis] *= size
            whole[name] = jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    given = validate.check_call(whole, options)
    for name in ("q_segment_ids", "kv_segment_ids"):
        x = arrays[name]
        if isinstance(x, jax.Array) and not jnp.can_cast(x.dtype, jnp.int32):
            raise NotImplementedError(
                f"{name} of dtype {x.dtype} is not supported, only what int32 holds"
            )
    call = validate.rounded(given)
    local = {}
    for name, axis in ring.TRAVELLING.items():
        x = getattr(call, name)
        if x is not None:
            shape = list(x.shape)
            shape[axis] //= size
            local[name] = jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    operands = validate.canonical(
        dataclasses.replace(call, **local), arrays, options["dropout_key"]
    )
    return given, call, operands
