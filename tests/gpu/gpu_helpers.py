"""What the GPU tests share: running the kernels with poisoned outputs."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import baseline
import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jax_flash import mha

# Relative to the size of the logits, which lse is as large as.
LSE_TOLERANCE = 2e-6

F32_ERRORS = {None: 2.0**-15, "tf32": 2e-3}
"""Of results of float32 with a precision that is not "highest", by which one.

Relative to the largest; gradients twice that.

On Hopper both are those of split bfloat16 where TMA reads operands (in the backward
only None), else None is "highest", and "tf32" rounds to TF32.
"""

# Query, key and value, and the other arguments of `mha`.
Problem = tuple[Sequence[np.ndarray], dict[str, Any]]
Result = tuple[np.ndarray, np.ndarray]


def in_new_process(function: Callable[[], None], **environment: str) -> None:
    """Calls a function of a test module; its memory is free for others afterwards.

    JAX keeps what it has once allocated until the process ends.
    """
    module, name = function.__module__, function.__name__
    result = subprocess.run(
        [sys.executable, "-P", "-c", f"import {module}; {module}.{name}()"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def poisoned_call(call: Callable, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> Any:
    """`call` whose results are written where there was NaN.

    Buffers of NaN are donated to the program, so they become its results' memory.

    Args:
      call: a function of arrays that returns as many arrays as there are shapes.
      shapes: (shape, dtype) of its results.

    Returns:
      A function of the same arguments: (results, addresses of the donated buffers).
    """

    def with_poison(poison: Any, *args: Any) -> Any:
        return call(*args)

    jitted = jax.jit(with_poison, donate_argnums=0, keep_unused=True)

    def run(*args: Any) -> Any:
        poison = jax.device_put(
            [np.full(shape, np.nan, dtype) for shape, dtype in shapes]
        )
        addresses = [x.unsafe_buffer_pointer() for x in poison]
        return jitted(poison, *args), addresses

    return run


def run_kernels(problems: Sequence[Problem]) -> list[Result]:
    """(out, lse) of the CUDA kernel for each problem, as NumPy arrays.

    All are run by one program, which takes much less time to compile than one for each.
    """
    varying = [
        {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
        for _, given in problems
    ]
    fixed = [
        {name: x for name, x in given.items() if name not in operands}
        for (_, given), operands in zip(problems, varying, strict=True)
    ]

    def call(arguments: Any) -> list[Any]:
        results: list[Any] = []
        for (arrays, operands), options in zip(arguments, fixed, strict=True):
            results += mha(
                *arrays,
                **operands,
                **options,
                return_lse=True,
                implementation="cuda",
            )
        return results

    shapes: list[tuple[tuple[int, ...], Any]] = []
    for (query, _, value), _ in problems:
        batch, rows, heads, _ = query.shape
        shapes.append(((batch, rows, heads, value.shape[-1]), query.dtype))
        shapes.append(((batch, heads, rows), np.dtype(np.float32)))
    arguments = jax.device_put(
        [
            (tuple(arrays), one)
            for (arrays, _), one in zip(problems, varying, strict=True)
        ]
    )
    got, donated = poisoned_call(call, shapes)(arguments)
    assert sorted(x.unsafe_buffer_pointer() for x in got) == sorted(donated)
    host = [np.asarray(x) for x in got]
    return list(zip(host[::2], host[1::2], strict=True))


def run_kernel(query: Any, key: Any, value: Any, **given: Any) -> Result:
    """(out, lse) of the CUDA kernel as NumPy arrays, its results poisoned before."""
    return run_kernels([((query, key, value), given)])[0]


def plain(query: Any, key: Any, value: Any, **given: Any) -> np.ndarray:
    """`baseline.attention` in NumPy: no program to compile for each shape."""
    q, k, v = (x.astype(np.float32) for x in (query, key, value))
    out = np.empty((*query.shape[:3], value.shape[-1]), query.dtype)
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    factors = oracle.kept_of(shape, given)
    for index, pair, p, _ in baseline.weights(
        q, k, baseline.scale_of(query, given), given
    ):
        if factors is not None:
            b, rows, n = index
            p = p * factors[b, n, rows].astype(np.float32)
        out[index] = p.astype(query.dtype).astype(np.float32) @ v[pair]
    return out


def assert_result(result: Result, problem: Problem) -> None:
    """A result against float64, bounded by the error of `plain`, rounding and logits.

    Logits are rounded to f32, so large ones allow an error that `plain` may be spared.
    """
    query = problem[0][0]
    _assert_result(result, problem, plain, float(jnp.finfo(query.dtype).eps), 2.0**-22)


def assert_correct(query: Any, key: Any, value: Any, **given: Any) -> None:
    """The kernel against float64, bounded by the error of what XLA does."""

    def by_xla(*arrays: Any, **given: Any) -> np.ndarray:
        return np.asarray(baseline.attention(*map(jnp.asarray, arrays), **given))

    result = run_kernel(query, key, value, **given)
    _assert_result(result, ((query, key, value), given), by_xla, 0.0, 0.0)


def assert_near(
    got: np.ndarray, expected: np.ndarray, tolerance: float, what: Any = ""
) -> None:
    """Equal places of -inf, and errors relative to the largest value or 1."""
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    got, expected = (np.where(np.isneginf(x), 0, x) for x in (got, expected))
    error = np.abs(got - expected).max(initial=0)
    largest = max(1.0, float(np.abs(expected).max(initial=0)))
    assert error <= tolerance * largest, f"{what} error {error:.3e} of {largest:.3e}"


def _assert_result(
    result: Result,
    problem: Problem,
    reference: Callable[..., Any],
    step: float,
    logit_error: float,
) -> None:
    """Out, lse, and exact zeros in rows without keys.

    Args:
      result: (out, lse) of the kernel.
      problem: what they were computed from.
      reference: the same mathematics in f32, whose error bounds that of `out`.
      step: as for `baseline.assert_within`.
      logit_error: further error of `out`, relative to it, for each unit of the logits.
    """
    (query, key, value), given = problem
    out, lse = result
    clean = oracle.without_padding(query, key, value, given)
    q, k, v = (x.astype(query.dtype) for x in clean)
    # Logits of -inf are legal; a NaN would fail below.
    with np.errstate(over="ignore", invalid="ignore"):
        expected = oracle.attention(query, key, value, **given)
        by_reference = reference(q, k, v, **given)
    empty = np.isneginf(expected.lse)
    logits = np.abs(np.where(empty, 0, expected.lse)).max(initial=1)
    extra = logit_error * logits * np.abs(expected.out).max(initial=0)
    baseline.assert_within(out, by_reference, expected.out, step=step, extra=extra)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (np.moveaxis(out, 1, 2)[empty].astype(np.float32) == 0).all()
    difference = np.where(empty, 0, lse - np.where(empty, 0, expected.lse))
    assert np.isfinite(difference).all()
    assert np.abs(difference).max(initial=0) <= LSE_TOLERANCE * logits
