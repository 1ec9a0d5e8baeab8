"""Kernels with intervals: dropout, beside other options, by float64."""

from typing import Any

import numpy as np
import pytest
import specs
from gpu_helpers import assert_result, run_kernels
from gradient_helpers import Problem, assert_all, problem_of

from jax_flash import alibi

Spec = specs.Spec

WIDTHS = ((64, 64), (128, 128), (256, 256), (40, 24), (33, 17), (192, 128))
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"window_size": (70, 30)},
    {"is_causal": True, "query_lengths": (150, 33), "key_lengths": (170, 0)},
)


def ids(seed: int, batch: int, length: int) -> np.ndarray:
    """Documents one after the other, and padding at the end."""
    rng = np.random.default_rng([seed, 5])
    found = np.sort(rng.integers(0, 4, (batch, length)), -1)
    found[:, length - length // 9 :] = -1
    return found.astype(np.int32)


def options_of(spec: Spec, seed: int, kinds: str) -> dict[str, Any]:
    """Of the kinds named by letters: dropout (p), documents, cap, alibi."""
    rng = np.random.default_rng([seed, 6])
    given: dict[str, Any] = {}
    if "p" in kinds:
        given["dropout_rate"] = (0.1, 0.5, 0.003, 0.9)[seed % 4]
        given["dropout_key"] = rng.integers(0, 1 << 32, 2, np.uint32)
    if "d" in kinds:
        given["q_segment_ids"] = ids(seed, spec.batch, spec.query_length)
        given["kv_segment_ids"] = ids(seed, spec.batch, spec.key_length)
    if "c" in kinds:
        given["softcap"] = 1.5
    if "a" in kinds:
        slopes = rng.uniform(0, 0.3, (spec.batch, spec.heads))
        given["bias"] = alibi(slopes.astype(np.float32))
    return given


def cases(dtype: str) -> list[tuple[Spec, str]]:
    """Every width with every kind; masks, lengths and groups of heads in turn."""
    found = []
    for i, widths in enumerate(WIDTHS):
        for j, kinds in enumerate(("p", "pc", "pdca")):
            mask = MASKS[(i + j) % len(MASKS)]
            found.append((Spec(2, 150, 170, 4, 2, *widths, dtype=dtype, **mask), kinds))
    found += [
        (Spec(1, 1000, 1000, 4, 4, 64, dtype=dtype, is_causal=True), "p"),
        (Spec(1, 777, 1300, 4, 1, 128, dtype=dtype), "p"),
        (Spec(1, 900, 900, 2, 2, 256, dtype=dtype, is_causal=True), "pd"),
        (Spec(3, 1, 500, 8, 2, 128, dtype=dtype), "p"),
    ]
    return found


def problems(dtype: str) -> tuple[list[str], list[Problem]]:
    """Labels, and problems with NaN wherever nothing may be read."""
    made = [
        problem_of(spec, i, with_lse=i % 2 == 1, **options_of(spec, i, kinds))
        for i, (spec, kinds) in enumerate(cases(dtype))
    ]
    labels = [f"{kinds} {spec}" for spec, kinds in cases(dtype)]
    return labels, [problem.poisoned() for problem in made]


@pytest.mark.parametrize("dtype", specs.DTYPES)
def test_forward(dtype: str) -> None:
    labels, made = problems(dtype)
    calls = [(problem.arrays, problem.given) for problem in made]
    failures = []
    for label, call, result in zip(labels, calls, run_kernels(calls), strict=True):
        try:
            assert_result(result, call)
        except AssertionError as error:
            failures.append(f"{label}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(dtype: str, deterministic: bool) -> None:
    assert_all(*problems(dtype), deterministic=deterministic)
