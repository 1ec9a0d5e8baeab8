"""Queries, keys and values side by side in one array, as `mha_qkvpacked` takes them.

Such a call is one of attention whose config has `qkv_heads`, N and K, and whose operand
"qkv" [*B, T, (N + 2 K) H] stands for query, key and value: first the heads of queries,
then of keys, then of values. The kernels read it in place; everything else works on
the three parts.

Lives here: the parts of the array, and the functions that run a call on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash._src.config import OPERANDS, QKV, AttentionConfig, Backward

PARTS = OPERANDS[:3]

Names = tuple[str, ...]


def packed(config: AttentionConfig, heads: tuple[int, int]) -> AttentionConfig:
    """The config of a row-major call whose three tensors are one array."""
    order = tuple(range(len(config.orders[0]) - 1))
    present = (QKV, *config.present[3:])
    return dataclasses.replace(
        config, present=present, orders=(order,), qkv_heads=heads
    )


def unpacked(config: AttentionConfig) -> AttentionConfig:
    """The config of the same call with its three parts, which are row-major."""
    order = tuple(range(len(config.orders[0]) + 1))
    present = (*PARTS, *config.present[1:])
    return dataclasses.replace(
        config, present=present, orders=(order,) * 3, qkv_heads=None
    )


def split(heads: tuple[int, int], qkv: jax.Array) -> list[jax.Array]:
    """Query [*B, T, N, H], key and value [*B, T, K, H]."""
    count = heads[0] + 2 * heads[1]
    by_head = qkv.reshape(*qkv.shape[:-1], count, qkv.shape[-1] // count)
    return jnp.split(by_head, [heads[0], sum(heads)], axis=-2)


def join(parts: Sequence[jax.Array]) -> jax.Array:
    """The array of three parts, the inverse of `split`."""
    whole = jnp.concatenate(parts, axis=-2)
    *lead, heads, width = whole.shape
    return whole.reshape(*lead, heads * width)


def shapes(heads: tuple[int, int], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of the parts, from that of the array."""
    width = shape[-1] // (heads[0] + 2 * heads[1])
    return [(*shape[:-1], n, width) for n in (heads[0], heads[1], heads[1])]


def split_named(
    heads: tuple[int, int], operands: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Operands by name, with the parts in place of the array."""
    rest = {name: x for name, x in operands.items() if name != QKV}
    return dict(zip(PARTS, split(heads, operands[QKV]), strict=True)) | rest


def unpacked_backward(backward: Backward) -> Backward:
    """The same gradients, those of the parts in place of that of the array."""
    named = list(zip(backward.perturbed, backward.shared, strict=True))
    expanded = [(n, s) for name, s in named for n in _expanded(name)]
    names, shared = zip(*expanded, strict=True) if expanded else ((), ())
    return Backward(names, shared, backward.has_dlse)


def join_gradients(backward: Backward, gradients: Sequence[jax.Array]) -> list:
    """The gradients of `backward` from those of `unpacked_backward(backward)`."""
    left = list(gradients)
    result = []
    for name in backward.perturbed:
        own = [left.pop(0) for _ in _expanded(name)]
        result.append(join(own) if name == QKV else own[0])
    return result


def _expanded(name: str) -> Names:
    return PARTS if name == QKV else (name,)


def splits_forward(run: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `run(*operands, config=)`, a forward of the parts, take "qkv" as well."""

    @functools.wraps(run)
    def wrapped(*args: Any, config: AttentionConfig) -> Any:
        if config.qkv_heads is None:
            return run(*args, config=config)
        parts = split(config.qkv_heads, args[0])
        return run(*parts, *args[1:], config=unpacked(config))

    return wrapped


def splits_tangent(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a tangent; of the tangents that follow each is split, too."""

    @functools.wraps(run)
    def wrapped(*args: Any, config: AttentionConfig, perturbed: Names) -> Any:
        if config.qkv_heads is None:
            return run(*args, config=config, perturbed=perturbed)
        count = len(args) - len(perturbed)
        tangents: list[Any] = []
        for name, x in zip(perturbed, args[count:], strict=True):
            tangents += split(config.qkv_heads, x) if name == QKV else [x]
        names = tuple(n for name in perturbed for n in _expanded(name))
        parts = split(config.qkv_heads, args[0])
        given = (*parts, *args[1:count], *tangents)
        return run(*given, config=unpacked(config), perturbed=names)

    return wrapped


def splits_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a backward, whose gradients are joined."""

    @functools.wraps(run)
    def wrapped(
        *args: Any, config: AttentionConfig, backward: Backward
    ) -> list[jax.Array]:
        if config.qkv_heads is None:
            return run(*args, config=config, backward=backward)
        parts = split(config.qkv_heads, args[0])
        which = unpacked_backward(backward)
        given = (*parts, *args[1:])
        gradients = run(*given, config=unpacked(config), backward=which)
        return join_gradients(backward, gradients)

    return wrapped
