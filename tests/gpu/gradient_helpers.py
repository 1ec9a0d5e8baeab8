"""What the GPU tests of the backward share: gradients of many problems, and a bound."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import baseline
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import specs
from gpu_helpers import poisoned_call

from jax_flash import mha

NAMES = ("query", "key", "value")

Gradients = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Operands, the other arguments of `mha`, and the cotangents; dlse may be None."""

    arrays: Sequence[np.ndarray]
    given: dict[str, Any]
    dout: np.ndarray
    dlse: np.ndarray | None = None

    def empty_rows(self) -> np.ndarray:
        """Rows that attend nothing: bool [B, N, T]."""
        query, key, _ = self.arrays
        batch, rows, heads, _ = query.shape
        shape = (batch, heads, rows, key.shape[1])
        return ~oracle.allowed(shape, self.given).any(-1)

    def clean(self) -> "Problem":
        """The same with zeros where nothing may be read."""
        dtype = self.dout.dtype
        query, key, value = (x.astype(np.float64) for x in self.arrays)
        arrays = oracle.without_padding(query, key, value, self.given)
        empty = self.empty_rows()
        by_row = np.moveaxis(empty, 1, 2)[..., None]
        return Problem(
            [x.astype(dtype) for x in arrays],
            self.given,
            np.where(by_row, np.zeros((), dtype), self.dout),
            None if self.dlse is None else np.where(empty, np.float32(0), self.dlse),
        )

    def poisoned(self) -> "Problem":
        """The same with NaN and infinity where nothing may be read."""
        query, key, value = (x.copy() for x in self.arrays)
        for name, cut in (
            ("query_seq_lengths", ((query, np.nan),)),
            ("key_value_seq_lengths", ((key, np.inf), (value, np.nan))),
        ):
            lengths = np.broadcast_to(
                self.given.get(name, np.int32(1 << 30)), query.shape[:1]
            )
            for x, poison in cut:
                beyond = np.arange(x.shape[1]) >= lengths[:, None]
                x[beyond] = poison
        for name, cut in (
            ("q_segment_ids", ((query, np.inf),)),
            ("kv_segment_ids", ((key, np.nan), (value, np.inf))),
        ):
            for x, poison in cut:
                ids = np.broadcast_to(self.given.get(name, 0), x.shape[:2])
                x[ids < 0] = poison
        empty = self.empty_rows()
        dout = self.dout.copy()
        np.moveaxis(dout, 1, 2)[empty] = np.nan
        dlse = None
        if self.dlse is not None:
            dlse = np.where(empty, np.float32(-np.inf), self.dlse)
        return Problem((query, key, value), self.given, dout, dlse)


def problem_of(
    spec: specs.Spec, seed: int = 0, with_lse: bool = False, **given: Any
) -> Problem:
    """Standard normal operands and cotangents."""
    arrays = spec.arrays(seed)
    rng = np.random.default_rng([seed, 1])
    batch, rows, heads, _ = spec.shapes[0]
    dout = rng.standard_normal((batch, rows, heads, spec.widths[1]), np.float32)
    dlse = rng.standard_normal((batch, heads, rows), np.float32) if with_lse else None
    return Problem(arrays, spec.options | given, dout.astype(arrays[0].dtype), dlse)


def gradients_of(
    arrays: Any, operands: Any, dout: Any, dlse: Any, options: dict[str, Any]
) -> Any:
    """Gradients of one problem by the kernels, traced."""

    def f(*arrays: Any) -> Any:
        return mha(
            *arrays, **operands, **options, return_lse=True, implementation="cuda"
        )

    if dlse is None:
        return jax.vjp(lambda *a: f(*a)[0], *arrays)[1](dout)
    return jax.vjp(f, *arrays)[1]((dout, dlse))


def run_gradients(problems: Sequence[Problem], **options: Any) -> list[Gradients]:
    """Gradients by the kernels, by one program for all problems, as NumPy arrays.

    They are written where there was NaN. So, in all likelihood, is the workspace:
    memory that was full of NaN is freed before the program asks for some.
    """
    varying = [
        {name: x for name, x in p.given.items() if isinstance(x, np.ndarray)}
        for p in problems
    ]
    fixed = [
        {name: x for name, x in p.given.items() if not isinstance(x, np.ndarray)}
        for p in problems
    ]

    def call(arguments: Any) -> list[Any]:
        results: list[Any] = []
        for argument, one in zip(arguments, fixed, strict=True):
            results += gradients_of(*argument, options=one | options)
        return results

    shapes = [(x.shape, x.dtype) for p in problems for x in p.arrays]
    arguments = jax.device_put(
        [
            (tuple(p.arrays), operands, p.dout, p.dlse)
            for p, operands in zip(problems, varying, strict=True)
        ]
    )
    jax.block_until_ready(jnp.full(1 << 28, jnp.nan, jnp.float32)).delete()
    got, donated = poisoned_call(call, shapes)(arguments)
    assert sorted(x.unsafe_buffer_pointer() for x in got) == sorted(donated)
    host = [np.asarray(x) for x in got]
    return [tuple(host[i : i + 3]) for i in range(0, len(host), 3)]


def assert_gradients(
    result: Gradients,
    problem: Problem,
    extra: float = 0.0,
    factor: float = baseline.FACTOR,
    spared: Mapping[str, float] | None = None,
) -> None:
    """Gradients against float64, and exact zeros where nothing is attended.

    Bounded by the error of `baseline.gradients`, by rounding, and by the float32 error
    of `dout @ value^T - delta`, which `baseline` may be spared where one weight is 1.

    Args:
      result: of query, key and value.
      problem: what was computed.
      extra: error allowed beyond that, relative to the largest value or 1.
      factor: see `baseline.assert_within`.
      spared: further error allowed, by name of the gradient.
    """
    assert_all_gradients([(result, problem)], extra, factor, spared)


def assert_all_gradients(
    parts: Sequence[tuple[Gradients, Problem]],
    extra: float = 0.0,
    factor: float = baseline.FACTOR,
    spared: Mapping[str, float] | None = None,
) -> None:
    """The same of the parts of one call: its largest error is that of all of them."""
    compared = [compare_gradients(result, problem) for result, problem in parts]
    step = float(jnp.finfo(parts[0][1].arrays[0].dtype).eps)
    for i, name in enumerate(NAMES):
        got, plain, expected, rounding = zip(
            *(each[i] for each in compared), strict=True
        )
        flat = [
            np.concatenate([x.ravel() for x in xs]) for xs in (got, plain, expected)
        ]
        try:
            largest = max(1.0, float(np.abs(flat[2]).max(initial=0)))
            allowed = max(rounding) + extra * largest + (spared or {}).get(name, 0.0)
            baseline.assert_within(*flat, step=step, extra=allowed, factor=factor)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


def compare_gradients(
    result: Gradients, problem: Problem
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """Result, baseline, float64 and what rounding adds, of each of NAMES.

    What attends nothing is checked right here.
    """
    problem = problem.clean()
    query, key, value = problem.arrays
    operands = query, key, value, problem.dout, problem.dlse
    expected = oracle.gradients(*operands, **problem.given)
    plain = baseline.gradients(*operands, **problem.given)
    scale = problem.given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)

    def size(x: np.ndarray) -> float:
        return float(np.linalg.norm(x.astype(np.float32), axis=-1).max(initial=0))

    slope = 2.0**-21 * scale * size(problem.dout) * size(value)
    extra = {"query": slope * size(key), "key": slope * size(query), "value": 0.0}
    empty = problem.empty_rows()
    assert (np.moveaxis(result[0], 1, 2)[empty].astype(np.float32) == 0).all()
    # Keys that no row sees.
    batch, rows, heads, _ = query.shape
    shape = (batch, heads, rows, key.shape[1])
    unseen = ~oracle.allowed(shape, problem.given).any((1, 2))
    for got in result[1:]:
        assert (got[unseen].astype(np.float32) == 0).all()
    return [
        (np.asarray(got), plain[name], expected[name], extra[name])
        for name, got in zip(NAMES, result, strict=True)
    ]


def assert_all(
    labels: Sequence[Any], problems: Sequence[Problem], **options: Any
) -> None:
    """Runs the problems in one program and reports all that are wrong.

    Args:
      labels: what to call each problem.
      problems: the problems.
      **options: further arguments of `mha`.
    """
    failures = []
    results = run_gradients(problems, **options)
    for label, problem, result in zip(labels, problems, results, strict=True):
        try:
            assert_gradients(result, problem)
        except AssertionError as error:
            failures.append(f"{label}: {error}")
    assert not failures, "\n".join(failures)
