"""Kernels with intervals: bias, mask, dropout, beside other options, by float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import specs
from gpu_helpers import assert_result, run_kernels
from gradient_helpers import Problem, assert_all, problem_of

from jax_flash import alibi, mha

Spec = specs.Spec

PATTERNS = ("bnts", "1nts", "b1ts", "bn1s", "11ts", "111s")
"""Which of the dimensions of a bias or a mask are in full."""

BIAS_DTYPES = (jnp.bfloat16, np.float16, np.float32)
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
    """Of the kinds named by letters: dropout (p), documents, cap, alibi, bias, mask."""
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
    full = (spec.batch, spec.heads, spec.query_length, spec.key_length)
    if "b" in kinds:
        given["bias"] = bias_of(rng, shape_of(PATTERNS[seed % 6], full), seed)
    if "m" in kinds:
        mask = rng.random(shape_of(PATTERNS[(seed + 3) % 6], full)) < 0.6
    if "t" in kinds:
        mask = mask_of_tiles(rng, shape_of(PATTERNS[(seed + 2) % 5], full))
    if {"m", "t"} & {*kinds}:
        if mask.shape[2] > 1:
            mask[:, :, ::11] = False
        given["mask"] = mask
    return given


def mask_of_tiles(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Most tiles are hidden, some are seen in part; documents where rows have masks."""
    rows, keys = shape[2:]
    count = -(-rows // 64), -(-keys // 64)
    tiles = rng.random((*shape[:2], *count)) < 0.2
    mask = tiles.repeat(64, -1).repeat(64, -2)[..., :rows, :keys]
    mask |= np.arange(rows)[:, None] // 200 == np.arange(keys) // 200
    return mask & (rng.random(shape) < 0.9)


def shape_of(pattern: str, full: tuple[int, ...]) -> tuple[int, ...]:
    """Size 1 where the pattern has a 1."""
    return tuple(1 if c == "1" else n for c, n in zip(pattern, full, strict=True))


def bias_of(
    rng: np.random.Generator, shape: tuple[int, ...], seed: int = 0
) -> np.ndarray:
    """Random normal, -inf here and there, in one of the types."""
    bias = rng.standard_normal(shape, np.float32)
    bias[rng.random(shape) < 0.02] = -np.inf
    return bias.astype(BIAS_DTYPES[seed % 3])


def cases(dtype: str) -> list[tuple[Spec, str]]:
    """Every width with every kind; masks, lengths and groups of heads in turn."""
    found = []
    for i, widths in enumerate(WIDTHS):
        for j, kinds in enumerate(("p", "pdca", "b", "m", "bm", "pbmdc")):
            mask = MASKS[(i + j) % len(MASKS)]
            found.append((Spec(2, 150, 170, 4, 2, *widths, dtype=dtype, **mask), kinds))
    found += [
        (Spec(1, 1000, 1000, 4, 4, 64, dtype=dtype, is_causal=True), "p"),
        (Spec(1, 777, 1300, 4, 1, 128, dtype=dtype), "p"),
        (Spec(1, 900, 900, 2, 2, 256, dtype=dtype, is_causal=True), "pd"),
        (Spec(3, 1, 500, 8, 2, 128, dtype=dtype), "p"),
        (Spec(1, 900, 1111, 4, 2, 128, dtype=dtype), "bm"),
        (Spec(1, 900, 900, 2, 2, 64, dtype=dtype, is_causal=True), "b"),
        (Spec(1, 777, 1300, 2, 1, 256, dtype=dtype), "m"),
        (Spec(1, 900, 900, 4, 2, 64, dtype=dtype, is_causal=True), "t"),
        (Spec(2, 777, 1300, 4, 2, 128, dtype=dtype), "t"),
        (Spec(1, 640, 5000, 2, 2, 128, dtype=dtype), "tbp"),
        (Spec(1, 777, 1300, 2, 1, 256, dtype=dtype), "td"),
        (Spec(2, 300, 1000, 4, 4, 40, dtype=dtype, window_size=(600, 90)), "tc"),
        (Spec(1, 600, 600, 2, 2, 33, dtype=dtype), "t"),
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


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    ("kinds", "deterministic"), [("", False), ("p", False), ("pc", False), ("c", True)]
)
def test_gradient_of_bias(width: int, kinds: str, deterministic: bool) -> None:
    """Summed over what shares it, for every pattern; grouped heads, masked rows."""
    spec = Spec(2, 333, 300, 4, 2, width, is_causal=True)
    full = (2, 4, 333, 300)
    rng = np.random.default_rng(width)
    given: dict[str, Any] = {"mask": rng.random((2, 1, 333, 300)) < 0.7}
    given |= options_of(spec, 1, kinds)
    biases = [
        bias_of(rng, shape_of(pattern, full), i) for i, pattern in enumerate(PATTERNS)
    ]
    problem = problem_of(spec, 2, with_lse=True, **given)
    assert problem.dlse is not None
    options = {n: given.pop(n) for n in ("dropout_rate", "softcap") if n in given}
    options |= {"deterministic": deterministic, "implementation": "cuda"}

    @jax.jit
    def gradients(arrays: Any, biases: Any, cotangents: Any, rest: Any) -> Any:
        def f(biases: Any) -> Any:
            all_options = {**options, **rest, "is_causal": True, "return_lse": True}
            return [mha(*arrays, bias=bias, **all_options) for bias in biases]

        return jax.vjp(f, biases)[1]([cotangents] * len(biases))[0]

    cotangents = problem.dout, problem.dlse
    operands = jax.device_put((tuple(problem.arrays), biases, cotangents, given))
    got = gradients(*operands)
    if deterministic:
        for x, again in zip(got, gradients(*operands), strict=True):
            np.testing.assert_array_equal(x, again)
    for pattern, bias, x in zip(PATTERNS, biases, got, strict=True):
        of_oracle = problem.given | {"bias": bias.astype(np.float64)}
        exact = oracle.gradients(
            *problem.arrays, dout=problem.dout, dlse=problem.dlse, **of_oracle
        )["bias"]
        expected = oracle.reduced_to(exact, bias.shape)
        assert x.dtype == bias.dtype
        error = np.linalg.norm(np.asarray(x, np.float64) - expected)
        assert error <= 0.01 * np.linalg.norm(expected) + 1e-4, pattern


@pytest.mark.parametrize("width", [64, 128, 256])
def test_gradient_of_slopes(width: int) -> None:
    """With each of the other options, of grouped heads; of the same bits each time."""
    specs_and_kinds = (
        (Spec(2, 900, 1000, 4, 2, width, is_causal=True), ""),
        (Spec(2, 300, 777, 4, 4, width), "c"),
        (Spec(2, 333, 300, 4, 1, width, window_size=(90, 40)), "dp"),
        (Spec(2, 150, 170, 4, 2, width), "cmp"),
        (Spec(1, 1000, 900, 2, 2, width, query_lengths=(950,)), "t"),
    )
    problems = [
        problem_of(spec, i, with_lse=i % 2 == 0, **options_of(spec, i, f"a{kinds}"))
        for i, (spec, kinds) in enumerate(specs_and_kinds)
    ]
    problems = [problem.poisoned() for problem in problems]
    for problem in problems:
        problem.given["bias"].slopes[..., 1] = 0.0
    arrays = [
        {name: x for name, x in p.given.items() if isinstance(x, np.ndarray)}
        for p in problems
    ]
    rest = [
        {name: x for name, x in p.given.items() if name not in {*a, "bias"}}
        for p, a in zip(problems, arrays, strict=True)
    ]
    slopes = [problem.given["bias"].slopes for problem in problems]

    @jax.jit
    def gradients(tensors: Any, slopes: Any, arrays: Any, cotangents: Any) -> Any:
        def one(i: int) -> Any:
            def f(*args: Any) -> Any:
                given = {**rest[i], **arrays[i], "deterministic": True}
                given |= {"bias": alibi(args[3]), "implementation": "cuda"}
                out, lse = mha(*args[:3], **given, return_lse=True)
                return out if cotangents[i][1] is None else (out, lse)

            dout, dlse = cotangents[i]
            given = (*tensors[i], slopes[i])
            return jax.vjp(f, *given)[1](dout if dlse is None else (dout, dlse))

        return [one(i) for i in range(len(slopes))]

    operands = jax.device_put(
        (
            [tuple(p.arrays) for p in problems],
            slopes,
            arrays,
            [(p.dout, p.dlse) for p in problems],
        )
    )
    got, again = (jax.tree.map(np.asarray, gradients(*operands)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, got, again)
    for (spec, kinds), problem, found in zip(
        specs_and_kinds, problems, got, strict=True
    ):
        clean = problem.clean()
        expected = oracle.gradients(
            *clean.arrays, dout=clean.dout, dlse=clean.dlse, **clean.given
        )
        expected["slopes"] = expected.pop("bias")
        names = ("query", "key", "value", "slopes")
        for name, x in zip(names, found, strict=True):
            error = np.linalg.norm(x.astype(np.float64) - expected[name])
            # Distances multiply the error that a rounded out puts into each row.
            share = 0.03 if name == "slopes" else 0.01
            bound = share * np.linalg.norm(expected[name])
            assert error <= bound + 1e-4, f"{kinds} {spec} {name}: {error} {bound}"


@pytest.mark.parametrize("width", [64, 128, 256])
def test_rows_of_minus_infinity(width: int) -> None:
    """Out 0, lse -inf and gradients 0, with NaN as the cotangent of such a row."""
    query, key, value = Spec(1, 200, 300, 2, 2, width).arrays()
    bias = np.zeros((1, 2, 200, 300), np.float32)
    bias[:, 1, 70:90] = -np.inf
    dout = np.ones((1, 200, 2, width), query.dtype)
    dout[:, 70:90, 1] = np.nan

    @jax.jit
    def run(query: Any, key: Any, value: Any, bias: Any, dout: Any) -> Any:
        def f(*arrays: Any) -> Any:
            return mha(*arrays, return_lse=True, implementation="cuda")

        (out, lse), vjp = jax.vjp(f, query, key, value, bias)
        return out, lse, vjp((dout, jnp.zeros_like(lse)))

    out, lse, gradients = jax.tree.map(np.asarray, run(query, key, value, bias, dout))
    assert not out[:, 70:90, 1].astype(np.float32).any()
    assert np.isneginf(lse[:, 1, 70:90]).all()
    assert np.isfinite(lse[:, 0]).all()
    for gradient in gradients:
        assert np.isfinite(gradient.astype(np.float32)).all()
    assert not gradients[0][:, 70:90, 1].astype(np.float32).any()
    assert not gradients[3][:, 1, 70:90].any()


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("heads", [1, 2])
def test_hidden_tiles_are_not_read(width: int, heads: int) -> None:
    """NaN among keys that a mask hides from all rows, forward and backward."""
    query, key, value = Spec(1, 333, 1024, 2, 2, width).arrays()
    hidden = slice(256, 640)
    mask = np.ones((1, heads, 333, 1024), bool)
    mask[..., hidden] = mask[:, :, :200, 704:768] = mask[:, :, 70:80] = False

    @jax.jit
    def run(*arrays: Any) -> Any:
        def f(*arrays: Any) -> Any:
            return mha(*arrays, mask=mask, return_lse=True, implementation="cuda")

        results, vjp = jax.vjp(f, *arrays)
        return results, vjp(jax.tree.map(jnp.ones_like, results))

    expected = jax.tree.map(np.asarray, run(query, key, value))
    key, value = key.copy(), value.copy()
    key[:, hidden] = value[:, hidden] = np.nan
    got = jax.tree.map(np.asarray, run(query, key, value))
    leaves = (jax.tree.leaves(tree) for tree in (got, expected))
    for x, y in zip(*leaves, strict=True):
        finite = np.isfinite(y.astype(np.float32))
        assert (np.isfinite(x.astype(np.float32)) == finite).all()
        close = np.isclose(
            x[finite].astype(np.float32),
            y[finite].astype(np.float32),
            rtol=0.02,
            atol=1e-3,
        )
        assert close.all()
    for gradient in got[1][1:]:
        assert not gradient[:, hidden].astype(np.float32).any()
