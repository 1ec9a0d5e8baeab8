"""What the two Flax adapters share: no Flax import here, no kernel knowledge either.

`jax_flash.nnx` and `jax_flash.linen` translate Flax's calling conventions; the options
of an adapter, the check that nothing Flax passed is lost, and rotary embedding live
here, so that the two cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._src import validate
from jax_flash.attention import mha


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options that Flax's attention modules have no argument for.

    Frozen and compared by value: two modules built alike have equal static parts, so
    a jitted step is not traced again.

    Attributes:
      scale: multiplies the logits, `head_dim ** -0.5` if None.
      is_causal: mask keys after the query, also when Flax asks for no mask. Adds
        nothing to a step with Flax's cache, whose mask is causal by itself.
      causal_alignment: "top_left" is Flax's own rule (query i sees keys 0..i);
        "bottom_right" aligns the last query with the last key. They agree when the
        two lengths are equal.
      window_size: (left, right), both inclusive, None = unbounded. Not for steps with
        Flax's cache, which does not say where the query stands.
      implementation: a name, a tuple of names in order of preference, or None.
    """

    scale: float | None = None
    is_causal: bool = False
    causal_alignment: str = "top_left"
    window_size: tuple[int | None, int | None] | None = None
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Makes tuples of lists, which have no hash."""
        for name in ("window_size", "implementation"):
            given = getattr(self, name)
            if isinstance(given, list):
                object.__setattr__(self, name, tuple(given))


def mha_precision(precision: Any) -> str | None:
    """What `mha` calls a precision of `jax.lax.PrecisionLike`.

    Args:
      precision: None, a `jax.lax.Precision` or its name, or a pair of two equal ones.

    Returns:
      "highest", or None, which is at least as precise as DEFAULT and HIGH.

    Raises:
      NotImplementedError: a pair of different ones, or a dot algorithm.
    """
    parts = precision if isinstance(precision, tuple) else (precision,)
    try:
        named = {jax.lax.Precision(part) for part in parts if part is not None}
    except ValueError:
        named = None
    if named == {jax.lax.Precision.HIGHEST} and None not in parts:
        return "highest"
    if named is not None and jax.lax.Precision.HIGHEST not in named:
        return None
    raise NotImplementedError(
        f"attention_fn does not support precision={precision!r}; it takes None or a"
        " jax.lax.Precision"
    )


def attend(
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    is_causal: bool,
    broadcast_dropout: bool,
    dropout_rng: jax.Array | None,
    dropout_rate: float,
    deterministic: bool,
    precision: Any,
    unsupported: dict[str, Any],
) -> jax.Array:
    """Calls `mha` for an adapter.

    Args:
      options: what the adapter was built with.
      query: [*B, T, N, H].
      key: [*B, S, K, H].
      value: [*B, S, K, Hv].
      bias: broadcastable to [*B, N, T, S], or None.
      mask: broadcastable to [*B, N, T, S] (nonzero = attend), or None. Flax's mask
        helpers return float arrays, so any dtype is taken.
      is_causal: Flax's request; joined with `options.is_causal`.
      broadcast_dropout: must be False where dropout is active.
      dropout_rng: its key.
      dropout_rate: Flax's attention dropout; only active when not `deterministic`.
      deterministic: Flax's flag.
      precision: see `mha_precision`.
      unsupported: arguments this adapter cannot honour; each must be None.

    Returns:
      [*B, T, N, Hv] in the dtype of `query`.

    Raises:
      NotImplementedError: an argument asks for something that is not built; the
        message names it and shows its value.
      ValueError: `dropout_rng` is missing, or what `mha` says.
    """
    for name, argument in unsupported.items():
        if name == "module" and argument is not None:
            raise NotImplementedError(
                "attention_fn does not support sow_weights=True (module="
                f"{type(argument).__name__}): the weights never exist in memory"
            )
        if argument is not None:
            raise NotImplementedError(
                f"attention_fn does not support {name}={argument!r}"
            )
    is_causal = validate.flag("is_causal", is_causal)
    wants_causal = validate.flag("is_causal", options.is_causal)
    dropout_rate = validate.check_dropout_rate(dropout_rate)
    drops = dropout_rate > 0.0 and not deterministic
    if drops and broadcast_dropout:
        raise NotImplementedError(
            f"attention_fn does not support broadcast_dropout={broadcast_dropout} with"
            f" dropout_rate={dropout_rate}: every batch entry and head drops its own;"
            " build the module with broadcast_dropout=False"
        )
    if drops and dropout_rng is None:
        raise ValueError(
            f"dropout_rng must be given with dropout_rate={dropout_rate}, got None"
        )
    # With `decode=True` Flax asks for one query and all keys of its cache.
    with_cache = query.shape[-3] == 1 != key.shape[-3] and mask is not None
    if with_cache and options.window_size is not None:
        raise NotImplementedError(
            f"attention_fn does not support window_size={options.window_size} for one"
            f" query on {key.shape[-3]} keys with a mask, a step with Flax's cache: it"
            " does not say where the query stands"
        )
    return mha(
        query,
        key,
        value,
        bias=bias,
        mask=None if mask is None else _mask(mask),
        scale=options.scale,
        is_causal=is_causal or (wants_causal and not with_cache),
        causal_alignment=options.causal_alignment,
        window_size=options.window_size,
        dropout_rate=dropout_rate if drops else 0.0,
        dropout_key=dropout_rng if drops else None,
        precision=mha_precision(precision),
        implementation=options.implementation,
    )


def _mask(mask: Any) -> jax.Array:
    """A mask of Flax, whose helpers return float arrays, as bool."""
    dtype = validate.shape_of("mask", mask).dtype
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise ValueError(
            f"mask must be bool or numbers (nonzero = attend), got dtype {dtype}"
        )
    return mask.astype(bool)


def _positions(positions: Any) -> jax.Array:
    """Rotary positions as an array of integers."""
    got = f"{type(positions).__name__}: {reprlib.repr(positions)}"
    try:
        array = jnp.asarray(positions)
    except OverflowError as error:
        raise ValueError(f"positions must fit int32, got {got}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"positions must be integers, got {got}") from error
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"positions must be integers, got dtype {array.dtype}")
    if isinstance(positions, np.ndarray | np.generic) and positions.size:
        # JAX would keep the last bits of others.
        limits = jnp.iinfo(array.dtype)
        for extreme in (positions.min(), positions.max()):
            if not limits.min <= int(extreme) <= limits.max:
                raise ValueError(f"positions must fit {array.dtype}, got {extreme}")
    return array


def apply_rotary(
    x: jax.Array, positions: jax.Array | None = None, *, theta: float = 10000.0
) -> jax.Array:
    """Rotary position embedding, half-split convention (as Llama and GPT-NeoX).

    Element i of the first half of the width is rotated with element i of the second
    half by the angle `position * theta ** (-2 i / H)`.

    Args:
      x: [*B, T, N, H] queries or keys, H even.
      positions: integer [*B, T] or any shape that broadcasts to it; 0..T-1 if None.
      theta: base of the geometric series of wavelengths.

    Returns:
      Array of the shape and dtype of `x`; the rotation is done in float32.

    Raises:
      ValueError: `x` is no such array, H is odd, theta is not positive, or `positions`
        are not integers or do not broadcast to [*B, T].
    """
    shape = validate.shape_of("x", x)
    if len(shape.shape) < 3 or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating [*B,T,N,H], got shape {shape.shape} of {shape.dtype}"
        )
    *batch_and_length, _, width = shape.shape
    if width % 2:
        raise ValueError(f"apply_rotary needs an even head width, got {width}")
    theta = validate.positive_number("theta", theta)
    if positions is None:
        positions = jnp.arange(batch_and_length[-1])
    positions = _positions(positions)
    try:
        positions = jnp.broadcast_to(positions, batch_and_length)
    except ValueError as error:
        raise ValueError(
            f"positions has shape {positions.shape}, which does not broadcast to"
            f" {tuple(batch_and_length)}"
        ) from error
    exponents = jnp.arange(width // 2, dtype=jnp.float32) * (-2.0 / width)
    angles = positions[..., None, None].astype(jnp.float32) * theta**exponents
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless the query heads can share the key/value heads."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}"
        )


def attend_grouped(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    positions: jax.Array | None,
    seq_lengths: jax.Array | None,
    rope_theta: float | None,
    is_causal: bool,
    window_size: tuple[int | None, int | None] | None,
    implementation: str | tuple[str, ...] | None,
) -> jax.Array:
    """What `GroupedQueryAttention` does between its projections.

    Args:
      query: [*B, T, N, H].
      key: [*B, T, K, H].
      value: [*B, T, K, H].
      positions: see `apply_rotary`; None without `rope_theta`.
      seq_lengths: int32 [*B], rows beyond neither attend nor are attended, or None.
      rope_theta: base of the rotary embedding, None = no rotary embedding.
      is_causal: as for `mha`.
      window_size: as for `mha`.
      implementation: as for `mha`.

    Returns:
      [*B, T, N, H] in the dtype of `query`.

    Raises:
      ValueError: `positions` without `rope_theta` or that are no integers, or shapes
        that do not fit.
    """
    if positions is not None:
        positions = _positions(positions)
    if rope_theta is not None:
        query = apply_rotary(query, positions, theta=rope_theta)
        key = apply_rotary(key, positions, theta=rope_theta)
    elif positions is not None:
        raise ValueError(
            f"positions (shape {positions.shape}) are for rotary embedding, but"
            f" rope_theta={rope_theta}"
        )
    return mha(
        query,
        key,
        value,
        is_causal=is_causal,
        window_size=window_size,
        query_seq_lengths=seq_lengths,
        key_value_seq_lengths=seq_lengths,
        implementation=implementation,
    )
