"""Kernels with intervals: segments, packed sequences, soft cap, ALiBi, by float64."""

import functools
from typing import Any

import intervals_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from gpu_helpers import assert_result, run_kernels
from gradient_helpers import Problem, assert_all, assert_all_gradients, problem_of

from jax_flash import alibi, explain, mha, mha_varlen
from jax_flash._src import intervals

Spec = specs.Spec

RANDOM_BATCHES, RANDOM_PROBLEMS = 12, 10
REPEATS = 30
WIDTHS = ((64, 64), (128, 128), (256, 256), (96, 96), (40, 24), (33, 17), (192, 128))


def runs(
    rng: np.random.Generator, batch: int, length: int, count: int, padding: bool
) -> np.ndarray:
    """Documents one after the other, and padding at the end."""
    ids = np.sort(rng.integers(0, count, (batch, length)), -1)
    if padding:
        ids[:, length - length // 7 :] = -1
    return ids.astype(np.int32)


def anyhow(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Ids in any order, some of them negative."""
    return rng.integers(-1, 3, (batch, length)).astype(np.int32)


def segments(spec: Spec, seed: int, sorted_ids: bool) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 5])
    batch = 1 if seed % 3 == 0 else spec.batch  # shared by the batch, or not
    sizes = spec.query_length, spec.key_length
    q_ids, kv_ids = (
        runs(rng, batch, n, 5, seed % 2 == 0) if sorted_ids else anyhow(rng, batch, n)
        for n in sizes
    )
    if sorted_ids and sizes[0] == sizes[1]:
        kv_ids = q_ids
    return {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}


def slopes(spec: Spec, seed: int) -> np.ndarray:
    shape = (spec.heads,) if seed % 2 else (spec.batch, spec.heads)
    values = np.random.default_rng([seed, 6]).uniform(-0.05, 0.5, shape)
    return values.astype(np.float32)


def options_of(spec: Spec, seed: int, kinds: str) -> dict[str, Any]:
    """Of the kinds named by letters: documents, ids in any order, cap, alibi.

    Or a cap far above all scores (s), less far (l), far above most scores (w), and
    slopes that reach far (f).
    """
    given: dict[str, Any] = {}
    if "d" in kinds or "i" in kinds:
        given |= segments(spec, seed, "d" in kinds)
    if "h" in kinds:  # documents of halves of blocks
        sizes = spec.query_length, spec.key_length
        q_ids, kv_ids = (np.arange(n, dtype=np.int32)[None] // 64 for n in sizes)
        given |= {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
    if "c" in kinds:
        given["softcap"] = 1.5
    if "a" in kinds:
        given["bias"] = alibi(slopes(spec, seed))
    if "s" in kinds:
        given["softcap"] = 50.0
    if "l" in kinds:
        given["softcap"] = 12.0
    if "w" in kinds:
        given |= {"softcap": 50.0, "scale": 5 / spec.head_dim**0.5}
    if "f" in kinds:
        signs = np.where(np.arange(spec.heads) % 3 == 2, -1, 1)
        given["bias"] = alibi((0.004 * signs).astype(np.float32))
    return given


def cases(dtype: str) -> list[tuple[Spec, str]]:
    """Every width with every kind; masks, lengths and groups of heads in turn."""
    masks: list[dict[str, Any]] = [
        {"is_causal": True},
        {},
        {"window_size": (70, 30)},
        {"is_causal": True, "query_lengths": (150, 33), "key_lengths": (170, 0)},
        {"is_causal": True, "causal_alignment": "top_left"},
    ]
    found = []
    for i, widths in enumerate(WIDTHS):
        for j, kinds in enumerate(("d", "i", "c", "a", "dca")):
            mask = masks[(i + j) % len(masks)]
            found.append((Spec(2, 150, 170, 4, 2, *widths, dtype=dtype, **mask), kinds))
    found += [
        (Spec(1, 1000, 1000, 4, 4, 64, dtype=dtype, is_causal=True), "d"),
        (Spec(1, 777, 1300, 4, 1, 128, dtype=dtype), "d"),
        (Spec(1, 900, 900, 2, 2, 256, dtype=dtype, is_causal=True), "dca"),
        (Spec(3, 1, 500, 8, 2, 128, dtype=dtype), "i"),
        (Spec(3, 500, 1, 8, 2, 64, dtype=dtype), "ia"),
        (Spec(1, 1000, 1000, 4, 4, 64, dtype=dtype), "h"),
        (Spec(1, 1000, 1000, 4, 4, 128, dtype=dtype, is_causal=True), "hc"),
    ]
    # Tiles that are seen in full: before, around and after the diagonal.
    top = "top_left"
    found += [
        (Spec(1, 900, 900, 4, 4, 64, dtype=dtype), "w"),
        (Spec(1, 1000, 1000, 4, 4, 128, dtype=dtype, is_causal=True), "w"),
        (Spec(1, 900, 900, 4, 4, 64, dtype=dtype, is_causal=True), "s"),
        (Spec(1, 1000, 1000, 4, 4, 128, dtype=dtype), "s"),
        (Spec(1, 1000, 1000, 4, 4, 128, dtype=dtype, is_causal=True), "ds"),
        (Spec(1, 700, 700, 2, 2, 256, dtype=dtype, is_causal=True), "s"),
        (Spec(1, 900, 900, 4, 4, 64, dtype=dtype, is_causal=True), "l"),
        (Spec(1, 1000, 1000, 4, 4, 128, dtype=dtype), "l"),
        (Spec(1, 700, 700, 2, 2, 256, dtype=dtype), "l"),
        (Spec(1, 300, 4000, 4, 2, 64, dtype=dtype, is_causal=True), "f"),
        (Spec(1, 300, 4000, 4, 2, 128, dtype=dtype), "f"),
        (Spec(1, 300, 1500, 4, 2, 128, dtype=dtype, causal_alignment=top), "wf"),
        (Spec(1, 200, 1500, 3, 1, 256, dtype=dtype, causal_alignment=top), "wf"),
        (Spec(1, 700, 700, 3, 3, 128, dtype=dtype), "cf"),
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


def test_arrays() -> None:
    """The kernels that compute them against jnp, number for number, on the CPU."""
    made = intervals_test.CASES | intervals_test.LARGER
    calls = []
    for sizes, given, fields in made.values():
        o = intervals_test.operands_of(sizes, given, intervals_test.batch_of(given))
        limit = intervals.MAX_LENGTH // 2
        bounded = {n: min(x, limit) for n, x in fields.items() if n.startswith("wind")}
        calls.append((intervals_test.config_of(o, fields | bounded), o))
    configs = [config for config, _ in calls]

    @jax.jit
    def by_kernel(operands: Any) -> Any:
        return [
            intervals.by_kernel(*call) for call in zip(configs, operands, strict=True)
        ]

    got = by_kernel([o for _, o in calls])
    with jax.default_device(jax.devices("cpu")[0]):
        expected = [
            intervals.intervals(config, jax.tree.map(np.asarray, o))
            for config, o in calls
        ]
    for name, *arrays in zip(made, got, expected, strict=True):
        for x, y in zip(*arrays, strict=True):
            np.testing.assert_array_equal(x, y, name)


@pytest.mark.parametrize("dtype", specs.DTYPES)
def test_forward(dtype: str) -> None:
    labels, made = problems(dtype)
    calls = [(problem.arrays, problem.given) for problem in made]
    for label, call, result in zip(labels, calls, run_kernels(calls), strict=True):
        try:
            assert_result(result, call)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(dtype: str, deterministic: bool) -> None:
    assert_all(*problems(dtype), deterministic=deterministic)


@pytest.mark.parametrize("batch", range(RANDOM_BATCHES))
def test_random_problems(batch: int) -> None:
    """Any sizes, any combination of options."""
    labels, made = [], []
    for seed in range(RANDOM_PROBLEMS * batch, RANDOM_PROBLEMS * (batch + 1)):
        rng = np.random.default_rng([seed, 8])
        rows, keys = (int(2 ** rng.uniform(0, 9.5)) for _ in range(2))
        group, kv_heads = (int(rng.integers(1, 4)) for _ in range(2))
        widths = WIDTHS[rng.integers(len(WIDTHS))]
        spec = Spec(
            int(rng.integers(1, 4)),
            rows,
            keys,
            group * kv_heads,
            kv_heads,
            *widths,
            dtype=specs.DTYPES[rng.integers(2)],
            is_causal=bool(rng.integers(2)),
            window_size=None if rng.random() < 0.5 else (int(rng.integers(200)), 9),
        )
        kinds = "".join(kind for kind in "dca" if rng.random() < 0.6) or "i"
        labels.append(f"{seed} {kinds} {spec}")
        given = options_of(spec, seed, kinds)
        made.append(problem_of(spec, seed, seed % 2 == 0, **given).poisoned())
    assert_all(labels, made, deterministic=batch % 2 == 0)
    calls = [(problem.arrays, problem.given) for problem in made]
    for label, call, result in zip(labels, calls, run_kernels(calls), strict=True):
        try:
            assert_result(result, call)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error


# Offsets of queries and keys: empty sequences, one without keys, rows outside.
OFFSETS = {
    "one length": ((0, 128, 256, 384), (0, 128, 256, 384)),
    "ragged": ((3, 3, 200, 201, 450, 700), (0, 40, 330, 330, 339, 701)),
    "many": (tuple(range(0, 901, 7)), tuple(range(0, 901, 7))),
}


@functools.partial(jax.jit, static_argnames=("options",))
def packed(
    arrays: Any, offsets: Any, cotangents: Any, options: tuple[tuple[str, Any], ...]
) -> Any:
    """`(out, lse)` and gradients of packed sequences."""

    def f(*arrays: Any) -> Any:
        given = dict(options) | {"return_lse": True, "implementation": "cuda"}
        return mha_varlen(*arrays, *offsets, **given)

    results, vjp = jax.vjp(f, *arrays)
    return results, vjp(cotangents)


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(name: str, width: int, causal: bool) -> None:
    """Each sequence as if it were alone, zeros outside of all, NaN there."""
    queries, keys = OFFSETS[name]
    spec = Spec(1, queries[-1] + 20, keys[-1] + 5, 4, 2, width)
    problem = problem_of(spec, 1, with_lse=True)
    assert problem.dlse is not None
    query, key, value = (x[0].copy() for x in problem.arrays)
    dout, dlse = problem.dout[0].copy(), problem.dlse[0].copy()
    outside = np.ones(len(query), bool)
    outside[queries[0] : queries[-1]] = False
    for x in (query, dout):
        x[outside] = np.nan
    dlse[:, outside] = np.nan
    for x in (key, value):
        x[: keys[0]] = np.nan
        x[keys[-1] :] = np.nan
    options = {"is_causal": causal, "softcap": 2.0 if width == 128 else None}
    (out, lse), gradients = jax.tree.map(
        np.asarray,
        packed(
            (query, key, value),
            (np.array(queries, np.int32), np.array(keys, np.int32)),
            (dout, dlse),
            tuple(options.items()),
        ),
    )
    assert not out[outside].astype(np.float32).any()
    assert np.isneginf(lse[:, outside]).all()
    assert not gradients[0][outside].astype(np.float32).any()
    parts = []
    bounds = zip(queries, queries[1:], keys, keys[1:], strict=False)
    for first, end, first_key, end_key in list(bounds)[:40]:
        rows, columns = slice(first, end), slice(first_key, end_key)
        if first == end:
            for got in gradients[1:]:
                assert not got[columns].astype(np.float32).any()
            continue
        if first_key == end_key:
            assert not out[rows].astype(np.float32).any()
            assert np.isneginf(lse[:, rows]).all()
            continue
        own = query[rows][None], key[columns][None], value[columns][None]
        given = {n: x for n, x in options.items() if x is not None}
        assert_result((out[rows][None], lse[:, rows][None]), (own, given))
        alone = Problem(own, given, dout[rows][None], dlse[:, rows][None])
        cuts = (rows, columns, columns)
        cut = tuple(x[cut][None] for x, cut in zip(gradients, cuts, strict=True))
        parts.append((cut, alone))
    assert_all_gradients(parts)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("sorted_ids", [False, True])
def test_repeats_are_equal(width: int, sorted_ids: bool) -> None:
    """Of the forward always, of gradients if asked for, bit by bit."""
    spec = Spec(2, 900, 1100, 8, 2, width, is_causal=True)
    given = segments(spec, 1, sorted_ids) | {"softcap": 3.0}
    problem = problem_of(spec, 3, with_lse=True, **given)
    call = [(problem.arrays, given)]
    first = run_kernels(call)[0]

    @jax.jit
    def gradients(arrays: Any, dout: Any, dlse: Any) -> Any:
        def f(*arrays: Any) -> Any:
            options = {"deterministic": True, "implementation": "cuda"}
            return mha(*arrays, **spec.options, **given, **options, return_lse=True)

        return jax.vjp(f, *arrays)[1]((dout, dlse))

    arguments = jax.device_put((tuple(problem.arrays), problem.dout, problem.dlse))
    reference = gradients(*arguments)
    for _ in range(REPEATS):
        for got, want in zip(gradients(*arguments), reference, strict=True):
            assert bool(jnp.array_equal(got, want))
    for got, want in zip(run_kernels(call)[0], first, strict=True):
        np.testing.assert_array_equal(got, want)


def test_kernels_are_chosen_by_themselves() -> None:
    """Calls need not name the implementation."""
    query, key, value = Spec(1, 128, 128, 2, 2, 64).arrays()
    explanation = explain(query, key, value, softcap=2.0)
    assert explanation.chosen["cuda"] == "cuda"
    assert "with intervals" in explanation.details["cuda"]
