"""Sinks with the kernels: results and gradients against float64."""

import functools
from typing import Any

import baseline
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import specs
from gpu_helpers import assert_result
from gradient_helpers import Problem, assert_gradients, problem_of

from jax_flash import explain, mha

Spec = specs.Spec

PROBLEMS = (
    Spec(2, 128, 128, 4, 4, 64),
    Spec(1, 300, 500, 8, 2, 128, is_causal=True),
    Spec(2, 257, 130, 4, 1, 96, dtype="float16"),
    Spec(1, 513, 513, 6, 3, 64, is_causal=True, window_size=(100, None)),
    Spec(2, 200, 400, 4, 2, 192, 128, window_size=(30, 40)),
    Spec(4, 90, 110, 6, 2, 64, is_causal=True, query_lengths=(90, 0, 17, 1)),
    Spec(4, 90, 110, 6, 2, 128, key_lengths=(0, 110, 1, 64)),
    Spec(3, 150, 70, 4, 2, 64, is_causal=True, key_lengths=(70, 0, 3)),
    Spec(2, 100, 180, 4, 2, 256, is_causal=True),
    Spec(2, 64, 96, 3, 3, 33),
    Spec(1, 2, 3000, 8, 2, 128),
    Spec(2, 16, 2048, 16, 2, 64, is_causal=True, causal_alignment="bottom_right"),
)


def sinks_of(spec: Spec, seed: int) -> np.ndarray:
    """From far below the logits to far above, one for each head or also each entry."""
    rng = np.random.default_rng([seed, 7])
    shape = (spec.heads,) if seed % 2 else (spec.batch, spec.heads)
    values = (3 * rng.standard_normal(shape)).astype(np.float32)
    values[..., 0] = -np.inf
    values[..., -1] = 9.0
    return values


@functools.cache
def cases() -> list[Problem]:
    return [
        problem_of(spec, seed, with_lse=seed % 3 == 0, sinks=sinks_of(spec, seed))
        for seed, spec in enumerate(PROBLEMS)
    ]


def computed(problem: Problem, operands: Any, cotangents: Any) -> Any:
    """`(out, lse)` and the gradients of query, key, value and sinks, traced."""
    options = {n: x for n, x in problem.given.items() if n != "sinks"}

    def f(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return mha(
            query,
            key,
            value,
            sinks=sinks,
            **options,
            return_lse=True,
            implementation="cuda",
        )

    results, vjp = jax.vjp(f, *operands)
    dout, dlse = cotangents
    return results, vjp((dout, jnp.zeros_like(results[1]) if dlse is None else dlse))


@functools.cache
def results() -> list[Any]:
    """Of all problems, by one program."""

    def program(arguments: Any) -> list[Any]:
        each = zip(cases(), arguments, strict=True)
        return [computed(problem, *given) for problem, given in each]

    arguments = [
        ((*problem.arrays, problem.given["sinks"]), (problem.dout, problem.dlse))
        for problem in cases()
    ]
    return jax.tree.map(np.asarray, jax.jit(program)(jax.device_put(arguments)))


INDICES = pytest.mark.parametrize(
    "index", range(len(PROBLEMS)), ids=lambda i: str(PROBLEMS[i])
)


@INDICES
def test_out_and_lse(index: int) -> None:
    problem = cases()[index]
    assert_result(results()[index][0], (problem.arrays, problem.given))


@INDICES
def test_gradients_of_query_key_and_value(index: int) -> None:
    assert_gradients(results()[index][1][:3], cases()[index])


@INDICES
def test_gradient_of_sinks(index: int) -> None:
    problem, got = cases()[index].clean(), results()[index][1][3]
    query, key, value = problem.arrays
    operands = query, key, value, problem.dout, problem.dlse
    expected = oracle.gradients(*operands, **problem.given)["sinks"]
    plain = baseline.gradients(*operands, **problem.given)["sinks"]
    shape = problem.given["sinks"].shape
    expected, plain = (
        oracle.reduced_to(x, shape).reshape(shape) for x in (expected, plain)
    )
    # Plain may be spared by luck the sum over the rows of errors of random signs: each
    # as large as one rounding of out makes it.
    exact = oracle.attention(query, key, value, **problem.given)
    sinks = np.broadcast_to(problem.given["sinks"], exact.lse.shape[:2])[..., None]
    live = np.isfinite(exact.lse)
    share = np.where(live, np.exp(sinks - np.where(live, exact.lse, 0)), 0)
    products = np.square(exact.out * problem.dout.astype(np.float64)).sum(-1)
    errors = np.square(share) * np.moveaxis(products, 1, 2)
    eps = float(jnp.finfo(query.dtype).eps)
    extra = eps * float(np.sqrt(errors.sum((0, 2)).max()))
    baseline.assert_within(got, plain, expected, extra=extra)
    assert (got[..., 0] == 0).all()  # a sink of -inf takes no share


def test_rows_without_keys_are_zeros() -> None:
    """Whatever their sinks and cotangents."""
    query, key, value = (jnp.asarray(x) for x in Spec(2, 70, 90, 4, 2, 64).arrays())
    sinks = jnp.full(4, 50.0)

    @jax.jit
    def program(lengths: Any) -> Any:
        def f(*args: Any) -> Any:
            *tensors, sinks = args
            return mha(
                *tensors,
                sinks=sinks,
                key_value_seq_lengths=lengths,
                return_lse=True,
                implementation="cuda",
            )

        (out, lse), vjp = jax.vjp(f, query, key, value, sinks)
        nan = jnp.nan
        return out, lse, vjp((jnp.full_like(out, nan), jnp.full_like(lse, nan)))

    out, lse, gradients = program(jnp.zeros(2, jnp.int32))
    assert not np.asarray(out, np.float32).any()
    assert np.isneginf(lse).all()
    for x in gradients:
        assert not np.asarray(x, np.float32).any()


def test_the_kernels_run_it() -> None:
    query, key, value = Spec(2, 70, 90, 4, 2, 64).arrays()
    explanation = explain(query, key, value, sinks=np.zeros(4, np.float32))
    assert explanation.chosen["cuda"] == "cuda"
