"""Kernels with intervals in the emulator, checked against float64."""

from typing import Any

import interval_cases
import numpy as np
import oracle
from emulated import aligned, backward_problem, call, call_backward
from interval_cases import Case

from jax_flash._src import plan

CAP_ERROR = 1.1e-6
"""Of the polynomials that kernels have for tanh."""


def few(widths: list[tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """Cases and widths of operands: every option with each of two kernels.

    `widths` are by turns for one kernel and for the other.
    """
    cases = []
    for name in interval_cases.EVERY_OPTION:
        for _ in range(2):
            cases.append((name, widths[len(cases) % len(widths)]))
    return cases + list(zip(interval_cases.SHARED_ARRAYS, widths, strict=False))


def spoil(arrays: dict[str, np.ndarray], case: Case, dead_rows: np.ndarray) -> None:
    """NaN in all that belongs to dead or unread keys and to dead rows [B, T]."""
    dead_keys = np.broadcast_to(case.kv_ids < 0, arrays["key"].shape[:2])
    for name in ("key", "value"):
        arrays[name][dead_keys] = np.nan
        arrays[name][:, case.unread] = np.nan
    for name in ("query", "out", "dout"):
        if name in arrays:
            arrays[name][dead_rows] = np.nan


def dead_rows_of(case: Case) -> np.ndarray:
    """Which rows see nothing by their intervals and ids: bool [B, T]."""
    batch, rows = case.shape[:2]
    return np.broadcast_to(~case.seen.any(-1), (batch, rows))


def run_forward(
    function: Any,
    case: Case,
    arrays: dict[str, np.ndarray],
    workspace: np.ndarray | None = None,
    **ways: int,
) -> tuple[np.ndarray, np.ndarray, oracle.Result]:
    """Results of a forward on `arrays`, which are spoiled, and those expected.

    `ways` are `multiprocessors` and `tf32_products` of `Arguments`.
    """
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    expected = oracle.attention(query, key, value, **case.given())
    batch, rows, heads, _ = query.shape
    dead_rows = dead_rows_of(case)
    spoil(arrays, case, dead_rows)
    results = {
        "out": aligned((batch, rows, heads, value.shape[-1]), query.dtype),
        "lse": aligned((batch, heads, rows), np.float32),
        "queue": aligned((plan.row_list_size(batch, rows),), np.int32, -1),
    }
    if workspace is not None:
        results["workspace"] = workspace
    call(function, case.numbers(), arrays | case.arrays(), results, **ways)
    dead = np.isneginf(expected.lse)
    assert dead[np.broadcast_to(dead_rows[:, None], dead.shape)].all()
    return results["out"], results["lse"], expected


def check_forward(
    function: Any, case: Case, arrays: dict[str, np.ndarray], multiprocessors: int
) -> None:
    """Runs a forward of 16 bits on `arrays`, which are spoiled."""
    out, lse, expected = run_forward(
        function, case, arrays, multiprocessors=multiprocessors
    )
    dead = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), dead)
    lse_error = np.abs(np.where(dead, 0, lse) - np.where(dead, 0, expected.lse))
    bound = 2e-6 * max(1, np.abs(expected.lse[~dead]).max(initial=0))
    assert lse_error.max() <= bound + cap_error(case)
    step = 2.0**-8 if out.dtype != np.float16 else 2.0**-11
    error = np.abs(out.astype(np.float64) - expected.out)
    assert error.max() <= 2 * step * np.abs(expected.out).max(initial=0)


def cap_error(case: Case) -> float:
    """Of logits."""
    return CAP_ERROR * case.options.get("softcap", 0)


def run_backward(
    function: Any,
    case: Case,
    widths: tuple[int, int],
    dtype: str,
    tile: int,
    with_dlse: bool = False,
    **ways: Any,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The gradients of a backward, and those expected, both by operand.

    `tile`, the kernel's width, sizes the workspace; `ways` are those of
    `emulated.call_backward`. With a soft cap the gradient of what is added to logits
    takes a call of its own.
    """
    dead_rows = dead_rows_of(case)
    arrays, expected = backward_problem(
        case.shape, case.given(), widths, dtype, with_dlse, dead_rows
    )
    spoil(arrays, case, dead_rows)
    more = {}
    of_scores = expected.pop("bias", np.zeros(()))
    if case.bias is not None:
        more["dbias"] = aligned(case.bias.shape, np.float32, 0)
        expected["bias"] = oracle.reduced_to(of_scores, case.bias.shape)
    if case.wants_slopes:
        batch, _, keys, heads, _ = case.shape
        more["dslopes"] = aligned((batch, heads, plan.SLOPE_PARTS, keys), np.float32, 0)
        expected["slopes"] = -(of_scores * case.distance()[:, None]).sum((2, 3))
    given = case.numbers(), arrays | case.arrays(), tile
    results = call_backward(function, *given, more_results=more, **ways)
    if more and "softcap" in case.options:
        results |= call_backward(function, *given, **ways)
    if case.wants_slopes:
        results["slopes"] = -results["slopes"].sum((2, 3))
    return results, expected
