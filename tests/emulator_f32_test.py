"""The kernels of float32, as in emulator_test.py."""

import ctypes
import itertools
import shutil

import emulated
import numpy as np
import oracle
import pytest

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

TOLERANCES = {3: 2e-6, 1: 3e-3}
"""Products of TF32 for one of float32 -> relative errors of results."""


def ways(widths: list[tuple[int, int]]) -> list[tuple]:
    """Each case with one of the widths, and some with one product."""
    cases = list(zip(emulated.CASES, itertools.cycle(widths)))
    return [(*case, 3) for case in cases] + [(*case, 1) for case in cases[1::2]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("mha_f32", tmp_path_factory.mktemp("f32"))


WIDTHS = [(64, 64), (128, 128), (33, 17), (40, 56), (120, 68), (65, 127)]
"""Of queries and of values; rows of odd ones do not start at 16 bytes."""


def forward(
    library: ctypes.CDLL,
    arrays: dict[str, np.ndarray],
    given: dict,
    products: int,
) -> tuple[np.ndarray, np.ndarray]:
    batch, rows, heads, _ = arrays["query"].shape
    width = arrays["value"].shape[-1]
    out = emulated.aligned((batch, rows, heads, width), np.float32)
    lse = emulated.aligned((batch, heads, rows), np.float32)
    emulated.call(
        library.mha_fwd_f32,
        given,
        arrays,
        {"out": out, "lse": lse},
        multiprocessors=1,
        tf32_products=products,
    )
    return out, lse


@pytest.mark.parametrize(("case", "widths", "products"), ways(WIDTHS))
def test_forward(
    library: ctypes.CDLL, case: str, widths: tuple[int, int], products: int
) -> None:
    shape, given = emulated.CASES[case]
    arrays = emulated.problem(shape, *widths, "float32")
    expected = oracle.attention(*arrays.values(), **given)
    emulated.spoil_keys(arrays, given)
    out, lse = forward(library, arrays, given, products)
    emulated.check_floats(out, lse, expected, TOLERANCES[products])


@pytest.mark.parametrize("products", TOLERANCES)
def test_nan_and_huge_numbers_reach_the_output(
    library: ctypes.CDLL, products: int
) -> None:
    """Rounding must not turn the NaN that GPUs compute into a number."""
    arrays = emulated.problem((1, 40, 40, 1, 1), 64, 64, "float32")
    arrays["query"][0, 3, 0, 5] = np.uint32(0x7FFFFFFF).view(np.float32)
    arrays["value"][0, :, 0, 9] = 1e33
    out, lse = forward(library, arrays, {}, products)
    assert np.isnan(out[0, 3]).all()
    assert np.isnan(lse[0, 0, 3])
    others = np.delete(out[0, :, 0], 3, axis=0)
    np.testing.assert_allclose(others[:, 9], 1e33, rtol=1e-3)
    assert np.isfinite(others).all()


SPLIT_TOLERANCE = 2.0**-15
"""Of the backward by products of split bfloat16: see docs/numerics.md."""

BACKWARD_WIDTHS = [(64, 64), (128, 128), (33, 17), (40, 56), (72, 127)]


@pytest.mark.parametrize(("case", "widths", "products"), ways(BACKWARD_WIDTHS))
def test_backward(
    library: ctypes.CDLL, case: str, widths: tuple[int, int], products: int
) -> None:
    results, expected = emulated.run_backward(
        library.mha_bwd_f32,
        widths,
        case,
        list(emulated.CASES).index(case),
        "float32",
        64 if max(widths) <= 64 else 128,
        tf32_products=products,
    )
    emulated.check_gradients(results, expected, TOLERANCES[products], 3)


SPLIT_WIDTHS = [(64, 64), (128, 128), (40, 56), (120, 72)]


@pytest.mark.parametrize(
    ("case", "widths"),
    [
        (case, SPLIT_WIDTHS[(i + shift) % 4])
        for i, case in enumerate(emulated.CASES)
        for shift in (0, 1)
    ],
)
def test_split_backward(
    library: ctypes.CDLL, case: str, widths: tuple[int, int]
) -> None:
    results, expected = emulated.run_backward(
        library.mha_bwd_split,
        widths,
        case,
        list(emulated.CASES).index(case),
        "float32",
        64 if max(widths) <= 64 else 128,
        tf32_products=3,
    )
    emulated.check_gradients(results, expected, SPLIT_TOLERANCE, 3)
