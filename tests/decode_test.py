"""`decode_mha` against float64, and under transformations."""

import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from decode_helpers import normal, paged, problem, with_lse
from helpers import assert_close
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import alibi, decode_mha, explain, mha
from jax_flash._src import blocks

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}


def expected(
    query: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: Any,
    k_scale: Any = None,
    v_scale: Any = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64 by the oracle."""
    window = options.pop("window_size", None)
    window = None if window is None else (window[0], None)
    k, v = (x.astype(np.float64) for x in (k, v))
    k = k * np.reshape(1.0 if k_scale is None else k_scale, (-1, 1))
    v = v * np.reshape(1.0 if v_scale is None else v_scale, (-1, 1))
    single = query.ndim == 3
    result = oracle.attention(
        query[:, None] if single else query,
        k,
        v,
        key_value_seq_lengths=lengths,
        is_causal=True,
        window_size=window,
        **options,
    )
    return (
        (result.out[:, 0], result.lse[:, :, 0])
        if single
        else (
            result.out,
            result.lse,
        )
    )


def check(got: Any, want: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
    out, lse = got
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    assert_close(out, want[0], TOLERANCE[dtype])
    assert_close(lse, want[1], 2e-6)


@pytest.mark.parametrize("seed", range(30))
def test_random(seed: int) -> None:
    """Any combination of options, contiguous and paged, garbage beyond the lengths."""
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    dtype = pick.choice(("float32", "bfloat16", "float16"))
    kind = pick.choice((dtype, dtype, "int8", "float8_e4m3fn"))
    batch, kv_heads = pick.randint(1, 4), pick.randint(1, 3)
    heads = kv_heads * pick.choice((1, 2, 3, 8))
    page, slots = pick.choice((1, 2, 7, 16)), pick.randint(1, 5)
    room = page * slots
    width, value_width = pick.randint(1, 40), pick.randint(1, 40)
    tokens = pick.choice((0, 1, 2, 5, 17))
    shape = (batch, tokens, heads, width) if tokens else (batch, heads, width)
    query = normal(rng, *shape).astype(dtype)
    edges = (0, 1, page - 1, page, page + 1, room, room + 3, -2)
    lengths = np.array([pick.choice(edges) for _ in range(batch)], np.int32)
    options: dict[str, Any] = {}
    if kind == "int8":
        k = rng.integers(-127, 128, (batch, room, kv_heads, width)).astype(np.int8)
        v = rng.integers(-127, 128, (batch, room, kv_heads, value_width))
        v, fill = v.astype(np.int8), -128
    else:
        k = normal(rng, batch, room, kv_heads, width).astype(jnp.dtype(kind))
        v = normal(rng, batch, room, kv_heads, value_width).astype(jnp.dtype(kind))
        fill = np.nan
        for b, length in enumerate(lengths):
            k[b, max(length, 0) :] = v[b, max(length, 0) :] = np.nan
    if kind != dtype:
        options["k_scale"] = rng.uniform(0.01, 0.1, kv_heads).astype(np.float32)
        options["v_scale"] = np.float32(0.25)
    if pick.random() < 0.4:
        options["window_size"] = (pick.randint(0, 20), pick.choice((None, 0, 3)))
    if pick.random() < 0.3:
        options["softcap"] = 3.0
    if pick.random() < 0.3:
        options["sinks"] = normal(rng, *pick.choice(((heads,), (batch, heads))))
    if pick.random() < 0.3:
        slopes = 0.1 * normal(rng, *pick.choice(((heads,), (batch, heads))))
        options["bias"] = alibi(slopes)
    if pick.random() < 0.3:
        options["scale"] = pick.choice((0.0, -0.4, 2.0))
    want = expected(query, k, v, lengths, **options)
    if pick.random() < 0.5:
        k, v, options["page_table"] = paged(rng, (k, v), lengths, page, fill)
    arrays = {n: x for n, x in options.items() if n == "bias" or hasattr(x, "shape")}
    static = {n: x for n, x in options.items() if n not in arrays}
    run = jax.jit(functools.partial(decode_mha, **static, return_lse=True))
    check(run(query, k, v, lengths, **arrays), want, dtype)


def test_rows_without_keys() -> None:
    out, lse = with_lse(*problem())
    assert (np.asarray(out[0]) == 0).all()
    assert np.isneginf(lse[0]).all()
    # Two tokens and three queries: the first stands before the sequence.
    assert (np.asarray(out[1, 0]) == 0).all()
    assert np.isneginf(lse[1, :, 0]).all()
    assert np.isfinite(lse[1, :, 1:]).all()


@pytest.mark.parametrize("page", [None, 8])
def test_chunked(page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    want = with_lse(*problem(page))
    monkeypatch.setattr(blocks, "MATERIALISE", 1)
    monkeypatch.setattr(blocks, "KEY_BLOCK", 5)
    jax.clear_caches()
    assert_close(jax.jit(with_lse)(*problem(page)), want)


@pytest.mark.parametrize("page", [None, 8])
def test_gradients_in_chunks(page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of problems too large for all scores at once."""
    query, k, v, *rest = problem(page)

    def loss(query, k, v):
        return jnp.sin(with_lse(query, k, v, *rest)[0]).sum()

    want = jax.grad(loss, (0, 1, 2))(query, k, v)
    monkeypatch.setattr(blocks, "MATERIALISE", 1)
    monkeypatch.setattr(blocks, "KEY_BLOCK", 5)
    jax.clear_caches()
    assert_close(jax.grad(loss, (0, 1, 2))(query, k, v), want)


def test_pages_before_the_window_may_be_gone() -> None:
    """Their entries may be anything: a serving loop gives their pages away."""
    query, k, v, lengths, table = problem(8)
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    want = with_lse(query, k, v, lengths, table, window_size=(3, 0))
    table = np.array(table)
    # Of 24 tokens the three queries see those from 18 on.
    table[3, :2] = (-1, 10**6)
    got = with_lse(query, k, v, lengths, table, window_size=(3, 0))
    assert_close(got, want)


@pytest.mark.parametrize("page", [None, 8])
def test_vmap(page: int | None) -> None:
    """Over everything, and over queries alone with one cache."""
    args = problem(page)
    stacked = [np.stack([x, x[::-1]]) for x in args[:1]] + [
        np.stack([x, x]) for x in args[1:]
    ]
    got = jax.vmap(with_lse)(*stacked)
    want = [with_lse(*(x[i] for x in stacked)) for i in range(2)]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want))
    axes = (0, *(None,) * (len(args) - 1))
    shared = jax.vmap(with_lse, axes)(stacked[0], *args[1:])
    assert_close(shared, got)


@pytest.mark.parametrize("page", [None, 8])
def test_vmap_and_gradient_of_slopes(page: int | None) -> None:
    """As of `mha`, whose last queries they are."""
    args = problem(page)
    slopes = 0.1 * normal(np.random.default_rng(1), 2, 4, 8)

    def attend(slopes):
        return with_lse(*args, bias=alibi(slopes))

    got = jax.vmap(attend)(slopes)
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *map(attend, slopes)))
    query, k, v, lengths = problem()

    def by_mha(slopes):
        return mha(
            query,
            k,
            v,
            alibi(slopes),
            is_causal=True,
            key_value_seq_lengths=lengths,
            return_lse=True,
        )

    def loss(f):
        return lambda slopes: jnp.sin(f(slopes)[0]).sum()

    assert_close(attend(slopes[0]), by_mha(slopes[0]))
    assert_close(jax.grad(loss(attend))(slopes[0]), jax.grad(loss(by_mha))(slopes[0]))


@pytest.mark.parametrize("page", [None, 8])
def test_vmap_of_nothing(page: int | None) -> None:
    args = problem(page)
    out, lse = jax.vmap(with_lse)(*(np.stack([x])[:0] for x in args))
    one = with_lse(*args)
    assert (out.shape, lse.shape) == ((0, *one[0].shape), (0, *one[1].shape))


@pytest.mark.parametrize("page", [None, 8])
def test_heads_and_batch_on_a_mesh(page: int | None) -> None:
    """Named shardings stay; heads need no communication."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    args = problem(page)
    batch = None if page else "x"
    caches = [P(batch, None, "y")] * 2
    specs = [P("x", None, "y"), *caches, P("x"), *([P("x")] if page else [])]
    put = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(args, specs, strict=True)
    ]
    compiled = jax.jit(with_lse).lower(*put).compile()
    out, lse = compiled(*put)
    assert_close((out, lse), with_lse(*args))
    text = str(compiled.as_text())
    assert "all-gather" not in text
    assert "all-reduce" not in text
    mapped = jax.shard_map(
        with_lse,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=(P("x", None, "y"), P("x", "y")),
    )
    assert_close(jax.jit(mapped)(*args), with_lse(*args))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_more_devices_than_kv_heads(kv_heads: int) -> None:
    """Query heads stay apart; each device has the one head of keys that they read."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("y",))
    query, k, v, lengths = problem()
    k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]
    put = jax.device_put(query, NamedSharding(mesh, P(None, None, "y")))
    compiled = jax.jit(with_lse).lower(put, k, v, lengths).compile()
    out, lse = compiled(put, k, v, lengths)
    assert out.sharding.spec[2] == lse.sharding.spec[1] == "y"
    assert "all-gather" not in str(compiled.as_text())
    assert_close((out, lse), expected(query, k, v, lengths))


def test_explicit_axes() -> None:
    """Results and derivatives where shardings are part of types."""
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), (AxisType.Explicit,) * 2
    )
    arrays = problem()
    specs = [P("x", None, "y")] * 3 + [P("x")]

    def loss(query, k, v, lengths):
        return jnp.sin(decode_mha(query, k, v, lengths)).sum()

    with jax.set_mesh(mesh):
        args = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
        out = jax.jit(decode_mha)(*args)
        assert jax.typeof(out).sharding.spec[:3] == ("x", None, "y")
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
    assert_close((out, got), (decode_mha(*arrays), jax.grad(loss, (0, 1, 2))(*arrays)))


def test_gradients() -> None:
    """Those of `mha`, through jnp."""
    query, k, v, lengths = problem()

    def loss(query, k, v):
        out, lse = with_lse(query, k, v, lengths)
        return jnp.sin(out).sum() + jnp.where(jnp.isinf(lse), 0, jnp.cos(lse)).sum()

    got = jax.grad(loss, (0, 1, 2))(query, k, v)
    out, lse = expected(query, k, v, lengths)
    dlse = np.where(np.isinf(lse), 0, -np.sin(np.where(np.isinf(lse), 0, lse)))
    given = {"key_value_seq_lengths": lengths, "is_causal": True}
    want = oracle.gradients(query, k, v, np.cos(out), dlse, **given)
    assert_close(got, tuple(want[n] for n in ("query", "key", "value")))


# --- errors

Q = np.zeros((2, 3, 4, 8), np.float32)
C = np.zeros((2, 5, 2, 8), np.float32)
L = np.zeros(2, np.int32)
HALF = C.astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((None, C, C, L), {}, ValueError, "query must be an array, got None"),
        ((Q[0, 0], C, C, L), {}, ValueError, r"query .* got shape \(4, 8\)"),
        ((Q.astype(int), C, C, L), {}, ValueError, "query must be floating"),
        ((Q, C[0], C, L), {}, ValueError, r"k_cache must be \[B,S,K,H\], got"),
        ((Q, C, C[:, :2], L), {}, ValueError, "v_cache must have the dtype and all"),
        ((Q, C, HALF, L), {}, ValueError, "v_cache .* got bfloat16"),
        ((Q, HALF, HALF, L), {}, ValueError, "k_cache must have the dtype of query"),
        ((Q, C[..., :7], C, L), {}, ValueError, "width H=8 of query, got 7"),
        ((Q[:, :, :3], C, C, L), {}, ValueError, "N=3 and K=2"),
        ((Q[:1], C, C, L[:1]), {}, ValueError, "batch B=1 .* needs page_table"),
        ((Q, C, C, Q[:, 0, 0, 0]), {}, ValueError, "cache_seqlens must be integers"),
        ((Q, C, C, L[:1]), {}, ValueError, r"cache_seqlens .* B=2, got shape \(1,\)"),
        ((Q, C, C, 3), {}, ValueError, "cache_seqlens must be an array, got int: 3"),
        ((Q, C, C, L), {"page_table": L}, ValueError, "page_table must be int32"),
        (
            (np.zeros((2, 65, 4, 8), np.float32), C, C, L),
            {},
            NotImplementedError,
            "query has T=65",
        ),
        ((Q, C, C, L), {"k_scale": 1.0}, ValueError, "k_scale is for caches of"),
        (
            (Q, C.astype(np.int8), C.astype(np.int8), L),
            {"v_scale": np.ones(3, np.float32)},
            ValueError,
            r"v_scale .* K=2 heads, got shape \(3,\)",
        ),
        (
            (Q, C.astype(np.int8), C.astype(np.int8), L),
            {"k_scale": 0},
            ValueError,
            "k_scale must be positive, got 0",
        ),
        (
            (Q, C.astype(np.int8), C.astype(np.int8), L),
            {"v_scale": 1e-60},  # 0 in float32
            ValueError,
            "v_scale must be positive, got 1e-60",
        ),
        (
            (Q, C.astype(np.int8), C.astype(np.int8), L),
            {"v_scale": np.float32("nan")},
            ValueError,
            "v_scale must be a finite real number.*nan",
        ),
        (
            (Q, C.astype(np.int16), C.astype(np.int16), L),
            {},
            NotImplementedError,
            "k_cache of dtype int16",
        ),
        ((Q, C, C, L), {"sinks": np.ones(3, np.float32)}, ValueError, "sinks must be"),
        ((Q, C, C, L), {"sinks": L}, ValueError, "sinks must be floating"),
        (
            (Q, C, C, L),
            {"bias": alibi(np.ones(3, np.float32))},
            ValueError,
            r"bias=alibi\(slopes\) must be \[N\] or \[B,N\] with .*N=4, got .*\(3,\)",
        ),
        (
            (Q, C, C, L),
            {"bias": np.zeros((2, 4, 3, 5), np.float32)},
            NotImplementedError,
            r"bias must be jax_flash.alibi\(slopes\).*got shape \(2, 4, 3, 5\)",
        ),
        ((Q, C, C, L), {"bias": 1.0}, ValueError, "bias must be None or .*float: 1.0"),
        ((Q, C, C, L), {"softcap": -1.0}, ValueError, "softcap must be positive"),
        ((Q, C, C, L), {"window_size": 3}, ValueError, "window_size must be"),
        ((Q, C, C, L), {"num_splits": 0}, ValueError, "num_splits .* got 0"),
        ((Q, C, C, L), {"num_splits": True}, ValueError, "num_splits .* got True"),
        (
            (Q, C, C, L),
            {"num_splits": np.timedelta64(2, "s")},
            ValueError,
            "num_splits .*2",
        ),
        ((Q, C, C, L), {"scale": "x"}, ValueError, "scale must be a number"),
        ((Q, C, C, L), {"return_lse": 1}, ValueError, "return_lse must be"),
        ((Q, C, C, L), {"implementation": "x"}, ValueError, "implementation must"),
        ((Q, C, C, L), {"implementation": ()}, ValueError, "implementation must"),
        ((Q, C, C, L), {"implementation": "cuda"}, NotImplementedError, "'cuda'"),
    ],
)
def test_errors(args: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        decode_mha(*args, **options)


@pytest.mark.parametrize("option", ["sinks", "alibi"])
def test_float64_stays(option: str) -> None:
    """Sinks and slopes are not rounded to float32 beside float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = (2, 4, 8), (2, 9, 4, 8), (2, 9, 4, 6)
        query, k, v = (rng.standard_normal(shape) for shape in shapes)
        numbers = np.abs(rng.standard_normal(4)) + 1 / 3
        scores = np.einsum("bnh,bsnh->bns", query, k) * 8**-0.5
        total = np.exp(numbers) * np.ones((2, 4))
        given: dict[str, Any] = {"sinks": numbers}
        if option == "alibi":
            given = {"bias": alibi(numbers)}
            scores = scores - numbers[:, None] * (8 - np.arange(9))
            total = 0.0
        lengths = np.array([9, 9])
        _, lse = decode_mha(query, k, v, lengths, return_lse=True, **given)
    wanted = np.log(np.exp(scores).sum(-1) + total)
    np.testing.assert_allclose(lse.reshape(2, 4), wanted, rtol=1e-14)


def test_explain_checks_what_decode_mha_checks() -> None:
    query = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    cache = jax.ShapeDtypeStruct((2, 16, 2, 8), jnp.int8)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    run = functools.partial(explain, query, cache, cache, cache_seqlens=lengths)
    assert "xla" in str(run(k_scale=2))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k_scale": -1.0}, "k_scale must be positive, got -1.0"),
        ({"k_scale": "a"}, "k_scale must be a number or floating .* got 'a'"),
        ({"return_lse": 3}, "return_lse must be True or False, got 3"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            run(**options)
