"""SmolLM2-135M-Instruct in examples/llama, beside what transformers computes of it.

tests/data/smollm2.json comes from tools/llama_reference.py: tokens of five prompts, the
likeliest tokens at every position in float64, and greedy continuations.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib

import generate
import jax
import jax.numpy as jnp
import llama_helpers
import llama_weights
import numpy as np
import pytest
from llama_model import Llama, Sampling
from llama_tokenizer import Tokenizer, load_tokenizer

DATA = pathlib.Path(__file__).parent / "data" / "smollm2.json"
TOLERANCE = 5e-5
"""Of probabilities: float32 beside float64."""


@functools.cache
def reference() -> list[dict]:
    return json.loads(DATA.read_text())["prompts"]


@pytest.fixture(scope="module")
def weights() -> pathlib.Path:
    return llama_helpers.smollm2()


@pytest.fixture(scope="module")
def model(weights: pathlib.Path) -> Llama:
    return llama_weights.load_model(weights)


@pytest.fixture(scope="module")
def tokenizer(weights: pathlib.Path) -> Tokenizer:
    return load_tokenizer(weights)


def table(rows: list[list[int]]) -> jax.Array:
    """int32 [B, T]: rows of tokens, padded."""
    width = max(len(row) for row in rows)
    return jnp.array([row + [0] * (width - len(row)) for row in rows], jnp.int32)


def test_tokens(tokenizer: Tokenizer) -> None:
    for entry in reference():
        prompt = entry["prompt"]
        if isinstance(prompt, str):
            assert tokenizer.encode(prompt).tolist() == entry["tokens"]
            assert tokenizer.decode(entry["tokens"]) == prompt
        else:
            assert tokenizer.chat(prompt).tolist() == entry["tokens"]


@pytest.fixture(scope="module")
def logits(model: Llama) -> np.ndarray:
    """Without a cache, of each prompt and its continuation: float32 [5, T, V]."""
    rows = [entry["tokens"] + entry["continuation"] for entry in reference()]
    forward = jax.jit(lambda model, tokens: model(tokens))
    return np.asarray(forward(model, table(rows)))


def test_probabilities(logits: np.ndarray) -> None:
    """The likeliest token at every position, and the largest probabilities."""
    worst = 0.0
    for entry, found in zip(reference(), logits, strict=True):
        likeliest = np.array(entry["likeliest"])
        found = found[: len(likeliest)]
        np.testing.assert_array_equal(found.argmax(-1), likeliest[:, 0])
        shares = np.asarray(jax.nn.softmax(found))
        ours = np.take_along_axis(shares, likeliest, axis=1)
        worst = max(worst, np.abs(ours - np.array(entry["probabilities"])).max())
    print(f"probabilities differ by {worst:.1e} at most")
    assert worst <= TOLERANCE


def test_greedy_continuations(
    model: Llama, tokenizer: Tokenizer, logits: np.ndarray
) -> None:
    """64 tokens of each prompt, by every way to read the prompts and to keep the keys.

    Without a cache it is one call: what stands behind a token does not change its
    logits, so the whole text gives what each beginning of it would.
    """
    prompts = [np.array(entry["tokens"], np.int32) for entry in reference()]
    wanted = np.array([entry["continuation"] for entry in reference()])
    longest = max(len(prompt) for prompt in prompts)
    steps = wanted.shape[1]
    for paged, chunk in ((False, None), (True, None), (True, 16)):
        written = generate.written(
            model,
            prompts,
            generate.empty_caches(model, len(prompts), longest + steps, paged=paged),
            jax.random.key(0),
            Sampling(),
            chunk=chunk,
        )
        text = np.stack(list(itertools.islice(written, steps)), axis=1)
        np.testing.assert_array_equal(text, wanted, err_msg=f"{paged=}, {chunk=}")

    for prompt, found, text in zip(prompts, logits, wanted, strict=True):
        start = len(prompt) - 1
        np.testing.assert_array_equal(found[start : start + steps].argmax(-1), text)
    answer = tokenizer.decode(wanted[0].tolist())
    assert answer.startswith("The capital of France is Paris.")
