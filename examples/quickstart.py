"""`jax_flash.mha` in a few lines: jit, grad, vmap, and who runs it.

python examples/quickstart.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jax_flash

# [batch, tokens, heads, width]; 8 query heads share 2 key/value heads.
keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (2, 256, 8, 64), jnp.bfloat16)
key = jax.random.normal(keys[1], (2, 256, 2, 64), jnp.bfloat16)
value = jax.random.normal(keys[2], (2, 256, 2, 64), jnp.bfloat16)


@jax.jit
def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention, each query seeing at most the 128 latest keys."""
    return jax_flash.mha(query, key, value, is_causal=True, window_size=(127, 0))


@jax.jit
@jax.grad
def gradient(query: jax.Array) -> jax.Array:
    """Gradient of a scalar of the output."""
    return jnp.sum(attend(query, key, value).astype(jnp.float32) ** 2)


print("output  ", attend(query, key, value).shape)
print("gradient", gradient(query).shape)

# Four sets of queries over one copy of the keys and values: nothing is repeated.
many = jnp.stack([query, -query, 2 * query, query + 1])
print("vmap    ", jax.vmap(attend, in_axes=(0, None, None))(many, key, value).shape)

# Sequences of different lengths: rows past the end are 0.
lengths = jnp.array([256, 100], jnp.int32)
padded = jax_flash.mha(
    query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths
)
print("past the end:", float(jnp.abs(padded[1, 100:]).max()))

print(jax_flash.explain(query, key, value, is_causal=True))
