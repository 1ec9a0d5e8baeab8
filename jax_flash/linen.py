"""Flax Linen adapters: `attention_fn`, `AttentionFn`, `GroupedQueryAttention`.

    nn.MultiHeadDotProductAttention(8, attention_fn=jax_flash.linen.attention_fn)

Import this module by name; `import jax_flash` never imports Flax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import linen as nn
    from flax.linen import dtypes
except ImportError as error:
    raise ImportError(
        "jax_flash.linen needs Flax, which is not installed:"
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
default_kernel_init: Initializer = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionFn(AttentionOptions):
    """An `attention_fn` for `flax.linen.MultiHeadDotProductAttention`.

    `attention_fn` is `AttentionFn()`. Linen describes a causal mask by an array only;
    `AttentionFn(is_causal=True)` asks for it without one, so that keys after the query
    are never loaded, and `AttentionFn(window_size=(1023, 0))` gives a sliding window.
    Linen drops what a function's signature lacks, so the signature below holds
    everything it passes; each argument is honoured or raises `NotImplementedError`.

    Differences from Linen's default: logits and softmax are always computed in float32,
    the output has the promoted dtype, and a row whose keys are all masked is 0 (Linen
    averages the values).
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
        module: nn.Module | None = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., jax.Array] | None = None,
        qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
        attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
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
          module: Linen's `sow_weights`; must be None, as the weights never exist.
          force_fp32_for_softmax: either value: the softmax is in float32 always.
          einsum_dot_general: must be None; there is no einsum to replace.
          qk_attn_weights_einsum: as `einsum_dot_general`.
          attn_weights_value_einsum: as `einsum_dot_general`.

        Returns:
          [*B, T, N, Hv] in the promoted dtype.

        Raises:
          NotImplementedError: an argument asks for something that is not built.
          ValueError: shapes or dtypes do not fit (see `jax_flash.mha`).
        """
        del force_fp32_for_softmax
        query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
        return attend(
            self,
            query,
            key,
            value,
            bias,
            mask,
            is_causal=False,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            precision=precision,
            unsupported={
                "module": module,
                "einsum_dot_general": einsum_dot_general,
                "qk_attn_weights_einsum": qk_attn_weights_einsum,
                "attn_weights_value_einsum": attn_weights_value_einsum,
            },
        )


attention_fn = AttentionFn()


class GroupedQueryAttention(nn.Module):
    """Self-attention with shared key/value heads, through `jax_flash.mha`.

    Parameters `query`, `key`, `value` have kernels [in_features, heads, head_dim],
    `out` has [num_heads, head_dim, out_features]: the head axis is its own, so tensor
    parallelism is a partition of it, given with `nn.with_partitioning` around
    `kernel_init` and `out_kernel_init`.

    Attributes:
      num_heads: query heads, a multiple of `num_kv_heads`.
      num_kv_heads: key/value heads; query head n reads n // (num_heads / num_kv_heads).
      head_dim: width of a head; must be even if `rope_theta` is given.
      out_features: width of the output, that of the input if None.
      is_causal: mask keys after the query.
      window_size: (left, right), both inclusive, None = unbounded.
      rope_theta: base of the rotary embedding; no rotary embedding if None.
      use_bias: add a bias in the projections.
      dtype: computation dtype; inferred from inputs and parameters if None.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the query, key and value kernels.
      out_kernel_init: initializer of the output kernel, `kernel_init` if None.
      implementation: as `jax_flash.mha`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    out_features: int | None = None
    is_causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    rope_theta: float | None = None
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    implementation: str | tuple[str, ...] | None = None

    @nn.compact
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
          ValueError: `num_heads` is no multiple of `num_kv_heads`, `positions` without
            `rope_theta`, or shapes that do not fit.
        """
        check_heads(self.num_heads, self.num_kv_heads)

        def project(name: str, heads: int) -> jax.Array:
            return nn.DenseGeneral(
                (heads, self.head_dim),
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                name=name,
            )(inputs)

        query = project("query", self.num_heads)
        key = project("key", self.num_kv_heads)
        value = project("value", self.num_kv_heads)
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
        return nn.DenseGeneral(
            inputs.shape[-1] if self.out_features is None else self.out_features,
            axis=(-2, -1),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.out_kernel_init or self.kernel_init,
            name="out",
        )(attended)
