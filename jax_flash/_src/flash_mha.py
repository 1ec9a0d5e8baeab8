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
      config: the call.
      operands: canonical operands, those named in `config.present`.

    Returns:
      `(out, lse)`: [*B, T, N, Hv] in the query's dtype and [*B, N, T] in float32.
    """
    ordered = [operands[name] for name in config.present]
    out, lse = primitives.forward(config, *compat.vary_together(ordered))
    return out, lse
