"""The kernels under compute-sanitizer, on small shapes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sanitizer_script.py")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # One allocation for each buffer, so that memcheck sees its end.
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    command = [
        sanitizer,
        f"--tool={tool}",
        "--kernel-name=kernel_substring=mha_fwd_kernel",
        "--error-exitcode=9",
        sys.executable,
        str(SCRIPT),
    ]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-4000:]
    assert "0 errors" in report or "0 hazards" in report, report[-4000:]
    assert "kernel calls: 48" in report, report[-4000:]
