"""Sums of the sm_90 backward in an order, and blocks that make dQ, on the CPU."""

import ctypes
import shutil
from typing import Any

import emulated
import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

# Batch, rows, keys, heads, key heads; options; multiprocessors, in turn.
RINGS: dict[str, Any] = {
    "one block": ((1, 300, 100, 2, 2), {}, (1, 2)),
    "as many tiles as blocks": ((1, 250, 250, 3, 3), {}, (4, 2)),
    "groups of heads": ((2, 330, 290, 4, 2), {}, (3, 3)),
    "more tiles than blocks": ((1, 600, 180, 2, 1), {}, (2, 4)),
    "a last block of one key, a last tile of one row": (
        (1, 321, 257, 1, 1),
        {},
        (3, 4),
    ),
    "lengths": (
        (4, 400, 380, 1, 1),
        {
            "query_seq_lengths": (400, 1, 0, 250),
            "key_value_seq_lengths": (0, 380, 100, 129),
        },
        (3, 6),
    ),
}


@pytest.fixture(scope="module")
def backward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("mha_bwd", tmp_path_factory.mktemp("backward"))


def gradients(
    backward: ctypes.CDLL,
    shape: tuple[int, ...],
    given: dict[str, Any],
    width: int,
    dtype: str,
    **ways: Any,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the kernel writes, and the exact gradients, by name of the operand."""
    widths = (width, width)
    arrays, expected = emulated.backward_problem(shape, given, widths, dtype)
    tile = 64 if width <= 64 else 128
    results = emulated.call_backward(backward.mha_bwd_sm90, given, arrays, tile, **ways)
    return results, expected


@pytest.mark.parametrize(
    ("case", "width"),
    [
        *((case, 128) for case in RINGS),
        ("groups of heads", 96),
        ("more tiles than blocks", 96),
        ("as many tiles as blocks", 64),
    ],
)
def test_rings(backward: ctypes.CDLL, case: str, width: int) -> None:
    """Blocks of a head begin with tiles of their own, and wait for each other.

    Blocks that are the last to add to a tile make its dQ, but for one in float32. At
    width 64 there are no rings.
    """
    shape, given, multiprocessors = RINGS[case]
    dtype = "bfloat16" if width < 128 else "float16"
    tolerance = emulated.TOLERANCES[dtype]
    results = []
    for count, f32 in zip(multiprocessors, (False, True), strict=True):
        result, expected = gradients(
            backward,
            shape,
            given,
            width,
            dtype,
            multiprocessors=count,
            f32_results=f32,
        )
        emulated.check_gradients(result, expected, tolerance)
        results.append(result)
    # Sums over queries do not depend on other blocks.
    for name in ("key", "value"):
        rounded = results[1][name].astype(results[0][name].dtype)
        assert (rounded == results[0][name]).all(), name


@pytest.mark.parametrize("width", [64, 128])
def test_diagonal(backward: ctypes.CDLL, width: int) -> None:
    """Much work on a diagonal: the block of the first keys makes dQ, unasked."""
    shape, given = (2, 290, 300, 3, 3), {"is_causal": True}
    given |= {"query_seq_lengths": (290, 170), "key_value_seq_lengths": (300, 120)}
    result, expected = gradients(
        backward, shape, given, width, "bfloat16", multiprocessors=1
    )
    emulated.check_gradients(result, expected, emulated.TOLERANCES["bfloat16"])


def test_narrow(backward: ctypes.CDLL) -> None:
    """Width 64 without a mask: of many blocks, that of the first keys makes dQ."""
    shape, given = (2, 150, 1040, 1, 1), {"key_value_seq_lengths": (1040, 300)}
    result, expected = gradients(
        backward, shape, given, 64, "bfloat16", multiprocessors=2
    )
    emulated.check_gradients(result, expected, emulated.TOLERANCES["bfloat16"])
