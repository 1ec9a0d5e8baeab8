"""The forwards of float32 by products of split bfloat16, as in emulator_test.py."""

import ctypes
import shutil
from typing import Any

import emulated
import interval_cases
import interval_checks
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_flash._src import plan

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

TOLERANCE = 2.0**-16
"""Of results, relative to the largest: see docs/numerics.md."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("mha_split", tmp_path_factory.mktemp("split"))


MARGIN = 8
"""Of numbers behind the parts, which stay as they are."""


def room_for_parts(op: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    size = plan.split_elements(op, [arrays[x].shape for x in ("query", "key", "value")])
    assert size is not None
    return emulated.aligned((size + MARGIN,), jnp.bfloat16, 7.0)


def check(
    library: ctypes.CDLL,
    arrays: dict[str, np.ndarray],
    given: dict[str, Any],
    multiprocessors: int,
    tolerance: float = TOLERANCE,
) -> None:
    expected = oracle.attention(*arrays.values(), **given)
    emulated.spoil_keys(arrays, given)
    batch, rows, heads, _ = arrays["query"].shape
    out = emulated.aligned((batch, rows, heads, arrays["value"].shape[-1]), np.float32)
    lse = emulated.aligned((batch, heads, rows), np.float32)
    parts = room_for_parts("mha_fwd", arrays)
    emulated.call(
        library.mha_fwd_split,
        given,
        arrays,
        {"out": out, "lse": lse, "workspace": parts},
        multiprocessors=multiprocessors,
        tf32_products=3,
    )
    assert (parts[-MARGIN:] == 7).all()
    emulated.check_floats(out, lse, expected, tolerance)


@pytest.mark.parametrize("case", emulated.CASES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (40, 56), (120, 72)])
def test_forward(library: ctypes.CDLL, widths: tuple[int, int], case: str) -> None:
    shape, given = emulated.CASES[case]
    arrays = emulated.problem(shape, *widths, "float32")
    # Logits that are larger than others', by `scale`, have larger errors.
    tolerance = 2 * TOLERANCE if case == "scale" else TOLERANCE
    check(library, arrays, given, 1 + widths[0] % 3, tolerance)


@pytest.mark.parametrize("jump", [30, 100])
@pytest.mark.parametrize("width", [64, 128])
def test_scores_that_leave_the_range(
    library: ctypes.CDLL, width: int, jump: float
) -> None:
    """Some are computed again, by other instructions."""
    arrays = emulated.problem((1, 170, 600, 1, 1), width, width, "float32")
    emulated.grow(arrays, jump)
    # Logits of hundreds carry their own errors of 2^-17 or so into the exponent.
    check(library, arrays, {}, 1, 2.0**-16 * 4 * jump)


@pytest.mark.parametrize("case", ["2, packed heads", "4, no rows or keys"])
def test_split_keys(library: ctypes.CDLL, case: str) -> None:
    """Clusters of thread blocks add up float32."""
    shape, width, given = emulated.SPLITS[case]
    arrays = emulated.problem(shape, width, width, "float32")
    check(library, arrays, given, 132)


def test_nan_and_huge_numbers_reach_the_output(library: ctypes.CDLL) -> None:
    arrays = emulated.problem((1, 40, 40, 1, 1), 64, 64, "float32")
    arrays["query"][0, 3, 0, 5] = np.nan
    arrays["value"][0, :, 0, 9] = 1e33
    out = emulated.aligned((1, 40, 1, 64), np.float32)
    lse = emulated.aligned((1, 1, 40), np.float32)
    parts = emulated.aligned((3 * 2 * 40 * 64,), jnp.bfloat16)
    results = {"out": out, "lse": lse, "workspace": parts}
    emulated.call(
        library.mha_fwd_split, {}, arrays, results, multiprocessors=1, tf32_products=3
    )
    assert np.isnan(out[0, 3]).all()
    assert np.isnan(lse[0, 0, 3])
    others = np.delete(out[0, :, 0], 3, axis=0)
    np.testing.assert_allclose(others[:, 9], 1e33, rtol=1e-4)
    assert np.isfinite(others).all()


@pytest.mark.parametrize("widths", [(64, 64), (8, 72)])
def test_room_for_the_parts(library: ctypes.CDLL, widths: tuple[int, int]) -> None:
    """`plan` and the kernel agree, also where sequences share an operand."""
    function = library.split_elements
    function.restype = ctypes.c_int64
    width = 64 if max(widths) <= 64 else 128
    for shared in (False, True):
        arguments = emulated.Arguments(
            batch_strides=(ctypes.c_int64 * 3)(5, 0 if shared else 7, 9),
            batch=3,
            query_length=11,
            key_length=13,
            heads=4,
            kv_heads=2,
            head_dim=widths[0],
            head_dim_v=widths[1],
            tf32_products=3,
        )
        keys = (1 if shared else 3, 13, 2, widths[0])
        shapes = [(3, 11, 4, widths[0]), keys, (3, 13, 2, widths[1])]
        got = function(ctypes.byref(arguments), width)
        for op in ("mha_fwd", "mha_fwd_intervals"):
            assert got == plan.split_elements(op, shapes)


def check_intervals(
    library: ctypes.CDLL,
    case: interval_cases.Case,
    arrays: dict[str, np.ndarray],
    multiprocessors: int,
    tolerance: float,
) -> None:
    parts = room_for_parts("mha_fwd_intervals", arrays)
    results = interval_checks.run_forward(
        library.mha_fwd_intervals_split,
        case,
        arrays,
        parts,
        multiprocessors=multiprocessors,
        tf32_products=3,
    )
    assert (parts[-MARGIN:] == 7).all()
    emulated.check_floats(*results, tolerance)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        *interval_checks.few([(64, 64), (120, 72), (40, 56), (128, 128)]),
        # Without options, which have a kernel of their own.
        ("unsorted ids, causal, wide", (64, 64)),
        ("ragged documents, causal", (120, 72)),
        ("ragged, packed", (40, 56)),
        ("packed", (128, 128)),
        ("dead rows in clean tiles", (64, 64)),
    ],
)
def test_forward_with_intervals(
    library: ctypes.CDLL, name: str, widths: tuple[int, int]
) -> None:
    case = interval_cases.case(name)
    arrays = emulated.problem(case.shape, *widths, "float32")
    # Larger logits, by scale or bias, have larger errors, or count for more.
    large = "scale" in case.options or case.bias is not None
    tolerance = 2 * TOLERANCE if large else TOLERANCE
    check_intervals(library, case, arrays, 1 + len(name) % 3, tolerance)


@pytest.mark.parametrize("width", [64, 128])
def test_what_a_mask_hides_is_skipped(library: ctypes.CDLL, width: int) -> None:
    """NaN is there, with which nothing is multiplied."""
    case = interval_cases.with_a_hole()
    arrays = emulated.problem(case.shape, width, width, "float32")
    check_intervals(library, case, arrays, 2, TOLERANCE)


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "cap and slopes": {"options": {"softcap": 600.0}, "slopes": np.array([[0.05]])},
    "bias, mask, dropout": {
        "bias": interval_cases.random_bias((1, 1, 170, 600), "float32"),
        "mask": interval_cases.striped_mask((1, 1, 170, 600)),
        "dropout_rate": 0.3,
    },
}


@pytest.mark.parametrize("jump", [30, 100])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("width", [64, 128])
def test_scores_with_intervals_that_leave_the_range(
    library: ctypes.CDLL, width: int, options: str, jump: float
) -> None:
    dead = np.arange(170) % 5 == 2
    case = interval_cases.of_options(
        (1, 170, 600, 1, 1), np.where(dead, -1, 0), rest=OPTIONS[options]
    )
    arrays = emulated.problem(case.shape, width, width, "float32")
    emulated.grow(arrays, jump)
    check_intervals(library, case, arrays, 1, TOLERANCE * 4 * jump)
