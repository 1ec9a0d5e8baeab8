"""The transformable attention operation, with all its rules registered."""

import jax

from jax_flash._src import batching, compat, derivatives, primitives
from jax_flash._src.config import AttentionConfig

__all__ = ["RESIDUAL_NAMES", "flash_mha"]

RESIDUAL_NAMES = derivatives.RESIDUAL_NAMES

# Imported for the batching rules that it registers.
del batching


def flash_mha(
    config: AttentionConfig, operands: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Attention of canonical operands under every JAX transformation.

    Args:
      config: the call; `config.present` is set from `operands`.
      operands: canonical operands by name, in the order of `config.OPERANDS`.

    Returns:
      `(out, lse)`: [*B, T, N, Hv] in the query's dtype and [*B, N, T] in float32.
    """
    assert config.present == tuple(operands)
    out, lse = primitives.forward(
        config, *compat.vary_together(list(operands.values()))
    )
    return out, lse
