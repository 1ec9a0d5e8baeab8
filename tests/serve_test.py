"""examples/llama/serve.py as a user starts it, with the weights of SmolLM2."""

from __future__ import annotations

import pathlib
import re
import sys

import llama_helpers
import pytest
import serve
from examples_test import run_python

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
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n")
    given = [str(empty) if option == "EMPTY" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["serve.py", *given])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert message in capsys.readouterr().err
