"""The interval of keys of a row: against its definition, and against the C++ one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flash._src import mask, registry

SIDES = (None, 0, 1, 3, 100)
CASES = list(itertools.product(SIDES, SIDES, (False, True)))


# Compiled once for each number of rows and window, not operation by operation.
_key_interval = jax.jit(mask.key_interval, static_argnums=(3, 4, 5))


def unbounded(side: int | None) -> int:
    return -1 if side is None else side


def intervals(
    rows: int, query_length: int, key_length: int, left, right, bottom_right: bool
) -> tuple[np.ndarray, np.ndarray]:
    first, end = _key_interval(
        jnp.arange(rows, dtype=jnp.int32),
        jnp.int32(query_length),
        jnp.int32(key_length),
        unbounded(left),
        unbounded(right),
        bottom_right,
    )
    return np.asarray(first), np.asarray(end)


def expected(
    rows: int, keys: int, query_length: int, key_length: int, left, right, bottom_right
) -> np.ndarray:
    return oracle.visible(
        rows,
        keys,
        query_length,
        key_length,
        causal_alignment="bottom_right" if bottom_right else "top_left",
        window_size=(left, right),
    )


@pytest.mark.parametrize(("left", "right", "bottom_right"), CASES)
def test_interval(left: int | None, right: int | None, bottom_right: bool) -> None:
    rows, keys = 6, 9
    key = np.arange(keys)
    for lengths in itertools.product((0, 1, 4, 6), (0, 1, 5, 9)):
        first, end = intervals(rows, *lengths, left, right, bottom_right)
        got = (key >= first[:, None]) & (key < end[:, None])
        want = expected(rows, keys, *lengths, left, right, bottom_right)
        np.testing.assert_array_equal(got, want, str(lengths))
        beyond = np.arange(rows) >= lengths[0]
        assert not first[beyond].any()
        assert not end[beyond].any()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    keys=st.integers(1, 40),
    query_length=st.integers(0, 40),
    key_length=st.integers(0, 40),
    left=st.none() | st.integers(0, 50),
    right=st.none() | st.integers(0, 50),
    bottom_right=st.booleans(),
)
def test_interval_property(
    rows: int,
    keys: int,
    query_length: int,
    key_length: int,
    left: int | None,
    right: int | None,
    bottom_right: bool,
) -> None:
    query_length, key_length = min(query_length, rows), min(key_length, keys)
    first, end = intervals(rows, query_length, key_length, left, right, bottom_right)
    key = np.arange(keys)
    got = (key >= first[:, None]) & (key < end[:, None])
    want = expected(rows, keys, query_length, key_length, left, right, bottom_right)
    np.testing.assert_array_equal(got, want)


def test_interval_of_the_kernels() -> None:
    """C++ and Python compute the same interval."""
    if registry.extension().missing is not None:
        pytest.skip("the extension was not built")
    from jax_flash import _kernels  # pyright: ignore[reportAttributeAccessIssue]

    rows = 7
    for left, right, bottom_right in CASES:
        for lengths in itertools.product((0, 1, 5, 7), (0, 1, 6, 200)):
            first, end = intervals(rows, *lengths, left, right, bottom_right)
            sides = unbounded(left), unbounded(right)
            for row in range(rows):
                got = _kernels.key_interval(row, *lengths, *sides, bottom_right)
                # Empty intervals may be written in many ways.
                want = first[row], end[row]
                assert tuple(got) == want or (got[1] <= got[0] and want[1] <= want[0])
