"""The kernels of float32 against float64."""

from typing import Any

import chex
import gpu_helpers
import gradient_helpers
import jax
import numpy as np
import oracle
import pytest
import specs
from gpu_helpers import F32_ERRORS, assert_near

from jax_flash._src import plan, registry


def spec(*sizes: int, **options: Any) -> specs.Spec:
    return specs.Spec(*sizes, dtype="float32", **options)


CASES = (
    *(spec(1, 300, 400, 2, 1, width) for width in (64, 96, 128)),
    *(spec(2, 257, 129, 4, 2, *widths) for widths in ((40, 24), (128, 72), (8, 100))),
    # Rows that do not start at multiples of 16 bytes.
    *(spec(1, 130, 200, 2, 2, *widths) for widths in ((33, 17), (127, 65), (125, 3))),
    spec(1, 1, 1, 1, 1, 64),
    spec(1, 1, 2049, 8, 1, 128),
    spec(1, 2049, 2049, 2, 2, 64, is_causal=True),
    spec(1, 1025, 1025, 2, 1, 128, is_causal=True),
    *(
        spec(2, 200, 333, 4, 2, width, is_causal=True, causal_alignment=f"{side}_{end}")
        for width, side, end in ((64, "top", "left"), (128, "bottom", "right"))
    ),
    spec(1, 400, 150, 2, 2, 128, is_causal=True),
    spec(1, 500, 700, 3, 3, 128, window_size=(100, 20)),
    spec(1, 500, 500, 3, 1, 64, is_causal=True, window_size=(70, None)),
    *(
        spec(
            3,
            150,
            177,
            2,
            1,
            width,
            is_causal=True,
            query_lengths=(150, 70, 0),
            key_lengths=(100, 177, 9),
        )
        for width in (64, 128, 80)
    ),
    spec(2, 70, 80, 1, 1, 64, key_lengths=(0, 80)),
)


@pytest.fixture(scope="module", params=[None, "highest", "tf32"])
def results(request: pytest.FixtureRequest) -> tuple[str | None, list[Any]]:
    """All cases by one program for each precision."""
    problems = [
        (case.arrays(i), case.options | {"precision": request.param})
        for i, case in enumerate(CASES)
    ]
    return request.param, gpu_helpers.run_kernels(problems)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_forward(results: tuple[str | None, list[Any]], number: int) -> None:
    precision, all_results = results
    arrays, options = CASES[number].arrays(number), CASES[number].options
    if precision == "highest":
        gpu_helpers.assert_result(all_results[number], (arrays, options))
    else:
        assert_close(all_results[number], arrays, options, F32_ERRORS[precision])


def assert_close(
    result: Any, arrays: Any, options: dict[str, Any], tolerance: float
) -> None:
    out, lse = result
    expected = oracle.attention(*arrays, **options)
    assert (np.moveaxis(out, 1, 2)[np.isneginf(expected.lse)] == 0).all()
    assert_near(out, expected.out, tolerance)
    assert_near(lse, expected.lse, tolerance)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(deterministic: bool) -> None:
    """Every second problem has a cotangent of lse."""
    problems = [
        gradient_helpers.problem_of(case, i, with_lse=i % 2 == 1).poisoned()
        for i, case in enumerate(CASES)
    ]
    ways = {"precision": "highest", "deterministic": deterministic}
    gradient_helpers.assert_all(CASES, problems, **ways)


@pytest.mark.parametrize("precision", F32_ERRORS)
def test_gradients_of_other_precisions(precision: str | None) -> None:
    """The forward's errors are in the output and lse that the backward starts from."""
    problems = [
        gradient_helpers.problem_of(case, i, with_lse=i % 2 == 1)
        for i, case in enumerate(CASES)
    ]
    results = gradient_helpers.run_gradients(
        [problem.poisoned() for problem in problems], precision=precision
    )
    for case, problem, result in zip(CASES, problems, results, strict=True):
        clean = problem.clean()
        query, key, value = clean.arrays
        expected = oracle.gradients(
            query, key, value, clean.dout, clean.dlse, **clean.given
        )
        for name, got in zip(gradient_helpers.NAMES, result, strict=True):
            tolerance = 2 * F32_ERRORS[precision]
            assert_near(got, expected[name], tolerance, (case, name))


@pytest.mark.parametrize("precision", [None, "highest"])
def test_deterministic_gradients_are_bitwise_reproducible(
    precision: str | None,
) -> None:
    cases = [spec(1, 700, 900, 4, 2, width, is_causal=True) for width in (64, 128)]
    problems = [gradient_helpers.problem_of(case) for case in cases]
    ways = {"precision": precision, "deterministic": True}
    first, *others = (
        gradient_helpers.run_gradients(problems, **ways) for _ in range(3)
    )
    for other in others:
        chex.assert_trees_all_equal(first, other)


def test_precisions_differ_as_they_should() -> None:
    """Of one problem, by the kernels that are planned."""
    arrays = spec(1, 256, 512, 2, 2, 128).arrays()
    capability = int(jax.devices()[0].compute_capability.replace(".", ""))
    forced = registry.extension().force_sm80
    planned = plan.forward_kernel("float32", 128, 128, capability, force_sm80=forced)
    assert planned is not None
    default, highest, tf32 = (
        gpu_helpers.run_kernel(*arrays, precision=precision)[0]
        for precision in (None, "highest", "tf32")
    )
    expected = oracle.attention(*arrays).out
    errors = [np.abs(x - expected).max() for x in (highest, default, tf32)]
    assert errors[0] < 2e-6
    if planned.dtype == "split":
        np.testing.assert_array_equal(default, tf32)
        assert errors[0] < errors[1] < F32_ERRORS[None]
    else:
        np.testing.assert_array_equal(default, highest)
        assert 1e-5 < errors[2] < F32_ERRORS["tf32"]


@pytest.mark.parametrize("width", [64, 128])
def test_sums_over_many_keys(width: int) -> None:
    """Tensor cores add with truncation, in which errors of one sign add up."""
    query, key, value = spec(1, 128, 8192, 1, 1, width).arrays()
    arrays = query, key, np.abs(value)
    out, _ = gpu_helpers.run_kernel(*arrays)
    expected = oracle.attention(*arrays).out
    assert np.abs(out / expected - 1).max() < 2.0**-13


def test_gradients_that_add_up_over_many_rows() -> None:
    """The same in the backward, of keys and values: all their parts have one sign."""
    case = spec(1, 8192, 128, 1, 1, 64)
    problem = gradient_helpers.problem_of(case)
    problem.dout[...] = np.abs(problem.dout)
    query, key, value = problem.arrays
    expected = oracle.gradients(query, key, value, problem.dout, None)
    for precision in (None, "highest"):
        ((_, _, got),) = gradient_helpers.run_gradients([problem], precision=precision)
        assert np.abs(got / expected["value"] - 1).max() < 2.0**-14


@pytest.mark.parametrize("width", [64, 128])
def test_more_keys_than_scores_have_range_for(width: int) -> None:
    """Scores that grow from tile to tile, some of which are computed again."""
    query, key, value = spec(1, 170, 600, 1, 1, width).arrays()
    query[..., 0] = 32
    for jump in (5, 100):
        shift = jump * (np.arange(600) // 128)[::-1] * width**0.5 / 32
        key[..., 0] = shift[None, :, None]
        result = gpu_helpers.run_kernel(query, key, value)
        # Products of large factors have large errors, which exponentials get.
        assert_close(result, (query, key, value), {}, 4 * jump * F32_ERRORS[None])


def test_nan_stays_nan() -> None:
    query, key, value = spec(1, 64, 96, 1, 1, 64).arrays()
    query[0, 3, 0, 5] = np.nan
    for precision in (None, "tf32", "highest"):
        out, _ = gpu_helpers.run_kernel(query, key, value, precision=precision)
        assert np.isnan(out[0, 3]).all()
        assert np.isfinite(np.delete(out, 3, axis=1)).all()


@pytest.mark.parametrize("precision", [None, "highest"])
def test_bitwise_reproducible_and_independent_of_neighbours(
    precision: str | None,
) -> None:
    query, key, value = spec(3, 200, 300, 4, 2, 64, is_causal=True).arrays()
    ways = {"is_causal": True, "precision": precision}
    out, lse = gpu_helpers.run_kernel(query, key, value, **ways)
    again = gpu_helpers.run_kernel(query, key, value, **ways)
    alone = gpu_helpers.run_kernel(*(x[1:2] for x in (query, key, value)), **ways)
    for one, same, single in zip((out, lse), again, alone, strict=True):
        np.testing.assert_array_equal(one, same)
        np.testing.assert_array_equal(one[1:2], single)
