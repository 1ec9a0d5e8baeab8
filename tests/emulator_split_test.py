"""The forward of float32 by products of split bfloat16, as in emulator_test.py."""

import ctypes
import shutil
from typing import Any

import emulator_test
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
    return emulator_test.build("mha_split", tmp_path_factory.mktemp("split"))


def check(
    library: ctypes.CDLL,
    arrays: dict[str, np.ndarray],
    given: dict[str, Any],
    multiprocessors: int,
    tolerance: float = TOLERANCE,
) -> None:
    expected = oracle.attention(*arrays.values(), **given)
    emulator_test.spoil_keys(arrays, given)
    query, key, value = arrays.values()
    batch, rows, heads, _ = query.shape
    out = emulator_test.aligned((batch, rows, heads, value.shape[-1]), np.float32)
    lse = emulator_test.aligned((batch, heads, rows), np.float32)
    size = plan.split_elements([x.shape for x in (query, key, value)])
    assert size is not None
    parts = emulator_test.aligned((size + 8,), jnp.bfloat16, 7.0)
    emulator_test.call(
        library.mha_fwd_split,
        given,
        arrays,
        {"out": out, "lse": lse, "workspace": parts},
        multiprocessors=multiprocessors,
        tf32_products=3,
    )
    assert (parts[size:] == 7).all()
    dead = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), dead)
    for x, exact in ((out, expected.out), (np.where(dead, 0, lse), expected.lse)):
        exact = np.where(np.isneginf(exact), 0, exact)
        assert np.abs(x - exact).max() <= tolerance * max(1, np.abs(exact).max())
    assert (np.moveaxis(out, 1, 2)[dead] == 0).all()


@pytest.mark.parametrize("case", emulator_test.CASES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (40, 56), (120, 72)])
def test_forward(library: ctypes.CDLL, widths: tuple[int, int], case: str) -> None:
    shape, given = emulator_test.CASES[case]
    arrays = emulator_test.problem(shape, *widths, "float32")
    # Logits that are larger than others', by `scale`, have larger errors.
    tolerance = 2 * TOLERANCE if case == "scale" else TOLERANCE
    check(library, arrays, given, 1 + widths[0] % 3, tolerance)


@pytest.mark.parametrize("jump", [30, 100])
@pytest.mark.parametrize("width", [64, 128])
def test_scores_that_leave_the_range(
    library: ctypes.CDLL, width: int, jump: float
) -> None:
    """Some are computed again, by other instructions."""
    arrays = emulator_test.problem((1, 170, 600, 1, 1), width, width, "float32")
    arrays["query"][..., 0] = 32
    shift = emulator_test.growing(600, jump) * width**0.5 / 32
    arrays["key"][..., 0] = shift[None, :, None]
    # Logits of hundreds carry their own errors of 2^-17 or so into the exponent.
    check(library, arrays, {}, 1, 2.0**-16 * 4 * jump)


@pytest.mark.parametrize("case", ["2, packed heads", "4, no rows or keys"])
def test_split_keys(library: ctypes.CDLL, case: str) -> None:
    """Clusters of thread blocks add up float32."""
    shape, width, given = emulator_test.SPLITS[case]
    arrays = emulator_test.problem(shape, width, width, "float32")
    check(library, arrays, given, 132)


def test_nan_and_huge_numbers_reach_the_output(library: ctypes.CDLL) -> None:
    arrays = emulator_test.problem((1, 40, 40, 1, 1), 64, 64, "float32")
    arrays["query"][0, 3, 0, 5] = np.nan
    arrays["value"][0, :, 0, 9] = 1e33
    out = emulator_test.aligned((1, 40, 1, 64), np.float32)
    lse = emulator_test.aligned((1, 1, 40), np.float32)
    parts = emulator_test.aligned((3 * 2 * 40 * 64,), jnp.bfloat16)
    results = {"out": out, "lse": lse, "workspace": parts}
    emulator_test.call(
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
        arguments = emulator_test.Arguments(
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
        assert got == plan.split_elements(shapes)
