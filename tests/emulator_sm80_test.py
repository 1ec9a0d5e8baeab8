"""The sm_80 forward, and sm_80 kernels with intervals, as in emulator_test.py."""

import ctypes
import itertools
import shutil

import emulated
import interval_cases
import interval_checks
import pytest

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("mha_sm80", tmp_path_factory.mktemp("sm80"))


def rotated(cases: dict, ways: list) -> list[tuple]:
    """Each case with one of the ways."""
    return list(zip(cases, itertools.cycle(ways)))


PLAIN = [
    ((64, 64), "bfloat16"),
    ((128, 120), "float16"),
    ((33, 17), "bfloat16"),
    ((256, 256), "bfloat16"),
    ((100, 128), "float16"),
]
"""Widths of queries and of values; float16 gets the kernel of width 128."""


@pytest.mark.parametrize(("case", "way"), rotated(emulated.CASES, PLAIN))
def test_forward(
    library: ctypes.CDLL, case: str, way: tuple[tuple[int, int], str]
) -> None:
    shape, given = emulated.CASES[case]
    arrays = emulated.problem(shape, *way[0], way[1])
    emulated.check_forward(library.mha_fwd_sm80, arrays, given, 1)


NARROW = [((100, 33), "float16"), ((200, 130), "bfloat16")]
"""Rows that do not start at multiples of 16 bytes have kernels of their own."""


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *itertools.product(interval_cases.CASES, [((128, 120), "float16")]),
        *rotated(interval_cases.CASES, [((256, 256), "bfloat16"), *NARROW]),
    ],
)
def test_forward_with_intervals(
    library: ctypes.CDLL, name: str, way: tuple[tuple[int, int], str]
) -> None:
    case = interval_cases.case(name)
    arrays = emulated.problem(case.shape, *way[0], way[1])
    interval_checks.check_forward(library.mha_fwd_intervals_sm80, case, arrays, 1)


def test_what_a_mask_hides_is_skipped(library: ctypes.CDLL) -> None:
    """NaN is there, with which nothing is multiplied."""
    case = interval_cases.with_a_hole()
    arrays = emulated.problem(case.shape, 128, 128, "float16")
    interval_checks.check_forward(library.mha_fwd_intervals_sm80, case, arrays, 1)
    results, expected = interval_checks.run_backward(
        library.mha_bwd_intervals_sm80,
        case,
        (128, 128),
        "float16",
        128,
        multiprocessors=1,
    )
    emulated.check_gradients(results, expected, emulated.TOLERANCES["float16"])


@pytest.mark.parametrize("name", interval_cases.CASES)
def test_backward_with_intervals(library: ctypes.CDLL, name: str) -> None:
    number = list(interval_cases.CASES).index(name)
    ways = list(itertools.product((False, True), repeat=3))
    with_dlse, f32_results, deterministic = ways[number % len(ways)]
    check_backward(
        library,
        name,
        80,
        (128, 120),
        "float16",
        with_dlse=with_dlse,
        f32_results=f32_results,
        deterministic=deterministic,
    )


@pytest.mark.parametrize(
    ("name", "way"),
    rotated(
        interval_cases.CASES,
        [
            (80, (256, 256), "bfloat16"),
            (89, (128, 128), "float16"),
            # Blocks of 32 keys.
            (89, (248, 256), "bfloat16"),
            *((80, *narrow) for narrow in NARROW),
        ],
    ),
)
def test_backward_in_order_with_intervals(
    library: ctypes.CDLL, name: str, way: tuple[int, tuple[int, int], str]
) -> None:
    """Thread blocks run one after another: none may wait for a later one."""
    check_backward(library, name, *way, deterministic=True)


def check_backward(
    library: ctypes.CDLL,
    name: str,
    compute_capability: int,
    widths: tuple[int, int],
    dtype: str,
    **ways: bool,
) -> None:
    results, expected = interval_checks.run_backward(
        getattr(library, f"mha_bwd_intervals_sm{compute_capability}"),
        interval_cases.case(name),
        widths,
        dtype,
        128 if dtype == "float16" else 256,
        multiprocessors=1,
        **ways,
    )
    emulated.check_gradients(results, expected, emulated.TOLERANCES[dtype])
