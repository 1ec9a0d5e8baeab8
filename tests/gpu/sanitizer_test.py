"""The kernels under compute-sanitizer, on small shapes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitizer_script

from jax_flash._src import registry

SCRIPT = Path(sanitizer_script.__file__)
# In the names of the kernels to check. A backward has three, and runs after a forward.
KERNELS = {
    "mha_fwd": "mha_fwd_kernel",
    "mha_bwd": "bwd",
    "mha_fwd_intervals": "mha_fwd_kernel",
    "mha_bwd_intervals": "bwd",
    "intervals": "interval_",  # what runs before them, on mask and order
    "decode": "decode",
    "sample": "sample_kernel",
    "top_k": "top_k_kernel",
    "rms_norm": "rms_norm",
    "rope_append": "rope_append",
}
FAMILIES = [
    (op, family)
    for op in KERNELS
    for family in (("chosen", "sm80") if op.startswith("mha") else ("chosen",))
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize(("op", "family"), FAMILIES)
def test_sanitizer(op: str, tool: str, family: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # One allocation for each buffer, so that memcheck sees its end.
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    # Programs of many kernels become CUDA graphs, in which the tool crashes.
    flags = os.environ.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
    if family == "sm80":
        environment["JAX_FLASH_FORCE_SM80"] = "1"
    elif registry.extension().force_sm80:
        pytest.skip("the environment chooses sm80, too")
    command = [
        sanitizer,
        f"--tool={tool}",
        f"--kernel-name=kernel_substring={KERNELS[op]}",
        "--error-exitcode=9",
        sys.executable,
        str(SCRIPT),
        op,
    ]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500
    )
    # What comes first says most; stacks of the host follow each error.
    lines = (result.stdout + result.stderr).splitlines()
    report = "\n".join(line for line in lines if "Host Frame" not in line)
    assert result.returncode == 0, report[:6000]
    assert "0 errors" in report or "0 hazards" in report, report[-4000:]
    count = sum(1 for _ in sanitizer_script.CALLS[op]())
    assert f"kernel calls: {count}" in report, report[-4000:]
