"""Shows what an engine does: a block on a terminal, drawn again and again, or lines.

Lives here: `Texts`, from tokens to text as it grows; `Meter`, speeds; and the two
displays, `Live` and `Lines`.
"""

from __future__ import annotations

import collections
import shutil
import statistics
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence

from llama_engine import DONE, READING, WAITING, WRITING, Engine, Request

WINDOW = 3.0
"""Seconds over which the current speed is measured."""
REDRAW = 0.05
"""Seconds between two drawings of `Live`."""
LONGEST = 72
"""Characters after which a line of `Lines` ends at the next space."""


def printable(text: str, keep: str = "") -> str:
    """Text without what could move the cursor, and with `keep` as it is."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


def cut(text: str, columns: int, *, left: bool = False) -> str:
    """As much of a line as fits, the end of it if `left`."""
    kept: list[str] = []
    for c in reversed(text) if left else text:
        wide = unicodedata.east_asian_width(c) in "WF"
        columns -= 0 if unicodedata.combining(c) else 1 + wide
        if columns < 0:
            break
        kept.append(c)
    return "".join(reversed(kept) if left else kept)


class Texts:
    """The answers as text."""

    def __init__(self, stream: Callable[[], Callable[[int | None], str]]) -> None:
        """`stream` begins a text: from each of its tokens to the text it completes.

        None, behind the last token, gives what is left of it.
        """
        self._stream = stream
        self._open: dict[Request, tuple[Callable[[int | None], str], int]] = {}
        self._text: dict[Request, str] = {}

    def of(self, request: Request) -> str:
        """The answer so far."""
        return self._text.get(request, "")

    def grow(self, request: Request) -> str:
        """What has come since the last call."""
        step, seen = self._open.get(request) or (self._stream(), 0)
        new = "".join(step(token) for token in request.answer[seen:])
        if request.state == DONE:
            new += step(None)
        self._open[request] = step, len(request.answer)
        self._text[request] = self.of(request) + new
        return new


class Meter:
    """Tokens a second, and seconds to the first token."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.tokens = 0
        self.most_pages = 0
        self._recent: collections.deque[tuple[float, int]] = collections.deque()

    def count(self, engine: Engine, tokens: int) -> None:
        """A step that made so many tokens."""
        now = time.perf_counter()
        self.tokens += tokens
        self.most_pages = max(self.most_pages, engine.used_pages)
        self._recent.append((now, tokens))
        while self._recent[0][0] < now - WINDOW:
            self._recent.popleft()

    def speed(self) -> float:
        """Tokens a second, lately."""
        now = time.perf_counter()
        return sum(n for _, n in self._recent) / max(
            min(WINDOW, now - self.start), 1e-9
        )

    def summary(self, engine: Engine, requests: Sequence[Request]) -> str:
        """What all of it took."""
        seconds = time.perf_counter() - self.start
        waits = first_tokens(requests)
        read = sum(len(r.prompt) for r in requests)
        first = (
            f"the first token after {statistics.median(waits):.2f} s (median),"
            f" {max(waits):.2f} s at most; "
            if waits
            else ""
        )
        return (
            f"{len(requests)} requests, {self.tokens} tokens in {seconds:.2f} s:"
            f" {self.tokens / seconds:.1f} tokens/s; {first}"
            f"at most {self.most_pages} of {engine.allocator.num_pages} pages used;"
            f" {sum(r.shared for r in requests)} of {read} prompt tokens shared;"
            f" {engine.preemptions} times put back"
        )


def first_tokens(requests: Sequence[Request]) -> list[float]:
    """Seconds to the first token, of those that have one."""
    return [r.first_token - r.submitted for r in requests if r.first_token is not None]


def state(requests: Sequence[Request], meter: Meter) -> str:
    """How many do what, and how fast."""
    counts = collections.Counter(r.state for r in requests)
    waits = first_tokens(requests)
    first = f", first token after {statistics.median(waits):.2f} s" if waits else ""
    return (
        f"{counts[DONE]} done, {counts[WRITING]} writing, {counts[READING]} reading,"
        f" {counts[WAITING]} waiting; {meter.speed():.1f} tokens/s{first}"
    )


def cache(engine: Engine) -> str:
    """How much of the cache is used."""
    pages, used = engine.allocator.num_pages, engine.used_pages
    return (
        f"cache {used}/{pages} pages ({100 * used // pages}%),"
        f" {engine.shared_pages} shared"
    )


def ending(request: Request) -> str:
    """How a request went, once it is done."""
    assert request.finished is not None
    waits = first_tokens([request])
    return (
        f"{len(request.answer)} tokens ({request.finish})"
        + "".join(f", the first after {x:.2f} s" for x in waits)
        + f", {request.finished - request.submitted:.2f} s in all"
        + f", {request.shared} of {len(request.prompt)} tokens shared"
        + f", put back {request.preemptions} times" * (request.preemptions > 0)
    )


class Lines:
    """A line for everything that happens: for files and pipes."""

    def __init__(self, texts: Texts, every: float = 2.0) -> None:
        self._texts = texts
        self._every = every
        self._next = time.perf_counter() + every
        self._pending: dict[Request, str] = {}

    def update(
        self,
        engine: Engine,
        requests: Sequence[Request],
        changed: Sequence[Request],
        meter: Meter,
    ) -> None:
        """After each step: lines that are complete, who is done, and how it goes."""
        for request in changed:
            text = self._pending.get(request, "") + self._texts.grow(request)
            self._pending[request] = self._shown(request, text)
            if request.state == DONE:
                self._line(request, self._pending.pop(request))
                self._line(request, f"= {ending(request)}")
        if time.perf_counter() >= self._next:
            self._next = time.perf_counter() + self._every
            print(f"# {state(requests, meter)}; {cache(engine)}", flush=True)

    def note(self, text: str) -> None:
        """A line of one's own."""
        print(f"# {printable(text)}", flush=True)

    def close(self) -> None:
        """There is nothing to clear."""

    def _shown(self, request: Request, text: str) -> str:
        """Shows complete lines, returns the rest."""
        *lines, text = text.split("\n")
        for line in lines:
            self._line(request, line)
        end = text.rfind(" ", 0, LONGEST) if len(text) > LONGEST else -1
        if end > 0:
            self._line(request, text[:end])
            text = text[end + 1 :]
        return text

    def _line(self, request: Request, text: str) -> None:
        if text.strip():
            print(f"[{request.number}] {printable(text)}", flush=True)


class Live:
    """A block at the bottom of the terminal; answers scroll away above it when done."""

    def __init__(self, texts: Texts, titles: dict[Request, str]) -> None:
        self._texts = texts
        self._titles = titles
        self._height = 0
        self._drawn = 0.0

    def update(
        self,
        engine: Engine,
        requests: Sequence[Request],
        changed: Sequence[Request],
        meter: Meter,
    ) -> None:
        """After each step; draws at most 20 times a second."""
        done = []
        for request in changed:
            self._texts.grow(request)
            if request.state == DONE:
                done.append(request)
        now = time.perf_counter()
        if not done and now - self._drawn < REDRAW:
            return
        self._drawn = now
        size = shutil.get_terminal_size()
        block = [state(requests, meter), self._bar(engine, size.columns - 1)]
        block += [self._row(request, size.columns - 1) for request in engine.running]
        above = [self._answer(request) for request in done]
        block = [cut(line, size.columns - 1) for line in block][: size.lines - 1]
        sys.stdout.write(self._clear() + "".join(f"{x}\n" for x in [*above, *block]))
        sys.stdout.flush()
        self._height = len(block)

    def note(self, text: str) -> None:
        """A line of one's own, above the block."""
        self.close()
        print(printable(text), flush=True)

    def close(self) -> None:
        """Takes the block away."""
        sys.stdout.write(self._clear())
        sys.stdout.flush()
        self._height = 0

    def _clear(self) -> str:
        return f"\x1b[{self._height}F\x1b[J" if self._height else ""

    def _bar(self, engine: Engine, columns: int) -> str:
        """Use of the cache, and a character for so many pages."""
        head, pages = cache(engine), engine.allocator.num_pages
        width = max(0, min(pages, columns - len(head) - 1))
        full = engine.used_pages * width // pages
        shared = engine.shared_pages * width // pages
        return f"{head} {'█' * shared}{'▓' * (full - shared)}{'░' * (width - full)}"

    def _row(self, request: Request, columns: int) -> str:
        head = f"[{request.number}] {request.state} {len(request.answer):4d} "
        text = printable(self._texts.of(request)) or printable(self._titles[request])
        return head + cut(text, max(columns - len(head), 0), left=True)

    def _answer(self, request: Request) -> str:
        title = printable(self._titles[request])
        text = printable(self._texts.of(request), keep="\n").strip()
        return (
            f"\x1b[1m[{request.number}] {title}\x1b[0m\n{text}\n({ending(request)})\n"
        )
