"""What serve.py shows, on a terminal and in lines."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import llama_display
import llama_engine
import llama_helpers
import numpy as np
import pytest
from llama_display import Lines, Live, Meter, Texts, cut, printable
from llama_engine import Engine, Request

WORDS = ("one", " two", " three\n", " \x1b[2Jfour", " 五", ".")
TEXT = "".join(WORDS)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """It runs no model: the i-th token of an answer is i."""

    def advance(_: Any, weights: Any, pools: Any, last: Any, batch: Any) -> Any:
        return jnp.asarray(batch.numbers), pools, last

    monkeypatch.setattr(llama_engine, "advance", advance)
    return Engine(
        llama_helpers.random_model(), num_pages=10, page_size=4, slots=2, max_tokens=20
    )


def stream() -> Callable[[int | None], str]:
    return lambda token: "" if token is None else WORDS[token]


def serve(engine: Engine, display: Lines | Live, titles: dict[Request, str]) -> Meter:
    """Three requests, from beginning to end."""
    meter = Meter()
    requests = [engine.submit(np.arange(n), len(WORDS)) for n in (3, 12, 5)]
    titles.update({r: f"title {r.number}\t!" for r in requests})
    while engine.running or engine.waiting:
        changed = engine.step()
        meter.count(engine, len(changed))
        display.update(engine, requests, changed, meter)
        if requests[1].answer == [0, 1]:
            display.note("a\rnote")
    display.close()
    assert meter.tokens == 3 * len(WORDS)
    print(meter.summary(engine, requests))
    return meter


SUMMARY = (
    r"3 requests, 18 tokens in \S+ s: \S+ tokens/s; the first token after \S+ s"
    r" \(median\), \S+ s at most; at most (\d+) of 10 pages used; 0 of 20 prompt tokens"
    r" shared; 0 times put back"
)


def test_lines(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    serve(engine, Lines(Texts(stream), every=0.0), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("# a note") == 1
    own = [line[4:] for line in lines if line.startswith("[1] ")]
    assert own[:-1] == ["one two three", "  [2Jfour 五."]
    assert re.fullmatch(
        r"= 6 tokens \(length\), the first after \S+ s, \S+ s in all, 0 of 12 tokens"
        r" shared",
        own[-1],
    )
    states = [line for line in lines if re.match("# .* done", line)]
    assert re.fullmatch(
        r"# 0 done, 2 writing, 0 reading, 1 waiting; \S+ tokens/s, first token after"
        r" \S+ s; cache 5/10 pages \(50%\), 0 shared",
        states[1],
    )
    assert states[-1].startswith("# 3 done, 0 writing, 0 reading, 0 waiting; ")
    assert re.fullmatch(SUMMARY, lines[-1])


def test_long_lines_end_at_spaces(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a longer word " * 30
    request = engine.submit([1], 6)

    def step(token: int | None) -> str:
        return "" if token is None else words[70 * token :][:70]

    lines = Lines(Texts(lambda: step), every=1e9)
    while engine.running or engine.waiting:
        lines.update(engine, [request], engine.step(), Meter())
    shown = [x[4:] for x in capsys.readouterr().out.splitlines() if x[4] != "="]
    assert " ".join(shown) == words[: 6 * 70]
    assert 5 <= len(shown) <= 7


def test_the_last_line_has_what_was_left_of_a_character(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    request = engine.submit([1], 2)
    texts = Texts(lambda: lambda token: "�" if token is None else str(token))
    lines = Lines(texts, every=1e9)
    while engine.running or engine.waiting:
        lines.update(engine, [request], engine.step(), Meter())
    assert capsys.readouterr().out.splitlines()[0] == "[0] 01�"
    assert texts.of(request) == "01�"


def screen(text: str) -> list[str]:
    """What a terminal shows after a text: only what `Live` may send is understood."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[\d*[A-Za-z]|\n)", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif re.fullmatch(r"\x1b\[\d+F", part):
            row -= int(part[2:-1])
            assert row >= 0
        elif part == "\x1b[J":
            del lines[row + 1 :]
            lines[row] = ""
        elif not re.fullmatch(r"\x1b\[[01]m", part):
            assert "\x1b" not in part
            lines[row] += part
    return lines


@pytest.mark.parametrize("size", [(100, 30), (40, 4)])
def test_live(
    engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
) -> None:
    monkeypatch.setattr(
        shutil, "get_terminal_size", lambda *_, **__: os.terminal_size(size)
    )
    monkeypatch.setattr(llama_display, "REDRAW", 0.0)
    titles: dict[Request, str] = {}
    serve(engine, Live(Texts(stream), titles), titles)
    out = capsys.readouterr().out
    lines = screen(out)
    assert lines[0] == "a note"
    for number in range(3):
        at = lines.index(f"[{number}] title {number} !")
        assert lines[at + 1 : at + 3] == ["one two three", "  [2Jfour 五."]
        assert lines[at + 3].startswith("(6 tokens (length), the first after ")
    assert re.fullmatch(SUMMARY, lines[-2])
    assert len(lines) == 1 + 3 * 5 + 2
    # In between: the state, the cache, and a row for each text that runs.
    frames = [screen(x) for x in out.split("\x1b[J")]
    frame = next(x for x in frames if "[0] writing    1 one" in x)
    assert frame[0].startswith(
        "0 done, 2 writing, 0 reading, 1 waiting; "[: size[0] - 1]
    )
    assert all(len(line) < size[0] for line in frame)
    assert len(frame) - 1 == min(4, size[1] - 1)
    bar = "▓▓▓▓▓░░░░░" if size[0] == 100 else "▓▓▓░░░"
    assert frame[1] == f"cache 5/10 pages (50%), 0 shared {bar}"


def test_cut() -> None:
    assert cut("abcd", 3) == "abc"
    assert cut("abcd", 3, left=True) == "bcd"
    assert cut("五五", 3) == "五"
    assert cut("e\u0301e\u0301x", 2) == "e\u0301e\u0301"
    assert cut("abc", 0) == cut("", 5) == ""
    assert printable("a\tb\x1b[1m\nc", keep="\n") == "a b [1m\nc"
