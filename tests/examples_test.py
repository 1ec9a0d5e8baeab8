"""The examples and the benchmark run as a user starts them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import jax_flash

ROOT = pathlib.Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def run_python(*arguments: str, status: int = 0) -> str:
    """Runs Python in the repository with the package under test; returns stdout."""
    package = pathlib.Path(jax_flash.__file__).parents[1]
    # Warnings are errors in tests, and in the programs that tests start.
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_quickstart() -> None:
    out = run_python("examples/quickstart.py")
    assert "output   (2, 256, 8, 64)" in out
    assert "vmap     (4, 2, 256, 8, 64)" in out
    assert "past the end: 0.0" in out


def test_train_lm(tmp_path: pathlib.Path) -> None:
    chart = tmp_path / "loss.png"
    options = ["--steps", "4", "--generate", "8", "--vocabulary", "300"]
    out = run_python("examples/train_lm.py", *options, "--out", str(chart))
    losses = re.search(r"held-out loss (\S+) at the start, (\S+) at the end", out)
    assert losses is not None, out
    assert float(losses[2]) < float(losses[1])
    assert "attention runs by" in out
    assert "\nThe statement" in out
    assert chart.read_bytes().startswith(PNG)


def test_train_lm_rejects_nonsense() -> None:
    out = run_python("examples/train_lm.py", "--steps", "0", status=2)
    assert "--steps >= 1" in out
    out = run_python("examples/train_lm.py", "--implementation", "fast", status=2)
    assert "invalid choice: 'fast'" in out
    out = run_python("examples/train_lm.py", "--implementation", "cudnn", status=1)
    assert "no attention for this cpu device" in out
    assert "Traceback" not in out


def test_train_lm_checks_the_chart_before_it_trains(tmp_path: pathlib.Path) -> None:
    absent = tmp_path / "absent" / "loss.png"
    for path in (absent, tmp_path, tmp_path / "loss.nothing"):
        out = run_python("examples/train_lm.py", "--out", str(path), status=2)
        assert f"--out {path} cannot be written: " in out
        assert "attention runs by" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_generate(temperature: str) -> None:
    options = ["--steps", "8", "--generate", "24", "--vocabulary", "300"]
    out = run_python("examples/generate.py", *options, "--temperature", temperature)
    assert "all tokens equal those of full recomputation" in out
    assert re.search(r"96 tokens in \S+ s, \d+ tokens/s", out), out
    assert "caches donated: True" in out
    assert "\nA class definition is|" in out


def test_generate_rejects_nonsense() -> None:
    out = run_python("examples/generate.py", "--temperature", "-1", status=2)
    assert "--temperature >= 0" in out


@pytest.mark.parametrize(
    "program",
    ["examples/generate.py", "examples/train_lm.py", "-mbenchmarks.train_step"],
)
@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_beyond_32_bits(program: str, seed: int) -> None:
    """JAX fails with more than 64, and drops what is beyond 32."""
    out = run_python(program, "--seed", str(seed), status=2)
    assert f"needs --seed from 0 to 4294967295, got {seed}" in out


def test_tests_of_llama_are_skipped_without_its_packages() -> None:
    program = (
        "import pytest, sys; sys.modules['gguf'] = None; "
        "sys.exit(pytest.main(['--collect-only', '-rs', '-p', 'no:cacheprovider', "
        "'tests/llama_engine_test.py', 'tests/examples_test.py::test_llama']))"
    )
    out = run_python("-c", program)
    assert "could not import 'gguf'" in out
    assert "1 test collected" in out, out


def test_llama(tmp_path: pathlib.Path) -> None:
    for name in ("gguf", "jinja2", "safetensors", "tokenizers", "tqdm"):
        pytest.importorskip(name)
    import llama_helpers

    file = tmp_path / "tiny.gguf"
    metadata = llama_helpers.tokenizer_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    config = dataclasses.replace(llama_helpers.TINY, vocabulary=size, context=64)
    llama_helpers.write_gguf(file, llama_helpers.random_model(config), metadata)
    options = ["--model", str(file), "--tokens", "6", "--chunk", "8"]
    out = run_python("examples/llama/generate.py", "hello", *options)
    assert re.search(r"^\d+ tokens read, [1-6] written: ", out, re.MULTILINE), out
    assert "float32, paged cache" in out


def test_llama_benchmark_smoke(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It compiles much and computes little.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    results = tmp_path / "llama.json"
    # Machines with a GPU have jax, flax and numpy.
    absent = ("gguf", "safetensors", "tokenizers", "jinja2", "tqdm")
    program = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({absent}); "
        "runpy.run_module('benchmarks.llama', run_name='__main__', alter_sys=True)"
    )
    out = run_python("-c", program, "--smoke", "--json", str(results))
    rows = json.loads(results.read_text())["rows"]
    found = {(row["cell"], row["arm"]) for row in rows}
    decoded = {("decode b2 n128", arm) for arm in ("jax_flash", "jax_nn", "paged")}
    read = {("prefill b1 n64", arm) for arm in ("jax_flash", "jax_nn")}
    assert found == decoded | read, out
    assert all(row["ms"] > 0 and row["bound_ms"] > 0 for row in rows)
    assert re.search(r"^decode b2 n128 +paged .* times as fast$", out, re.M), out
    assert re.search(r"^prefill b1 n64 +jax_flash .* times as fast$", out, re.M), out


def test_benchmark_smoke(tmp_path: pathlib.Path) -> None:
    results, chart = tmp_path / "smoke.json", tmp_path / "smoke.png"
    options = ["--smoke", "--check", "--rounds", "2", "--seconds", "0.002"]
    arms = ["--arms", "jax_flash_xla,xla,torch_fa2,fa3_dew"]
    out = run_python(
        "-m", "benchmarks.bench", *options, *arms, "--idle", "0", "--out", str(results)
    )
    assert re.search(r"d32 n64 h4/2 causal( +[\d.e-]+)+", out), out
    assert re.search(r"^  no torch_fa2: (needs|grouped)", out, re.M), out
    assert re.search(r"^no fa3_dew in 2 of 2 cells: needs", out, re.M), out
    data = json.loads(results.read_text())
    assert {"device", "commit", "date", "command", "versions"} <= set(data)
    for result in data["results"]:
        assert {"jax_flash_xla", "xla"} <= set(result["arms"])
        assert result["arms"]["xla"]["tflops"] > 0
        assert result["arms"]["xla"]["wall"]["samples"] == 2
        assert result["checked"]
    run_python("-m", "benchmarks.plot", str(results), str(chart))
    assert chart.read_bytes().startswith(PNG)


def test_train_step_smoke() -> None:
    options = ["--smoke", "--steps", "6", "--turn", "2"]
    out = run_python("-m", "benchmarks.train_step", *options)
    losses = re.findall(r"^(\w+) +\S+ ms a step .* loss (\S+) to (\S+)$", out, re.M)
    assert [name for name, _, _ in losses] == ["xla", "jax_nn"], out
    assert all(float(last) < float(first) for _, first, last in losses)
    parted = re.search(r"losses of 6 steps part by (\S+) nats at most", out)
    assert parted is not None
    assert float(parted[1]) < 1e-3


def test_train_step_rejects_nonsense() -> None:
    options = ["--smoke", "--arms", "xla,xla"]
    out = run_python("-m", "benchmarks.train_step", *options, status=2)
    assert "--arms must be two implementations" in out


def test_benchmark_cells() -> None:
    names = run_python("-m", "benchmarks.bench", "--list").split("\n")
    assert {"d64 n512", "d128 n4096 causal", "d256 n16384"} <= set(names)


@pytest.mark.parametrize("option", [["--arms", "nobody"], ["--frobnicate"]])
def test_benchmark_rejects_nonsense(option: list[str]) -> None:
    assert option[-1] in run_python("-m", "benchmarks.bench", *option, status=2)
