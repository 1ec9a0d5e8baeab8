"""Attention on GPUs in JAX: one function under every transformation."""

import importlib
from typing import Any

from jax_flash import backends
from jax_flash._src import registry
from jax_flash._src.alibi import alibi
from jax_flash.attention import dot_product_attention, mha, mha_qkvpacked, mha_varlen
from jax_flash.backends import explain
from jax_flash.cache import KVCache, OutOfPagesError, PageAllocator, PagedKVCache
from jax_flash.decode import append_kv, decode_mha, merge_partials
from jax_flash.normalization import rms_norm, silu_mul, split_qkv
from jax_flash.parallel import ring_mha, ulysses_mha
from jax_flash.rotary import rope, rope_append_kv, rope_append_qkvpacked
from jax_flash.sampling import sample, top_k

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "__version__",
    "alibi",
    "append_kv",
    "backends",
    "decode_mha",
    "dot_product_attention",
    "explain",
    "merge_partials",
    "mha",
    "mha_qkvpacked",
    "mha_varlen",
    "ring_mha",
    "rms_norm",
    "rope",
    "rope_append_kv",
    "rope_append_qkvpacked",
    "sample",
    "silu_mul",
    "split_qkv",
    "top_k",
    "ulysses_mha",
]

# Registers the FFI targets, so that exported programs can be loaded.
registry.extension()


def __getattr__(name: str) -> Any:
    """`jax_flash.nnx` and `jax_flash.linen` without importing flax before use."""
    if name in ("nnx", "linen"):
        return importlib.import_module(f"jax_flash.{name}")
    raise AttributeError(f"module 'jax_flash' has no attribute {name!r}")
