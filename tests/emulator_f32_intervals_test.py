"""The kernels of float32 with intervals, but for the split forward.

That is in emulator_split_test.py.
"""

import ctypes
import shutil

import emulated
import interval_cases
import interval_checks
import pytest

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

TOLERANCES = {"f32": 2e-6, "split": 2.0**-15}
"""Of results, relative: by three products of TF32, and by those of split bfloat16."""

WIDTHS = {
    "f32": [(64, 64), (128, 128), (33, 17), (65, 127), (40, 56), (120, 68)],
    "split": [(64, 64), (128, 128), (40, 56), (120, 72)],
}
"""Of queries and of values; rows of odd ones do not start at 16 bytes."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("f32_intervals")
    return emulated.build("mha_f32_intervals", folder)


def check_forward(
    library: ctypes.CDLL, case: interval_cases.Case, widths: tuple[int, int]
) -> None:
    results = interval_checks.run_forward(
        library.mha_fwd_intervals_f32,
        case,
        emulated.problem(case.shape, *widths, "float32"),
        multiprocessors=1,
        tf32_products=3,
    )
    emulated.check_floats(*results, TOLERANCES["f32"])


@pytest.mark.parametrize(("name", "widths"), interval_checks.few(WIDTHS["f32"]))
def test_forward(library: ctypes.CDLL, name: str, widths: tuple[int, int]) -> None:
    check_forward(library, interval_cases.case(name), widths)


def check_backward(
    library: ctypes.CDLL,
    kernel: str,
    case: interval_cases.Case,
    widths: tuple[int, int],
    **ways: bool,
) -> None:
    results, expected = interval_checks.run_backward(
        getattr(library, f"mha_bwd_intervals_{kernel}"),
        case,
        widths,
        "float32",
        64 if max(widths) <= 64 else 128,
        multiprocessors=1,
        tf32_products=3,
        **ways,
    )
    assert not results["query"][interval_checks.dead_rows_of(case)].any()
    # Larger logits have larger errors.
    tolerance = TOLERANCES[kernel] * (2 if "scale" in case.options else 1)
    if "slopes" in expected:
        # What is multiplied by distances and added up nearly cancels.
        slopes = {"slopes": expected.pop("slopes")}
        emulated.check_gradients(results, slopes, 16 * tolerance)
    emulated.check_gradients(results, expected, tolerance, 3)


@pytest.mark.parametrize(
    ("kernel", "name", "widths"),
    [
        (kernel, *case)
        for kernel, widths in WIDTHS.items()
        for case in interval_checks.few(widths)
    ],
)
def test_backward(
    library: ctypes.CDLL, kernel: str, name: str, widths: tuple[int, int]
) -> None:
    number = interval_checks.few(WIDTHS[kernel]).index((name, widths))
    check_backward(
        library,
        kernel,
        interval_cases.case(name),
        widths,
        with_dlse=number % 3 == 0,
        deterministic=number % 4 in (1, 2),
    )


def test_what_a_mask_hides_is_skipped(library: ctypes.CDLL) -> None:
    """NaN is there, with which nothing is multiplied."""
    case = interval_cases.with_a_hole()
    for width in (64, 128):
        check_forward(library, case, (width, width))
    check_backward(library, "f32", case, (64, 64))
    check_backward(library, "split", case, (128, 128))


@pytest.mark.parametrize("name", ["small soft cap", "soft cap that some scores pass"])
def test_soft_caps(library: ctypes.CDLL, name: str) -> None:
    """Small logits are as exact under a large cap as without one."""
    case = interval_cases.case(name)
    check_forward(library, case, (64, 64))
    check_backward(library, "f32", case, (64, 64))
