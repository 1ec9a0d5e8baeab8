"""`rope` and `rope_append_kv`: numbers, caches in place, transformations, errors."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_helpers import of_one_projection, paged, quantised
from helpers import assert_close
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jax_flash import (
    KVCache,
    PagedKVCache,
    append_kv,
    decode_mha,
    mha,
    rope,
    rope_append_kv,
    rope_append_qkvpacked,
)

WIDTH = 16
STRETCHED = np.array([1.0, 0.3, 0.05, 0.0], np.float32)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def turned(
    x: np.ndarray,
    positions: Any,
    theta: float = 10000.0,
    inv_freq: np.ndarray | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> np.ndarray:
    """The definition, pair by pair, in float64."""
    x = np.array(x, np.float64)
    result = x.copy()
    positions = np.broadcast_to(positions, x.shape[:-2])
    count = len(inv_freq) if inv_freq is not None else (rotary_dim or x.shape[-1]) // 2
    for at in np.ndindex(*x.shape[:-1]):
        for i in range(count):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + count)
            speed = theta ** (-i / count) if inv_freq is None else float(inv_freq[i])
            angle = int(positions[at[:-1]]) * speed
            a, b = x[*at, first], x[*at, second]
            result[*at, first] = a * np.cos(angle) - b * np.sin(angle)
            result[*at, second] = a * np.sin(angle) + b * np.cos(angle)
    return result


OPTIONS = {
    "plain": {},
    "interleaved": {"interleaved": True},
    "base": {"theta": 500000},
    "part": {"rotary_dim": 6},
    "part, interleaved": {"rotary_dim": 10, "interleaved": True, "theta": 100.0},
    "frequencies": {"inv_freq": STRETCHED},
    "frequencies, interleaved": {"inv_freq": STRETCHED, "interleaved": True},
    "width of frequencies": {"inv_freq": STRETCHED, "rotary_dim": 8},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_values(case: str) -> None:
    rng = np.random.default_rng(0)
    x = normal(rng, 3, 5, 2, WIDTH)
    lengths = np.array([0, 7, 300])
    positions = lengths[:, None] + np.arange(5)
    options = dict(OPTIONS[case])
    want = turned(x, positions, **options)
    assert_close(rope(x, positions, **options), want, 3e-5)
    assert_close(rope(x, np.arange(5), **options), turned(x, np.arange(5), **options))
    # One token of each sequence; a number of batch dimensions; no position but 0.
    assert_close(rope(x[:, 0], lengths, **options), want[:, 0], 3e-5)
    more = rope(x[None, :, None], positions[:, None], **options)
    assert_close(more, want[None, :, None], 3e-5)
    np.testing.assert_array_equal(rope(x, np.int32(0), **options), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_is_rounded_once(dtype: str) -> None:
    x = normal(np.random.default_rng(1), 40, 3, WIDTH).astype(jnp.dtype(dtype))
    got = rope(x, np.arange(40))
    assert got.dtype == dtype
    exact = turned(x, np.arange(40))
    error = np.abs(np.asarray(got, np.float64) - exact)
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    assert (error <= unit * np.abs(exact) * 1.001 + 1e-5).all()


def test_float64_stays() -> None:
    x = np.random.default_rng(0).standard_normal((9, 2, WIDTH))
    with jax.enable_x64(True):
        got = rope(x, np.arange(9) + 100000)
        assert got.dtype == jnp.float64
        assert_close(got, turned(x, np.arange(9) + 100000), 1e-10)


def test_logits_depend_on_distance_alone() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (normal(rng, 2, 6, n, WIDTH) for n in (4, 2, 2))

    def attention(start: int) -> jax.Array:
        at = start + np.arange(6)
        return mha(rope(query, at), rope(key, at), value, is_causal=True)

    assert_close(attention(0), attention(500), 1e-4)


def test_transformations() -> None:
    rng = np.random.default_rng(0)
    x, frequencies = normal(rng, 3, 4, 2, 8), jnp.array([1.0, 0.5, 0.2], jnp.float32)
    at = rng.integers(0, 9, (3, 4))

    def f(x: Any, frequencies: Any) -> jax.Array:
        return rope(x, at, inv_freq=frequencies, interleaved=True)

    check_grads(f, (x, frequencies), order=2, rtol=2e-2, atol=2e-2)
    # It turns: the gradient is turned back.
    _, pull = jax.vjp(lambda x: rope(x, at), x)
    assert_close(rope(pull(x)[0], at), jnp.asarray(x))
    mapped = jax.vmap(rope, in_axes=(1, 1), out_axes=1)(x, at)
    assert_close(jax.jit(lambda x, at: rope(x, at))(x, at), mapped, 1e-6)


def test_strict_rank_promotion() -> None:
    with jax.numpy_rank_promotion("raise"):
        rope(np.ones((2, 3, 1, 4), np.float32), np.arange(3))


# --- rope_append_kv

ROOM = 16


def problem(dtype: Any, tokens: int, page: int | None) -> dict[str, Any]:
    """Arguments; sequences from the start, in between, without room, switched off."""
    rng = np.random.default_rng(0)
    shape = (4, tokens) if tokens else (4,)
    cache = normal(rng, 4, ROOM, 2, WIDTH), normal(rng, 4, ROOM, 2, 8)
    dtype = jnp.dtype(dtype)
    given = {
        "query": normal(rng, *shape, 6, WIDTH),
        "k_new": normal(rng, *shape, 2, WIDTH),
        "v_new": normal(rng, *shape, 2, 8),
    }
    if dtype not in (jnp.int8, jnp.float8_e4m3fn):
        given = {n: x.astype(dtype) for n, x in given.items()}
    k, v = (x.astype(dtype) for x in cache)
    given["cache_seqlens"] = np.array([0, 5, ROOM - 2, -1], np.int32)
    if page is not None:
        full = np.full(4, ROOM)
        k, v, given["page_table"] = paged(rng, (k, v), full, page, 0)
    return {**given, "k_cache": k, "v_cache": v}


@pytest.mark.parametrize("case", ["plain", "part, interleaved", "frequencies"])
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("tokens", [0, 3])
def test_append(case: str, page: int | None, tokens: int) -> None:
    """The queries of `turned`, and the caches that `append_kv` makes of its keys."""
    given = problem("float32", tokens, page)
    options = dict(OPTIONS[case])
    at = given["cache_seqlens"]
    at = at[:, None] + np.arange(tokens) if tokens else at
    query, k, v = jax.jit(functools.partial(rope_append_kv, **options))(**given)
    packed = jax.jit(functools.partial(rope_append_qkvpacked, **options))
    same = packed(**of_one_projection(given))
    assert_close(same, (query, k, v), 1e-6)
    assert_close(query, turned(given["query"], at, **options), 1e-5)
    key = turned(given["k_new"], at, **options).astype(np.float32)
    want = append_kv(
        given["k_cache"],
        given["v_cache"],
        key,
        given["v_new"],
        given["cache_seqlens"],
        page_table=given.get("page_table"),
    )
    assert_close((k, v), want, 1e-5)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_append_quantises(kind: str, page: int | None) -> None:
    """The turned key, not a rounding of it, is divided by the scale and rounded."""
    given = problem(kind, 1, page)
    given |= {n: given[n].astype(jnp.bfloat16) for n in ("query", "k_new", "v_new")}
    scales = np.array([0.02, 0.05], np.float32)
    options = {"k_scale": scales, "v_scale": np.float32(0.02)}
    query, k, v = rope_append_kv(**given, **options)
    same = rope_append_qkvpacked(**of_one_projection(given), **options)
    for got, want in zip(same, (query, k, v), strict=True):
        np.testing.assert_array_equal(got, want)
    assert (query.dtype, k.dtype, v.dtype) == (jnp.bfloat16, kind, kind)
    key = turned(given["k_new"], given["cache_seqlens"][:, None])
    wants = (
        quantised(kind, key, scales[None])[0],
        quantised(kind, given["v_new"], np.full((1, 2), 0.02, np.float32))[0],
    )
    for got, want in zip((k, v), wants, strict=True):
        if page is not None:
            table = given["page_table"]
            got = np.asarray(got)[table].reshape(4, ROOM, 2, -1)
        for b, length in enumerate(given["cache_seqlens"][:3]):
            np.testing.assert_array_equal(
                np.asarray(got[b, length], np.float32), want[b, 0].astype(np.float32)
            )


@pytest.mark.parametrize("page", [None, 4])
def test_decoding_equals_attention_to_all(page: int | None) -> None:
    """By the caches' method, in chunks and token by token."""
    rng = np.random.default_rng(0)
    query, key, value = (normal(rng, 2, 9, n, WIDTH) for n in (4, 2, 2))
    if page is None:
        cache: Any = KVCache.create(2, ROOM, 2, WIDTH, dtype=jnp.float32)
    else:
        cache = PagedKVCache.create(
            8, page, 2, WIDTH, batch=2, max_pages=4, dtype=jnp.float32
        )
        table = rng.permutation(8).reshape(2, 4).astype(np.int32)
        cache = dataclasses.replace(cache, page_table=table)
    at = np.arange(9)
    want = mha(
        rope(query, at, theta=50.0), rope(key, at, theta=50.0), value, is_causal=True
    )
    qkv = np.concatenate([x.reshape(2, 9, -1) for x in (query, key, value)], -1)
    packed = cache
    for part in (slice(0, 5), slice(5, 8), 8):
        q, cache = cache.rope_append(
            query[:, part], key[:, part], value[:, part], theta=50.0
        )
        assert_close(cache.attend(q), want[:, part])
        q, packed = packed.rope_append_qkvpacked(qkv[:, part], theta=50.0)
        assert_close(packed.attend(q), want[:, part])
    for end in (cache, packed):
        np.testing.assert_array_equal(end.lengths, [9, 9])


# Not bfloat16: see append_kv_test.test_append_is_in_place_when_donated.
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("tokens", [0, 3])
def test_in_place_when_donated(dtype: str, page: int | None, tokens: int) -> None:
    """The caches keep their memory, no operation copies or fills one."""
    given = jax.tree.map(jnp.asarray, problem(dtype, tokens, page))
    names = ("k_cache", "v_cache")
    step = jax.jit(rope_append_kv, donate_argnames=names)
    compiled = step.lower(**given).compile()
    for x in (given[n] for n in names):
        size = ",".join(map(str, x.shape))
        made = rf"= \w+\[{size}\]\S* (copy|copy-start|broadcast|convert)\("
        assert not re.search(made, str(compiled.as_text()))
    addresses = [given[n].unsafe_buffer_pointer() for n in names]
    _, k, v = compiled(**given)
    assert [x.unsafe_buffer_pointer() for x in (k, v)] == addresses


def test_append_under_vmap_and_grad() -> None:
    given = problem("float32", 2, None)
    layers = {
        n: jnp.stack([x, 2 * x]) for n, x in given.items() if n != "cache_seqlens"
    }
    got = jax.vmap(lambda x: rope_append_kv(**x, cache_seqlens=given["cache_seqlens"]))(
        layers
    )
    for i in (0, 1):
        one: dict[str, Any] = {n: x[i] for n, x in layers.items()}
        want = rope_append_kv(**one, cache_seqlens=given["cache_seqlens"])
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), want, 1e-6)

    lengths = np.clip(given["cache_seqlens"], 0, ROOM - 2)

    def through_cache(query: Any, key: Any, value: Any) -> jax.Array:
        query, k, v = rope_append_kv(
            query, key, value, given["k_cache"], given["v_cache"], lengths
        )
        return jnp.sin(decode_mha(query, k, v, lengths + 2)).sum()

    def literal(query: Any, key: Any, value: Any) -> jax.Array:
        at = lengths[:, None] + np.arange(2)
        k, v = append_kv(
            given["k_cache"], given["v_cache"], rope(key, at), value, lengths
        )
        return jnp.sin(decode_mha(rope(query, at), k, v, lengths + 2)).sum()

    arrays = [given[n] for n in ("query", "k_new", "v_new")]
    got, want = (jax.grad(f, (0, 1, 2))(*arrays) for f in (through_cache, literal))
    assert all(np.abs(x).max() > 1e-3 for x in want)
    assert_close(got, want, 1e-6)


def test_sharded_by_heads_and_sequences() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    given = problem("float32", 3, None)
    want = rope_append_kv(**given)
    placed = {
        n: jax.device_put(
            x, NamedSharding(mesh, P("x") if x.ndim == 1 else P("x", None, "y"))
        )
        for n, x in given.items()
    }
    compiled = jax.jit(rope_append_kv).lower(**placed).compile()
    assert "all-gather" not in str(compiled.as_text())
    assert_close(compiled(**placed), want, 1e-6)


# --- errors

X = np.zeros((2, 3, 4, 8), np.float32)
AT = np.arange(3)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((None, AT), {}, ValueError, "x must be an array, got NoneType: None"),
        ((X[0, 0, 0], AT), {}, ValueError, r"x must be \[\*B,N,H\], got shape \(8,\)"),
        ((X.astype(int), AT), {}, ValueError, "x must be floating, got dtype int"),
        (
            (X.astype(jnp.float8_e4m3fn), AT),
            {},
            NotImplementedError,
            "x of dtype float8_e4m3fn",
        ),
        ((X, 3), {}, ValueError, "positions must be an array, got int: 3"),
        ((X, AT + 0.5), {}, ValueError, "positions must be integers, got dtype"),
        ((X, np.arange(4)), {}, ValueError, r"positions .* = \(2, 3\) .* \(4,\)"),
        ((X, AT), {"theta": 0}, ValueError, "theta must be positive, got 0.0"),
        ((X, AT), {"theta": 1e-45}, ValueError, "theta must be positive, got 1e-45"),
        ((X, AT), {"theta": "x"}, ValueError, "theta must be a number, got 'x'"),
        ((X, AT), {"rotary_dim": 3}, ValueError, "rotary_dim must be even.*got 3"),
        ((X, AT), {"rotary_dim": 10}, ValueError, "the width H=8, got 10"),
        ((X, AT), {"rotary_dim": 0}, ValueError, "from 2 .*got 0"),
        ((X, AT), {"rotary_dim": 4.0}, ValueError, "rotary_dim must be an int"),
        ((X[..., :7], AT), {}, ValueError, "rotary_dim must be given for .* H=7"),
        ((X, AT), {"interleaved": 1}, ValueError, "interleaved must be True or F"),
        (
            (X, AT),
            {"inv_freq": STRETCHED, "theta": 5.0},
            ValueError,
            "theta must be None where inv_freq is given, got 5.0",
        ),
        ((X, AT), {"inv_freq": [1.0]}, ValueError, "inv_freq must be an array"),
        ((X, AT), {"inv_freq": AT}, ValueError, "inv_freq must be floating"),
        (
            (X, AT),
            {"inv_freq": np.ones(5, np.float32)},
            ValueError,
            r"inv_freq must be \[at most 4\].*\(5,\)",
        ),
        (
            (X, AT),
            {"inv_freq": STRETCHED, "rotary_dim": 6},
            ValueError,
            r"inv_freq must be \[3\].*rotary_dim=6.*\(4,\)",
        ),
    ],
)
def test_errors(args: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        rope(*args, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "query must be an array, got None"),
        ({"query": X[0, 0]}, r"query must be \[B,N,H\] or .* got shape \(4, 8\)"),
        ({"k_new": X[0, 0]}, r"k_new must be \[B,K,H\] or .* got shape \(4, 8\)"),
        ({"k_new": X.astype(int)}, "k_new must be floating"),
        ({"k_new": X[:, :2]}, r"all but the heads of query \(2, 3, 4, 8\)"),
        ({"query": X[:, :, :3]}, "multiple of k_new's heads, got N=3 and K=4"),
        ({"v_new": X[:, :2]}, "v_new must have all but the width"),
        ({"k_cache": X[..., :6]}, "k_new must be .* K=4 and width 6"),
        ({"cache_seqlens": np.zeros(3, int)}, r"cache_seqlens .* B=2, .*\(3,\)"),
        ({"page_table": np.zeros(2, int)}, "page_table must be int32"),
        ({"k_scale": 1.0}, "k_scale is for caches of"),
        ({"theta": -1.0}, "theta must be positive, got -1.0"),
        ({"interleaved": None}, "interleaved must be True or False"),
    ],
)
def test_errors_of_append(changes: Any, message: str) -> None:
    names = "query", "k_new", "v_new", "k_cache", "v_cache"
    given: dict[str, Any] = dict.fromkeys(names, X)
    given["cache_seqlens"] = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match=message):
        rope_append_kv(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": None}, "qkv must be an array, got None"),
        ({"qkv": X}, r"qkv must be \[B,W\] or \[B,T,W\], got shape \(2, 3, 4, 8\)"),
        ({"qkv": np.ones((2, 96), int)}, "qkv must be floating, got dtype int"),
        ({"qkv": np.ones((2, 95), np.float32)}, r"K=4, H=8 and Hv=8, .*\(2, 95\)"),
        ({"qkv": np.ones((2, 64), np.float32)}, r"width of N\*H .*\(2, 64\)"),
        ({"qkv": np.ones((2, 80), np.float32)}, r"N a multiple of K.*\(2, 80\)"),
        ({"qkv": np.ones((3, 96), np.float32)}, "qkv must have the batch B=2 .*got 3"),
        ({"v_cache": X[:, :2]}, "v_cache must have the dtype and all but the width"),
        ({"cache_seqlens": np.zeros(3, int)}, r"cache_seqlens .* B=2, .*\(3,\)"),
        ({"page_table": np.zeros(2, int)}, "page_table must be int32"),
        ({"k_scale": 1.0}, "k_scale is for caches of"),
        ({"theta": -1.0}, "theta must be positive, got -1.0"),
        ({"rotary_dim": 10}, "the width H=8, got 10"),
        ({"interleaved": None}, "interleaved must be True or False"),
    ],
)
def test_errors_of_qkvpacked(changes: Any, message: str) -> None:
    given: dict[str, Any] = {
        "qkv": np.ones((2, 96), np.float32),
        "k_cache": X,
        "v_cache": X,
        "cache_seqlens": np.zeros(2, np.int32),
    }
    assert rope_append_qkvpacked(**given)[0].shape == (2, 4, 8)
    with pytest.raises(ValueError, match=message):
        rope_append_qkvpacked(**{**given, **changes})


def test_symbolic_width_of_qkvpacked() -> None:
    """Heads that a call may not have ask for a constraint, and work with it."""
    cache, at = jax.ShapeDtypeStruct((2, 6, 2, 8), jnp.float32), jnp.zeros(2, int)
    f = jax.jit(lambda qkv, k, v: rope_append_qkvpacked(qkv, k, v, at))

    def qkv(*constraints: str) -> Any:
        (width,) = export.symbolic_shape("16*n", constraints=constraints)
        return jax.ShapeDtypeStruct((2, 1, width), jnp.float32)

    message = r"qkv of shape \(2, 1, 16\*n\) .* the constraint '16\*n >= 48'"
    with pytest.raises(NotImplementedError, match=message):
        export.export(f)(qkv(), cache, cache)
    with pytest.raises(ValueError, match="qkv must have a width of N"):
        export.export(f)(qkv("n <= 2"), cache, cache)
    args = [np.ones((2, 1, 64), np.float32), *[np.zeros(cache.shape, np.float32)] * 2]
    exported = export.export(f)(qkv("16*n >= 48"), cache, cache)
    assert_close(exported.call(*args), f(*args), 1e-6)


def test_traced_statics() -> None:
    for name, value in (("theta", 5.0), ("rotary_dim", 4), ("interleaved", True)):
        with pytest.raises(ValueError, match=f"{name} must be static"):
            jax.jit(lambda y, name=name: rope(X, AT, **{name: y}))(value)


def test_positions_beyond_int32() -> None:
    with jax.enable_x64(True):
        got = rope(np.ones((1, 1, 2)), np.array([2**33]))
    angle = 2.0**33
    wanted = np.cos(angle) - np.sin(angle), np.sin(angle) + np.cos(angle)
    np.testing.assert_allclose(got[0, 0], wanted, rtol=1e-6)


def test_explicit_axes() -> None:
    """`rope` of replicated rows at sharded positions, and a step of a cache."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), (AxisType.Explicit,))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 2, 8), np.float32)
    at = np.array([[0], [7], [2], [5]], np.int32)
    cache = rng.standard_normal((4, 12, 2, 8), np.float32)
    wanted = rope(x, at), rope_append_kv(x, x, x, cache, cache, at[:, 0])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(at, NamedSharding(mesh, P("x")))
        caches = jax.device_put(cache, NamedSharding(mesh, P("x")))
        got = rope(x, sharded), rope_append_kv(x, x, x, caches, caches, at[:, 0])
    assert_close(got, wanted, 1e-6)
