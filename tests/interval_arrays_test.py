"""The cases that emulated kernels with intervals are tested with."""

import interval_cases
import numpy as np
import pytest


@pytest.mark.parametrize("name", interval_cases.CASES)
def test_cases_hold_what_their_arrays_say(name: str) -> None:
    """The mask that records and ids make is the dense one."""
    case = interval_cases.case(name)
    arrays = case.arrays()
    rows, keys = case.seen.shape[1:]
    records, ids = arrays["rows"][:, :rows], arrays["keys"][:, None, :keys]
    key = np.arange(keys)
    first, end, row_id, _ = np.moveaxis(records, -1, 0)[..., None]
    seen = (first <= key) & (key < end) & (ids == row_id)
    np.testing.assert_array_equal(seen, case.seen)
