"""The decode kernels of float32 against float64; what stays the same bits."""

from typing import Any

import chex
import jax
import numpy as np
import pytest
from decode_helpers import paged
from decode_kernel_test import EDGES, check, check_alone, problem, run

from jax_flash import alibi, decode_mha

# Widths of queries and of values, tokens, query heads (2 key heads), page, options.
CASES: tuple[tuple[tuple[int, int], int, int, int | None, tuple[str, ...]], ...] = (
    *(((width, width), 1, 8, None, ()) for width in (64, 128, 256)),
    *(((width, width), 3, 8, 16, ()) for width in (64, 128, 256)),
    ((128, 128), 1, 2, 1, ()),
    ((128, 128), 16, 8, 64, ()),
    ((128, 128), 64, 8, 100, ("window_size",)),
    ((64, 64), 1, 32, None, ("softcap",)),
    ((256, 256), 9, 6, None, ("sinks", "window_size")),
    ((36, 20), 1, 8, 64, ("sinks",)),
    ((128, 128), 2, 8, 16, ("bias", "softcap")),
    ((4, 132), 2, 14, None, ("window_size", "softcap", "sinks", "bias")),
    ((196, 252), 5, 8, 1, ("softcap", "window_size")),
    ((128, 64), 1, 8, None, ("num_splits",)),
)
OPTIONS = {"window_size": (70, None), "softcap": 3.0, "num_splits": 3}


def case_of(number: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Query, caches and lengths; the same with pages; arrays; the other options.

    What is beyond the lengths is NaN.
    """
    widths, tokens, heads, page, names = CASES[number]
    lengths = np.array(EDGES, np.int32)
    room = 1100 if page == 100 else 1024
    query, k, v = problem(
        number, len(lengths), tokens, heads, 2, room, *widths, dtype="float32"
    )
    for b, length in enumerate(lengths):
        k[b, max(length, 0) :] = v[b, max(length, 0) :] = np.nan
    given, operands = (query, k, v, lengths), {}
    held = given
    rng = np.random.default_rng(number)
    if page is not None:
        k_pool, v_pool, table = paged(rng, (k, v), lengths, page, np.nan)
        held, operands["page_table"] = (query, k_pool, v_pool, lengths), table
    if "sinks" in names:
        operands["sinks"] = rng.standard_normal((len(lengths), heads), np.float32)
    if "bias" in names:
        slopes = 0.1 * rng.standard_normal((len(lengths), heads), np.float32)
        operands["bias"] = alibi(slopes)
    return given, held, operands, {n: OPTIONS[n] for n in names if n in OPTIONS}


@pytest.fixture(scope="module")
def results() -> list[Any]:
    """All cases by one program."""
    cases = [case_of(i) for i in range(len(CASES))]

    def call(arguments: Any) -> Any:
        return [
            decode_mha(
                *held, **operands, **options, return_lse=True, implementation="cuda"
            )
            for (held, operands), (*_, options) in zip(arguments, cases, strict=True)
        ]

    given = [(held, operands) for _, held, operands, _ in cases]
    return jax.device_get(jax.jit(call)(given))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_lengths(results: list[Any], number: int) -> None:
    given, _, operands, options = case_of(number)
    operands.pop("page_table", None)
    check(results[number], *given, **operands, **options)


@pytest.mark.parametrize(
    ("batch", "tokens", "room", "width"),
    [
        (6, 2, 4096, 128),  # splits cut anywhere
        (6, 16, 4096, 64),  # several tiles of rows
        (300, 1, 512, 64),  # one thread block for all of a sequence, alone clusters
        (3, 3, 500, 128),  # alone clusters of two tiles of rows
        (20, 5, 1000, 256),
    ],
)
def test_same_bits_again_and_alone(
    batch: int, tokens: int, room: int, width: int
) -> None:
    query, k, v = problem(0, batch, tokens, 16, 4, room, width, dtype="float32")
    lengths = np.random.default_rng(1).integers(0, room + 1, batch).astype(np.int32)
    lengths[:2] = room, 0
    first, again = (run(query, k, v, lengths) for _ in range(2))
    chex.assert_trees_all_equal(again, first)
    check_alone(first, (query, k, v, lengths), (0, 1, 2, batch - 1), 4)


def test_one_long_sequence() -> None:
    """Nearly all weights alike, so that errors of one sign would add up."""
    query, k, v = problem(0, 1, 1, 32, 8, 32768, 128, dtype="float32")
    query, v = query / 8, v + np.float32(3)
    lengths = np.array([32768 - 5], np.int32)
    check(run(query, k, v, lengths), query, k, v, lengths)
