"""The kernels' own source code, run on the CPU thread for thread, against float64.

`emulator/` stands in for CUDA. What it cannot see (races, asynchrony, speed) is for
`tests/gpu`; wrong indices, masks and barriers fail here, on any machine that has g++.
"""

import ctypes
import shutil
from typing import Any

import emulated
import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("mha_fwd", tmp_path_factory.mktemp("forward"))


@pytest.fixture(scope="module")
def backward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build("mha_bwd", tmp_path_factory.mktemp("backward"))


@pytest.mark.parametrize("case", emulated.CASES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (256, 256), (40, 56)])
def test_forward_sm90(forward: ctypes.CDLL, widths: tuple[int, int], case: str) -> None:
    shape, given = emulated.CASES[case]
    number = list(emulated.CASES).index(case) + widths[0]
    dtype = ("bfloat16", "float16")[number % 2]
    arrays = emulated.problem(shape, *widths, dtype)
    emulated.check_forward(forward.mha_fwd_sm90, arrays, given, 1 + number % 3)


@pytest.mark.parametrize("jump", [5, 30, 100])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90_of_growing_scores(
    forward: ctypes.CDLL, width: int, jump: float
) -> None:
    """Scores that leave the range of the first tile's maximum, and overflow."""
    arrays = emulated.problem((1, 170, 600, 1, 1), width, width, "bfloat16")
    emulated.grow(arrays, jump)
    emulated.check_forward(forward.mha_fwd_sm90, arrays, {}, 1)


@pytest.mark.parametrize("case", emulated.SPLITS)
def test_forward_sm90_of_split_keys(forward: ctypes.CDLL, case: str) -> None:
    """Clusters of thread blocks that share the keys, and each other's memory."""
    shape, width, given = emulated.SPLITS[case]
    dtype = ("bfloat16", "float16")[len(case) % 2]
    arrays = emulated.problem(shape, width, width, dtype)
    emulated.check_forward(forward.mha_fwd_sm90, arrays, given, 132)


PARTS: dict[str, Any] = {
    "empty sequences, short and long ones": (
        (6, 33, 1100, 8, 1),
        (128, 128),
        4,
        {"key_value_seq_lengths": (1100, 0, 1, 20, 700, 1063)},
    ),
    "a window, rows without keys, padding rows of three warpgroups": (
        (2, 30, 1500, 8, 1),
        (64, 40),
        5,
        {"key_value_seq_lengths": (1500, 17), "window_size": (900, 0)},
    ),
    "all tiles in one part, another sequence in many": (
        (2, 17, 1030, 8, 1),
        (256, 136),
        16,
        {"key_value_seq_lengths": (18, 1030)},
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_forward_sm90_of_parts(forward: ctypes.CDLL, case: str) -> None:
    """Parts of the keys with results of their own, as decoding asks for them.

    A sequence has the same bits alone, on another number of multiprocessors.
    """
    shape, (width, value_width), parts, given = PARTS[case]
    dtype = ("bfloat16", "float16")[len(case) % 2]
    arrays = emulated.problem(shape, width, value_width, dtype)
    given = given | {"is_causal": True}
    got = emulated.check_forward(forward.mha_fwd_sm90, arrays, given, 3, parts)
    last = slice(shape[0] - 1, None)
    given["key_value_seq_lengths"] = given["key_value_seq_lengths"][last]
    alone = {name: x[last] for name, x in arrays.items()}
    again = emulated.check_forward(forward.mha_fwd_sm90, alone, given, 132, parts)
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(x[last], y)


@pytest.mark.parametrize("case", emulated.CASES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (40, 56), (72, 120)])
def test_backward_sm90(
    backward: ctypes.CDLL, widths: tuple[int, int], case: str
) -> None:
    number = list(emulated.CASES).index(case) + widths[0]
    tile = 64 if max(widths) <= 64 else 128
    check_backward(backward.mha_bwd_sm90, widths, case, number, number % 2 == 1, tile)


@pytest.mark.parametrize("case", emulated.CASES)
@pytest.mark.parametrize("widths", [(96, 96), (88, 72)])
def test_backward_sm90_of_width_96(
    backward: ctypes.CDLL, widths: tuple[int, int], case: str
) -> None:
    number = list(emulated.CASES).index(case) + widths[1] // 8
    check_backward(backward.mha_bwd_sm90, widths, case, number, False, 128)


WIDTHS_OF_PAIRS = ((256, 256), (192, 128), (200, 232), (160, 192))


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("case", emulated.CASES_OF_PAIRS)
def test_paired_backward_sm90(backward: ctypes.CDLL, case: str, turn: int) -> None:
    """Clusters of two thread blocks, which exchange dS; each case at two widths."""
    number = list(emulated.CASES_OF_PAIRS).index(case)
    widths = WIDTHS_OF_PAIRS[(number + turn) % 4]
    tile = 256 if max(widths) > 192 else 192
    number += number // 4 + 3 * turn
    check_backward(backward.mha_bwd_sm90, widths, case, number, tile == 192, tile)


@pytest.mark.parametrize("case", emulated.CASES)
@pytest.mark.parametrize(
    ("widths", "f16", "tile"),
    [((64, 64), False, 64), ((128, 120), True, 128), ((33, 17), False, 64)],
)
def test_backward_sm80(
    backward: ctypes.CDLL, widths: tuple[int, int], f16: bool, tile: int, case: str
) -> None:
    number = list(emulated.CASES).index(case)
    check_backward(backward.mha_bwd_sm80, widths, case, number, f16, tile)


@pytest.mark.parametrize("case", ["causal", "lengths"])
def test_wide_backward_sm80(backward: ctypes.CDLL, case: str) -> None:
    check_backward(backward.mha_bwd_sm80, (256, 256), case, 3, False, 256)


@pytest.mark.parametrize("case", emulated.CASES)
@pytest.mark.parametrize(("widths", "tile"), [((64, 56), 64), ((256, 200), 256)])
def test_backward_sm80_on_hopper(
    backward: ctypes.CDLL, widths: tuple[int, int], tile: int, case: str
) -> None:
    """Tiles for more shared memory; of the wider ones halves of the warps differ."""
    number = list(emulated.CASES).index(case) + tile // 64
    check_backward(backward.mha_bwd_sm80_on_hopper, widths, case, number, False, tile)


@pytest.mark.parametrize(
    ("widths", "tile", "case", "parts"),
    [
        ((64, 64), 64, "packed heads", 4),
        ((128, 120), 128, "packed heads", 2),
        ((72, 88), 128, "lengths", 2),
        ((256, 256), 256, "padding before the rows", 2),
        ((256, 200), 256, "ragged", 2),
        ((160, 128), 192, "packed heads", 2),
    ],
)
def test_backward_sm90_of_split_groups(
    backward: ctypes.CDLL, widths: tuple[int, int], tile: int, case: str, parts: int
) -> None:
    """The heads of a group in blocks of their own, each with room for its gradients."""
    for number in (parts, 7 - parts):
        check_backward(
            backward.mha_bwd_sm90,
            widths,
            case,
            number,
            tile == 192,
            tile,
            parts=parts,
        )


def check_backward(
    function: Any,
    widths: tuple[int, int],
    case: str,
    number: int,
    f16: bool,
    tile: int,
    *,
    parts: int = 0,
) -> None:
    dtype = "float16" if f16 else "bfloat16"
    results, expected = emulated.run_backward(
        function, widths, case, number, dtype, tile, parts=parts
    )
    emulated.check_gradients(results, expected, emulated.TOLERANCES[dtype])
