"""Flax NNX adapters: `attention_fn`, `AttentionFn`, `GroupedQueryAttention`.

    layer = nnx.MultiHeadAttention(8, 512, attention_fn=jax_flash.nnx.attention_fn, ...)

Import this module by name; `import jax_flash` never imports Flax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
    from flax.nnx.nn import dtypes
except ImportError as error:
    raise ImportError(
        "jax_flash.nnx needs Flax, which is not installed:"
        " pip install 'jax_flash[flax]'"
    ) from error

from jax_flash._src.flax_adapter import (
    AttentionOptions,
    apply_rotary,
    attend,
    attend_grouped,
    check_heads,
)

__all__ = ["AttentionFn", "GroupedQueryAttention", "apply_rotary", "attention_fn"]

Initializer = Callable[..., jax.Array]
default_kernel_init: Initializer = nnx.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionFn(AttentionOptions):
    """An `attention_fn` for `flax.nnx.MultiHeadAttention` with options of its own.

    `attention_fn` is `AttentionFn()`. `AttentionFn(window_size=(1023, 0))` gives a
    sliding window, which Flax has no argument for. Arguments are those Flax passes;
    each is honoured or raises `NotImplementedError`.

    Differences from Flax's default: logits and softmax are always computed in float32,
    and a row whose keys are all masked is 0 (Flax averages the values).
    """

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: nnx.Module | None = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        is_causal: bool = False,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Attention of `query` over `key` and `value`.

        Args:
          query: [*B, T, N, H].
          key: [*B, S, K, H], N % K == 0.
          value: [*B, S, K, Hv].
          bias: broadcastable to [*B, N, T, S], added to the logits.
          mask: broadcastable to [*B, N, T, S], nonzero = attend.
          broadcast_dropout: must be False where dropout is active: what is dropped
            differs between batch entries and heads.
          dropout_rng: key of the dropout.
          dropout_rate: as for `mha`; active unless `deterministic`. Not the draw of
            Flax, but the same distribution, rounded to multiples of 1/256.
          deterministic: no dropout.
          dtype: computation and output dtype; inferred from the inputs if None.
          precision: None or a `jax.lax.Precision`; DEFAULT and HIGH are exceeded.
          module: Flax's `sow_weights`; must be None, as the weights never exist.
          promote_dtype: `(query, key, value), dtype -> (query, key, value)`.
          is_causal: mask keys after the query.
          input_positions: must be None; rotary embedding is in `apply_rotary` and
            `GroupedQueryAttention`.

        Returns:
          [*B, T, N, Hv] in the promoted dtype.

        Raises:
          NotImplementedError: an argument asks for something that is not built.
          ValueError: shapes or dtypes do not fit (see `jax_flash.mha`).
        """
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        return attend(
            self,
            query,
            key,
            value,
            bias,
            mask,
            is_causal=is_causal,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            precision=precision,
            unsupported={"module": module, "input_positions": input_positions},
        )


attention_fn = AttentionFn()


class GroupedQueryAttention(nnx.Module):
    """Self-attention with shared key/value heads, through `jax_flash.mha`.

    `query`, `key` and `value` are `nnx.LinearGeneral` with kernels
    [in_features, heads, head_dim]; `out` has [num_heads, head_dim, out_features]: the
    head axis is its own, so tensor parallelism is a partition of it, given with
    `nnx.with_partitioning` around `kernel_init` and `out_kernel_init`. Flax wants such
    a module to be made inside `with jax.set_mesh(mesh):`.

    Args:
      in_features: width of the input.
      num_heads: query heads, a multiple of `num_kv_heads`.
      num_kv_heads: key/value heads; query head n reads n // (num_heads / num_kv_heads).
      head_dim: width of a head; must be even if `rope_theta` is given.
      out_features: width of the output, `in_features` if None.
      is_causal: mask keys after the query.
      window_size: (left, right), both inclusive, None = unbounded.
      rope_theta: base of the rotary embedding; no rotary embedding if None.
      use_bias: add a bias in the projections.
      dtype: computation dtype; inferred from inputs and parameters if None.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the query, key and value kernels.
      out_kernel_init: initializer of the output kernel, `kernel_init` if None.
      implementation: as `jax_flash.mha`.
      rngs: NNX random streams.

    Raises:
      ValueError: `num_heads` is no multiple of `num_kv_heads`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        out_features: int | None = None,
        is_causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None,
        rope_theta: float | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        implementation: str | tuple[str, ...] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_heads(num_heads, num_kv_heads)
        self.is_causal = is_causal
        self.window_size = window_size
        self.rope_theta = rope_theta
        self.implementation = implementation

        def project(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                in_features,
                (heads, head_dim),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.query = project(num_heads)
        self.key = project(num_kv_heads)
        self.value = project(num_kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features if out_features is None else out_features,
            axis=(-2, -1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=out_kernel_init or kernel_init,
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: jax.Array,
        *,
        positions: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
    ) -> jax.Array:
        """Attends within each sequence.

        Args:
          inputs: [*B, T, in_features].
          positions: integer, broadcastable to [*B, T]: rotary positions, 0..T-1 if
            None. They rotate only; masks count rows.
          seq_lengths: int32 [*B], rows beyond neither attend nor are attended.

        Returns:
          [*B, T, out_features]; before the output projection, rows beyond
          `seq_lengths` are 0.

        Raises:
          ValueError: `positions` without `rope_theta`, or shapes that do not fit.
        """
        query, key, value = self.query(inputs), self.key(inputs), self.value(inputs)
        attended = attend_grouped(
            query,
            key,
            value,
            positions=positions,
            seq_lengths=seq_lengths,
            rope_theta=self.rope_theta,
            is_causal=self.is_causal,
            window_size=self.window_size,
            implementation=self.implementation,
        )
        return self.out(attended)
