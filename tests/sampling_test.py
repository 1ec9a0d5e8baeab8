"""`sample` and `top_k`: the distribution, the exact draw, transformations, errors."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cuda_text, kernel_calls
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import sample, top_k
from jax_flash._src import registry, sample_reference

KEY = jax.random.key(7)
SIZE = 40
# Standard normal quantiles that a correct sampler passes all but once in 10^6 times.
SIGMAS = 4.9


def logits_of(rows: int, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((rows, size))).astype(np.float32)


def truncated(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """The distribution of one row in float64, written from the docstring."""
    x = logits.astype(np.float64) / temperature
    if mask is not None:
        x = np.where(mask, x, -np.inf)
    ranked = np.argsort(-x, kind="stable")
    p = np.exp(x - x.max())
    p[ranked[top_k:] if top_k else []] = 0
    p /= p.sum()
    if top_p is not None:
        before = np.cumsum(p[ranked]) - p[ranked]
        p[ranked[before >= top_p]] = 0
    if min_p is not None:
        p[p < min_p * p.max()] = 0
    return p / p.sum()


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.07},
    "top_k and top_p": {"top_k": 12, "top_p": 0.9, "temperature": 1.7},
    "all": {"top_k": 20, "top_p": 0.95, "min_p": 0.02, "temperature": 2.0},
    "mask": {"mask": np.arange(SIZE) % 3 != 0, "top_p": 0.9},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_distribution(name: str) -> None:
    """Chi-square against the exact truncated distribution; nothing outside it."""
    options = OPTIONS[name]
    draws = 60_000
    row = logits_of(1, SIZE)[0]
    expected = truncated(row, **options) * draws
    tokens = jax.jit(functools.partial(sample, **options))(
        jnp.broadcast_to(row, (draws, SIZE)), KEY
    )
    counts = np.bincount(np.asarray(tokens), minlength=SIZE)
    assert counts[expected == 0].sum() == 0
    # Rare tokens together, so that the statistic is near chi-square.
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert freedom >= 3
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty: the cube root is nearly normal.
    variance = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
    assert abs(z) < SIGMAS, (statistic, freedom)


def exact_weight(distance: int) -> int:
    """The weight of `sample_reference.weight` in Python's integers."""
    fraction = (distance << 12) & 0xFFFFFFFF
    value = sample_reference.EXP2_COEFFICIENTS[-1]
    for coefficient in sample_reference.EXP2_COEFFICIENTS[-2::-1]:
        value = coefficient - (fraction * value >> 32)
    value = (1 << 31) - (fraction * value >> 32)
    octaves = distance >> 20
    return value >> (octaves + 1) if octaves < 31 else 0


def exact_sample(
    logits: np.ndarray, parameters: np.ndarray, mask: np.ndarray | None
) -> int:
    """docs/design/sampling.md for one row, in Python's integers."""
    high, low, factor_bits, k, mass, reach = (int(x) for x in parameters)
    factor = np.uint32(factor_bits).view(np.float32)
    x = logits.astype(np.float32)
    allowed = [i for i in range(len(x)) if x[i] > -np.inf and (mask is None or mask[i])]
    if not allowed:
        return -1
    best = max(x[i] for i in allowed)

    def distance(i: int) -> int:
        if x[i] == best:
            return 0
        with np.errstate(over="ignore"):
            units = (best - x[i]) * factor
        return int(min(units, np.float32(2147483520)))

    ranked = sorted(allowed, key=lambda i: (-float(x[i]), i))[:k]
    weights = [exact_weight(distance(i)) for i in ranked]
    limit = max(1, sum(weights) * mass >> 20) if mass <= 1 << 20 else None
    kept, before = {}, 0
    for i, w in zip(ranked, weights, strict=True):
        if limit is not None and before >= limit:
            break
        before += w
        if distance(i) <= reach:
            kept[i] = w
    target = ((high << 32) + low) * sum(kept.values()) >> 64
    for i in sorted(kept):
        if target < kept[i]:
            return i
        target -= kept[i]
    raise AssertionError("the target is below the sum")


def ugly_logits(dtype: Any) -> np.ndarray:
    """Ties, zeros of both signs, infinities, NaN, nothing at all."""
    x = logits_of(8, 200, seed=1).astype(jnp.dtype(dtype)).astype(np.float32)
    x[1] = np.round(x[1])
    x[2] = np.where(np.arange(200) % 2, 0.0, -0.0)
    x[3, ::3] = -np.inf
    x[4, 5:8] = np.inf
    x[5, ::2] = np.nan
    x[6] = -np.inf
    x[7] *= 1e30
    return x.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_draw_is_the_one_defined(name: str, dtype: str) -> None:
    options = dict(OPTIONS[name])
    mask = options.pop("mask", None)
    if mask is not None:
        mask = np.resize(mask, (8, 200))
    with np.errstate(over="ignore"):
        logits = ugly_logits(dtype)
    per_row = {"top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    given = {
        n: jnp.full(8, options[n], t) if n in options else None
        for n, t in per_row.items()
    }
    temperature = jnp.full(8, options.get("temperature", 1.0), jnp.float32)
    for seed in range(3):
        key = jax.random.key(seed)
        table = sample_reference.parameters(
            jax.random.key_data(key), temperature, **given
        )
        got = sample(logits, key, **options, mask=mask)
        expected = [
            exact_sample(row, parameters, None if mask is None else mask[i])
            for i, (row, parameters) in enumerate(
                zip(logits, np.asarray(table), strict=True)
            )
        ]
        np.testing.assert_array_equal(got, expected)


def test_weights() -> None:
    distances = np.r_[0:5000, 0 : 40 << 20 : 99991].astype(np.uint32)
    got = np.asarray(sample_reference.weight(jnp.asarray(distances)))
    np.testing.assert_array_equal(got, [exact_weight(int(d)) for d in distances])
    exact = 2.0 ** (30 - distances / 2**20)
    assert np.all(np.abs(got - exact) <= 1e-7 * exact + 1)


def test_random_bits_are_those_of_jax() -> None:
    """What `jax.random.bits` makes of the same key and counters."""
    table = sample_reference.parameters(
        jax.random.key_data(KEY), jnp.ones(9), None, None, None
    )
    with jax.threefry_partitionable(True):
        bits = jax.random.bits(KEY, (9,))
    np.testing.assert_array_equal(table[:, 0] ^ table[:, 1], bits)


def test_rows_do_not_depend_on_the_batch() -> None:
    x = logits_of(6, 100)
    whole = sample(x, KEY, top_p=0.9)
    np.testing.assert_array_equal(sample(x[:4], KEY, top_p=0.9), whole[:4])
    changed = x.copy()
    changed[4:] = 0
    np.testing.assert_array_equal(sample(changed, KEY, top_p=0.9)[:4], whole[:4])
    np.testing.assert_array_equal(
        sample(x.reshape(2, 3, 100), KEY, top_p=0.9), whole.reshape(2, 3)
    )
    assert sample(x[0], KEY, top_p=0.9) == whole[0]
    assert sample(x[0], KEY).shape == ()


def test_greedy() -> None:
    x = np.round(logits_of(20, 50))
    np.testing.assert_array_equal(sample(x, KEY, temperature=0), x.argmax(-1))
    np.testing.assert_array_equal(sample(x, KEY, top_k=1), x.argmax(-1))
    np.testing.assert_array_equal(sample(x, KEY, top_p=0.0), x.argmax(-1))
    np.testing.assert_array_equal(sample(x, KEY, temperature=1e-30), best_of(x))


def best_of(x: np.ndarray) -> np.ndarray:
    """Where ties are drawn from, what `sample` draws."""
    return np.asarray(sample(np.where(x == x.max(-1, keepdims=True), 0, -np.inf), KEY))


@pytest.mark.parametrize("temperature", [1e39, 10**400, math.inf])
def test_temperatures_beyond_float32(temperature: float) -> None:
    """Every token is as likely as the others."""
    x = logits_of(4, 30)
    got = sample(x, KEY, temperature=temperature)
    np.testing.assert_array_equal(got, sample(np.zeros_like(x), KEY))


def test_parameters_of_rows() -> None:
    """Arrays are what the rows' own numbers would be, traced or not."""
    x = logits_of(4, 100)
    arrays = {
        "temperature": np.array([0.0, 0.5, 1.0, 2.0], np.float32),
        "top_k": np.array([100, 3, 1000, 50]),
        "top_p": np.array([1.0, 0.9, 0.3, 0.8], np.float32),
        "min_p": np.array([0, 0.1, 0.01, 1.0], np.float32),
    }
    got = sample(x, KEY, **arrays)
    np.testing.assert_array_equal(jax.jit(sample)(x, KEY, **arrays), got)
    for i in range(4):
        numbers = {name: a[i].item() for name, a in arrays.items()}
        assert sample(x, KEY, **numbers)[i] == got[i]
    assert got[3] == x[3].argmax()


def test_keys() -> None:
    x = logits_of(5, 100)
    raw = jax.random.PRNGKey(7)
    np.testing.assert_array_equal(sample(x, raw), sample(x, KEY))
    assert (sample(x, jax.random.key(8)) != sample(x, KEY)).any()


def test_a_mask_of_all_rows_is_that_of_each() -> None:
    x, mask = logits_of(5, 100), logits_of(1, 100, seed=3)[0] > 0
    each = np.broadcast_to(mask, (5, 100))
    np.testing.assert_array_equal(sample(x, KEY, mask=mask), sample(x, KEY, mask=each))
    np.testing.assert_array_equal(
        sample(x, KEY, mask=mask), sample(np.where(mask, x, -np.inf), KEY)
    )
    assert (sample(x, KEY, mask=np.zeros(100, bool)) == -1).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap(axis: int) -> None:
    x = logits_of(12, 30).reshape(3, 4, 30)
    moved = np.moveaxis(x, 0, axis)
    keys = jax.random.split(KEY, 3)
    f = functools.partial(sample, top_k=7)
    got = jax.vmap(f, in_axes=(axis, 0))(moved, keys)
    np.testing.assert_array_equal(got, [f(a, k) for a, k in zip(x, keys, strict=True)])
    got = jax.vmap(f, in_axes=(None, 0))(x[0], keys)
    np.testing.assert_array_equal(got, [f(x[0], k) for k in keys])
    got = jax.vmap(f, in_axes=(axis, None))(moved, KEY)
    np.testing.assert_array_equal(got, [f(a, KEY) for a in x])
    twice = jax.vmap(jax.vmap(f, (None, 0)), (0, None))(x, keys)
    np.testing.assert_array_equal(twice, [[f(a, k) for k in keys] for a in x])


def test_an_unmapped_operand_is_not_copied(kernels: None) -> None:
    """Many draws from the same logits: the kernel reads them in place."""
    x, keys = jnp.asarray(logits_of(2, 30)), jax.random.split(KEY, 5)
    text = cuda_text(jax.vmap(sample, (None, 0)), x, keys)
    line = next(t for t in text.splitlines() if registry.SAMPLE_TARGET in t)
    assert "tensor<1x2x30xf32>, tensor<5x2x6xui32>) -> tensor<5x2xi32>" in line


def test_one_kernel_call(kernels: None) -> None:
    x = jnp.asarray(logits_of(2, 30), jnp.bfloat16)
    f = functools.partial(sample, top_k=5, mask=np.ones(30, bool))
    assert kernel_calls(f, x, KEY, target=registry.SAMPLE_TARGET) == 1
    assert kernel_calls(lambda x: top_k(x, 5), x, target=registry.TOP_K_TARGET) == 1
    wide = jnp.zeros((2, 1000))
    assert (
        kernel_calls(lambda x: top_k(x, 500), wide, target=registry.TOP_K_TARGET) == 0
    )


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
@pytest.mark.parametrize("batch", [(16,), (2, 8)])
def test_sharded_rows_need_no_communication(
    batch: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    names = ("x", "y")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    x = logits_of(16, 96).reshape(*batch, 96)
    put = jax.device_put(x, NamedSharding(mesh, P(*(None,) * (len(batch) - 1), "x")))
    f = jax.jit(functools.partial(sample, top_k=20, top_p=0.9))
    compiled = f.lower(put, KEY).compile().as_text()
    assert compiled is not None
    for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert f" {name}(" not in compiled
    np.testing.assert_array_equal(f(put, KEY), f(x, KEY))
    vocabulary = P(*(None,) * len(batch), names[-1:])
    split = jax.device_put(x, NamedSharding(mesh, vocabulary))
    np.testing.assert_array_equal(f(split, KEY), f(x, KEY))


def test_shard_map_and_scan() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = logits_of(16, 50)
    f = functools.partial(sample, top_p=0.9)
    got = jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    )(x, KEY)
    parts = [f(part, KEY) for part in np.split(x, 8)]
    np.testing.assert_array_equal(got, np.concatenate(parts))

    def step(key: Any, x: Any) -> Any:
        key, now = jax.random.split(key)
        return key, f(x, now)

    _, got = jax.lax.scan(step, KEY, x.reshape(4, 4, 50))
    key = KEY
    for part, tokens in zip(x.reshape(4, 4, 50), got, strict=True):
        key, expected = step(key, part)
        np.testing.assert_array_equal(tokens, expected)


def test_no_derivative() -> None:
    def f(x: Any) -> Any:
        return x.sum() + sample(x, KEY).sum().astype(jnp.float32)

    np.testing.assert_array_equal(jax.grad(f)(jnp.ones((2, 5))), np.ones((2, 5)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("k", [0, 1, 7, 200])
def test_top_k(dtype: str, k: int) -> None:
    with np.errstate(over="ignore"):
        x = ugly_logits(dtype)
    values, indices = top_k(x, k)
    for row, v, i in zip(x.astype(np.float64), values, indices, strict=True):
        # NaN last, behind -inf.
        rank = np.lexsort((-np.where(np.isnan(row), -np.inf, row), np.isnan(row)))
        np.testing.assert_array_equal(i, rank[:k])
        np.testing.assert_array_equal(np.asarray(v, np.float64), row[rank[:k]])


def test_top_k_transforms() -> None:
    x = jnp.asarray(logits_of(6, 30).reshape(2, 3, 30))

    def f(x: Any) -> Any:
        return top_k(x, 4)[0]

    np.testing.assert_array_equal(jax.vmap(f, 1, 1)(x), f(x))
    expected = jax.grad(lambda x: jnp.sin(jax.lax.top_k(x, 4)[0]).sum())(x)
    got = jax.grad(lambda x: jnp.sin(f(x)).sum())(x)
    np.testing.assert_allclose(got, expected)
    got = jax.vmap(jax.grad(lambda x: jnp.sin(f(x)).sum()))(x)
    np.testing.assert_allclose(got, expected)
    _, tangent = jax.jvp(f, (x,), (2 * x,))
    np.testing.assert_allclose(tangent, 2 * f(x))


def test_top_k_of_an_explicitly_sharded_vocabulary() -> None:
    """Its derivatives gather it as the values do; gradients are sharded like it."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    x = logits_of(6, 32)

    def f(x: Any) -> Any:
        return top_k(x, 4)[0]

    def grad(x: Any) -> Any:
        return jax.grad(lambda x: jnp.sin(f(x)).sum())(x)

    with jax.set_mesh(mesh):
        for spec in (P("x", "y"), P(None, ("x", "y"))):
            put = jax.device_put(x, NamedSharding(mesh, spec))
            for g in (grad, jax.jit(grad), jax.vmap(grad)):
                np.testing.assert_allclose(g(put), grad(x), rtol=1e-6)
            assert jax.typeof(grad(put)).sharding.spec == spec
            _, tangent = jax.jvp(f, (put,), (2 * put,))
            np.testing.assert_allclose(tangent, 2 * f(x))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    tokens = sample(np.zeros(shape, np.float32), KEY)
    np.testing.assert_array_equal(tokens, np.full(shape[0], -1))
    values, indices = top_k(np.zeros(shape, np.float32), 0)
    assert values.shape == indices.shape == (shape[0], 0)


X = np.zeros((2, 5), np.float32)
WRONG = {
    "logits": ({"logits": [1.0]}, ValueError, r"logits must be an array, got list"),
    "scalar": ({"logits": np.float32(1)}, ValueError, r"at least 1 dimension"),
    "integers": ({"logits": X.astype(int)}, ValueError, r"logits must be floating"),
    "float8": (
        {"logits": jax.ShapeDtypeStruct((2, 5), jnp.float8_e4m3fn)},
        NotImplementedError,
        r"logits of dtype float8_e4m3fn is not supported",
    ),
    "vocabulary": (
        {"logits": jax.ShapeDtypeStruct((1, (1 << 20) + 1), jnp.float32)},
        NotImplementedError,
        r"logits of shape \(1, 1048577\): a vocabulary V of more than 1048576",
    ),
    "key": ({"key": 3}, ValueError, r"key must be a typed key or uint32 \[2\], got 3"),
    "keys": (
        {"key": jax.random.split(KEY, 3)},
        ValueError,
        r"key must be one key, got an array of keys of shape \(3,\)",
    ),
    "words": (
        {"key": np.zeros(4, np.uint32)},
        ValueError,
        r"key must be a typed key or uint32 \[2\], got uint32\[4\]",
    ),
    "generator": (
        {"key": jax.random.key(0, impl="rbg")},
        NotImplementedError,
        r"key of the generator rbg is not supported",
    ),
    "temperature": (
        {"temperature": -1.0},
        ValueError,
        r"temperature must be from 0 to inf, got -1.0",
    ),
    "no temperature": (
        {"temperature": None},
        ValueError,
        r"temperature must be a number or an array, got None",
    ),
    "nan": ({"temperature": math.nan}, ValueError, r"temperature .* got nan"),
    "k": ({"top_k": 0}, ValueError, r"top_k must be from 1 to inf, got 0"),
    "fraction": ({"top_k": 2.5}, ValueError, r"top_k must be an integer, got 2.5"),
    "bool": ({"top_k": True}, ValueError, r"top_k must be an integer .* got True"),
    "k array": ({"top_k": X[:, 0]}, ValueError, r"top_k .* got dtype float32"),
    "p": ({"top_p": 1.5}, ValueError, r"top_p must be from 0 to 1, got 1.5"),
    "p scalar": (
        {"top_p": np.float32(2)},
        ValueError,
        r"top_p .* from 0 to 1, got 2.0",
    ),
    "k scalar": ({"top_k": np.int32(0)}, ValueError, r"top_k .* from 1 to inf, got 0"),
    "p shape": (
        {"top_p": X[0]},
        ValueError,
        r"top_p must broadcast to \[\*B\] = \(2,\), got shape \(5,\)",
    ),
    "min_p": ({"min_p": "a"}, ValueError, r"min_p must be a number .* got 'a'"),
    "mask": ({"mask": X}, ValueError, r"mask must be bool .* got float32"),
    "mask shape": (
        {"mask": np.ones((3, 5), bool)},
        ValueError,
        r"mask must broadcast to \[\*B,V\] = \(2, 5\), got shape \(3, 5\)",
    ),
    "short mask": (
        {"mask": np.ones((2, 1), bool)},
        ValueError,
        r"mask must have an entry for each of the V=5 tokens",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    changes, error, message = WRONG[name]
    arguments = {"logits": X, "key": KEY} | changes
    logits = arguments.pop("logits")
    call = functools.partial(sample, **arguments)
    if isinstance(logits, jax.ShapeDtypeStruct):
        call = functools.partial(jax.eval_shape, call)
    with pytest.raises(error, match=message):
        call(logits)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (6, r"k must be from 0 to V=5, got 6"),
        (-1, r"k must be from 0 to V=5, got -1"),
        (1.0, r"k must be an int, got 1.0"),
        (True, r"k must be an int, got True"),
    ],
)
def test_errors_of_top_k(k: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(X, k)


def test_a_traced_k() -> None:
    with pytest.raises(ValueError, match=r"k must be static, got a traced value"):
        jax.jit(lambda k: jax_flash.top_k(X, k))(3)
