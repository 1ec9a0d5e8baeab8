"""The covering array itself, and a few of its cases in jnp."""

import itertools
import pathlib
import sys
from typing import Any

import covering
import jax
import numpy as np
import pytest

# The problems stand beside the test that runs all of them.
sys.path.append(str(pathlib.Path(__file__).parent / "gpu"))

import covering_problems

ALL = covering.ALL_FACTORS


def test_every_pair_is_covered_and_no_forbidden_one() -> None:
    first = 0
    for factors, count in covering.ARRAYS:
        cases = covering.cases()[first : first + count]
        covered = {pair for case in cases for pair in covering.pairs_of(case, factors)}
        assert covered == covering.pairs(factors)
        first += count
    assert first == len(covering.cases()) >= 1500


def test_cases_are_different_and_always_the_same() -> None:
    for factors, count in covering.ARRAYS:
        cases = covering.several(factors, count)
        assert len({tuple(case.values()) for case in cases}) == count
    assert covering.array(ALL, 0) == covering.array(ALL, 0)
    assert covering.array(ALL, 0) != covering.array(ALL, 1)


def test_an_array_is_small() -> None:
    """Two factors need 56 cases at least; all together hardly more."""
    assert 56 <= len(covering.array(ALL, 0)) <= 75


def test_batches_are_all_cases() -> None:
    batches = [covering.batch(number) for number in range(covering.BATCHES)]
    numbers = [i for batch in batches for i, _ in batch]
    assert sorted(numbers) == list(range(len(covering.cases())))
    for batch in batches:
        assert len({case["kernels"] for _, case in batch}) == 1


def test_most_cases_are_those_of_kernels() -> None:
    calls = [
        covering_problems.call_of(i, case)
        for i, case in list(enumerate(covering.cases()))[::16]
    ]
    share = np.mean([call.by_kernels for call in calls])
    assert 0.9 < share < 1


def chosen(count: int) -> list[int]:
    """Some cases of each array."""
    sizes = [size for _, size in covering.ARRAYS]
    ends = itertools.accumulate(sizes, initial=0)
    return [
        first + (end - first) * i // count
        for first, end in itertools.pairwise(ends)
        for i in range(count)
    ]


@pytest.mark.parametrize("number", chosen(3))
def test_cases_in_jnp(number: int) -> None:
    call = covering_problems.call_of(number, covering.cases()[number])

    def program(arguments: Any) -> Any:
        return covering_problems.computed(call, arguments)

    results = jax.jit(program)(covering_problems.arguments(call))
    covering_problems.assert_right(call, [np.asarray(x) for x in results])


@pytest.mark.usefixtures("kernels")
def test_kernels_take_what_the_test_says() -> None:
    for number, case in list(enumerate(covering.cases()))[::31]:
        covering_problems.assert_choice(covering_problems.call_of(number, case))
