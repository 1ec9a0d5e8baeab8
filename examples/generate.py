"""Writes text with a cache of keys and values, the whole loop in one jitted function.

    python examples/generate.py

The model and the text are those of `train_lm.py`, trained for a few steps first. Then
prompts of different lengths are continued together: `jax_flash.mha` reads them,
`jax_flash.decode_mha` attends to the caches, `jax_flash.sample` draws the tokens, all
inside one `jax.lax.while_loop` with the caches donated. The same tokens are computed
again without any cache, every step from the whole sequence; the two must be equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import train_lm
from flax import nnx

import jax_flash
from jax_flash import KVCache

PROMPTS = ("The statement", "A class definition is", "If the", "import")


def empty_caches(config: train_lm.Config, batch: int, room: int) -> list[KVCache]:
    """A cache of `room` tokens for each layer."""
    return [
        KVCache.create(
            batch, room, config.kv_heads, config.head_dim, dtype=config.dtype
        )
        for _ in range(config.layers)
    ]


def draw(
    logits: jax.Array, key: jax.Array, step: jax.Array, temperature: jax.Array
) -> jax.Array:
    """The token of one step, float32 [B, V] -> int32 [B]; a key for each step."""
    return jax_flash.sample(
        logits, jax.random.fold_in(key, step), temperature=temperature, top_k=50
    )


@nnx.jit(donate_argnames=("caches", "tokens"))
def generate(
    model: train_lm.LanguageModel,
    caches: list[KVCache],
    tokens: jax.Array,
    lengths: jax.Array,
    steps: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    prompts: jax.Array,
) -> tuple[jax.Array, list[KVCache]]:
    """Continues prompts by `steps` tokens.

    Args:
      model: the model.
      caches: one for each layer, with room for prompts and `steps` tokens. What they
        hold is overwritten.
      tokens: int32 [B, room]: overwritten too.
      lengths: int32 [B], tokens of each prompt, at least 1.
      steps: int32, at least 1: an array, so that another number compiles nothing.
      key: of the draws.
      temperature: float32, 0 for the likeliest token.
      prompts: int32 [B, T], padded behind the lengths with anything.

    Returns:
      `(tokens, caches)`: the first `steps` columns of tokens are the continuation.
    """
    rows = jnp.arange(len(prompts))
    caches = [dataclasses.replace(c, lengths=jnp.zeros_like(lengths)) for c in caches]
    logits, caches = model.decode(prompts, caches)
    # The padding was written as well; with these lengths the next tokens go over it.
    caches = [dataclasses.replace(cache, lengths=lengths) for cache in caches]
    first = draw(logits[rows, lengths - 1], key, jnp.int32(0), temperature)
    tokens = tokens.at[:, 0].set(first)

    def unfinished(carry: tuple[jax.Array, jax.Array, list[KVCache]]) -> jax.Array:
        return carry[0] < steps

    def step(
        carry: tuple[jax.Array, jax.Array, list[KVCache]],
    ) -> tuple[jax.Array, jax.Array, list[KVCache]]:
        done, tokens, caches = carry
        logits, caches = model.decode(tokens[:, done - 1, None], caches)
        token = draw(logits[:, 0], key, done, temperature)
        return done + 1, tokens.at[:, done].set(token), caches

    start = (jnp.int32(1), tokens, caches)
    return jax.lax.while_loop(unfinished, step, start)[1:]


@nnx.jit
def next_tokens(
    model: train_lm.LanguageModel,
    window: jax.Array,
    lengths: jax.Array,
    step: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """The next token of each sequence, from all of it: int32 [B, room] -> int32 [B].

    With a causal mask what stands in `window` behind `lengths` changes nothing.
    """
    logits = model(window)[jnp.arange(len(window)), lengths - 1]
    return draw(logits, key, step, temperature)


def recompute(
    model: train_lm.LanguageModel,
    prompts: jax.Array,
    lengths: jax.Array,
    steps: int,
    key: jax.Array,
    temperature: jax.Array,
) -> np.ndarray:
    """What `generate` writes, int32 [B, steps], computed without a cache."""
    window = jnp.pad(prompts, ((0, 0), (0, steps)))
    rows = jnp.arange(len(prompts))
    tokens = []
    for step in range(steps):
        token = next_tokens(
            model, window, lengths + step, jnp.int32(step), key, temperature
        )
        window = window.at[rows, lengths + step].set(token)
        tokens.append(token)
    return np.stack(tokens, axis=1)


def trained_model(
    arguments: argparse.Namespace,
) -> tuple[train_lm.LanguageModel, train_lm.Tokenizer]:
    """The model of `train_lm.py` after a few steps, and its tokenizer."""
    text, _ = train_lm.read_text()
    tokenizer = train_lm.Tokenizer(text, arguments.vocabulary)
    config = train_lm.Config(
        vocabulary=arguments.vocabulary, dtype=jnp.dtype(arguments.dtype)
    )
    model = train_lm.LanguageModel(config, nnx.Rngs(arguments.seed))
    optimizer = train_lm.make_optimizer(model, arguments.steps)
    rng = np.random.default_rng(arguments.seed)
    tokens = tokenizer.encode(text)
    for _ in range(arguments.steps):
        batch = train_lm.draw_batch(rng, tokens, config)
        train_lm.train_step(model, optimizer, batch)
    return model, tokenizer


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Writes text, with and without cache.")
    parser.add_argument("--steps", type=int, default=100, help="training steps before")
    parser.add_argument("--generate", type=int, default=64, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: likeliest")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="in bfloat16 the two ways round differently and may choose differently",
    )
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.generate) < 1 or arguments.vocabulary < 256:
        parser.error("needs --steps >= 1, --generate >= 1, --vocabulary >= 256")
    if not 0 <= arguments.temperature < float("inf"):
        parser.error(f"needs --temperature >= 0, got {arguments.temperature}")
    train_lm.check_seed(parser, arguments.seed)
    return arguments


def main() -> int:
    """Returns 1 if the tokens with and without cache differ."""
    arguments = parse_arguments()
    model, tokenizer = trained_model(arguments)
    steps = arguments.generate
    encoded = [tokenizer.encode(prompt) for prompt in PROMPTS]
    lengths = jnp.array([len(tokens) for tokens in encoded], jnp.int32)
    longest = max(len(tokens) for tokens in encoded)
    prompts = jnp.array([np.pad(t, (0, longest - len(t))) for t in encoded], jnp.int32)
    key, temperature = (
        jax.random.key(arguments.seed),
        jnp.float32(arguments.temperature),
    )

    caches = empty_caches(model.config, len(prompts), longest + steps)
    tokens = jnp.zeros((len(prompts), steps), jnp.int32)
    for count in (1, steps):  # the first call compiles, the second one is timed
        start = time.perf_counter()
        given = caches
        tokens, caches = generate(
            model,
            caches=caches,
            tokens=tokens,
            lengths=lengths,
            steps=jnp.int32(count),
            key=key,
            temperature=temperature,
            prompts=prompts,
        )
        tokens.block_until_ready()
        seconds = time.perf_counter() - start
    donated = all(cache.k.is_deleted() and cache.v.is_deleted() for cache in given)

    written = np.asarray(tokens)
    for prompt, row in zip(PROMPTS, written, strict=True):
        print(f"{prompt}|{tokenizer.decode(row)}\n")
    print(
        f"{written.size} tokens in {seconds:.3f} s,"
        f" {written.size / seconds:.0f} tokens/s, prompts included;"
        f" caches donated: {donated}; {jax.devices()[0].device_kind}"
    )
    expected = recompute(model, prompts, lengths, steps, key, temperature)
    if not np.array_equal(written, expected):
        row, step = np.argwhere(written != expected)[0]
        print(
            f"differs from full recomputation: prompt {row}, token {step}:"
            f" {written[row, step]} with cache, {expected[row, step]} without",
            file=sys.stderr,
        )
        return 1
    print("all tokens equal those of full recomputation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
