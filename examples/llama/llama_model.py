"""A decoder of the Llama family in Flax NNX, on the operations of `jax_flash`.

Lives here: `Config`, the model, the caches of its layers, and what runs it: `prefill`
reads the beginnings of sequences, `step` up to 64 more tokens of each, `next_tokens` is
one of the two and `jax_flash.sample` in one jitted program. Weights come from
`llama_weights`, text becomes tokens in `llama_tokenizer`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_flash
from jax_flash import KVCache, PagedKVCache

MOST_NEW_TOKENS = 64
"""Of each sequence in one `step`: what `jax_flash.decode_mha` takes."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model.

    Attributes:
      vocabulary: tokens V.
      width: of the stream between the layers, C.
      layers: how many.
      heads: query heads N.
      kv_heads: key/value heads K; query head n reads n // (N / K).
      head_dim: H, even.
      hidden: width of the SwiGLU layer, F.
      rope_theta: base of the rotary embedding.
      rope_factors: [H / 2] by which its frequencies are divided, or None: models that
        were stretched to longer contexts have them.
      norm_eps: epsilon of RMSNorm.
      tied: whether the output projection is the embedding.
      context: tokens that the model was trained for.
      dtype: of weights, arithmetic and caches; logits are float32.
      implementation: of attention, as in `jax_flash.mha`.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    context: int = 2048
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        pairs = self.head_dim // 2
        if self.rope_factors is not None and len(self.rope_factors) != pairs:
            raise ValueError(
                f"rope_factors must be {pairs} numbers, one for each pair of"
                f" head_dim={self.head_dim}, got {len(self.rope_factors)}"
            )

    @property
    def frequencies(self) -> np.ndarray:
        """Radians a token by which each pair of a head turns, float32 [H / 2]."""
        powers = np.arange(0, self.head_dim, 2) / self.head_dim
        frequencies = self.rope_theta**-powers
        if self.rope_factors is not None:
            frequencies = frequencies / np.asarray(self.rope_factors)
        return frequencies.astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caches:
    """Keys and values of all layers, which share lengths and page table.

    `lengths` and `page_table` are the host's to change with `dataclasses.replace`,
    between two calls that donate the rest.

    Attributes:
      k: for each layer [B, S, K, H], or pages [pages, page, K, H].
      v: the same of values.
      lengths: int32 [B], tokens of each sequence; negative: switched off.
      page_table: int32 [B, max_pages] as in `PagedKVCache`, with -1 where a sequence
        has no page; or None: contiguous.
    """

    k: list[jax.Array]
    v: list[jax.Array]
    lengths: Any
    page_table: Any = None

    @classmethod
    def contiguous(cls, config: Config, batch: int, max_length: int) -> Self:
        """Empty caches with room for `max_length` tokens of each sequence."""
        return cls._of(
            [
                KVCache.create(
                    batch,
                    max_length,
                    config.kv_heads,
                    config.head_dim,
                    dtype=config.dtype,
                )
                for _ in range(config.layers)
            ]
        )

    @classmethod
    def paged(
        cls, config: Config, num_pages: int, page_size: int, batch: int, max_pages: int
    ) -> Self:
        """Pools of free pages and a page table of empty sequences."""
        return cls._of(
            [
                PagedKVCache.create(
                    num_pages,
                    page_size,
                    config.kv_heads,
                    config.head_dim,
                    batch=batch,
                    max_pages=max_pages,
                    dtype=config.dtype,
                )
                for _ in range(config.layers)
            ]
        )

    @classmethod
    def _of(cls, layers: list[KVCache] | list[PagedKVCache]) -> Self:
        return cls(
            [layer.k for layer in layers],
            [layer.v for layer in layers],
            layers[0].lengths,
            getattr(layers[0], "page_table", None),
        )

    def layer(self, index: int) -> KVCache | PagedKVCache:
        """The cache of one layer."""
        if self.page_table is None:
            return KVCache(self.k[index], self.v[index], self.lengths)
        return PagedKVCache(self.k[index], self.v[index], self.page_table, self.lengths)

    @property
    def room(self) -> int:
        """Tokens that a sequence can have."""
        if self.page_table is None:
            return self.k[0].shape[1]
        return self.page_table.shape[1] * self.k[0].shape[1]

    def copy_pages(self, source: Any, target: Any) -> Self:
        """`PagedKVCache.copy_pages` in every layer."""
        if self.page_table is None:
            raise ValueError("copy_pages needs paged caches, got contiguous ones")
        layers = [
            PagedKVCache(k, v, self.page_table, self.lengths).copy_pages(source, target)
            for k, v in zip(self.k, self.v, strict=True)
        ]
        return dataclasses.replace(
            self, k=[layer.k for layer in layers], v=[layer.v for layer in layers]
        )


SAMPLING_LIMITS = {
    "temperature": (0.0, math.inf),
    "top_k": (1, (1 << 31) - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
}
"""Least and most of the numbers in `Sampling`."""


def is_number(x: Any, whole: bool) -> bool:
    """Whether x is an integer (`whole`) or a number of any kind, and no bool."""
    kinds = (int, np.integer) if whole else (int, float, np.number)
    return isinstance(x, kinds) and not isinstance(x, bool)


def integer(name: str, x: Any) -> int:
    """X as an int; ValueError with the name where it is none."""
    if not is_number(x, whole=True):
        raise ValueError(f"{name} must be an integer, got {x!r}")
    return int(x)


def beyond_limits(numbers: Any) -> Iterator[tuple[str, str]]:
    """Names of numbers of `Sampling` that are out of their limits, and what is wrong.

    Args:
      numbers: has them by their names; None is right but for the temperature.
    """
    for name, (least, most) in SAMPLING_LIMITS.items():
        value: Any = getattr(numbers, name)
        if value is None and name != "temperature":
            continue
        if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
            value = value.item()
        whole = isinstance(least, int)
        if not is_number(value, whole):
            yield name, f"{'an integer' if whole else 'a number'}, got {value!r}"
        elif not least <= value <= most:
            yield name, f"from {least} to {most}, got {value}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options of `jax_flash.sample`: numbers, or arrays of one for each sequence.

    Another value compiles nothing; None, which leaves the option out, does.
    """

    temperature: Any = 0.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None

    def check(self) -> None:
        """Raises ValueError for a number that is out of its limits.

        As an operand of a compiled program it is no number any more: nobody else looks.
        """
        for name, limits in beyond_limits(self):
            raise ValueError(f"{name} must be {limits}")

    def draw(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """float32 [B, V] -> int32 [B]."""
        return jax_flash.sample(
            logits,
            key,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )


Attend = Callable[[int, jax.Array], jax.Array]
"""From the index of a layer and its queries, keys and values, none of them turned yet,
side by side as the projection writes them [B, T, (N + 2 K) H], to [B, T, N, H]."""


def split_heads(qkv: jax.Array, config: Config) -> list[jax.Array]:
    """Query [B, T, N, H], key and value [B, T, K, H]."""
    sizes = (n * config.head_dim for n in (config.heads, config.kv_heads))
    parts = jax_flash.split_qkv(qkv, *sizes)
    return [x.reshape(*x.shape[:-1], -1, config.head_dim) for x in parts]


def _dense(sizes: tuple[int, int], config: Config, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        *sizes,
        use_bias=False,
        kernel_init=nnx.initializers.normal(sizes[0] ** -0.5),
        dtype=config.dtype,
        param_dtype=config.dtype,
        rngs=rngs,
    )


def product(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """[*B, I] by the rows of [O, I] -> [*B, O].

    Of a single token XLA reads the weights faster as a sum than as a matrix product.
    """

    def of_many(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)

    def of_one(x: jax.Array, weight: jax.Array) -> jax.Array:
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
        y = jnp.sum(weight * x.reshape(1, -1), axis=-1).astype(dtype)
        return y.reshape(*x.shape[:-1], -1)

    if math.prod(x.shape[:-1]) != 1:
        return of_many(x, weight)
    return jax.lax.platform_dependent(x, weight, cuda=of_one, default=of_many)


class Projection(nnx.Module):
    """A matrix product with weights [outputs, inputs], as files have them."""

    def __init__(self, sizes: tuple[int, int], config: Config, rngs: nnx.Rngs) -> None:
        initial = nnx.initializers.normal(sizes[0] ** -0.5)
        self.weight = nnx.Param(initial(rngs.params(), sizes[::-1], config.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[*B, inputs] -> [*B, outputs]."""
        return product(x, self.weight[...], x.dtype)


class Norm(nnx.Module):
    """RMSNorm over the width of the model."""

    def __init__(self, config: Config) -> None:
        self.eps = config.norm_eps
        self.weight = nnx.Param(jnp.ones(config.width, config.dtype))

    def __call__(
        self, x: jax.Array, residual: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """`x + residual` normalised, and the sum itself: both [*B, C]."""
        weight = self.weight[...]
        if residual is None:
            return jax_flash.rms_norm(x, weight, eps=self.eps), x
        return jax_flash.rms_norm(x, weight, residual=residual, eps=self.eps)


class Block(nnx.Module):
    """Attention and a SwiGLU layer.

    The stream comes in two parts, what the layer before added and what was there, so
    that adding them and normalising the sum is one operation.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        q_size, kv_size = (n * config.head_dim for n in (config.heads, config.kv_heads))
        self.attention_norm = Norm(config)
        self.qkv = Projection((config.width, q_size + 2 * kv_size), config, rngs)
        self.out = Projection((q_size, config.width), config, rngs)
        self.mlp_norm = Norm(config)
        self.gate_up = _dense((config.width, 2 * config.hidden), config, rngs)
        self.down = _dense((config.hidden, config.width), config, rngs)

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array | None,
        attend: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """The two parts of the stream, each [B, T, C], behind this layer."""
        x, residual = self.attention_norm(x, residual)
        attended = attend(self.qkv(x))
        x = self.out(attended.reshape(*attended.shape[:-2], -1))
        x, residual = self.mlp_norm(x, residual)
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax_flash.silu_mul(gate, up)), residual


class Llama(nnx.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config

        def table() -> nnx.Param:
            initial = nnx.initializers.normal(config.width**-0.5)
            shape = (config.vocabulary, config.width)
            return nnx.Param(initial(rngs.params(), shape, config.dtype))

        self.embedding = table()
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = Norm(config)
        if not config.tied:
            self.head = table()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Of whole sequences without a cache: int32 [B, T] -> float32 [B, T, V].

        What stands behind a token does not change its logits.
        """
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        turned = functools.partial(
            jax_flash.rope, positions=positions, inv_freq=self.config.frequencies
        )

        def attend(_: int, qkv: jax.Array) -> jax.Array:
            query, key, value = split_heads(qkv, self.config)
            return jax_flash.mha(
                turned(query),
                turned(key),
                value,
                is_causal=True,
                implementation=self.config.implementation,
            )

        return self.logits(*self.hidden(tokens, attend))

    def hidden(self, tokens: jax.Array, attend: Attend) -> tuple[jax.Array, jax.Array]:
        """int32 [B, T] -> the two parts of the stream behind all layers, [B, T, C]."""
        x, residual = self.embedding[...][tokens], None
        for index, block in enumerate(self.blocks):
            x, residual = block(x, residual, functools.partial(attend, index))
        assert residual is not None
        return x, residual

    def logits(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """The two parts of the stream, [*B, C] -> float32 [*B, V]."""
        x, _ = self.norm(x, residual)
        table = self.embedding if self.config.tied else self.head
        return product(x, table[...], jnp.float32)


def prefill(
    model: Llama,
    tokens: jax.Array,
    counts: jax.Array,
    caches: Caches,
    *,
    all_logits: bool = False,
) -> tuple[jax.Array, Caches]:
    """Reads the beginnings of sequences, with `jax_flash.mha`.

    Args:
      model: the model.
      tokens: int32 [B, T], padded behind the counts with any tokens.
      counts: int32 [B], how many are new in each sequence, up to T; they need room in
        the caches. A sequence that has some forgets what its cache held; one that has
        none is left as it is.
      caches: contiguous or paged.
      all_logits: whether to return those of every position.

    Returns:
      Logits behind the last token, float32 [B, V], or of all, [B, T, V], and the caches
      with the tokens. Logits of padding mean nothing.
    """
    config = model.config
    active = counts > 0
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    turned = functools.partial(
        jax_flash.rope, positions=positions, inv_freq=config.frequencies
    )
    # A negative length writes nothing.
    starts = jnp.where(active, jnp.int32(0), jnp.int32(-1))
    before = dataclasses.replace(caches, lengths=starts)
    layers = []

    def attend(index: int, qkv: jax.Array) -> jax.Array:
        query, key, value = split_heads(qkv, config)
        query, key = turned(query), turned(key)
        layers.append(before.layer(index).append(key, value))
        return jax_flash.mha(
            query,
            key,
            value,
            is_causal=True,
            query_seq_lengths=counts,
            key_value_seq_lengths=counts,
            implementation=config.implementation,
        )

    x, residual = model.hidden(tokens, attend)
    lengths = jnp.where(active, counts, caches.lengths)
    caches = _with_layers(caches, layers, lengths)
    return _logits(model, x, residual, counts, all_logits), caches


def step(
    model: Llama,
    tokens: jax.Array,
    counts: jax.Array,
    caches: Caches,
    *,
    all_logits: bool = False,
) -> tuple[jax.Array, Caches]:
    """Reads up to 64 more tokens of each sequence, with `jax_flash.decode_mha`.

    Decoding (T = 1) and chunks of prompts are the same, also in one call. Padding may
    be written behind the new tokens of a sequence, into its own room and pages: the
    next tokens go over it. Nothing is written for a sequence without new tokens.

    Args:
      model: the model.
      tokens: int32 [B, T], T from 1 to 64, padded behind the counts with any tokens.
      counts: int32 [B], how many are new in each sequence, from 0 to T; they need room
        in the caches, and in a shared page the copy that `PageAllocator.extend` asks
        for.
      caches: contiguous or paged; sequences of negative length are left as they are.
      all_logits: whether to return those of every position.

    Returns:
      Logits behind the last new token, float32 [B, V], or of all, [B, T, V], and the
      caches with the tokens. Logits of padding, and those of sequences without new
      tokens, mean nothing.
    """
    config = model.config
    active = (counts > 0) & (caches.lengths >= 0)
    starts = jnp.where(active, caches.lengths, jnp.int32(-1))
    ends = jnp.where(active, caches.lengths + counts, caches.lengths)
    before = dataclasses.replace(caches, lengths=starts)
    layers = []

    def attend(index: int, qkv: jax.Array) -> jax.Array:
        query, cache = before.layer(index).rope_append_qkvpacked(
            qkv, inv_freq=config.frequencies
        )
        layers.append(cache)
        # The new tokens are the last ones of their sequence: padding goes before them.
        cache = dataclasses.replace(cache, lengths=jnp.where(active, ends, 0))
        attended = cache.attend(
            _rolled(query, -counts), implementation=config.implementation
        )
        return _rolled(attended, counts)

    x, residual = model.hidden(tokens, attend)
    caches = _with_layers(caches, layers, ends)
    return _logits(model, x, residual, counts, all_logits), caches


def _rolled(x: jax.Array, by: jax.Array) -> jax.Array:
    """[B, T, N, H] with the tokens of each sequence moved by int32 [B], in a ring."""
    length = x.shape[1]
    if length == 1:
        return x
    index = (jnp.arange(length, dtype=jnp.int32)[None] - by[:, None]) % length
    return jnp.take_along_axis(x, index[:, :, None, None], axis=1)


def _with_layers(
    caches: Caches, layers: list[KVCache | PagedKVCache], lengths: jax.Array
) -> Caches:
    return dataclasses.replace(
        caches,
        k=[layer.k for layer in layers],
        v=[layer.v for layer in layers],
        lengths=jnp.minimum(lengths, jnp.int32(caches.room)),
    )


def _logits(
    model: Llama,
    x: jax.Array,
    residual: jax.Array,
    counts: jax.Array,
    all_logits: bool,
) -> jax.Array:
    if all_logits:
        return model.logits(x, residual)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    x, residual = (
        jnp.take_along_axis(part, last, axis=1)[:, 0] for part in (x, residual)
    )
    return model.logits(x, residual)


@functools.partial(jax.jit, static_argnames="first", donate_argnames="caches")
def next_tokens(
    model: Llama,
    tokens: jax.Array,
    counts: jax.Array,
    caches: Caches,
    key: jax.Array,
    number: jax.Array,
    sampling: Sampling,
    *,
    first: bool = False,
) -> tuple[jax.Array, Caches]:
    """`prefill` if `first`, else `step`, and a draw: one program on the device.

    Args:
      model: the model.
      tokens: int32 [B, T].
      counts: int32 [B].
      caches: donated.
      key: of the whole text; the draw takes `fold_in(key, number)`.
      number: int32, of this draw.
      sampling: how to draw.
      first: whether the tokens begin their sequences.

    Returns:
      The tokens drawn, int32 [B], and the caches.
    """
    logits, caches = (prefill if first else step)(model, tokens, counts, caches)
    return sampling.draw(logits, jax.random.fold_in(key, number)), caches
