"""The backward kernels against float64; many problems share a program, and a test."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_test
import specs
from gpu_helpers import in_new_process
from gradient_helpers import Problem, assert_all, gradients_of, problem_of

from jax_flash import mha

SMALL, LARGE = 10, 4
"""Problems of a program, for sequences up to 400 and longer ones."""
RANDOM_BATCHES, RANDOM_PROBLEMS = 25, 16
REPEATS = 50


def groups_of(problems: list[specs.Spec], size: int) -> list[list[specs.Spec]]:
    return [problems[i : i + size] for i in range(0, len(problems), size)]


def is_small(spec: specs.Spec) -> bool:
    return max(spec.query_length, spec.key_length) <= 400


TABLE = groups_of([s for s in specs.GPU_TABLE if is_small(s)], SMALL) + groups_of(
    [s for s in specs.GPU_TABLE if not is_small(s)], LARGE
)


@pytest.mark.parametrize("group", range(len(TABLE)))
def test_shape_table(group: int) -> None:
    """Every second problem has a cotangent of lse, and every third is deterministic."""
    for deterministic in (False, True):
        chosen = [
            (i, spec)
            for i, spec in enumerate(TABLE[group])
            if (i % 3 == 0) == deterministic
        ]
        problems = [problem_of(s, i, with_lse=i % 2 == 1) for i, s in chosen]
        labels = [spec for _, spec in chosen]
        if problems:
            assert_all(labels, problems, deterministic=deterministic)


@pytest.mark.parametrize("batch", range(RANDOM_BATCHES))
def test_random_problems(batch: int) -> None:
    """Any sizes, widths and mask; NaN wherever nothing may be read."""
    seeds = range(RANDOM_PROBLEMS * batch, RANDOM_PROBLEMS * (batch + 1))
    chosen = [random_test.random_spec(10_000 + seed) for seed in seeds]
    problems = [
        problem_of(spec, seed, with_lse=seed % 2 == 0).poisoned()
        for seed, spec in zip(seeds, chosen, strict=True)
    ]
    assert_all(chosen, problems, deterministic=batch % 3 == 0)


WIDTHS = (
    (1, 1),
    (7, 9),
    (33, 33),
    (36, 60),
    (100, 36),
    (31, 200),
    (250, 6),
    (255, 255),
)


@pytest.mark.parametrize("dtype", specs.DTYPES)
def test_odd_widths(dtype: str) -> None:
    masks: list[dict[str, Any]] = [{"is_causal": True}, {"window_size": (40, 20)}]
    chosen = [
        specs.Spec(2, 150, 170, 4, 2, *widths, dtype=dtype, **mask)
        for widths in WIDTHS
        for mask in masks
    ]
    assert_all(chosen, [problem_of(spec, i) for i, spec in enumerate(chosen)])


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_padding_may_hold_anything(dtype: str, with_lse: bool) -> None:
    """Lengths 0, 1, in the middle, full and beyond; rows and keys that meet nothing."""
    lengths: list[dict[str, Any]] = [
        {"query_lengths": (90, 33, 0), "key_lengths": (7, 200, 65)},
        {"query_lengths": (1, 95, 64)},
        {"key_lengths": (0, 1, 128)},
        {"query_lengths": (90, 90, 90), "key_lengths": (0, 0, 0)},
        {"query_lengths": (0, 0, 0)},
    ]
    masks: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "top_left", "window_size": (3, 0)},
        {"window_size": (0, 0)},
    ]
    widths = (64, 128, 96, 256, 192)
    chosen = [
        specs.Spec(3, 90, 200, 4, 2, widths[i % 5], dtype=dtype, **length, **mask)
        for i, (length, mask) in enumerate(itertools.product(lengths, masks))
    ]
    # More rows than keys, causal: the first rows see nothing.
    chosen.append(specs.Spec(1, 300, 70, 2, 1, 64, dtype=dtype, is_causal=True))
    problems = [
        problem_of(spec, i, with_lse=with_lse).poisoned()
        for i, spec in enumerate(chosen)
    ]
    assert_all(chosen, problems)


@pytest.mark.parametrize("dtype", specs.DTYPES)
def test_any_scale(dtype: str) -> None:
    spec = specs.Spec(1, 100, 170, 2, 1, 64, dtype=dtype, is_causal=True)
    scales = (0.0, -0.3, 1e-30, -1e-30, 1e-3, 0.5)
    assert_all(scales, [problem_of(spec, scale=scale) for scale in scales])


@pytest.mark.parametrize("deterministic", [False, True])
def test_groups_of_heads(deterministic: bool) -> None:
    """Gradients of keys and values are summed over the heads that read them."""
    chosen = [
        specs.Spec(2, 190, 140, kv_heads * group, kv_heads, width, is_causal=causal)
        for kv_heads, group in ((1, 1), (1, 16), (3, 5), (2, 8))
        for width in (64, 128, 256)
        for causal in (False, True)
    ]
    problems = [problem_of(spec, i, True) for i, spec in enumerate(chosen)]
    assert_all(chosen, problems, deterministic=deterministic)


# --- transformations

SPEC = specs.Spec(3, 130, 200, 4, 2, 64, is_causal=True)
EXAMPLES = 3


def stacked(mapped: str, axis: int) -> tuple[list[Any], tuple[int | None, ...]]:
    """Operands of SPEC with EXAMPLES of each that is mapped, and their axes."""
    several = [SPEC.arrays(seed) for seed in range(EXAMPLES)]
    operands = [
        jnp.stack(xs, axis) if name in mapped else jnp.asarray(xs[0])
        for name, *xs in zip("qkv", *several, strict=True)
    ]
    return operands, tuple(axis if name in mapped else None for name in "qkv")


def loss(*arrays: Any, implementation: str) -> jax.Array:
    out, lse = mha(
        *arrays, is_causal=True, return_lse=True, implementation=implementation
    )
    return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-2) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.isfinite(x).all()
        assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max())


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_vmap_of_every_subset(axis: int) -> None:
    """Gradients of each example, and of the sum: then what is shared is summed."""
    cases = [stacked(m, axis) for m in ("q", "k", "v", "qk", "kv", "qv", "qkv")]

    @functools.partial(jax.jit, static_argnums=1)
    def program(several: Any, implementation: str) -> Any:
        one = functools.partial(loss, implementation=implementation)
        results = []
        for operands, (_, axes) in zip(several, cases, strict=True):
            mapped = jax.vmap(one, axes)
            results += [
                jax.vmap(jax.grad(one, (0, 1, 2)), axes)(*operands),
                jax.grad(lambda *a, m=mapped: m(*a).sum(), (0, 1, 2))(*operands),
            ]
        return results

    arguments = [operands for operands, _ in cases]
    assert_close(program(arguments, "cuda"), program(arguments, "xla"))


def test_vmap_is_the_loop() -> None:
    """Bitwise, in deterministic mode: a result does not depend on its neighbours."""
    operands, _ = stacked("qkv", 0)
    dout = jnp.asarray(problem_of(SPEC).dout)
    one = functools.partial(
        gradients_of,
        operands={},
        dout=dout,
        dlse=None,
        options={"is_causal": True, "deterministic": True},
    )

    @jax.jit
    def program(operands: Any) -> Any:
        looped = [one([x[i] for x in operands]) for i in range(EXAMPLES)]
        return (
            jax.vmap(lambda *a: one(a))(*operands),
            jax.tree.map(lambda *x: jnp.stack(x), *looped),
        )

    mapped, looped = program(operands)
    chex.assert_trees_all_equal(mapped, looped)


def test_cotangents_alone_mapped() -> None:
    operands = [jnp.asarray(x) for x in specs.Spec(1, 70, 90, 4, 2, 64).arrays()]

    def program(implementation: str) -> Any:
        def f(*a: Any) -> Any:
            return mha(*a, implementation=implementation)[0, :3, 1, :2]

        return jax.jit(jax.jacrev(f, (0, 1, 2)))(*operands)

    assert_close(program("cuda"), program("xla"))


def test_second_order_and_forward_mode() -> None:
    operands = [jnp.asarray(x) for x in specs.Spec(1, 40, 60, 2, 1, 64).arrays()]

    @functools.partial(jax.jit, static_argnums=1)
    def program(operands: Any, implementation: str) -> Any:
        f = functools.partial(loss, implementation=implementation)
        first = jax.grad(f, (0, 1, 2))
        second = jax.grad(
            lambda *a: sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in first(*a))
        )
        return second(*operands), jax.jvp(first, operands, operands)

    arguments = tuple(operands)
    assert_close(program(arguments, "cuda"), program(arguments, "xla"), 5e-2)


# --- reproducible

DETERMINISTIC = (
    specs.Spec(1, 1024, 1024, 8, 8, 64, is_causal=True),
    specs.Spec(2, 1000, 1100, 16, 2, 128, is_causal=True),
    specs.Spec(1, 500, 3000, 6, 6, 96, dtype="float16"),
    specs.Spec(1, 2048, 2048, 4, 1, 128, window_size=(300, 10)),
    specs.Spec(3, 700, 900, 4, 4, 192, 128, is_causal=True, key_lengths=(900, 1, 333)),
    specs.Spec(2, 640, 800, 6, 3, 256, dtype="float16", causal_alignment="top_left"),
    specs.Spec(1, 4097, 4097, 2, 2, 64, is_causal=True, query_lengths=(4000,)),
    specs.Spec(9, 130, 260, 16, 16, 33, is_causal=True),
    specs.Spec(1, 2048, 2048, 6, 2, 256, is_causal=True),
    specs.Spec(2, 1000, 1500, 4, 4, 192, window_size=(300, 10)),
)


def test_repeated_gradients_are_equal() -> None:
    """50 times bitwise, all problems in one program so that some find the chip busy."""
    problems: list[Problem] = [
        problem_of(spec, i, True) for i, spec in enumerate(DETERMINISTIC)
    ]
    fixed = [
        {k: x for k, x in p.given.items() if not isinstance(x, np.ndarray)}
        for p in problems
    ]
    arguments = jax.device_put(
        [
            (
                tuple(p.arrays),
                {k: x for k, x in p.given.items() if isinstance(x, np.ndarray)},
                p.dout,
                p.dlse,
            )
            for p in problems
        ]
    )

    @jax.jit
    def program(arguments: Any) -> Any:
        return [
            gradients_of(*argument, options=one | {"deterministic": True})
            for argument, one in zip(arguments, fixed, strict=True)
        ]

    @jax.jit
    def differences(a: Any, b: Any) -> Any:
        bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)  # noqa: E731
        return jax.tree.map(lambda x, y: jnp.sum(bits(x) != bits(y)), a, b)

    first = program(arguments)
    for _ in range(REPEATS):
        found = differences(first, program(arguments))
        assert sum(map(int, jax.tree.leaves(found))) == 0, found


# --- pairs of thread blocks over width 128


def test_in_pairs() -> None:
    """Whole, odd and missing tiles of keys, more pairs than fit, NaN where not read."""
    options: list[dict[str, Any]] = [
        {"is_causal": True},
        {"window_size": (100, 20)},
        {"key_lengths": (0, 1, 300), "query_lengths": (190, 33, 1)},
        {"is_causal": True, "causal_alignment": "top_left"},
        {},
    ]
    widths = ((256, 256), (192, 128), (192, 192), (200, 136))
    chosen = [
        specs.Spec(3, 190, 320, 4, 2, *w, dtype=specs.DTYPES[i % 2], **option)
        for i, (w, option) in enumerate(itertools.product(widths, options))
    ]
    chosen += [
        specs.Spec(1, 1500, 1450, 4, 1, 256, is_causal=True),
        specs.Spec(2, 2000, 2000, 8, 8, 192, 128),
    ]
    for deterministic in (False, True):
        for group in groups_of(chosen, SMALL):
            problems = [problem_of(s, i, True).poisoned() for i, s in enumerate(group)]
            assert_all(group, problems, deterministic=deterministic)


def test_more_elements_than_31_bits() -> None:
    in_new_process(more_elements_than_31_bits)


def more_elements_than_31_bits() -> None:
    """2.2e9 query elements; gradients of the last rows against a call on them alone."""
    rows, heads, width, last = 134_300, 128, 128, 100
    tail = jax.random.normal(jax.random.key(0), (1, last, heads, width), jnp.bfloat16)
    put = jax.jit(
        lambda x, t: jax.lax.dynamic_update_slice_in_dim(x, t, rows - last, 1),
        donate_argnums=0,
    )
    query = put(jnp.zeros((1, rows, heads, width), jnp.bfloat16), tail)
    dout = put(jnp.zeros((1, rows, heads, width), jnp.bfloat16), tail)
    assert query.size > 2**31
    keys, values = (
        jax.random.normal(jax.random.key(i), (1, 70, 1, width), jnp.bfloat16)
        for i in (1, 2)
    )

    @jax.jit
    def call(query: Any, dout: Any) -> Any:
        f = functools.partial(mha, implementation="cuda", deterministic=True)
        dquery, dkey, dvalue = jax.vjp(f, query, keys, values)[1](dout)
        return dquery[:, -last:], dkey, dvalue

    got, expected = call(query, dout), call(tail, tail)
    # Rows without a cotangent add nothing to the gradients of keys and values.
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y, 1e-2)
