"""`python -m jax_flash info`, `bench` and `demo`."""

import importlib.metadata
import re
import subprocess
import sys

import jax
import pytest

import jax_flash
from jax_flash.__main__ import main
from jax_flash._src import registry

SHAPE = ["--shape", "2,128,256,8,2,64"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"jax_flash  {jax_flash.__version__}" in text
    assert f"jax        {jax.__version__}" in text
    assert "python " in text
    assert "kernels " in text
    assert "device     0: cpu" in text


def test_info_of_a_shape(capsys: pytest.CaptureFixture[str], kernels: None) -> None:
    assert main(["info", *SHAPE, "--causal", "--window", "100,none", "--lengths"]) == 0
    text = capsys.readouterr().out
    assert "query bfloat16[2,128,8,64], key bfloat16[2,256,2,64]" in text
    assert "window_size=(100, None)" in text
    assert "query_seq_lengths int32[2]" in text
    assert "mha_fwd sm80 bf16: widths 32x32 64x64" in text
    assert "mha_fwd sm90 bf16: widths 64x64 96x96" in text
    assert "FORCE_SM80" not in text
    assert "  cuda  can run it on cuda: sm90 64x64 on compute capability 9.0, " in text
    assert "  cudnn no: query_seq_lengths" in text


def test_info_of_a_forced_family(capsys: pytest.CaptureFixture[str]) -> None:
    with registry.assume_kernels(force_sm80=True):
        assert main(["info", *SHAPE]) == 0
    text = capsys.readouterr().out
    assert "JAX_FLASH_FORCE_SM80=1: sm90 is not used" in text
    assert "  cuda  can run it on cuda: sm80 64x64; gradients by sm80 64x64\n" in text


def test_value_width_dtype_and_implementation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--dtype", "f32", "--implementation", "cudnn,xla", "--return-lse"]
    assert main(["info", "--shape", "2,128,256,8,2,64,32", *options]) == 0
    text = capsys.readouterr().out
    assert "value float32[2,256,2,32]" in text
    assert "cudnn no: query of dtype float32" in text
    assert "  cuda  xla" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "1,2,3"], "--shape must be B,T,S,N,K,H .*got '1,2,3'"),
        (["--shape", "a,b,c,d,e,f"], "--shape must be"),
        ([*SHAPE, "--window", "x"], "--window must be LEFT,RIGHT, got 'x'"),
        ([*SHAPE, "--window", "1"], r"window_size .*\(1,\)"),
        ([*SHAPE, "--implementation", "triton"], "implementation must be .*'triton'"),
        ([*SHAPE, "--precision", "high"], "precision must be .*got 'high'"),
        (["--shape", "2,128,256,8,3,64"], "N=8 and K=3"),
        (["--shape", ""], "--shape must be .*got ''"),
        (["--shape", "2,16,-16,4,2,64"], "--shape must be .*got '2,16,-16,4,2,64'"),
        (
            ["--causal", "--return-lse", "--dtype", "f32"],
            "--shape must be given with --dtype, --causal, --return-lse",
        ),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["info", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert re.search(message, captured.err)


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "2,16,16,4,2,8", "--dtype", "f32"]
    options = ["--causal", "--lengths", "--return-lse", "--seconds", "0.001"]
    assert main(["bench", *shape, *options]) == 0
    text = capsys.readouterr().out
    assert "query float32[2,16,4,8]" in text
    assert "is_causal=True" in text
    rows = re.findall(r"^(\w+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == ["xla"]
    assert all(float(x) > 0 for x in rows[0][1:])
    assert main(["bench", "--shape", "1,2"]) == 2
    capsys.readouterr()
    for seconds in ("nan", "inf", "0", "-1"):
        assert main(["bench", *shape, "--seconds", seconds]) == 2
        assert "--seconds must be positive, got" in capsys.readouterr().err
    assert main(["bench", *shape, "--implementation", "cudnn"]) == 2
    captured = capsys.readouterr()
    assert "cpu   nothing" in captured.out
    assert "--implementation cudnn cannot run it on cpu" in captured.err


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    text = capsys.readouterr().out
    errors = dict(re.findall(r"^(\w+).* off by (.*)$", text, re.MULTILINE))
    assert float(errors.pop("sample")) < 0.03
    assert len(errors) == 6
    assert all(float(x) < 2e-6 for x in errors.values())


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "jax_flash", "info", *SHAPE]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "runs on" in done.stdout


def test_version() -> None:
    try:
        installed = importlib.metadata.version("jax_flash")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert installed == jax_flash.__version__
