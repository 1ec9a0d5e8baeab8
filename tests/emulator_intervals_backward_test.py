"""The backward kernels with intervals, run on the CPU as in emulator_test.py."""

import ctypes
import itertools
import shutil

import interval_cases
import numpy as np
import pytest
from emulator_test import build

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def backward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("mha_bwd_intervals", tmp_path_factory.mktemp("backward"))


WIDTHS = {(64, 64): 64, (128, 128): 128, (40, 56): 64, (72, 120): 128, (256, 256): 256}
"""Widths of queries and of values, and of the kernel that they get."""


@pytest.mark.parametrize("name", interval_cases.CASES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_backward_sm90(
    backward: ctypes.CDLL, widths: tuple[int, int], name: str
) -> None:
    case = interval_cases.case(name)
    number = list(interval_cases.CASES).index(name) + list(WIDTHS).index(widths)
    dtype = ("bfloat16", "float16")[number % 2]
    ways = list(itertools.product((False, True), repeat=3))
    with_dlse, f32_results, deterministic = ways[number % len(ways)]
    results, expected = interval_cases.run_backward(
        backward.mha_bwd_intervals_sm90,
        case,
        widths,
        dtype,
        WIDTHS[widths],
        with_dlse=with_dlse,
        f32_results=f32_results,
        deterministic=deterministic,
        # Thread blocks run one after another: none may wait for a later one.
        multiprocessors=1 if deterministic else 1 + number % 3,
    )
    interval_cases.check_gradients(results, expected, dtype)
