"""examples/llama/serve.py as a user starts it, with the weights of SmolLM2."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable

import generate
import llama_helpers
import pytest
import serve
from examples_test import run_python
from llama_tokenizer import from_metadata

SERVE = "examples/llama/serve.py"


def test_eight_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In four slots and scarce pages; every answer is checked against it alone."""
    llama_helpers.smollm2()
    # It compiles much and computes little.
    flags = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out = run_python(SERVE, "--check", "--tokens", "12", "--pages", "12")
    assert "8 of 8 answers equal those of one prompt at a time" in out
    assert re.search(r"^\[0\] .*\bFrance\b", out, re.M), out
    ends = re.findall(
        r"^\[(\d)\] = \d+ tokens \((?:end|length)\), the first after \S+ s,"
        r" \S+ s in all, (\d+) of \d+ tokens shared",
        out,
        re.M,
    )
    assert sorted(number for number, _ in ends) == list("01234567")
    assert all(int(shared) >= 30 for _, shared in ends)
    summary = re.search(
        r"^8 requests, \d+ tokens in \S+ s: \S+ tokens/s; the first token after \S+ s"
        r" \(median\), \S+ s at most; at most (\d+) of 12 pages used;",
        out,
        re.M,
    )
    assert summary is not None, out
    assert int(summary[1]) > 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "needs --tokens >= 1, got 0"),
        (["--chunk", "65"], "needs --chunk <= 64, got 65"),
        (["--every", "-1"], "needs --every >= 0, got -1.0"),
        (["--temperature", "-1"], "needs --temperature from 0.0 to inf, got -1.0"),
        (["--top-p", "90"], "needs --top-p from 0.0 to 1.0, got 90.0"),
        (["--top-k", "2147483648"], "needs --top-k from 1 to 2147483647, got"),
        (["--min-p", "nan"], "needs --min-p from 0.0 to 1.0, got nan"),
        (["--seed", str(1 << 64)], "needs --seed from 0 to 4294967295, got 1844674"),
        (["--check", "--temperature", "1"], "it needs --temperature 0"),
        (["--file", "EMPTY"], "no prompts in"),
        (["--file", "NOWHERE"], "--file NOWHERE cannot be read: [Errno 2]"),
        (["--file", "LATIN"], "cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        (["--file", "EMPTY", "Hi"], "give prompts or --file, not both"),
    ],
)
def test_nonsense(
    options: list[str],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty, latin = tmp_path / "prompts.txt", tmp_path / "latin.txt"
    empty.write_text("\n")
    latin.write_bytes("é".encode("latin-1"))
    files = {"EMPTY": str(empty), "LATIN": str(latin)}
    given = [files.get(option, option) for option in options]
    monkeypatch.setattr(sys, "argv", ["serve.py", *given])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert message in capsys.readouterr().err


def test_a_prompt_a_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other characters that separate something stay where they are."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\ftwo\r\n\n \nthree\u2028four\n".encode())
    monkeypatch.setattr(sys, "argv", ["serve.py", "--file", str(file)])
    assert serve.parse_arguments().prompts == ["one\ftwo", "three\u2028four"]


@pytest.mark.parametrize("main", [serve.main, generate.main])
def test_what_is_no_prompt(
    main: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template refuses it, or its bytes were not UTF-8: a message, no traceback."""
    metadata = llama_helpers.tokenizer_metadata()
    for template, prompt, message in (
        ("{{ raise_exception('no chat') }}", "Hi", "the chat template refuses .* no"),
        (llama_helpers.CHAT_TEMPLATE, "\udcff", r"text must be UTF-8, got .*\\udcff"),
    ):
        metadata["tokenizer.chat_template"] = template
        loaded = llama_helpers.random_model(), from_metadata(metadata)
        for module in (serve, generate):
            monkeypatch.setattr(module, "load_or_exit", lambda *_, x=loaded: x)
        monkeypatch.setattr(sys, "argv", ["main.py", prompt, "--model", "any"])
        with pytest.raises(SystemExit, match=message):
            main()
