"""Every pair of options, types, widths and kernels, forward and backward, by float64.

1,536 cases (`covering`), none left out: what kernels do not take is run by what `mha`
takes in their place. Half of the programs is for the kernels for Ampere, in processes
of their own, because which kernels there are is read when a process starts.
"""

import os
from typing import Any

import covering
import covering_problems
import gpu_helpers
import jax
import numpy as np
import pytest

from jax_flash import mha
from jax_flash._src import registry

NUMBER = "JAX_FLASH_TEST_COVERING"


def check(number: int) -> None:
    """Runs the cases of a batch by one program, over memory that holds NaN."""
    numbered = covering.batch(number)
    calls = [covering_problems.call_of(i, case) for i, case in numbered]
    arguments = [covering_problems.arguments(call) for call in calls]

    def program(arguments: Any) -> list[Any]:
        each = zip(calls, arguments, strict=True)
        return [covering_problems.computed(call, given) for call, given in each]

    shapes = [
        (x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(program, arguments))
    ]
    results, _ = gpu_helpers.poisoned_call(program, shapes)(jax.device_put(arguments))
    failures = []
    for (i, case), call, result in zip(numbered, calls, results, strict=True):
        try:
            covering_problems.assert_choice(call)
            covering_problems.assert_right(call, [np.asarray(x) for x in result])
        except AssertionError as error:
            failures.append(f"{i} {case}: {error}")
    assert not failures, "\n".join([f"{len(failures)} of {len(calls)}", *failures])


def check_for_ampere() -> None:
    """The same in a process that leaves the kernels for Hopper out."""
    assert registry.extension().force_sm80
    check(int(os.environ[NUMBER]))


@pytest.mark.parametrize("number", range(covering.BATCHES))
def test_cases(number: int) -> None:
    if covering.batch(number)[0][1]["kernels"] != "sm80":
        check(number)
        return
    gpu_helpers.in_new_process(
        check_for_ampere, JAX_FLASH_FORCE_SM80="1", **{NUMBER: str(number)}
    )


def test_every_argument_changes_the_output() -> None:
    """Of the kernels, and of what runs in their place: nothing is ignored."""
    shapes = (2, 70, 4, 64), (2, 70, 2, 64), (2, 70, 2, 64)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    arrays = jax.device_put([x.astype(jax.numpy.bfloat16) for x in arrays])
    changes = covering_problems.changes(rng, 2, 70, 4)

    @jax.jit
    def program(arrays: Any) -> list[Any]:
        plain = mha(*arrays)
        return [plain, *(mha(*arrays, **options) for options in changes)]

    plain, *others = (np.asarray(x, np.float32) for x in program(arrays))
    for options, out in zip(changes, others, strict=True):
        assert np.abs(out - plain).max() > 0.05, options
