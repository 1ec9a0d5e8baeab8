"""CPU stand-ins for the kernels, to see what XLA makes of all around their calls.

XLA assigns layouts in the same way on every platform, so a program compiled for the CPU
with the kernel's custom call in it shows whether query, key and value reach the kernel
without a transpose or copy. That stand-in computes nothing; it is compiled, not run.

`emulated` runs: in place of a call it puts jnp operations, which know no more than
operands, results and attributes of the call.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jax_flash._src import (
    decode_call,
    decode_reference,
    dropout,
    inner,
    intervals,
    reference,
    reference_grad,
    registry,
    rope_inner,
    rope_reference,
)
from jax_flash._src.config import OPERANDS, AttentionConfig, Backward

LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")

METADATA_EXTENSION = 1
OLDEST_MINOR_VERSION = 3


class _Extension(ctypes.Structure):
    pass


class _ApiVersion(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("api_version", _ApiVersion))


_Extension._fields_ = (
    ("struct_size", ctypes.c_size_t),
    ("type", ctypes.c_int),
    ("next", ctypes.c_void_p),
    ("metadata", ctypes.POINTER(_Metadata)),
)


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.POINTER(_Extension)),
    )


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _handler(frame: "ctypes._Pointer[_CallFrame]") -> None:
    """Answers XLA, which asks for the handler's version on registering."""
    extension = frame.contents.extension_start
    if extension and extension.contents.type == METADATA_EXTENSION:
        version = extension.contents.metadata.contents.api_version
        version.major, version.minor = 0, OLDEST_MINOR_VERSION


@functools.cache
def _register() -> None:
    capsule = jax.ffi.pycapsule(_handler)
    for target in (
        registry.FORWARD_TARGET,
        registry.BACKWARD_TARGET,
        registry.INTERVALS_TARGET,
        registry.DECODE_TARGET,
        registry.ROPE_APPEND_TARGET,
    ):
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")


@contextlib.contextmanager
def _lowered_as_on_cuda() -> Iterator[None]:
    jax.clear_caches()
    mlir.register_lowering(inner.forward_i, inner._forward_cuda, platform="cpu")
    mlir.register_lowering(inner.backward_i, inner._backward_cuda, platform="cpu")
    rope_append_i = rope_inner.rope_append_i
    mlir.register_lowering(rope_append_i, rope_inner._cuda, platform="cpu")
    try:
        with registry.assume_kernels():
            yield
    finally:
        mlir.register_lowering(inner.forward_i, inner._forward_default, platform="cpu")
        mlir.register_lowering(
            inner.backward_i, inner._backward_default, platform="cpu"
        )
        mlir.register_lowering(rope_append_i, rope_inner._in_jnp, platform="cpu")
        jax.clear_caches()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """The CPU lowers calls as CUDA does, to the stand-in."""
    _register()
    with _lowered_as_on_cuda():
        yield


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """The CPU lowers calls as CUDA does, to jnp operations for those of kernels."""
    with (
        _lowered_as_on_cuda(),
        mock.patch.object(jax.ffi, "ffi_call", _emulation),
        # tests/emulator_interval_arrays_test.py calls the kernel itself.
        mock.patch.object(intervals, "by_kernel", intervals.intervals),
    ):
        yield


@contextlib.contextmanager
def emulated_backward() -> Iterator[None]:
    """The same for the backward alone."""
    with emulated():
        mlir.register_lowering(inner.forward_i, inner._forward_default, platform="cpu")
        yield


def _emulation(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    input_layouts: Any = None,
    input_output_aliases: dict[int, int] | None = None,
) -> Callable:
    """`jax.ffi.ffi_call` for every target that `_register` knows but one."""
    if target == registry.DECODE_TARGET:
        return functools.partial(_decoded, results)
    if target == registry.ROPE_APPEND_TARGET:
        assert input_output_aliases == {1: 1, 2: 2}
        return functools.partial(_rope_appended, results)

    def run(*operands: jax.Array, **attributes: Any) -> list[jax.Array]:
        assert [len(layout) for layout in input_layouts] == [x.ndim for x in operands]
        wide = [
            x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for x in operands
        ]
        heads, kv_heads = (
            int(attributes[name]) for name in ("packed_heads", "packed_kv_heads")
        )
        if heads:
            wide[:3] = _unpacked(wide[:3], heads, kv_heads)
        has_dlse = attributes.get("has_dlse", False)
        cotangents = ("dout", "dlse") if has_dlse else ("dout",)
        backward = target == registry.BACKWARD_TARGET
        assert backward or target == registry.FORWARD_TARGET
        residuals = ("out", "lse", *cotangents) if backward else ()
        names = (*OPERANDS[:3], *residuals, *_mask_operands(attributes))
        given = dict(zip(names, wide, strict=True))
        distance = jnp.zeros(())
        if attributes["has_intervals"]:
            given, distance = _dense(given)
        if attributes.get("has_dslopes"):
            assert attributes["has_slopes"]
            *lead, _, heads, _ = given["out"].shape
            shape = (*lead, heads, *distance.shape[-2:])
            given["bias"] = jnp.broadcast_to(given["bias"], shape)
        elif attributes.get("has_dbias"):  # of heads and rows in full, or as the bias
            shape = given["bias"].shape[:-3] + results[4].shape[-3:]
            given["bias"] = jnp.broadcast_to(given["bias"], shape)
        config = AttentionConfig(
            scale=float(attributes["scale"]),
            window_left=int(attributes["window_left"]),
            window_right=int(attributes["window_right"]),
            bottom_right=attributes["bottom_right"],
            softcap=float(attributes["softcap"]) or None,
            dropout_rate=float(attributes["dropout"]) / dropout.LEVELS,
            present=tuple(name for name in OPERANDS if name in given),
        )
        args = [given[name] for name in (*config.present, *residuals)]
        if backward:
            batch = results[0].shape[:-3]
            for name in residuals:
                assert given[name].shape[: len(batch)] == batch, name
            added = attributes["has_dbias"] or attributes["has_dslopes"]
            perturbed = OPERANDS[:3] + (("bias",) if added else ())
            which = Backward(perturbed, ((),) * len(perturbed), has_dlse)
            computed = reference_grad.backward(*args, config=config, backward=which)
            if added:
                *computed, of_bias = computed
                if config.softcap is not None:  # whose derivative is left out
                    computed = [jnp.full(x.shape, jnp.nan) for x in computed]
            # The workspace, of which nobody reads what is in it.
            computed.append(jnp.full(results[3].shape, jnp.nan, results[3].dtype))
            if attributes["has_dbias"]:
                sizes = zip(of_bias.shape, results[4].shape, strict=True)
                axes = tuple(i for i, (n, m) in enumerate(sizes) if n != m)
                assert not (axes and attributes["deterministic"])
                computed.append(of_bias.sum(axes, keepdims=True))
            if attributes["has_dslopes"]:
                by_key = (of_bias * distance).sum(-2, keepdims=True)
                padding = [(0, 0)] * (by_key.ndim - 2) + [(0, 3), (0, 0)]
                computed.append(jnp.pad(by_key, padding))
        else:
            computed = reference.forward(*args, config=config)
            if attributes["has_intervals"]:  # the queue, of which the same holds
                computed = [*computed, jnp.full(results[2].shape, -1, jnp.int32)]
        return [x.astype(r.dtype) for x, r in zip(computed, results, strict=True)]

    return run


def _decoded(
    results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array, **attributes: Any
) -> list[jax.Array]:
    """What the decode kernel computes; caches are not quantised."""
    flags = {n: f"has_{n.removeprefix('alibi_')}" for n in decode_call.OPERANDS[4:]}
    optional = [name for name, flag in flags.items() if attributes[flag]]
    config = decode_call.DecodeConfig(
        scale=float(attributes["scale"]),
        window_left=int(attributes["window_left"]),
        softcap=float(attributes["softcap"]) or None,
        present=(*decode_call.OPERANDS[:4], *optional),
    )
    wide = [
        x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x in operands
    ]
    computed = decode_reference.decode(*wide, config=config)
    # Partial results, of which nobody reads what is in them.
    computed += [jnp.full(r.shape, jnp.nan, r.dtype) for r in results[2:]]
    return [x.astype(r.dtype) for x, r in zip(computed, results, strict=True)]


def _rope_appended(
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: jax.Array,
    interleaved: bool,
    is_packed: bool,
    has_page_table: bool,
) -> list[jax.Array]:
    """What the kernel of `rope_append_kv` computes."""
    config = rope_reference.RopeConfig(interleaved, has_page_table, is_packed)
    computed = rope_reference.rope_append(*operands, config=config)
    for x, result in zip(computed, results, strict=True):
        assert (x.shape, x.dtype) == (result.shape, result.dtype)
    return computed


def _mask_operands(attributes: dict[str, Any]) -> tuple[str, ...]:
    """Names of the operands after rows, keys and values."""
    if not attributes["has_intervals"]:
        for name in ("has_slopes", "has_mask", "has_bias"):
            assert not attributes[name], name
        assert attributes["softcap"] == attributes["dropout"] == 0
        has = attributes["has_query_lengths"], attributes["has_kv_lengths"]
        return tuple(n for n, given in zip(LENGTHS, has, strict=True) if given)
    for name in ("has_query_lengths", "has_kv_lengths"):
        assert not attributes[name], name
    assert (attributes["window_left"], attributes["window_right"]) == (-1, -1)
    slopes = ("slopes",) if attributes["has_slopes"] else ()
    seeds = ("dropout_seeds",) if attributes["dropout"] else ()
    names = ("rows", "row_tiles", "keys", "key_tiles", *slopes, *seeds)
    arrays = (("mask_bits", "has_mask"), ("bias", "has_bias"))
    return names + tuple(name for name, given in arrays if attributes[given])


def _unpacked(same: Sequence[jax.Array], heads: int, kv_heads: int) -> list[jax.Array]:
    """Query, key and value from what is given for each: [*B, T, (N + 2 K) H]."""
    *lead, width = same[0].shape
    assert [x.shape for x in same] == [(*lead, width)] * 3
    width //= heads + 2 * kv_heads
    ends = [heads * width, (heads + kv_heads) * width]
    cut = [jnp.split(x, ends, axis=-1)[i] for i, x in enumerate(same)]
    return [x.reshape(*lead, -1, width) for x in cut]


def _dense(given: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """Operands with a boolean mask, and a bias, instead of intervals and slopes.

    And distances of keys from those that rows are aligned with [*B, 1, T, S]. Ids are
    looked at only where a record says so, and what is dead is not looked at.
    """
    given = dict(given)
    rows, row_tiles, keys, _ = (
        given.pop(name) for name in ("rows", "row_tiles", "keys", "key_tiles")
    )
    row_count, key_count = (given[name].shape[-3] for name in ("query", "key"))
    mixed = jnp.repeat(row_tiles[..., 5] != 0, intervals.TILE, -1)[..., :row_count]
    first, end, row_id, position = (rows[..., :row_count, i, None] for i in range(4))
    key = jnp.arange(key_count, dtype=jnp.int32)
    keys = keys[..., None, :key_count]
    seen = (first <= key) & (key < end) & ((row_id == keys) | ~mixed[..., None])
    if "bias" in given:
        assert given["bias"].shape[-1] == -(-key_count // 8) * 8
        given["bias"] = given["bias"][..., :key_count]
    distance = jnp.abs(position - key)[..., None, :, :].astype(jnp.float32)
    if "slopes" in given:
        slopes = -given.pop("slopes")[..., None, None] * distance
        given["bias"] = given.get("bias", 0.0) + slopes
    seen = seen[..., None, :, :]
    if "mask_bits" in given:
        words = given.pop("mask_bits")[..., None]
        bits = words >> jnp.arange(32, dtype=jnp.uint32) & 1
        bits = bits.reshape(*bits.shape[:-2], -1)
        seen = seen & (bits[..., :key_count] == 1)
    live_rows = (row_id >= 0)[..., None]
    live_keys = (keys[..., 0, :] >= 0)[..., None, None]
    for name in ("query", "out", "dout"):
        if name in given:
            given[name] = jnp.where(live_rows, given[name], 0)
    for name in ("key", "value"):
        given[name] = jnp.where(live_keys, given[name], 0)
    return given | {"mask": seen}, distance
