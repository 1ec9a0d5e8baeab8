"""Trains a small causal language model on English text and lets it write.

    python examples/train_lm.py

The text is the documentation that Python carries in `pydoc_data.topics`, so nothing is
downloaded. The model is a Flax NNX transformer (grouped-query attention, rotary
positions, RMSNorm, SwiGLU) whose attention is `jax_flash.mha`: the kernels on a GPU,
in bfloat16, and the same mathematics compiled by XLA elsewhere, in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import pathlib
import re
import sys
import time
from collections import Counter, defaultdict
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.backend_bases import FigureCanvasBase
from tqdm import tqdm

import jax_flash
from jax_flash import KVCache
from jax_flash.nnx import apply_rotary

PROMPT = "The statement"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of a training batch."""

    vocabulary: int
    length: int = 128
    batch: int = 16
    width: int = 160
    layers: int = 4
    heads: int = 5
    kv_heads: int = 1
    head_dim: int = 32
    hidden: int = 448
    dtype: Any = jnp.float32
    implementation: str | None = None


class Tokenizer:
    """Byte-pair encoding: bytes, then the pairs that occur most within words."""

    def __init__(self, text: str, vocabulary: int) -> None:
        counts = Counter(self.words(text))
        words = [list(word) for word in counts]
        weights = list(counts.values())
        pairs: Counter[tuple[int, int]] = Counter()
        where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)

        def count(index: int, sign: int) -> None:
            for pair in itertools.pairwise(words[index]):
                pairs[pair] += sign * weights[index]
                where[pair].add(index)

        for index in range(len(words)):
            count(index, 1)
        self.ranks: dict[tuple[int, int], int] = {}
        self.pieces = [bytes([byte]) for byte in range(256)]
        for token in range(256, vocabulary):
            pair = max(pairs, key=lambda pair: (pairs[pair], pair))
            self.ranks[pair] = token
            self.pieces.append(self.pieces[pair[0]] + self.pieces[pair[1]])
            for index in where.pop(pair):
                count(index, -1)
                words[index] = self.merge(words[index], pair, token)
                count(index, 1)

    @staticmethod
    def words(text: str) -> list[bytes]:
        """Splits into words with the space before them, digits, signs and blanks."""
        pattern = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\n+| +"
        return [word.encode() for word in re.findall(pattern, text)]

    @staticmethod
    def merge(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
        """`word` with every `pair` replaced by `token`."""
        merged: list[int] = []
        for part in word:
            merged.append(part)
            if tuple(merged[-2:]) == pair:
                merged[-2:] = [token]
        return merged

    def encode_word(self, word: bytes) -> list[int]:
        """Applies the merges in the order in which they were learnt."""
        parts = list(word)
        while len(parts) > 1:
            pair = min(
                itertools.pairwise(parts),
                key=lambda pair: self.ranks.get(pair, math.inf),
            )
            if pair not in self.ranks:
                break
            parts = self.merge(parts, pair, self.ranks[pair])
        return parts

    def encode(self, text: str) -> np.ndarray:
        """Tokens of `text`, int32 [tokens]."""
        words = self.words(text)
        encoded = {word: self.encode_word(word) for word in set(words)}
        return np.array([part for word in words for part in encoded[word]], np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of int [tokens]."""
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


def dense(sizes: tuple[int, int], config: Config, rngs: nnx.Rngs) -> nnx.Linear:
    """A projection that keeps the variance of normal inputs."""
    return nnx.Linear(
        *sizes,
        use_bias=False,
        kernel_init=nnx.initializers.normal(sizes[0] ** -0.5),
        dtype=config.dtype,
        rngs=rngs,
    )


def norm(config: Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the width of the model."""
    return nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config
        heads = config.heads + 2 * config.kv_heads
        self.qkv = dense((config.width, heads * config.head_dim), config, rngs)
        self.out = dense((config.heads * config.head_dim, config.width), config, rngs)

    def __call__(
        self, x: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, width] -> [B, T, width], and the cache with the new tokens.

        Several tokens are the beginning of their sequences, whose caches are empty; a
        single one may continue a sequence of any length.
        """
        config = self.config
        qkv = self.qkv(x).reshape(*x.shape[:2], -1, config.head_dim)
        heads, keys_end = config.heads, config.heads + config.kv_heads
        query, key, value = jnp.split(qkv, (heads, keys_end), axis=2)
        positions = None if cache is None else cache.lengths[:, None]
        if positions is not None:
            positions = positions + jnp.arange(x.shape[1])
        query, key = apply_rotary(query, positions), apply_rotary(key, positions)
        if cache is not None:
            cache = cache.append(key, value)
        if cache is None or x.shape[1] > 1:
            attended = jax_flash.mha(
                query, key, value, is_causal=True, implementation=config.implementation
            )
        else:
            attended = cache.attend(query, implementation=config.implementation)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache


class Block(nnx.Module):
    """Attention and a SwiGLU layer, each added to the stream it reads normalised."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm(config, rngs)
        self.up = dense((config.width, 2 * config.hidden), config, rngs)
        self.down = dense((config.hidden, config.width), config, rngs)

    def __call__(
        self, x: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, width] -> [B, T, width], and the cache with the new tokens."""
        attended, cache = self.attention(self.attention_norm(x), cache)
        x = x + attended
        gate, up = jnp.split(self.up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(nnx.silu(gate) * up), cache


class LanguageModel(nnx.Module):
    """Logits of the next token at every position; input and output embedding tied."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(
            config.vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            dtype=config.dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = norm(config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> float32 [B, T, vocabulary]."""
        x = self.embed(tokens) * math.sqrt(self.config.width)
        for block in self.blocks:
            x, _ = block(x)
        return self.logits(x)

    def decode(
        self, tokens: jax.Array, caches: list[KVCache]
    ) -> tuple[jax.Array, list[KVCache]]:
        """The same of new tokens behind those in the caches, one for each block.

        int32 [B, T] -> float32 [B, T, vocabulary], and the caches with the new tokens.
        T > 1 only at the beginning of sequences: see `Attention`.
        """
        x = self.embed(tokens) * math.sqrt(self.config.width)
        longer = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache)
            longer.append(cache)
        return self.logits(x), longer

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, T, width] -> float32 [B, T, vocabulary]."""
        return self.embed.attend(self.norm(x)).astype(jnp.float32)


def make_optimizer(model: LanguageModel, steps: int) -> nnx.Optimizer:
    """AdamW whose rate rises for a tenth of `steps` and then falls to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 4e-3, 1 + steps // 10, 1 + steps, 4e-4
    )
    rule = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1)
    )
    return nnx.Optimizer(model, rule, wrt=nnx.Param)


def draw_batch(
    rng: np.random.Generator, tokens: np.ndarray, config: Config
) -> jax.Array:
    """Pieces of the text from random places, int32 [batch, length + 1]."""
    starts = rng.integers(len(tokens) - config.length, size=(config.batch, 1))
    return jnp.asarray(tokens[starts + np.arange(config.length + 1)])


def loss_of(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats; int32 [B, T + 1] holds inputs and targets."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(tokens[:, :-1]), tokens[:, 1:]
    )
    return losses.mean()


@nnx.jit(donate_argnums=(0, 1))
def train_step(
    model: LanguageModel, optimizer: nnx.Optimizer, tokens: jax.Array
) -> jax.Array:
    """Updates both in place; returns the loss before the update."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


evaluate = nnx.jit(loss_of)


@nnx.jit(static_argnames="steps")
def generate(
    model: LanguageModel,
    window: jax.Array,
    filled: jax.Array,
    key: jax.Array,
    steps: int,
    temperature: float = 0.7,
) -> jax.Array:
    """Samples `steps` tokens after the first `filled` of int32 `window` [T].

    The whole window is computed at every step: with a causal mask the rows after
    `filled` change nothing, and one shape means one compilation. A full window drops
    its oldest token.
    """

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
        window, filled = carry
        logits = model(window[None])[0, filled - 1]
        token = jax.random.categorical(key, logits / temperature).astype(jnp.int32)
        full = filled == window.size
        window = jnp.where(full, jnp.roll(window, -1), window)
        filled = jnp.where(full, filled, filled + 1)
        return (window.at[filled - 1].set(token), filled), token

    return jax.lax.scan(step, (window, filled), jax.random.split(key, steps))[1]


def read_text() -> tuple[str, str]:
    """Training text and held-out text: every twentieth topic is held out."""
    names = sorted(topics.topics)
    held_out = set(names[::20])
    train = [topics.topics[name] for name in names if name not in held_out]
    return "\n\n".join(train), "\n\n".join(topics.topics[n] for n in sorted(held_out))


def explain_attention(config: Config) -> str:
    """Which implementation runs this model's attention, here and elsewhere, and why.

    Ends the program if none does here.
    """
    shape = (config.batch, config.length, config.heads, config.head_dim)
    query = jax.ShapeDtypeStruct(shape, config.dtype)
    key = jax.ShapeDtypeStruct((*shape[:2], config.kv_heads, shape[3]), config.dtype)
    explanation = jax_flash.explain(
        query, key, key, is_causal=True, implementation=config.implementation
    )
    platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    chosen = explanation.chosen.get(platform)
    if chosen is None:
        sys.exit(f"no attention for this {platform} device:\n{explanation}")
    return f"attention runs by {chosen!r} on this {platform} device\n{explanation}"


def draw(
    path: pathlib.Path, losses: list[float], held_out: dict[int, float], title: str
) -> None:
    """Writes the loss curve in the format of the suffix, as a PNG without one."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, linewidth=0.8, label="training batch")
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held-out text")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")
    plt.close(figure)


def why_no_chart(path: pathlib.Path) -> str | None:
    """Why `draw` cannot write there, None if it can; what is there is kept."""
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        return f"{path.suffix} is none of .{', .'.join(sorted(formats))}"
    fresh = not os.path.lexists(path)
    try:
        with path.open("ab"):
            pass
        if fresh:
            path.unlink()
    except OSError as error:
        return str(error)
    return None


def check_seed(parser: argparse.ArgumentParser, seed: int) -> None:
    """Ends the program unless a seed is one: JAX has no more than 32 bits of it."""
    if not 0 <= seed < 1 << 32:
        parser.error(f"needs --seed from 0 to {(1 << 32) - 1}, got {seed}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Trains a small language model.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="train_lm.png")
    parser.add_argument(
        "--implementation", choices=("cuda", "cudnn", "xla"), help="default: the best"
    )
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--generate", type=int, default=200, help="tokens to write")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.vocabulary < 256 or arguments.generate < 1:
        parser.error("needs --steps >= 1, --vocabulary >= 256, --generate >= 1")
    check_seed(parser, arguments.seed)
    # A longer training would end without its chart.
    reason = why_no_chart(arguments.out)
    if reason is not None:
        parser.error(f"--out {arguments.out} cannot be written: {reason}")
    return arguments


def main() -> int:
    """Returns 1 if the held-out loss did not fall."""
    arguments = parse_arguments()
    train_text, held_out_text = read_text()
    tokenizer = Tokenizer(train_text, arguments.vocabulary)
    train_tokens = tokenizer.encode(train_text)
    on_gpu = jax.default_backend() == "gpu"
    config = Config(
        vocabulary=arguments.vocabulary,
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
        implementation=arguments.implementation,
    )
    held_out_tokens = tokenizer.encode(held_out_text)
    rows = min(4 * config.batch, len(held_out_tokens) // (config.length + 1))
    held_out = jnp.asarray(held_out_tokens[: rows * (config.length + 1)])
    held_out = held_out.reshape(rows, -1)

    model = LanguageModel(config, nnx.Rngs(arguments.seed))
    optimizer = make_optimizer(model, arguments.steps)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(
        f"{len(train_text):,} characters of text, {len(train_tokens):,} tokens;"
        f" {size:,} parameters; {jax.devices()[0].device_kind}"
    )
    print(explain_attention(config))

    rng = np.random.default_rng(arguments.seed)
    losses: list[float] = []
    measured = {0: float(evaluate(model, held_out))}
    start = time.perf_counter()
    with tqdm(range(arguments.steps), unit="step", mininterval=0.5) as progress:
        for step in progress:
            batch = draw_batch(rng, train_tokens, config)
            loss = train_step(model, optimizer, batch)
            losses.append(float(loss))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            done = step + 1
            if done % max(1, arguments.steps // 8) == 0 or done == arguments.steps:
                measured[done] = float(evaluate(model, held_out))
    seconds = time.perf_counter() - start
    first, last = measured[0], measured[arguments.steps]
    print(
        f"held-out loss {first:.3f} at the start, {last:.3f} at the end;"
        f" {arguments.steps} steps in {seconds:.1f} s"
    )
    draw(arguments.out, losses, measured, f"{size:,} parameters, {seconds:.0f} s")
    print(f"loss curve in {arguments.out}")

    prompt = tokenizer.encode(PROMPT)
    window = jnp.zeros(config.length, jnp.int32).at[: len(prompt)].set(prompt)
    filled = jnp.int32(len(prompt))
    key = jax.random.key(arguments.seed)
    written = generate(model, window, filled, key, arguments.generate)
    print(f"\n{PROMPT}{tokenizer.decode(np.asarray(written))}")
    if not last < first:
        print(f"the loss did not fall: {first} -> {last}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
