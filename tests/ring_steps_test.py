"""What devices of a ring see at each step, and the order of the zigzag layout."""

import numpy as np
import pytest

from jax_flash._src import ring
from jax_flash.parallel import zigzag_order


def test_zigzag_order() -> None:
    order = zigzag_order(16, 2)
    assert order.tolist() == [*range(4), *range(12, 16), *range(4, 12)]
    assert zigzag_order(6, 1).tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"length must be a multiple of .* 4, got 6"):
        zigzag_order(6, 2)
    with pytest.raises(ValueError, match="num_shards must be at least 1, got 0"):
        zigzag_order(6, 0)


def test_zigzag_halves_the_work() -> None:
    """Scores of a device at a step: all but the first the same, half of a block."""
    rows = 8
    for step in ring.zigzag_steps(4, rows)[1:]:
        for piece in (step.before, step.behind):
            assert piece is not None
            assert piece.window == (None, None)
            sizes = [end - first for first, end in (piece.rows, piece.keys)]
            assert sizes[0] * sizes[1] == rows * rows // 2


def visible(shift: int, window: tuple[int | None, int | None], t: int, s: int):
    row, key = np.arange(t)[:, None] + shift, np.arange(s)
    left, right = window
    ok = np.ones((t, s), bool)
    ok &= True if left is None else key >= row - left
    return ok & (True if right is None else key <= row + right)


@pytest.mark.parametrize("window", [(None, 0), (0, 0), (3, None), (2, 5), (9, 1)])
@pytest.mark.parametrize(("t", "s"), [(6, 6), (4, 7), (7, 3)])
def test_piece(window: tuple[int | None, int | None], t: int, s: int) -> None:
    for shift in range(-20, 21):
        want = visible(shift, window, t, s)
        piece = ring.piece_of(shift, window, t, s)
        got = np.zeros_like(want)
        if piece is not None:
            rows, keys = slice(*piece.rows), slice(*piece.keys)
            sizes = piece.rows[1] - piece.rows[0], piece.keys[1] - piece.keys[0]
            assert min(sizes) > 0
            assert all(side is None or side >= 0 for side in piece.window)
            got[rows, keys] = visible(0, piece.window, *sizes)
            # A window is only said where it hides something.
            assert (piece.window == (None, None)) == want[rows, keys].all()
        np.testing.assert_array_equal(got, want)


def test_piece_of_everything() -> None:
    everything = ring.piece_of(-5, (None, None), 4, 6)
    assert everything == ring.Piece((0, 4), (0, 6))
