"""Continuous batching: many texts written together over one pool of pages.

Lives here: `Request`, one text from prompt to answer, and `Engine`, which decides on
the host who reads, who writes and who waits, and runs the model on the device. Nothing
here knows text; `serve` does, and `llama_display` shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llama_model import MOST_NEW_TOKENS, Caches, Llama, Sampling, integer, step

from jax_flash import OutOfPagesError, PageAllocator
from jax_flash.cache import PageCopy

WAITING, READING, WRITING, DONE = "waiting", "reading", "writing", "done"
EVERYTHING = 1 << 20
"""A `top_k` that leaves every token."""


@dataclasses.dataclass(eq=False)
class Request:
    """A text to write; the engine changes it.

    Attributes:
      number: requests are numbered, and served, in the order in which they came.
      prompt: int32 [tokens].
      max_new_tokens: how long the answer may become.
      sampling: how its tokens are drawn, numbers.
      seed: of the draws. Token i takes `fold_in(key(seed), i)`, so that an answer does
        not depend on what else is written, when, and in which slot.
      ends: tokens that end the answer, and do not belong to it.
      answer: the tokens written so far.
      state: "waiting", "reading" its prompt, "writing" or "done".
      finish: why it is done: "end" (one of `ends`) or "length".
      shared: tokens that it found in the cache when it was last admitted.
      preemptions: how often it lost its pages to an older request.
      submitted: time at which it came, like the others of `time.perf_counter`.
      first_token: when it had one.
      finished: when it was done.
      drawn: how many tokens were drawn, one that is on its way to the host included.
      cached: how many of its tokens are in the cache.
      sequence: its number in the allocator, while it has pages.
      slot: its row in the batch, while it has one.
    """

    number: int
    prompt: np.ndarray
    max_new_tokens: int
    sampling: Sampling
    seed: int
    ends: frozenset[int]
    answer: list[int] = dataclasses.field(default_factory=list)
    state: str = WAITING
    finish: str | None = None
    shared: int = 0
    preemptions: int = 0
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None
    drawn: int = 0
    cached: int = 0
    sequence: int = -1
    slot: int = -1

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer, int32 [tokens]."""
        return np.concatenate([self.prompt, np.array(self.answer, np.int32)])

    def __lt__(self, other: Request) -> bool:
        return self.number < other.number


@dataclasses.dataclass
class Prefix:
    """Tokens that stay in the cache for requests that begin with them."""

    tokens: np.ndarray
    sequence: int
    cached: int = 0
    slot: int = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one call of the model does: R rows of up to T tokens, arrays of the host.

    Attributes:
      tokens: int32 [R, T]; negative: the token that was drawn last in the row's slot.
      counts: int32 [R], how many of them there are; 0: the row does nothing.
      lengths: int32 [R], tokens in the cache before.
      page_table: int32 [R, max_pages].
      slots: int32 [R], where the drawn token is kept; out of range: nowhere.
      seeds: uint32 [R] of the draws.
      numbers: int32 [R] of the draws.
      sampling: arrays [R].
    """

    tokens: Any
    counts: Any
    lengths: Any
    page_table: Any
    slots: Any
    seeds: Any
    numbers: Any
    sampling: Sampling


Call = tuple[dict[int, Request], jax.Array]
"""Requests by the rows that draw a token for them, and the tokens, on the device."""

Pools = tuple[list[jax.Array], list[jax.Array]]
"""Keys and values of each layer, [pages, page, K, H]."""


@functools.partial(
    jax.jit, static_argnames="structure", donate_argnames=("pools", "last")
)
def advance(
    structure: Any,
    weights: list[jax.Array],
    pools: Pools,
    last: jax.Array,
    batch: Batch,
) -> tuple[jax.Array, Pools, jax.Array]:
    """Reads the tokens of a batch and draws one behind each row.

    Args:
      structure: the tree of the model.
      weights: its leaves. To take a module apart costs milliseconds: once is enough.
      pools: donated.
      last: int32 [slots], tokens drawn last; donated.
      batch: what to do.

    Returns:
      The tokens drawn, int32 [R] (of rows without tokens they mean nothing), pools and
      last.
    """
    model = jax.tree.unflatten(structure, weights)
    kept = last[jnp.minimum(batch.slots, jnp.int32(len(last) - 1))]
    tokens = jnp.where(batch.tokens < 0, kept[:, None], batch.tokens)
    caches = Caches(*pools, lengths=batch.lengths, page_table=batch.page_table)
    logits, caches = step(model, tokens, batch.counts, caches)

    def draw(
        logits: jax.Array, seed: jax.Array, number: jax.Array, sampling: Sampling
    ) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
        return sampling.draw(logits[None], key)[0]

    drawn = jax.vmap(draw)(logits, batch.seeds, batch.numbers, batch.sampling)
    last = last.at[batch.slots].set(drawn, mode="drop")
    return drawn, (caches.k, caches.v), last


@functools.partial(jax.jit, donate_argnames="pools")
def copy_page(pools: Pools, source: jax.Array, target: jax.Array) -> Pools:
    """Copies one page of every layer."""
    caches = Caches(*pools, lengths=None, page_table=jnp.zeros((1, 1), jnp.int32))
    caches = caches.copy_pages(source[None], target[None])
    return caches.k, caches.v


class Engine:
    """Writes the answers of many requests at once.

    A request waits until there is a slot and there are pages for its prompt, in the
    order in which requests came: none overtakes another. It reads its prompt in chunks,
    while others write, then writes with them, a token each `step`, until it is done and
    its pages are free again. What it has in common with a prefix or with a text in the
    cache, from one page on, it neither reads nor stores again.

    A text gets pages as it grows. If there is none for the next token, the youngest
    text that has pages gives up its own: it waits again, keeps its answer, and reads it
    behind the prompt when its turn comes. So the oldest always goes on, and each
    request is done sometime, because `submit` refuses one that does not fit even alone.

    The model runs in two shapes, each compiled once: `read_rows` x `chunk` and `slots`
    x 1. The pools are donated; of each call only the drawn tokens come to the host,
    and a call is under way while those of the one before are looked at. So the device
    does not wait for the host, and draws a token too much where a text has ended.
    """

    def __init__(
        self,
        model: Llama,
        *,
        num_pages: int,
        page_size: int = 16,
        slots: int = 8,
        max_tokens: int | None = None,
        chunk: int = MOST_NEW_TOKENS,
        read_rows: int = 2,
    ) -> None:
        """An engine with an empty cache.

        Args:
          model: the model.
          num_pages: pages of the pool.
          page_size: tokens of a page.
          slots: texts that are written together.
          max_tokens: of one text, prompt and answer; None = as many as the pool and the
            model's context have room for.
          chunk: tokens of a prompt that are read at once, up to 64.
          read_rows: prompts that are read at once.
        """
        sizes = {"slots": slots, "chunk": chunk, "read_rows": read_rows}
        for name, size in sizes.items():
            if integer(name, size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if chunk > MOST_NEW_TOKENS:
            raise ValueError(f"chunk must be at most {MOST_NEW_TOKENS}, got {chunk}")
        self.allocator = PageAllocator(num_pages, page_size)
        most = min(num_pages * page_size, model.config.context)
        self.max_tokens = most if max_tokens is None else max_tokens
        if not 1 <= self.max_tokens <= most:
            raise ValueError(
                f"max_tokens must be from 1 to {most}, what the cache"
                f" ({num_pages * page_size}) and the model's context"
                f" ({model.config.context}) allow, got {max_tokens}"
            )
        self.vocabulary = model.config.vocabulary
        self.chunk = chunk
        self.read_rows = read_rows
        self.preemptions = 0
        self.copied_pages = 0
        self._max_pages = self._pages(self.max_tokens)
        self._weights, self._structure = jax.tree.flatten(model)
        caches = Caches.paged(model.config, num_pages, page_size, 1, 1)
        self._pools: Pools = (caches.k, caches.v)
        self._last = jnp.zeros(slots, jnp.int32)
        self._slots: list[Request | None] = [None] * slots
        self._waiting: list[Request] = []
        self._prefixes: list[Prefix] = []
        self._submitted = 0
        self._under_way: list[Call] = []
        self._changed: list[Request] = []

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests without pages, the next one first."""
        return tuple(sorted(self._waiting))

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests that read or write, the oldest first."""
        return tuple(sorted(r for r in self._slots if r is not None))

    @property
    def used_pages(self) -> int:
        """Pages that are in use."""
        return self.allocator.num_pages - self.allocator.free_pages

    @property
    def shared_pages(self) -> int:
        """Pages that more than one text uses."""
        pages = range(self.allocator.num_pages)
        return sum(self.allocator.owners(page) > 1 for page in pages)

    def warm_up(self) -> None:
        """Compiles what the engine runs, so that no request waits for it."""
        for rows, length in ((self.read_rows, self.chunk), (len(self._slots), 1)):
            self._advance(self._batch(rows, length))
        self._pools = copy_page(self._pools, np.int32(0), np.int32(0))
        jax.block_until_ready(self._pools)

    def add_prefix(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Reads tokens and keeps them, for requests that begin with them.

        Raises:
          ValueError: there are none, too many, or requests are on their way.
          OutOfPagesError: there is no room for them.
        """
        self._check_idle("add_prefix")
        tokens = self._checked("tokens", tokens)
        if len(tokens) > self.max_tokens:
            raise ValueError(
                f"tokens must be at most max_tokens={self.max_tokens}, got"
                f" {len(tokens)}"
            )
        source, shared = self._longest(tokens, self._prefixes)
        prefix = Prefix(tokens, self._store(tokens, source, shared), shared)
        while prefix.cached < len(tokens):
            self._read([(prefix, tokens)])
        self._prefixes.append(prefix)

    def clear_prefixes(self) -> None:
        """Frees what `add_prefix` keeps."""
        self._check_idle("clear_prefixes")
        while self._prefixes:
            self.allocator.free(self._prefixes.pop().sequence)

    def submit(
        self,
        prompt: Sequence[int] | np.ndarray,
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        ends: Collection[int] = (),
    ) -> Request:
        """A request for an answer.

        Args:
          prompt: tokens, at least one.
          max_new_tokens: of the answer, at least 1.
          sampling: numbers; None = the likeliest tokens.
          seed: of the draws, from 0 to 2^32 - 1.
          ends: tokens that end the answer.

        Raises:
          ValueError: an argument is wrong, or it does not fit, even with all other
            requests gone.
        """
        prompt = self._checked("prompt", prompt)
        max_new_tokens = integer("max_new_tokens", max_new_tokens)
        seed = integer("seed", seed)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {seed}")
        sampling = Sampling() if sampling is None else sampling
        sampling.check()
        total = len(prompt) + max_new_tokens
        request = f"a prompt of {len(prompt)} tokens with an answer of {max_new_tokens}"
        if total > self.max_tokens:
            raise ValueError(
                f"{request} has {total} tokens, more than max_tokens={self.max_tokens}"
            )
        _, shared = self._longest(prompt[:-1], self._prefixes)
        # The last token of an answer is not stored.
        needed = self._pages(total - 1) - shared // self.allocator.page_size
        kept = {p for x in self._prefixes for p in self.allocator.pages(x.sequence)}
        free = self.allocator.num_pages - len(kept)
        if needed > free:
            raise ValueError(
                f"{request} needs {needed} pages of {self.allocator.page_size} tokens,"
                f" and of all {self.allocator.num_pages} only {free} are ever free"
            )
        result = Request(
            number=self._submitted,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            ends=frozenset(ends),
        )
        self._submitted += 1
        heapq.heappush(self._waiting, result)
        return result

    def step(self) -> list[Request]:
        """Admits who can be, reads a chunk of prompts, and writes one token of texts.

        Returns:
          The requests that have a new token or are done, by what the step before drew.
        """
        self._admit()
        reading = [r for r in self.running if r.state == READING][: self.read_rows]
        # Before anything is read: a text that gives up its pages does not read.
        writing = self._grown([r for r in self.running if r.state == WRITING])
        reading = [r for r in reading if r.state == READING]
        calls: list[Call] = []
        if reading:
            drawn = self._read([(r, r.tokens) for r in reading])
            complete = {
                row: r for row, r in enumerate(reading) if r.cached == len(r.tokens)
            }
            if complete:
                calls.append((complete, drawn))
        if writing:
            calls.append((dict(enumerate(writing)), self._write(writing)))
        for requests, _ in calls:
            for request in requests.values():
                request.state = WRITING
                request.drawn += 1
        before, self._under_way = self._under_way, calls
        self._collect(before)
        if not (reading or writing):
            self._collect_all()
        changed, self._changed = self._changed, []
        return changed

    def _collect(self, calls: list[Call]) -> None:
        """Waits for calls, and gives the requests their tokens."""
        for requests, drawn in calls:
            tokens = np.asarray(drawn)  # all that ever comes to the host
            for row, request in requests.items():
                if request.state != DONE:  # else it ended before this draw
                    self._take(request, int(tokens[row]))
                    self._changed.append(request)

    def _collect_all(self) -> None:
        calls, self._under_way = self._under_way, []
        self._collect(calls)

    # --- who has a slot and pages

    def _admit(self) -> None:
        while self._waiting and None in self._slots:
            request = self._waiting[0]
            tokens = request.tokens
            # The last token is read in any case: it draws the next one.
            source, shared = self._longest(tokens[:-1], self._sources())
            needed = self._pages(len(tokens)) - shared // self.allocator.page_size
            # A page to grow for each text: else one of them would soon have to go.
            if needed + len(self.running) > self.allocator.free_pages:
                return
            heapq.heappop(self._waiting)
            request.sequence = self._store(tokens, source, shared)
            request.cached = request.shared = shared
            request.slot = self._slots.index(None)
            request.state = READING
            self._slots[request.slot] = request

    def _grown(self, requests: list[Request]) -> list[Request]:
        """Those of the requests, oldest first, that have room for one more token."""
        ready = []
        for request in requests:
            while request.state == WRITING and request.drawn < request.max_new_tokens:
                try:
                    copies = self.allocator.extend(request.sequence, 1)
                except OutOfPagesError:
                    if self._under_way:  # a text may turn out to be done
                        self._collect_all()
                    else:
                        self._preempt(self.running[-1])
                else:
                    self._copy(copies)
                    ready.append(request)
                    break
        return [request for request in ready if request.state == WRITING]

    def _preempt(self, request: Request) -> None:
        self._leave(request, WAITING)
        request.preemptions += 1
        self.preemptions += 1
        heapq.heappush(self._waiting, request)

    def _leave(self, request: Request, state: str) -> None:
        """Slot and pages are free again."""
        self.allocator.free(request.sequence)
        self._slots[request.slot] = None
        request.sequence = request.slot = -1
        request.cached = 0
        request.drawn = len(request.answer)
        request.state = state

    def _take(self, request: Request, token: int) -> None:
        """What a drawn token does to a request."""
        now = time.perf_counter()
        if token in request.ends:
            request.finish = "end"
        else:
            request.answer.append(token)
            if request.first_token is None:
                request.first_token = now
            if len(request.answer) == request.max_new_tokens:
                request.finish = "length"
        if request.finish is not None:
            request.finished = now
            self._leave(request, DONE)

    # --- what is in the cache

    def _sources(self) -> list[Prefix | Request]:
        return [*self._prefixes, *self.running]

    def _longest(
        self, tokens: np.ndarray, sources: Sequence[Prefix | Request]
    ) -> tuple[Prefix | Request | None, int]:
        """Who has most of the beginning of `tokens` in the cache, and how much.

        Less than a page is not worth a copy: it counts as nothing.
        """
        best, length = None, 0
        for source in sources:
            have = source.tokens  # a token on its way to the host is not among them
            size = min(source.cached, len(have), len(tokens))
            differ = np.flatnonzero(have[:size] != tokens[:size])
            same = int(differ[0]) if len(differ) else size
            if same > length and same >= self.allocator.page_size:
                best, length = source, same
        return best, length

    def _store(
        self, tokens: np.ndarray, source: Prefix | Request | None, shared: int
    ) -> int:
        """A sequence with room for tokens, of which `source` has the first `shared`."""
        if source is None:
            return self.allocator.alloc(len(tokens))
        sequence = self.allocator.fork(source.sequence, shared)
        try:
            self._copy(self.allocator.extend(sequence, len(tokens) - shared))
        except OutOfPagesError:
            self.allocator.free(sequence)
            raise
        return sequence

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for source, target in copies:
            self._pools = copy_page(self._pools, np.int32(source), np.int32(target))
            self.copied_pages += 1

    # --- calls of the model

    def _read(self, rows: list[tuple[Any, np.ndarray]]) -> jax.Array:
        """The next chunk of each row, a request or a prefix with its tokens."""
        batch = self._batch(self.read_rows, self.chunk)
        for row, (owner, tokens) in enumerate(rows):
            part = tokens[owner.cached : owner.cached + self.chunk]
            batch.tokens[row, : len(part)] = part
            self._fill(batch, row, owner, len(part))
        return self._advance(batch)

    def _write(self, requests: list[Request]) -> jax.Array:
        """One token of each request, the one that it drew last."""
        batch = self._batch(len(self._slots), 1)
        for row, request in enumerate(requests):
            batch.tokens[row] = -1
            self._fill(batch, row, request, 1)
        return self._advance(batch)

    def _batch(self, rows: int, length: int) -> Batch:
        """A batch that does nothing."""
        one = np.ones(rows, np.float32)
        return Batch(
            tokens=np.zeros((rows, length), np.int32),
            counts=np.zeros(rows, np.int32),
            lengths=np.zeros(rows, np.int32),
            page_table=np.full((rows, self._max_pages), -1, np.int32),
            slots=np.full(rows, len(self._slots), np.int32),
            seeds=np.zeros(rows, np.uint32),
            numbers=np.zeros(rows, np.int32),
            sampling=Sampling(
                0 * one, np.full(rows, EVERYTHING, np.int32), one.copy(), 0 * one
            ),
        )

    def _fill(self, batch: Batch, row: int, owner: Any, count: int) -> None:
        """Makes a row read `count` tokens of a request or prefix."""
        batch.counts[row] = count
        batch.lengths[row] = owner.cached
        table = self.allocator.page_table([owner.sequence], self._max_pages)
        batch.page_table[row] = table[0]
        owner.cached += count
        if isinstance(owner, Prefix):
            return
        batch.slots[row] = owner.slot
        batch.seeds[row] = owner.seed
        batch.numbers[row] = owner.drawn
        for name in ("temperature", "top_k", "top_p", "min_p"):
            value = getattr(owner.sampling, name)
            if value is not None:
                getattr(batch.sampling, name)[row] = value

    def _advance(self, batch: Batch) -> jax.Array:
        drawn, self._pools, self._last = advance(
            self._structure, self._weights, self._pools, self._last, batch
        )
        return drawn

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.allocator.page_size)

    def _check_idle(self, name: str) -> None:
        count = len(self._waiting) + len(self.running)
        if count:
            raise ValueError(f"{name} must come before requests, got {count} of them")

    def _checked(self, name: str, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(tokens)
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise ValueError(
                f"{name} must be integers [tokens], at least one, got"
                f" {array.dtype}{list(array.shape)}"
            )
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocabulary:
            raise ValueError(
                f"{name} must be from 0 to {self.vocabulary - 1}, got"
                f" {low if low < 0 else high}"
            )
        return array.astype(np.int32)
