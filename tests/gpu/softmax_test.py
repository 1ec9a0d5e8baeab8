"""Scores that defeat a softmax that trusts its first tile.

A kernel may take a row's maximum once and later only watch that exponentials stay in
range. Here they do not, in every way: every result is held to the usual error bound,
and a row's bits must not depend on what its neighbours do.
"""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from gpu_helpers import assert_result, run_kernels

TILE = 128  # keys; what the shifts below are constant on
JUMPS = (1, 9, 20, 60, 100, 1000)  # from tile to tile, in natural logarithms
WIDTHS = (64, 128, 256)
ROWS, KEYS = 200, 1000

Arrays = tuple[np.ndarray, ...]


def tile_of(keys: int) -> np.ndarray:
    return np.arange(keys) // TILE


def growing(keys: int, jump: float) -> dict[str, np.ndarray]:
    """Shifts of logits [keys] that grow by `jump`."""
    tile = tile_of(keys)
    return {
        "towards the first key": jump * (tile[-1] - tile),
        "towards the last key": jump * tile,
        "every other tile": jump * (tile % 2),
        "within the tiles": jump * (np.arange(keys) % TILE) / TILE,
    }


def lonely(keys: int) -> dict[str, np.ndarray]:
    """Shifts of logits [keys] where one place differs from all the others."""
    tile = tile_of(keys)
    shifts = {
        "tiny last tile": np.where(tile == tile[-1], -1e4, 0.0),
        "tiny first tile": np.where(tile == 0, -1e4, 0.0),
        "tiny but for the first tile": np.where(tile == 0, 0.0, -1e4),
        "tiny but for a middle tile": np.where(tile == tile[-1] // 2, 0.0, -1e4),
    }
    for place in (0, keys // 2, keys - 1):
        for height in (15.0, 30.0, 1e4):
            shift = np.zeros(keys)
            shift[place] = height
            shifts[f"sink of {height:g} at {place}"] = shift
    return shifts


def gains(rows: int) -> dict[str, np.ndarray]:
    """How much of a shift each row feels, [rows]."""
    rng = np.random.default_rng(7)
    one = np.zeros(rows)
    one[37 % rows] = 1
    return {
        "all rows": np.ones(rows),
        "one row": one,
        "some rows": (rng.random(rows) < 0.1).astype(float),
        "rows against each other": rng.choice((-1.0, 1.0), rows),
        "rows by degrees": rng.random(rows),
    }


def shifted(
    spec: specs.Spec, shift: np.ndarray, gain: np.ndarray, seed: int = 0
) -> Arrays:
    """The spec's arrays with gain[row] * shift[key] added to the logits.

    The first channel of queries and keys carries it; its own random part is lost.
    """
    query, key, value = (x.astype(np.float32) for x in spec.arrays(seed))
    carrier = 32.0  # keeps both factors in the range of float16
    query[..., 0] = carrier * gain[:, None]
    key[..., 0] = shift[:, None] * spec.head_dim**0.5 / carrier
    dtype = jnp.dtype(spec.dtype)
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def check(problems: dict[str, tuple[Arrays, dict[str, Any]]]) -> None:
    """Runs all, compares all, names those that are wrong."""
    results = run_kernels(list(problems.values()))
    failures = []
    for (name, problem), result in zip(problems.items(), results, strict=True):
        try:
            assert_result(result, problem)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_growing_by_tile(width: int, dtype: str, jump: float) -> None:
    spec = specs.Spec(1, ROWS, KEYS, 2, 1, width, dtype=dtype)
    check(
        {
            f"{where}, {who}": (shifted(spec, shift, gain), {})
            for where, shift in growing(KEYS, jump).items()
            for who, gain in gains(ROWS).items()
        }
    )


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_lonely_keys_and_tiles(width: int, dtype: str) -> None:
    spec = specs.Spec(1, ROWS, KEYS, 2, 2, width, dtype=dtype)
    check(
        {
            f"{where}, {who}": (shifted(spec, shift, gain), {})
            for where, shift in lonely(KEYS).items()
            for who, gain in gains(ROWS).items()
        }
    )


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 96, 192])
def test_many_tiles(width: int, dtype: str, jump: float) -> None:
    rows, keys = 130, 4096
    spec = specs.Spec(1, rows, keys, 1, 1, width, dtype=dtype)
    who = gains(rows)
    check(
        {
            where: (shifted(spec, shift, who["rows by degrees"]), {})
            for where, shift in growing(keys, jump).items()
        }
    )


# Under each of these some rows see nothing of the tile that the block visits first, or
# of several; lengths end in the middle of everything.
MASKS: tuple[dict[str, Any], ...] = (
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "top_left"},
    {"is_causal": True, "window_size": (150, 0)},
    {"window_size": (300, 20)},
    {"window_size": (10, 0)},
    {"key_lengths": (599, 300, 129)},
    {"is_causal": True, "key_lengths": (512, 1, 600), "query_lengths": (200, 7, 150)},
)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_under_masks(width: int, dtype: str, mask: dict[str, Any]) -> None:
    rows, keys = 200, 600
    spec = specs.Spec(3, rows, keys, 1, 1, width, dtype=dtype, **mask)
    who = gains(rows)
    shifts = {
        f"{jump}, {where}": shift
        for jump in (9, 60, 1000)
        for where, shift in growing(keys, jump).items()
    }
    shifts |= lonely(keys)
    check(
        {
            where: (
                shifted(spec, shift, who[("all rows", "some rows")[i % 2]]),
                spec.options,
            )
            for i, (where, shift) in enumerate(shifts.items())
        }
    )


@pytest.mark.parametrize("jump", [20, 1000])
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_long_causal(width: int, dtype: str, jump: float) -> None:
    length = 2048
    spec = specs.Spec(1, length, length, 1, 1, width, dtype=dtype, is_causal=True)
    who = gains(length)
    for where, shift in growing(length, jump).items():
        arrays = shifted(spec, shift, who["rows by degrees"])
        check({where: (arrays, spec.options)})


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_few_queries_on_many_keys(width: int, dtype: str, rows: int) -> None:
    """Where keys are split among thread blocks, whose reference points then differ.

    One row is the decode kernel's.
    """
    keys = 4000
    spec = specs.Spec(1, rows, keys, 8, 2, width, dtype=dtype, is_causal=True)
    shifts = {
        f"{jump}, {where}": shift
        for jump in JUMPS
        for where, shift in growing(keys, jump).items()
    }
    check(
        {
            where: (shifted(spec, shift, np.ones(rows)), spec.options)
            for where, shift in (shifts | lonely(keys)).items()
        }
    )


@pytest.mark.parametrize("where", ["first", "last", "sink"])
@pytest.mark.parametrize("jump", [15, 60, 1000])
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_do_not_see_their_neighbours(
    width: int, dtype: str, jump: float, where: str
) -> None:
    """Each row's bits are those it has when all rows do as it does."""
    spec = specs.Spec(1, ROWS, KEYS, 2, 1, width, dtype=dtype)
    tile = tile_of(KEYS)
    shift = {
        "first": jump * (tile[-1] - tile),
        "last": jump * tile,
        "sink": np.where(np.arange(KEYS) == 300, jump, 0),
    }[where]
    rng = np.random.default_rng(1)
    row = np.arange(ROWS)
    subsets = [
        np.zeros(ROWS, bool),
        np.ones(ROWS, bool),
        row == 5,
        row % 16 == 8,
        row < 16,
        row >= 64,
        rng.random(ROWS) < 0.5,
        rng.random(ROWS) < 0.02,
    ]
    results = run_kernels(
        [(shifted(spec, shift, subset.astype(float)), {}) for subset in subsets]
    )
    calm, moved = results[:2]
    for subset, (out, lse) in zip(subsets, results, strict=True):
        expected_out = np.where(subset[:, None, None], moved[0], calm[0])
        expected_lse = np.where(subset, moved[1], calm[1])
        chex.assert_trees_all_equal((out, lse), (expected_out, expected_lse))


def minus_infinity(keys: int) -> dict[str, np.ndarray]:
    """Keys [keys] whose logits are -inf."""
    rng = np.random.default_rng(3)
    tile = tile_of(keys)
    return {
        "last tile": tile == tile[-1],
        "all but the first tile": tile > 0,
        "all but the first key": np.arange(keys) > 0,
        "all but the last key": np.arange(keys) < keys - 1,
        "half": rng.random(keys) < 0.5,
        "two middle tiles": (tile == 3) | (tile == 4),
        "all": np.ones(keys, bool),
    }


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_logits_of_minus_infinity(width: int, dtype: str, is_causal: bool) -> None:
    """From infinite keys, and in bfloat16 from finite ones whose product overflows.

    A row with no other logits has output 0 and lse -inf, as one without keys.
    """
    spec = specs.Spec(2, ROWS, KEYS, 2, 1, width, dtype=dtype, is_causal=is_causal)
    query, key, value = spec.arrays()
    query = query.copy()
    query[..., 0] = 4
    problems: dict[str, tuple[Arrays, dict[str, Any]]] = {}
    for where, chosen in minus_infinity(KEYS).items():
        infinite = key.copy()
        infinite[:, chosen, :, 0] = -np.inf
        problems[where] = ((query, infinite, value), spec.options)
        # Rows that see such keys alone would be a matter of overflow.
        if dtype == "bfloat16" and not is_causal and not chosen.all():
            huge = key.copy()
            huge[:, chosen, :, 0] = -3e38
            problems[f"{where}, finite"] = ((query, huge, value), spec.options)
    check(problems)


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_large_scale(width: int, dtype: str, scale: float) -> None:
    """Small whole numbers, so that products are exact and rows have equal maxima."""
    rng = np.random.default_rng(2)
    spec = specs.Spec(1, ROWS, KEYS, 2, 1, width, dtype=dtype)
    query, key = (
        rng.integers(-2, 3, shape).astype(jnp.dtype(dtype)) for shape in spec.shapes[:2]
    )
    arrays = (query, key, spec.arrays()[2])
    check(
        {
            str(causal): (arrays, {"scale": scale, "is_causal": causal})
            for causal in (False, True)
        }
    )
