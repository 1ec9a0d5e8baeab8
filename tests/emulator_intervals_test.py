"""The kernels with intervals, run on the CPU as in emulator_test.py."""

import ctypes
import shutil
from typing import Any

import interval_cases
import numpy as np
import pytest
from emulator_test import build, growing

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("mha_fwd_intervals", tmp_path_factory.mktemp("forward"))


@pytest.mark.parametrize("name", interval_cases.CASES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90(forward: ctypes.CDLL, width: int, name: str) -> None:
    check_forward(forward, (width, width), name)


@pytest.mark.parametrize("name", ["negative ids", "soft cap and slopes"])
@pytest.mark.parametrize("widths", [(40, 56), (128, 72)])
def test_forward_sm90_of_odd_widths(
    forward: ctypes.CDLL, widths: tuple[int, int], name: str
) -> None:
    check_forward(forward, widths, name)


def check_forward(library: ctypes.CDLL, widths: tuple[int, int], name: str) -> None:
    case = interval_cases.case(name)
    number = list(interval_cases.CASES).index(name) + widths[0] // 64
    dtype = ("bfloat16", "float16")[number % 2]
    arrays = interval_cases.operands(case.shape, widths, dtype)
    interval_cases.check_forward(
        library.mha_fwd_intervals_sm90, case, arrays, 1 + number % 3
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"options": {"softcap": 600.0}},
    "slopes": {"slopes": np.array([[0.05]])},
    "both": {"options": {"softcap": 600.0}, "slopes": np.array([[0.05]])},
}


@pytest.mark.parametrize(
    ("jump", "options"),
    [(5, "plain"), (30, "plain"), (100, "plain")]
    + [(jump, name) for jump in (30, 100) for name in OPTIONS if name != "plain"],
)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90_of_growing_scores(
    forward: ctypes.CDLL, width: int, jump: float, options: str
) -> None:
    """Scores that leave the range of the first tile's maximum, and overflow."""
    dead = np.arange(170) % 5 == 2
    case = interval_cases.of_options(
        (1, 170, 600, 1, 1), np.where(dead, -1, 0), rest=OPTIONS[options]
    )
    arrays = interval_cases.operands(case.shape, (width, width), "bfloat16")
    arrays["query"][..., 0] = 32
    shift = growing(600, jump) * width**0.5 / 32
    arrays["key"][..., 0] = shift[None, :, None]
    interval_cases.check_forward(forward.mha_fwd_intervals_sm90, case, arrays, 1)
