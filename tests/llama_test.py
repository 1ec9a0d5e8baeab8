"""The model of examples/llama: caches, chunks and padding change nothing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys

import generate
import jax
import jax.numpy as jnp
import llama_helpers
import numpy as np
import pytest
from helpers import kernel_calls
from llama_helpers import TINY
from llama_model import Caches, Config, Llama, Sampling, next_tokens, prefill, step

from jax_flash._src import registry

LENGTH = 20
TOLERANCE = 2e-5


@functools.cache
def model() -> Llama:
    return llama_helpers.random_model()


def tokens(batch: int = 3, length: int = LENGTH) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, TINY.vocabulary, (batch, length), dtype=np.int32)


def caches_of(kind: str, batch: int = 3, room: int = LENGTH) -> Caches:
    """Empty caches of no more room than `room`."""
    if kind == "contiguous":
        return Caches.contiguous(TINY, batch, room)
    page = 4
    slots = room // page
    caches = Caches.paged(TINY, batch * slots + 2, page, batch, slots)
    order = np.random.default_rng(0).permutation(batch * slots + 2)[: batch * slots]
    table = order.reshape(batch, slots).astype(np.int32)
    return dataclasses.replace(caches, page_table=jnp.asarray(table))


jitted_call = jax.jit(lambda model, tokens: model(tokens))
jitted_step = jax.jit(step, static_argnames="all_logits")
jitted_prefill = jax.jit(prefill, static_argnames="all_logits")


@functools.cache
def expected() -> np.ndarray:
    """Logits of `tokens()` without a cache."""
    return np.asarray(jitted_call(model(), jnp.asarray(tokens())))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("factors", [None, (1.0, 2.0, 3.5, 8.0)])
def test_logits_are_those_of_the_book(
    tied: bool, factors: tuple[float, ...] | None
) -> None:
    config = dataclasses.replace(TINY, tied=tied, rope_factors=factors)
    one = llama_helpers.random_model(config)
    logits = np.asarray(jitted_call(one, jnp.asarray(tokens(1))))[0]
    wanted = llama_helpers.expected_logits(one, tokens(1)[0])
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_chunks_of_any_length(kind: str) -> None:
    """Also padding that would reach beyond the room of a cache."""
    given, caches = tokens(), caches_of(kind)
    logits = np.zeros_like(expected())
    done, rng = np.zeros(3, int), np.random.default_rng(0)
    while (done < LENGTH).any():
        counts = np.minimum(rng.integers(0, 6, 3), LENGTH - done)
        chunk = rng.integers(0, TINY.vocabulary, (3, 5), dtype=np.int32)
        for b, count in enumerate(counts):
            chunk[b, :count] = given[b, done[b] : done[b] + count]
        out, caches = jitted_step(
            model(),
            jnp.asarray(chunk),
            jnp.asarray(counts, jnp.int32),
            caches,
            all_logits=True,
        )
        for b, count in enumerate(counts):
            logits[b, done[b] : done[b] + count] = out[b, :count]
        done += counts
        assert caches.lengths.tolist() == done.tolist()
    np.testing.assert_allclose(logits, expected(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_prefill_then_steps(kind: str) -> None:
    given, counts = tokens(), np.array([16, 7, 1], np.int32)
    logits, caches = jitted_prefill(
        model(), jnp.asarray(given[:, :16]), jnp.asarray(counts), caches_of(kind)
    )
    rows = np.arange(3)
    wanted = expected()[rows, counts - 1]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)
    for _ in range(4):
        new = jnp.asarray(given[rows, counts][:, None])
        logits, caches = jitted_step(model(), new, jnp.ones(3, jnp.int32), caches)
        wanted = expected()[rows, counts]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)
        counts += 1
    assert caches.lengths.tolist() == counts.tolist()


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("run", [jitted_prefill, jitted_step])
def test_sequences_without_new_tokens_stay_as_they_are(kind: str, run) -> None:
    filled = caches_of(kind)
    filled = dataclasses.replace(
        filled,
        k=[jnp.full_like(x, 3) for x in filled.k],
        v=[jnp.full_like(x, 4) for x in filled.v],
        lengths=jnp.array([2, 3, -1], jnp.int32),
    )
    # The last one is switched off: no tokens for it.
    counts = jnp.array([5, 0, 0], jnp.int32)
    _, caches = run(model(), jnp.asarray(tokens()[:, :5]), counts, filled)
    assert caches.lengths.tolist() == [5 if run is jitted_prefill else 7, 3, -1]
    for before, after in zip(filled.k + filled.v, caches.k + caches.v, strict=True):
        changed = np.asarray((before != after).any((2, 3)))
        if kind == "paged":
            table = np.asarray(filled.page_table)
            changed = changed[table].reshape(3, -1)
        start = 0 if run is jitted_prefill else 2
        assert changed[0].nonzero()[0].tolist() == list(range(start, start + 5))
        assert not changed[1:].any()


def test_switched_off_sequences_take_no_tokens() -> None:
    caches = dataclasses.replace(
        caches_of("paged"), lengths=jnp.array([0, -1, 0], jnp.int32)
    )
    counts = jnp.full(3, 5, jnp.int32)
    _, caches = jitted_step(model(), jnp.asarray(tokens()[:, :5]), counts, caches)
    assert caches.lengths.tolist() == [5, -1, 5]
    assert not np.asarray(caches.k[0])[np.asarray(caches.page_table)[1]].any()


def test_copied_pages() -> None:
    caches = caches_of("paged")
    counts = jnp.full(3, 5, jnp.int32)
    _, caches = jitted_step(model(), jnp.asarray(tokens()[:, :5]), counts, caches)
    source, target = int(caches.page_table[0, 0]), int(caches.page_table[2, 4])
    copied = caches.copy_pages([source], [target])
    for before, after in zip(caches.k + caches.v, copied.k + copied.v, strict=True):
        np.testing.assert_array_equal(after[target], before[source])
        others = np.arange(len(before)) != target
        np.testing.assert_array_equal(after[others], before[others])
    with pytest.raises(ValueError, match="needs paged caches"):
        caches_of("contiguous").copy_pages([0], [1])


def test_generated_alike_however_the_prompts_are_read() -> None:
    """The first text is the likeliest one, the others are drawn."""
    prompts = [tokens()[0, :9], tokens()[1, :1], tokens()[2, :16]]
    sampling = Sampling(jnp.array([0.0, 0.9, 2.0], jnp.float32), top_p=0.95)
    texts = []
    for paged, chunk in ((False, None), (True, 4)):
        written = generate.written(
            model(),
            prompts,
            generate.empty_caches(model(), 3, 26, paged=paged),
            jax.random.key(3),
            sampling,
            chunk=chunk,
        )
        texts.append(np.stack(list(itertools.islice(written, 10)), axis=1))
    np.testing.assert_array_equal(*texts)
    whole = np.concatenate([prompts[0], texts[0][0]])
    likeliest = llama_helpers.expected_logits(model(), whole).argmax(-1)
    np.testing.assert_array_equal(likeliest[len(prompts[0]) - 1 : -1], texts[0][0])


def test_caches_are_donated() -> None:
    caches = caches_of("paged")
    one = jnp.ones(3, jnp.int32)
    drawn, longer = next_tokens(
        model(),
        jnp.asarray(tokens()[:, :1]),
        one,
        caches,
        jax.random.key(0),
        jnp.int32(0),
        Sampling(),
    )
    assert drawn.shape == (3,)
    assert all(x.is_deleted() for x in jax.tree.leaves(caches))
    assert longer.lengths.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 4}, "heads=6 must be a multiple of kv_heads=4"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"rope_factors": (1.0,)}, "rope_factors must be 4 numbers"),
    ],
)
def test_wrong_sizes(change: dict, message: str) -> None:
    sizes = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(Config)}
    with pytest.raises(ValueError, match=message):
        Config(**(sizes | change))


def test_chunks_are_limited() -> None:
    caches = caches_of("contiguous", room=100)
    new, counts = jnp.zeros((3, 65), jnp.int32), jnp.full(3, 65, jnp.int32)
    with pytest.raises((ValueError, NotImplementedError), match="64"):
        jax.eval_shape(step, model(), new, counts, caches)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("first", [True, False])
def test_kernels_on_a_gpu(kernels: None, kind: str, first: bool) -> None:
    """Attention in every layer, every norm and the draw are kernels in bfloat16."""
    config = dataclasses.replace(TINY, dtype=jnp.dtype("bfloat16"))
    bfloat16 = llama_helpers.random_model(config)
    caches = jax.tree.map(
        lambda x: x.astype("bfloat16") if x.ndim == 4 else x, caches_of(kind)
    )

    def f(tokens: jax.Array, counts: jax.Array, caches: Caches) -> jax.Array:
        key, number = jax.random.key(0), jnp.int32(0)
        sampling = Sampling(0.7, top_k=50, top_p=0.9)
        return next_tokens(
            bfloat16, tokens, counts, caches, key, number, sampling, first=first
        )[0]

    attention = [registry.DECODE_TARGET, registry.FORWARD_TARGET]
    wanted = dict(zip(attention, (0, 2) if first else (2, 0), strict=True))
    wanted |= {registry.RMS_NORM_TARGET: 5, registry.SAMPLE_TARGET: 1}
    given = jnp.zeros((3, 1), jnp.int32), jnp.ones(3, jnp.int32), caches
    found = {name: kernel_calls(f, *given, target=name) for name in wanted}
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk", "65"], "--chunk from 1 to 64, got 65"),
        (["--tokens", "0"], "--tokens >= 1, got 0"),
        (["--temperature", "-1"], "--temperature from 0.0 to inf, got -1.0"),
        (["--top-k", "0"], "--top-k from 1 to 2147483647, got 0"),
        (["--top-p", "1.5"], "--top-p from 0.0 to 1.0, got 1.5"),
        (["--min-p", "nan"], "--min-p from 0.0 to 1.0, got nan"),
        (["--seed", "-1"], "--seed from 0 to 4294967295, got -1"),
        (["--seed", "4294967296"], "--seed from 0 to 4294967295, got 4294967296"),
        (["--raw", "--system", "x"], "--system needs the chat template"),
    ],
)
def test_command_line_rejects_nonsense(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "hello", *options])
    with pytest.raises(SystemExit):
        generate.parse_arguments()
    assert message in capsys.readouterr().err


def test_prompts_longer_than_the_context(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    file = tmp_path / "tiny.gguf"
    metadata = llama_helpers.tokenizer_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    config = dataclasses.replace(TINY, vocabulary=size, context=64)
    llama_helpers.write_gguf(file, llama_helpers.random_model(config), metadata)
    arguments = ["generate.py", "hello" * 64, "--raw", "--model", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert generate.main() == 1
    assert "64 tokens, the model's context is 64" in capsys.readouterr().err
