"""Checks of the user's arguments, once, at trace time.

Every message names the argument and shows its value. ValueError: the argument is wrong.
NotImplementedError: it is right, and not built. What a given implementation cannot do
is not decided here but in `Backend.supports`.
"""

import dataclasses
import functools
import math
import numbers
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jax_flash._src import alibi, compat, dropout
from jax_flash._src.alibi import Alibi
from jax_flash._src.call import Call
from jax_flash._src.config import OPERANDS, QKV, TRAILING

ALIGNMENTS = ("bottom_right", "top_left")
PRECISIONS = (None, "highest", "tf32", "bf16", "f16")
ROUNDED = {"bf16": jnp.dtype(jnp.bfloat16), "f16": jnp.dtype(jnp.float16)}
"""What float32 inputs are rounded to before anything is computed, by precision."""

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")
LARGEST_WINDOW = 1 << 30
"""A window side this large is unbounded; smaller ones cannot overflow int32 rows."""

LARGEST_NUMBER, SMALLEST_NUMBER = 3.4e38, 1.2e-38
"""Sizes within the normal numbers of float32, in which kernels and jnp compute."""

LARGEST_SOFTCAP = 1e30
"""Far above any logit, and so that logits over it are normal numbers of float32."""


def check_call(arrays: dict[str, Any], options: dict[str, Any]) -> Call:
    """Validates a call of `mha`.

    Args:
      arrays: the array arguments by name, None where not given; arrays or
        `jax.ShapeDtypeStruct`s.
      options: the other arguments by name.

    Returns:
      The call, with canonical ranks.
    """
    arrays = by_operand(arrays)
    given = {n: _abstract(n, x) for n, x in arrays.items() if x is not None}
    for name in OPERANDS[:3]:
        if name not in given:
            raise ValueError(f"{name} must be an array, got None")
    _check_qkv(given["query"], given["key"], given["value"])
    query = given["query"]
    batch = query.shape[:-3]
    _check_others(given)
    _check_packed(given)
    shapes = {
        name: jax.ShapeDtypeStruct(_canonical_shape(name, x.shape, len(batch)), x.dtype)
        for name, x in given.items()
    }
    checked = _check_options(options, given)
    if checked["dropout_rate"] > 0:
        shape = _canonical_shape("dropout_seeds", (query.shape[-2], 2), len(batch))
        shape = (*batch, *shape[len(batch) :])
        shapes["dropout_seeds"] = jax.ShapeDtypeStruct(shape, jnp.uint32)
    return Call(**shapes, **checked)


def rounded(call: Call) -> Call:
    """The call that is run: for precision "bf16" and "f16" that of rounded inputs.

    Only float32 is rounded: other types are exact in these, or were asked for.
    """
    dtype = ROUNDED.get(call.precision or "")
    if dtype is None:
        return call
    shapes = {}
    if call.dtype == jnp.float32:
        for name in OPERANDS[:3]:
            shapes[name] = jax.ShapeDtypeStruct(getattr(call, name).shape, dtype)
    return dataclasses.replace(call, **shapes, precision=None)


def by_operand(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of operands: `bias` may stand for another one."""
    bias = arrays.get("bias")
    if not isinstance(bias, Alibi):
        return arrays
    return {**arrays, "bias": None, "alibi_slopes": alibi.slopes_of(bias)}


def canonical(
    call: Call, arrays: dict[str, Any], dropout_key: Any = None
) -> dict[str, jax.Array]:
    """The arrays of a validated (and rounded) call with canonical ranks and dtypes.

    An array "qkv" takes the place of query, key and value, which then are only types.
    """
    result = {}
    names = call.present
    if QKV in arrays:
        rank = len(call.batch) + TRAILING[QKV]
        qkv = jnp.asarray(arrays[QKV])
        qkv = qkv.reshape((1,) * (rank - qkv.ndim) + qkv.shape)
        result[QKV] = qkv.astype(call.dtype)
        names = names[3:]
    arrays = by_operand(arrays)
    if call.dropout_seeds is not None:
        words = key_words("dropout_key", dropout_key)
        made = dropout.seeds(words, call.batch, call.num_heads)
        arrays = {**arrays, "dropout_seeds": made}
    if call.q_segment_ids is not None:
        arrays = arrays | narrow_ids(arrays)
    for name in names:
        shape = getattr(call, name)
        x = arrays[name]
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(f"{shown(name)} must be an array, got {x}")
        if shape.dtype == jnp.int32:
            x = as_int32(x)
        x = as_array(name, x).reshape(shape.shape)
        result[name] = x.astype(call.dtype) if name in OPERANDS[:3] else x
    return result


def as_array(name: str, x: Any) -> jax.Array:
    """`x`, an array of NumPy or JAX, as one of JAX."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{shown(name)} must be an array that JAX takes, got {type(x).__name__} of "
            f"dtype {getattr(x, 'dtype', None)}"
        ) from error


def shape_of(name: str, x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array argument."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None or isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{shown(name)} must be an array, got {type(x).__name__}: {x!r}"
        )
    if isinstance(x, np.ndarray | np.generic):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(shape, dtype)


def as_int32(x: Any) -> Any:
    """Integers of any width as int32, saturated: lengths are clamped anyway."""
    if getattr(x, "dtype", None) == jnp.int32:
        return x
    limits = np.iinfo(np.int32)
    if isinstance(x, int):
        return np.int32(min(max(x, limits.min), limits.max))
    if isinstance(x, jax.Array):
        info = jnp.iinfo(x.dtype)
        x = jnp.clip(x, max(info.min, limits.min), min(info.max, limits.max))
        return x.astype(jnp.int32)
    x = np.asarray(x)
    if x.dtype.itemsize >= 4:  # NumPy cannot clip integers of 4 bits to these
        x = np.clip(x, limits.min, limits.max)
    return x.astype(np.int32)


def narrow_ids(arrays: dict[str, Any]) -> dict[str, Any]:
    """Segment ids of queries and keys as int32: as equal, and as negative, as before.

    Raises:
      ValueError: a NumPy array has an id that int32 cannot hold.
    """
    ids = {name: arrays[name] for name in ("q_segment_ids", "kv_segment_ids")}
    limits = np.iinfo(np.int32)
    for name, x in ids.items():
        if not isinstance(x, jax.Array) and np.size(x):
            for extreme in (np.min(x), np.max(x)):
                if not limits.min <= int(extreme) <= limits.max:
                    raise ValueError(f"{name} must fit int32, got the id {extreme}")
    if all(
        not isinstance(x, jax.Array) or jnp.can_cast(x.dtype, jnp.int32)
        for x in ids.values()
    ):
        return {name: as_int32(x) for name, x in ids.items()}
    wide = any(jnp.dtype(x.dtype).itemsize == 8 for x in ids.values())
    unsigned = jax.dtypes.canonicalize_dtype(jnp.uint64 if wide else jnp.uint32)
    given = compat.on_one_mesh([jnp.asarray(x) for x in ids.values()])
    ranked = functools.partial(_ranked, dtype=unsigned)
    ranks = compat.on_auto_axes(ranked, [jax.typeof(x) for x in given])(*given)
    return dict(zip(ids, ranks, strict=True))


def _ranked(q_ids: jax.Array, kv_ids: jax.Array, dtype: Any) -> list[jax.Array]:
    """For each id how many smaller ones there are, -1 if it is negative.

    Those of an entry of the batch are ranked alone, so that the batch may be sharded.
    Sorted twice rather than looked up: JAX has no look-up for every kind of sharding.

    Args:
      q_ids: [*B, T].
      kv_ids: [*B, S].
      dtype: unsigned, holds every id.
    """
    ids, alike = [q_ids, kv_ids], q_ids.shape[:-1] == kv_ids.shape[:-1]
    rows = [x if alike else x.ravel() for x in ids]
    sizes = [jnp.where(x < 0, jnp.zeros_like(x), x).astype(dtype) for x in rows]
    both = jnp.concatenate(sizes, axis=-1)
    place = jnp.arange(both.shape[-1], dtype=jnp.int32)
    place = compat.vary_like(jnp.broadcast_to(place, both.shape), both)
    ordered, place = lax.sort((both, place), num_keys=1)
    larger = (ordered[..., 1:] != ordered[..., :-1]).astype(jnp.int32)
    rank = jnp.concatenate([jnp.zeros_like(place[..., :1]), larger], axis=-1)
    _, rank = lax.sort((place, jnp.cumsum(rank, -1, dtype=jnp.int32)), num_keys=1)
    count = rows[0].shape[-1]
    ranks = (rank[..., :count], rank[..., count:])
    return [
        jnp.where(x < 0, -1, rank.reshape(x.shape))
        for x, rank in zip(ids, ranks, strict=True)
    ]


def _abstract(name: str, x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an argument as JAX will see it."""
    integers = "lengths" in name or "segment" in name or "cu_seqlens" in name
    if isinstance(x, int) and not isinstance(x, bool) and "lengths" in name:
        return jax.ShapeDtypeStruct((), jnp.int32)
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        kinds = "an int or an array" if "lengths" in name else "an array"
        got = f"{type(x).__name__}: {reprlib.repr(x)}"
        raise ValueError(f"{shown(name)} must be {kinds}, got {got}")
    try:
        is_integer = jnp.issubdtype(dtype, jnp.integer)
    except TypeError:
        raise ValueError(
            f"{shown(name)} must be an array of JAX or NumPy, got {type(x).__name__} "
            f"of dtype {dtype}"
        ) from None
    if integers:
        if not is_integer:
            raise ValueError(f"{name} must be integers, got dtype {dtype}")
        return jax.ShapeDtypeStruct(shape, jnp.int32)
    if isinstance(x, np.ndarray | np.generic):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(shape, dtype)


def _check_qkv(query: Any, key: Any, value: Any) -> None:
    qkv = {"query": query, "key": key, "value": value}
    layout = {"query": "[*B,T,N,H]", "key": "[*B,S,K,H]", "value": "[*B,S,K,Hv]"}
    for name, x in qkv.items():
        if len(x.shape) < 3:
            raise ValueError(
                f"{name} must have at least 3 dimensions, {layout[name]}, got shape "
                f"{x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got dtype {x.dtype}")
        if str(x.dtype) not in FLOAT_DTYPES:
            raise NotImplementedError(f"{name} of dtype {x.dtype} is not supported")
    shapes = f"got query {query.shape}, key {key.shape}, value {value.shape}"
    for name, x in qkv.items():
        if len(x.shape) != len(query.shape):
            raise ValueError(f"{name} must have the rank of query; {shapes}")
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} must have the batch dimensions of query {query.shape[:-3]}, "
                f"got {x.shape[:-3]}; {shapes}"
            )
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}"
            )
    if key.shape[-3] != value.shape[-3]:
        raise ValueError(f"value must have the length S of key; {shapes}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must have the number of heads K of key; {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the width H of query; {shapes}")
    heads, kv_heads, width = query.shape[-2], key.shape[-2], query.shape[-1]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query must have a multiple of key's heads, got N={heads} and K={kv_heads}"
        )
    if width < 1:
        raise ValueError(f"query must have a width H of at least 1, got {width}")


def shown(name: str) -> str:
    """What a user calls an operand."""
    return "bias=alibi(slopes)" if name == "alibi_slopes" else name


def _check_others(given: dict[str, Any]) -> None:
    query, key = given["query"], given["key"]
    batch = query.shape[:-3]
    (rows, heads), keys = query.shape[-3:-1], key.shape[-3]
    full = {
        "bias": ("[*B,N,T,S]", (*batch, heads, rows, keys)),
        "mask": ("[*B,N,T,S]", (*batch, heads, rows, keys)),
        "sinks": ("[*B,N]", (*batch, heads)),
        "alibi_slopes": ("[*B,N]", (*batch, heads)),
        "q_segment_ids": ("[*B,T]", (*batch, rows)),
        "kv_segment_ids": ("[*B,S]", (*batch, keys)),
        "query_seq_lengths": ("[*B]", batch),
        "key_value_seq_lengths": ("[*B]", batch),
    }
    for name, (layout, shape) in full.items():
        if name not in given:
            continue
        got = given[name].shape
        if not broadcasts(got, shape):
            raise ValueError(
                f"{shown(name)} must broadcast to {layout} = {shape}, got shape {got}"
            )
    for name in ("bias", "sinks", "alibi_slopes"):
        if name in given and not jnp.issubdtype(given[name].dtype, jnp.floating):
            hint = "; a boolean mask is `mask`" if name == "bias" else ""
            raise ValueError(
                f"{shown(name)} must be floating, got dtype {given[name].dtype}{hint}"
            )
    if "mask" in given and given["mask"].dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool (True = attend), got dtype {given['mask'].dtype}; "
            "an additive mask is `bias`"
        )
    for name, each in (("sinks", "logit"), ("alibi_slopes", "slope")):
        if name in given and given[name].shape[-1:] != (heads,):
            raise ValueError(
                f"{shown(name)} must have one {each} for each of the N={heads} query "
                f"heads, got shape {given[name].shape}"
            )
    for name, length in (("q_segment_ids", rows), ("kv_segment_ids", keys)):
        if name in given and given[name].shape[-1:] != (length,):
            raise ValueError(
                f"{name} must have one id for each of the {length} positions, got "
                f"shape {given[name].shape}"
            )
    if ("q_segment_ids" in given) != ("kv_segment_ids" in given):
        missing = "kv" if "q_segment_ids" in given else "q"
        raise ValueError(
            "q_segment_ids and kv_segment_ids must be given together, got "
            f"{missing}_segment_ids=None"
        )


def check_varlen(query: Any, cu_seqlens_q: Any) -> None:
    """What tells a call of `mha_varlen` from one of `mha`."""
    for name, x in (("query", query), ("cu_seqlens_q", cu_seqlens_q)):
        if not hasattr(x, "shape"):
            raise ValueError(f"{name} must be an array, got {x!r}")
    if len(query.shape) != 3:
        raise ValueError(f"query must be [Tq,N,H], got shape {query.shape}")


def _check_packed(given: dict[str, Any]) -> None:
    """Offsets of packed sequences: int32 [sequences + 1] for queries and keys."""
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name not in given:
            continue
        shape = given[name].shape
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(
                f"{name} must be [sequences + 1], the offsets of the sequences and the "
                f"end of the last, got shape {shape}"
            )
        if shape != given["cu_seqlens_q"].shape:
            raise ValueError(
                f"{name} must have the shape of cu_seqlens_q, "
                f"{given['cu_seqlens_q'].shape}, got {shape}"
            )


def is_typed_key(key: Any) -> bool:
    """Whether `key` is a key of `jax.random.key`, or stands for one."""
    dtype = getattr(key, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def check_key(name: str, key: Any) -> None:
    """One random key: typed, of any generator, or its uint32 words, [2] or [4]."""
    if is_typed_key(key):
        if key.shape:
            raise ValueError(
                f"{name} must be one key, got an array of keys of shape {key.shape}"
            )
        return
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    if shape not in ((2,), (4,)) or dtype != jnp.uint32:
        got = repr(key) if shape is None else f"{dtype} of shape {shape}"
        raise ValueError(
            f"{name} must be a key of jax.random, or uint32 [2] or [4], got {got}"
        )


def key_words(name: str, key: Any) -> jax.Array:
    """The words of a key, uint32 [2] or [4]."""
    if isinstance(key, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must be an array, got {key}")
    words = jax.random.key_data(key) if is_typed_key(key) else jnp.asarray(key)
    if words.shape[-1] not in (2, 4):
        raise NotImplementedError(
            f"{name} of {words.shape[-1]} words is not supported, only 2 or 4"
        )
    return words


def broadcasts(shape: tuple, full: tuple) -> bool:
    """Whether an array of `shape` broadcasts to `full`."""
    if len(shape) > len(full):
        return False
    tail = full[len(full) - len(shape) :]
    return all(n == 1 or n == m for n, m in zip(shape, tail, strict=True))


def _canonical_shape(name: str, shape: tuple, batch_dims: int) -> tuple[int, ...]:
    """`shape` with at least one batch dimension, missing ones of size 1."""
    rank = max(batch_dims, 1) + TRAILING[name]
    return (1,) * (rank - len(shape)) + tuple(shape)


def _static(name: str, x: Any) -> Any:
    """Rejects a traced value where Python needs to know it."""
    if isinstance(x, Tracer):
        raise ValueError(
            f"{name} must be static, got a traced value {x}; pass a Python value, or "
            f"name it in static_argnames of jax.jit"
        )
    return x


def number(name: str, x: Any) -> float:
    x = _static(name, x)
    if isinstance(x, np.ndarray | jax.Array):
        # A time is a number to NumPy.
        is_number = jnp.issubdtype(x.dtype, jnp.number) and x.dtype.kind != "m"
        is_number = is_number and x.ndim == 0
    else:
        is_number = isinstance(x, numbers.Real)
        is_number = is_number and not isinstance(x, bool | np.timedelta64)
    if not is_number:
        raise ValueError(f"{name} must be a number, got {x!r}")
    try:
        result = math.nan if np.iscomplexobj(x) else float(x)
    except OverflowError:
        result = math.inf
    if not abs(result) <= LARGEST_NUMBER:
        raise ValueError(
            f"{name} must be a finite real number, also in float32, got {x!r}"
        )
    return result


def positive_number(name: str, x: Any) -> float:
    """A number that float32 does not take for 0, such as one to divide by."""
    x = number(name, x)
    if x < SMALLEST_NUMBER:
        raise ValueError(
            f"{name} must be positive, got {x} (at least {SMALLEST_NUMBER})"
        )
    return x


def check_softcap(x: Any) -> float:
    x = positive_number("softcap", x)
    if x > LARGEST_SOFTCAP:
        raise ValueError(
            f"softcap must be at most {LARGEST_SOFTCAP}, got {x}; None is no cap"
        )
    return x


def static_int(name: str, x: Any) -> int:
    x = _static(name, x)
    if not is_integer(x):
        raise ValueError(f"{name} must be an int, got {x!r}")
    return int(x)


def is_integer(x: Any) -> bool:
    """Whether x is an integer of Python or NumPy, which has times among them."""
    other = isinstance(x, bool | np.timedelta64)
    return isinstance(x, int | np.integer) and not other


def _bound(name: str, x: Any) -> int | None:
    """A bound of lengths, None = no bound."""
    if x is None:
        return None
    x = static_int(name, x)
    if x < 0:
        raise ValueError(f"{name} must not be negative, got {x}")
    return min(int(x), np.iinfo(np.int32).max)  # which no length exceeds


def check_dropout_rate(x: Any) -> float:
    """The rate as a float of [0, 1)."""
    rate = number("dropout_rate", x)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}")
    return rate


def flag(name: str, x: Any) -> bool:
    x = _static(name, x)
    if not isinstance(x, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {x!r}")
    return bool(x)


def check_window(name: str, window: Any) -> tuple[int | None, int | None] | None:
    """A window as `(left, right)` of non-negative ints or None, or None."""
    if window is None:
        return None
    _static(name, window)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(
            f"{name} must be None or (left, right), each an int or None, got {window!r}"
        )
    sides = []
    for side in window:
        _static(name, side)
        if side is None:
            sides.append(None)
            continue
        if not is_integer(side):
            raise ValueError(f"{name} must hold ints or None, got {window!r}")
        if side < 0:
            raise ValueError(
                f"{name} must not be negative (None = unbounded), got {window!r}"
            )
        sides.append(int(side) if side < LARGEST_WINDOW else None)
    return (sides[0], sides[1])


def _check_options(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    scale = options["scale"]
    width = given["query"].shape[-1]
    scale = width**-0.5 if scale is None else number("scale", scale)
    softcap = options["softcap"]
    if softcap is not None:
        softcap = check_softcap(softcap)
    alignment = _static("causal_alignment", options["causal_alignment"])
    if not isinstance(alignment, str) or alignment not in ALIGNMENTS:
        raise ValueError(
            f"causal_alignment must be one of {ALIGNMENTS}, got {alignment!r}"
        )
    precision = _static("precision", options["precision"])
    if not isinstance(precision, str | None) or precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    rate = check_dropout_rate(options.pop("dropout_rate"))
    dropout_key = options.pop("dropout_key")
    if dropout_key is not None:
        check_key("dropout_key", dropout_key)
    elif rate > 0:
        raise ValueError(
            f"dropout_key must be given with dropout_rate={rate}, got None"
        )
    return {
        "scale": scale,
        "is_causal": flag("is_causal", options["is_causal"]),
        "causal_alignment": alignment,
        "window_size": check_window("window_size", options["window_size"]),
        "softcap": softcap,
        "dropout_rate": rate,
        **{
            name: _bound(name, options.get(name))
            for name in ("max_seqlen_q", "max_seqlen_k")
        },
        "deterministic": flag("deterministic", options["deterministic"]),
        "precision": precision,
        "return_lse": flag("return_lse", options["return_lse"]),
    }
