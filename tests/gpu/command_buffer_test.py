"""The kernels inside CUDA graphs, XLA's command buffers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import command_buffer_script

SCRIPT = Path(command_buffer_script.__file__)
FLAGS = (
    "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL",
    "--xla_gpu_graph_min_graph_size=1",
)
# Not "... thunk as a regular thunk sequence".
EXECUTED = re.compile("Execute command buffer(?! thunk)|Launch command buffer")


def test_lengths_change_between_replays() -> None:
    environment = os.environ | {
        "XLA_FLAGS": " ".join(FLAGS),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Each execution of a graph is logged.
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "command_buffer_thunk=3,cuda_command_buffer=3",
    }
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    log = result.stderr
    assert result.returncode == 0, log[-4000:]
    assert f"correct calls: {command_buffer_script.CALLS}" in result.stdout
    graphs = [
        i
        for i in range(command_buffer_script.CALLS)
        if EXECUTED.search(between(log, i))
    ]
    # XLA may run a program once or twice before it makes a graph of it.
    expected = range(2, command_buffer_script.CALLS)
    assert set(graphs) >= set(expected), f"graphs in calls {graphs}\n{log[-4000:]}"


def between(log: str, call: int) -> str:
    """What was logged during a call."""
    match = re.search(f"call {call} begins\n(.*)call {call} ends\n", log, re.DOTALL)
    assert match is not None, log[-4000:]
    return match.group(1)
