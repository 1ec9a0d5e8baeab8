"""Few queries of `mha` on many keys: decode kernel and gradients against float64."""

from typing import Any

import choice_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from gpu_helpers import assert_result, run_kernels
from gradient_helpers import assert_all, problem_of

from jax_flash import explain, mha
from jax_flash._src import decode_plan

Spec = specs.Spec

KEYS = decode_plan.MHA_KEYS
SINKS = np.array([0, 3, -9, 9, 1, 2], np.float32)
CASES: tuple[tuple[Spec, dict[str, Any]], ...] = (
    (Spec(2, 1, KEYS, 8, 2, 128), {}),
    (Spec(1, 1, 32 * KEYS, 8, 2, 128), {}),
    (Spec(2, 1, KEYS + 77, 4, 1, 64, dtype="float16", is_causal=True), {}),
    (Spec(1, 4, KEYS + 1, 8, 2, 128, is_causal=True), {"scale": 0.3}),
    (Spec(3, 3, KEYS, 5, 1, 80, 256, is_causal=True, key_lengths=(0, 2, KEYS + 9)), {}),
    (Spec(2, 1, KEYS, 16, 1, 256, key_lengths=(1, KEYS - 24)), {"softcap": 1.5}),
    (Spec(1, 2, 3 * KEYS, 3, 3, 96, window_size=(KEYS, 0)), {}),
    (Spec(2, 1, KEYS, 6, 3, 128, 64), {"sinks": SINKS}),
)


def problems() -> list[Any]:
    made = []
    for seed, (spec, options) in enumerate(CASES):
        problem = problem_of(spec, seed, with_lse=seed % 2 == 0, **options)
        plain = {n: x for n, x in problem.given.items() if n != "return_lse"}
        arrays = problem.arrays
        assert explain(*arrays, **plain).details["cuda"].startswith("the decode kernel")
        made.append(problem)
    return made


def test_out_and_lse() -> None:
    """All problems by one program, with padding of NaN."""
    given = [(p.poisoned().arrays, p.given) for p in problems()]
    for (spec, _), result, problem in zip(
        CASES, run_kernels(given), given, strict=True
    ):
        try:
            assert_result(result, problem)
        except AssertionError as error:
            raise AssertionError(f"{spec}: {error}") from error


def test_gradients() -> None:
    """The backward kernels take the out and lse of the decode kernel."""
    given = [p.poisoned() for p in problems()]
    assert_all([spec for spec, _ in CASES], given)


@pytest.mark.parametrize("keys", [KEYS - 1, KEYS])
def test_the_kernel_that_was_chosen_runs(keys: int) -> None:
    query = jnp.ones((2, 1, 8, 64), jnp.bfloat16)
    key = jnp.ones((2, keys, 2, 64), jnp.bfloat16)
    names = choice_test.kernels(choice_test.forward, query, key, key)
    assert any("decode" in name for name in names) == (keys == KEYS), names
    assert any("mha_fwd" in name for name in names) == (keys < KEYS), names


def test_a_sequence_is_the_same_in_any_batch() -> None:
    arrays = Spec(5, 1, KEYS, 8, 2, 128).arrays()
    run = jax.jit(lambda *a: mha(*a, return_lse=True, implementation="cuda"))
    whole, alone = run(*arrays), run(*(x[3:4] for x in arrays))
    for x, y in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(x[3:4]), np.asarray(y))
