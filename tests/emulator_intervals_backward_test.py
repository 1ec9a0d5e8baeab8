"""The backward kernels with intervals, run on the CPU as in emulator_test.py."""

import ctypes
import itertools
import shutil

import interval_cases
import interval_checks
import numpy as np
import pytest
from emulated import TOLERANCES, build, check_gradients

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def backward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("mha_bwd_intervals", tmp_path_factory.mktemp("backward"))


@pytest.mark.parametrize("name", interval_cases.CASES)
def test_backward_sm90(backward: ctypes.CDLL, name: str) -> None:
    check_backward(backward, (64, 64), 64, name)


@pytest.mark.parametrize(
    "name",
    [
        "one id",
        "dead rows in clean tiles",
        "negative ids",
        "unsorted ids, causal, wide",
        "packed, causal",
        "documents of whole tiles, causal",
        "documents of whole tiles, window",
        "soft cap and slopes",
        "small soft cap",
        "soft cap that some scores pass",
        "slopes, later keys",
        "mask",
        "bias",
        "bias in f32, shared by rows",
        "bias, mask and dropout",
        "gradient of slopes",
        "bias, soft cap, dropout",
    ],
)
@pytest.mark.parametrize(
    ("widths", "kernel"), [((40, 56), 64), ((128, 72), 128), ((256, 256), 256)]
)
def test_backward_sm90_of_other_widths(
    backward: ctypes.CDLL, widths: tuple[int, int], kernel: int, name: str
) -> None:
    check_backward(backward, widths, kernel, name)


def check_backward(
    library: ctypes.CDLL,
    widths: tuple[int, int],
    kernel: int,
    name: str,
    turn: int = 0,
    parts: int = 0,
) -> None:
    """One case, run in one of several ways by its number."""
    case = interval_cases.case(name)
    number = list(interval_cases.CASES).index(name) + kernel // 64 + turn
    dtype = ("bfloat16", "float16")[number % 2]
    ways = list(itertools.product((False, True), repeat=3))
    with_dlse, deterministic, f32_results = ways[number % len(ways)]
    results, expected = interval_checks.run_backward(
        library.mha_bwd_intervals_sm90,
        case,
        widths,
        dtype,
        kernel,
        with_dlse=with_dlse,
        f32_results=f32_results,
        deterministic=deterministic,
        # Thread blocks run one after another: none may wait for a later one. Those with
        # parts take all that there is from a counter.
        multiprocessors=132 if parts else 1 if deterministic else 1 + number % 3,
        parts=parts,
    )
    check_gradients(results, expected, TOLERANCES[dtype])
    dead_rows = interval_checks.dead_rows_of(case)
    assert not results["query"][dead_rows].any()


@pytest.mark.parametrize("turn", [0, 2])  # without and with an order of sums
@pytest.mark.parametrize(
    ("width", "name"),
    [
        (64, "lengths"),
        (128, "packed, causal"),
        (128, "bias and mask"),
        (256, "documents, causal"),
    ],
)
def test_backward_sm90_of_split_groups(
    backward: ctypes.CDLL, width: int, name: str, turn: int
) -> None:
    check_backward(backward, (width, width - 8), width, name, turn, 2)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_backward_sm90_skips_what_a_mask_hides(
    backward: ctypes.CDLL, width: int
) -> None:
    """Tiles that are hidden are not read, unless sums have an order."""
    results, expected = interval_checks.run_backward(
        backward.mha_bwd_intervals_sm90,
        interval_cases.with_a_hole(),
        (width, width),
        "bfloat16",
        width,
        multiprocessors=2,
    )
    check_gradients(results, expected, TOLERANCES["bfloat16"])


@pytest.mark.parametrize("name", ["negative ids, window, wide", "packed, causal"])
@pytest.mark.parametrize("width", [64, 256])
def test_sums_have_one_order(backward: ctypes.CDLL, width: int, name: str) -> None:
    """One thread block for all the work, or one for each part of it."""
    case = interval_cases.case(name)
    one, many = (
        interval_checks.run_backward(
            backward.mha_bwd_intervals_sm90,
            case,
            (width, width),
            "bfloat16",
            width,
            f32_results=True,
            deterministic=True,
            multiprocessors=multiprocessors,
        )[0]
        for multiprocessors in (1, 100)
    )
    for name, x in one.items():
        np.testing.assert_array_equal(x, many[name], name)
