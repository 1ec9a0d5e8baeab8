"""Intervals narrowed by a boolean mask: tiles at its ends that it hides are skipped."""

from typing import Any

import intervals_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import call_of, cuda_text
from interval_arrays import hidden
from interval_cases import mask_of_blocks
from intervals_test import CAUSAL, Dense, config_of, ids, segments
from options_kernel_test import ROWS, flash, tensors

from jax_flash._src import intervals, registry

TILE = intervals.TILE


def mask_of(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """[B, N, T, S]: one interval of keys for each row, but for "random"."""
    row, key = np.ogrid[: shape[2], : shape[3]]
    seen = {
        "blocks": row // 70 == key // 70,
        "band": (key > row - 50) & (key < row + 30),
        "keys": (key >= 40) & (key < 131),
        "row": row != 5,
        "none": np.zeros((1, 1), bool),
    }
    if kind == "random":
        return np.random.default_rng(0).random(shape) < 0.02
    return np.broadcast_to(seen[kind], shape)


SIZES = 200, 260


def operands(mask: np.ndarray, given: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return intervals_test.operands_of(SIZES, given, 2) | {"mask": jnp.asarray(mask)}


def test_ranges() -> None:
    """Of every shape of a mask; heads see what one of them sees."""
    full = 2, 3, 40, 170
    for shape in (full, (2, 3, 1, 170), (2, 1, 40, 1)):
        mask = mask_of("random", shape)
        words = intervals.seen_by_heads(jnp.asarray(mask), 170)
        got = np.asarray(intervals.mask_ranges(words, 40))
        assert (got.shape, got.dtype) == ((shape[0], 40, 2), np.int32)
        seen = np.broadcast_to(mask, (shape[0], *full[1:])).any(1)
        for b, row in np.ndindex(shape[0], 40):
            places = np.flatnonzero(seen[b, row])
            none = len(places) == 0
            expected = (intervals.MAX_LENGTH, 0) if none else places[[0, -1]] + [0, 1]
            np.testing.assert_array_equal(got[b, row], expected)


@pytest.mark.parametrize(("rows", "keys"), [(1, 170), (40, 4096), (150, 4097)])
def test_hidden(rows: int, keys: int) -> None:
    """By tile of rows and part of the keys, which are larger where keys are many."""
    blocks = mask_of_blocks((2, 1, rows, keys), 0.2)
    for mask in (blocks, blocks[:1, :, -1:], blocks[:, :, :, :1]):
        words = intervals.seen_by_heads(jnp.asarray(mask), keys)
        got = intervals.mask_hidden(words, rows, keys)
        spread = np.broadcast_to(mask, (*mask.shape[:3], keys))
        np.testing.assert_array_equal(got, hidden(spread, rows))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("blocks", {}),
        ("blocks", CAUSAL),
        ("band", CAUSAL),
        ("keys", {}),
        ("row", {}),
        ("none", {}),
    ],
)
def test_a_mask_of_intervals_is_as_one_of_numbers(
    kind: str, fields: dict[str, Any]
) -> None:
    """Arrays are exactly those that the mask has, so that no hidden tile is met."""
    o = operands(mask_of(kind, (2, 1, *SIZES)), {})
    config = config_of(o, fields)
    made = intervals.intervals(config, o)
    dense = Dense(config, o, SIZES)
    hides = hidden(np.asarray(o["mask"]), SIZES[0])
    for b in range(2):
        one = [np.asarray(x[b]) for x in made]
        intervals_test.check_rows(one[0], one[2], dense, b)
        tiles = one[1].copy()
        np.testing.assert_array_equal(tiles[:, 6:], hides[b])
        tiles[:, 6:] = 0
        intervals_test.check_row_tiles(tiles, one[0], dense.padded(b))
        intervals_test.check_key_tiles(one[3], one[1], one[2], dense.padded(b))


@pytest.mark.parametrize("alone", [True, False])
def test_a_mask_with_holes(alone: bool) -> None:
    """Intervals hold all that is seen; those of a mask alone end at keys seen."""
    mask = mask_of("random", (2, 1, *SIZES))
    given = segments(*[ids(2, n, 2, 0.1) for n in SIZES]) if not alone else {}
    o = operands(mask, given)
    config = config_of(o, {} if alone else CAUSAL)
    rows = np.asarray(intervals.intervals(config, o).rows)
    seen = Dense(config, o, SIZES).seen
    for b, row in np.ndindex(2, SIZES[0]):
        first, end, *_ = rows[b, row]
        places = np.flatnonzero(seen[b, row])
        if not alone:
            assert all((first <= places) & (places < end))
        elif len(places):
            np.testing.assert_array_equal((first, end), places[[0, -1]] + [0, 1])
        else:
            assert tuple(rows[b, row]) == intervals_test.DEAD


@pytest.mark.parametrize("heads", [1, 4])
def test_kernels_are_given_ranges(heads: int) -> None:
    """By one call that computes the intervals of forward and backward."""
    mask = jnp.tri(ROWS, tensors()[1].shape[1], dtype=bool)[None, None]
    mask = jnp.broadcast_to(mask, (1, heads, *mask.shape[2:]))

    def total(query: Any, key: Any, value: Any) -> Any:
        return flash(query, key, value, None, mask=mask)[0].astype(jnp.float32).sum()

    with registry.assume_kernels():
        text = cuda_text(jax.grad(total), *tensors())
    line = call_of(registry.INTERVALS_TARGET, text)
    assert "has_mask = true" in line
    assert f"tensor<1x{ROWS}x2xi32>" in line
    assert f"tensor<1x{-(-ROWS // TILE)}x2xi32>" in line
    assert text.count(f"@{registry.INTERVALS_TARGET}(") == 1
