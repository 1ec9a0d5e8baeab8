"""Continuous batching: the answers of requests alone, pages shared, none lost."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import llama_engine
import llama_helpers
import numpy as np
import pytest
import serve
from llama_engine import Engine, Request
from llama_helpers import TINY
from llama_model import Llama, Sampling

from jax_flash import OutOfPagesError

PAGE, ROOM = 4, 48
PLENTY, SCARCE = 40, 12
"""Pages: for all at once, and for one text of `ROOM` tokens."""
NARROW = {"slots": 1, "page_size": 16, "chunk": 3, "read_rows": 1}


@functools.cache
def model() -> Llama:
    return llama_helpers.random_model()


def engine(num_pages: int = PLENTY, **options: Any) -> Engine:
    """Slots for four texts of up to 48 tokens, in pages of 4, read by 8.

    Every other set of sizes has to be compiled: few tests have their own.
    """
    given = {"slots": 4, "page_size": PAGE, "chunk": 8, "max_tokens": ROOM}
    return Engine(model(), num_pages=num_pages, **(given | options))


def prompts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY.vocabulary, n, dtype=np.int32) for n in lengths]


@jax.jit
def likeliest(tokens: jax.Array, length: jax.Array) -> jax.Array:
    return jnp.argmax(model()(tokens[None])[0, length - 1])


@functools.cache
def answer_of(prompt: tuple[int, ...], count: int) -> list[int]:
    """The likeliest answer, every token from the whole text, without a cache."""
    tokens = np.zeros(ROOM, np.int32)
    tokens[: len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + count):
        tokens[length] = likeliest(jnp.asarray(tokens), jnp.int32(length))
    return tokens[len(prompt) : len(prompt) + count].tolist()


def alone(prompt: np.ndarray, count: int) -> list[int]:
    return answer_of(tuple(prompt.tolist()), count)


def check_pages(e: Engine) -> None:
    """Every owner of a page is known, nobody holds pages that waits or is done."""
    held = [r.sequence for r in e.running] + [p.sequence for p in e._prefixes]
    assert sorted(e.allocator.sequences) == sorted(held)
    owned = {page for s in held for page in e.allocator.pages(s)}
    assert e.used_pages == len(owned)
    for request in e.running:
        assert request.cached <= e.allocator.length(request.sequence)


def run(e: Engine, limit: int = 500) -> list[list[int]]:
    """Steps until all are done; the numbers of the running requests of each step."""
    seen = []
    while e.running or e.waiting:
        changed = e.step()
        assert all(r.answer or r.finish for r in changed)
        check_pages(e)
        seen.append([r.number for r in e.running])
        assert len(seen) < limit
    return seen


def check_answers(requests: Sequence[Request], counts: Sequence[int]) -> None:
    for request, count in zip(requests, counts, strict=True):
        assert (request.state, request.finish) == ("done", "length")
        assert request.answer == alone(request.prompt, count), request.number


@pytest.mark.parametrize("options", [{}, {"num_pages": SCARCE}, NARROW])
def test_answers_are_those_of_requests_alone(options: dict[str, int]) -> None:
    e = engine(**options)
    counts = (10, 4, 12, 1, 9, 7, 10, 3)
    given = prompts(3, 20, 1, 9, 33, 5, 8, 16)
    requests = [e.submit(p, n) for p, n in zip(given, counts, strict=True)]
    run(e)
    check_answers(requests, counts)
    assert e.used_pages == 0
    times = [(r.submitted, r.first_token, r.finished) for r in requests]
    assert all(a <= b <= c for a, b, c in times if b is not None and c is not None)


@pytest.mark.parametrize("seed", range(4))
def test_arrivals_at_any_time(seed: int) -> None:
    """Some share what others said, some end early; pages are scarce."""
    rng = np.random.default_rng(seed)
    e = engine(SCARCE)
    common = prompts(11, seed=seed)[0]
    if seed % 2:
        e.add_prefix(common[:6])
    requests, counts = [], []
    for step in range(200):
        if len(requests) < 14 and rng.random() < 0.4:
            own = prompts(int(rng.integers(1, 15)), seed=int(rng.integers(99)))[0]
            keep = common[: rng.integers(0, 12)]
            prompt = np.concatenate([keep, own])
            counts.append(int(rng.integers(1, 48 - 24)))
            ends = rng.integers(0, TINY.vocabulary, 24).tolist()
            requests.append(e.submit(prompt, counts[-1], ends=ends))
        e.step()
        check_pages(e)
        if len(requests) == 14 and not e.running and not e.waiting:
            break
        assert step < 199
    for request, count in zip(requests, counts, strict=True):
        whole = alone(request.prompt, count)
        want = list(itertools.takewhile(lambda x, r=request: x not in r.ends, whole))
        assert request.answer == want, request.number
        assert request.finish == ("length" if want == whole else "end")
    assert {r.finish for r in requests} == {"length", "end"}
    assert any(r.shared for r in requests)
    e.clear_prefixes()
    assert e.used_pages == 0


def test_requests_wait_for_pages_in_their_order() -> None:
    e = engine(SCARCE)
    # The second needs more pages than are left; the third would fit, and waits.
    given = prompts(26, 22, 2)
    requests = [e.submit(p, 6) for p in given]
    e.step()
    assert [r.number for r in e.running] == [0]
    assert [r.number for r in e.waiting] == [1, 2]
    admitted: list[int] = []
    for numbers in run(e):
        admitted += [n for n in numbers if n not in admitted]
    assert admitted == [0, 1, 2]
    assert e.preemptions == 0
    check_answers(requests, [6] * 3)
    assert e.used_pages == 0


def test_requests_wait_for_slots() -> None:
    e = engine()
    requests = [e.submit(p, 5) for p in prompts(3, 3, 3, 3, 3, 3)]
    seen = run(e)
    assert max(len(numbers) for numbers in seen) == 4
    check_answers(requests, [5] * 6)


def test_the_youngest_gives_up_its_pages() -> None:
    e = engine(SCARCE)
    requests = [e.submit(p, 25) for p in prompts(5, 6, 7)]
    seen = run(e)
    assert e.preemptions == sum(r.preemptions for r in requests) > 0
    assert requests[0].preemptions == 0
    # The oldest is never without pages until it is done.
    steps = [0 in numbers for numbers in seen]
    assert steps == sorted(steps, reverse=True)
    check_answers(requests, [25] * 3)
    assert e.used_pages == 0


def test_a_prefix_is_stored_once() -> None:
    e = engine()
    prefix, *tails = prompts(10, 3, 4, 5)
    e.add_prefix(prefix)
    assert e.used_pages == 3
    requests = [e.submit(np.concatenate([prefix, t]), 4) for t in tails]
    e.step()
    # Two whole pages are shared. The third one each writes to, in a copy.
    whole = e.allocator.pages(e._prefixes[0].sequence)[:2]
    assert [e.allocator.owners(page) for page in whole] == [4, 4]
    assert [r.shared for r in requests] == [10] * 3
    assert e.shared_pages == 2
    assert e.copied_pages == 3
    assert e.used_pages == 3 + sum(-(-(10 + len(t)) // PAGE) - 2 for t in tails)
    assert all(e.allocator.pages(r.sequence)[:2] == whole for r in e.running)
    run(e)
    check_answers(requests, [4] * 3)
    assert (e.used_pages, e.shared_pages) == (3, 0)
    # What the copies were made from is as it was.
    again = e.submit(np.concatenate([prefix, tails[0]]), 4)
    run(e)
    assert again.answer == requests[0].answer
    e.clear_prefixes()
    assert e.used_pages == 0


def test_a_prefix_begins_another() -> None:
    e = engine()
    long = prompts(20)[0]
    e.add_prefix(long[:9])
    e.add_prefix(long)
    assert e.used_pages == 3 + 3
    request = e.submit(np.concatenate([long, long[:1]]), 3)
    run(e)
    assert request.shared == 20
    check_answers([request], [3])


def test_running_texts_are_shared_as_far_as_they_are_read() -> None:
    e = engine()
    prompt = prompts(21)[0]
    first = e.submit(prompt, 9)
    e.step()  # 8 tokens of it
    second = e.submit(prompt, 9)
    e.step()
    assert (first.cached, second.shared) == (16, 8)
    while first.state != "writing":
        e.step()
    # A copy of the last, half-filled page; the last token is read again.
    third = e.submit(prompt, 9)
    e.step()
    assert third.shared == 20
    other = np.concatenate([prompt[:3], prompts(4, seed=5)[0]])
    fourth = e.submit(other, 2)  # less than a page in common
    run(e)
    assert fourth.shared == 0
    check_answers([first, second, third, fourth], [9, 9, 9, 2])
    assert e.used_pages == 0


def test_an_end_token_ends_the_answer() -> None:
    e = engine()
    prompt = prompts(6)[0]
    whole = alone(prompt, 8)
    end = whole[5]
    request = e.submit(prompt, 8, ends={end})
    none = e.submit(prompt, 8, ends={whole[0]})
    run(e)
    assert request.answer == whole[: whole.index(end)]
    assert (request.finish, none.finish) == ("end", "end")
    assert (none.answer, none.first_token) == ([], None)
    assert e.used_pages == 0


def test_draws_depend_on_the_seed_alone() -> None:
    """Not on neighbours, slots, chunks, or on being put back."""
    given = prompts(5, 6, 7, 5)
    sampling = Sampling(temperature=1.2, top_k=20, top_p=0.95)

    def answers(e: Engine, order: Sequence[int]) -> list[list[int]]:
        requests = {i: e.submit(given[i], 20, sampling=sampling, seed=i) for i in order}
        run(e)
        return [requests[i].answer for i in sorted(requests)]

    scarce = engine(SCARCE)
    want = answers(scarce, range(4))
    assert scarce.preemptions > 0
    assert answers(engine(**NARROW), (3, 1, 0, 2)) == want
    mixed = engine()
    greedy = mixed.submit(given[0], 20)
    drawn = mixed.submit(given[1], 20, sampling=sampling, seed=1)
    other = mixed.submit(given[1], 20, sampling=sampling, seed=99)
    run(mixed)
    assert greedy.answer == alone(given[0], 20)
    assert drawn.answer == want[1] != other.answer


def test_two_shapes_are_compiled_and_the_pools_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []

    def counted(model: Any, tokens: Any, *rest: Any) -> Any:
        shapes.append(tokens.shape)
        return step(model, tokens, *rest)

    step = llama_engine.step
    monkeypatch.setattr(llama_engine, "step", counted)
    e = engine(23, slots=5, chunk=7)
    e.warm_up()
    assert shapes == [(2, 7), (5, 1)]
    addresses = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(e._pools)]
    e.add_prefix(prompts(10)[0])
    requests = [e.submit(p, 9) for p in prompts(10, 30, 4, 1, 12, 11, 20)]
    run(e)
    check_answers(requests, [9] * 7)
    assert e.copied_pages > 0
    assert len(shapes) == 2
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(e._pools)] == addresses


def test_what_never_fits_is_refused() -> None:
    e = engine(SCARCE)
    with pytest.raises(
        ValueError, match=r"40 tokens with an answer of 9 has 49 tokens"
    ):
        e.submit(prompts(40)[0], 9)
    prefix = prompts(29)[0]
    e.add_prefix(prefix)
    # 4 of 12 pages are left, beside the 7 that who begins alike shares.
    with pytest.raises(
        ValueError, match=r"needs 5 pages of 4 .* all 12 only 4 are ever"
    ):
        e.submit(prompts(8, seed=1)[0], 10)
    first = e.submit(prompts(8, seed=1)[0], 9)  # the last token needs no place
    second = e.submit(np.concatenate([prefix, prefix[:13]]), 3)
    with pytest.raises(ValueError, match="needs 5 pages"):
        e.submit(np.concatenate([prefix, prefix[:14]]), 3)
    run(e)
    check_answers([first, second], [9, 3])
    assert e.preemptions == 0
    with pytest.raises(OutOfPagesError):
        e.add_prefix(prompts(17, seed=2)[0])
    with pytest.raises(OutOfPagesError):  # after the fork
        e.add_prefix(np.concatenate([prefix, prefix[:16]]))
    assert e.used_pages == 8
    assert len(e.allocator.sequences) == 1


def test_errors() -> None:
    e = engine()
    sizes: list[tuple[dict[str, Any], str]] = [
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"chunk": 65}, "chunk must be at most 64, got 65"),
        ({"num_pages": 0}, "num_pages must be .* got 0"),
        ({"max_tokens": 161}, "max_tokens must be from 1 to 160"),
        ({"chunk": 1.5}, "chunk must be an integer, got 1.5"),
    ]
    for options, message in sizes:
        with pytest.raises(ValueError, match=message):
            engine(**options)
    for prompt, options, message in (
        ([], {}, r"prompt must be integers \[tokens\], at least one, got"),
        ([1.5], {}, r"prompt must be integers .* got float64\[1\]"),
        ([-1], {}, "prompt must be from 0 to 96, got -1"),
        ([5, 97], {}, "prompt must be from 0 to 96, got 97"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([5], {"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ([5], {"seed": -1}, "seed must be from 0 .* got -1"),
        ([5], {"seed": 1.5}, "seed must be an integer, got 1.5"),
        ([5], {"sampling": Sampling(None)}, "temperature must be a number, got None"),
        ([5], {"sampling": Sampling(top_k=2.5)}, "top_k must be an integer, got 2.5"),
        ([5], {"sampling": Sampling(-1.0)}, "temperature must be from 0.0 .* got -1.0"),
        ([5], {"sampling": Sampling(top_p=90)}, "top_p must be from 0.0 .* got 90"),
        ([5], {"sampling": Sampling(top_k=1 << 40)}, "top_k must be from 1 .* got"),
    ):
        given: dict[str, Any] = {"prompt": prompt, "max_new_tokens": 3, **options}
        with pytest.raises(ValueError, match=message):
            e.submit(**given)
    with pytest.raises(
        ValueError, match="tokens must be at most max_tokens=48, got 49"
    ):
        e.add_prefix(np.zeros(49, np.int32))
    e.submit([5], 3)
    with pytest.raises(ValueError, match="add_prefix must come before requests, got 1"):
        e.add_prefix([1, 2])


def test_a_prefix_leaves_room_for_the_longest_text() -> None:
    """What fits into the pool alone is not refused for a page that nobody shares."""
    begin, *ends = prompts(10, 3, 2)
    given = [np.concatenate([begin, end]) for end in ends]
    for pages, kept in ((8, 10), (7, 8)):  # of 4 tokens, of which 27 are stored
        e = engine(pages, max_tokens=28)
        prefix = serve.kept_prefix(given, 28, e)
        assert len(prefix) == kept
        e.add_prefix(prefix)
        requests = [e.submit(prompt, 28 - len(prompt)) for prompt in given]
        run(e)
        for request, prompt in zip(requests, given, strict=True):
            assert request.answer == alone(prompt, request.max_new_tokens)
    assert not len(serve.kept_prefix(given[:1], 28, e))
