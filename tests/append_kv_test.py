"""`append_kv` against a loop, under transformations, and in place."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_helpers import normal, paged, problem, with_lse
from helpers import assert_close
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import append_kv

E4M3 = jnp.float8_e4m3fn
C = np.zeros((2, 5, 2, 8), np.float32)
L = np.zeros(2, np.int32)


def appended(cache, new, lengths, table=None):
    """By a loop."""
    cache = cache.copy()
    for b, t in np.ndindex(*new.shape[:2]):
        at = int(lengths[b]) + t
        if lengths[b] < 0:
            continue
        if table is None:
            if at < cache.shape[1]:
                cache[b, at] = new[b, t]
            continue
        slot, offset = divmod(at, cache.shape[1])
        if slot < table.shape[1] and 0 <= table[b, slot] < len(cache):
            cache[table[b, slot], offset] = new[b, t]
    return cache


@pytest.mark.parametrize("page", [None, 1, 4, 16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_append(page: int | None, tokens: int) -> None:
    rng = np.random.default_rng(0)
    k, v = normal(rng, 5, 16, 2, 3), normal(rng, 5, 16, 2, 4)
    lengths = np.array([0, 3, 14, 16, -1], np.int32)
    table = None
    if page is not None:
        full = np.full(5, 16)
        k, v, table = paged(rng, (k, v), full, page, 0)
        lengths[3] = 2**31 - 1  # what comes after it is not the first place
        table[1, -1] = len(k)
        table[2, -1] = -1
    k_new, v_new = normal(rng, 5, tokens, 2, 3), normal(rng, 5, tokens, 2, 4)
    got = append_kv(k, v, k_new, v_new, lengths, page_table=table)
    for x, cache, y in zip(got, (k, v), (k_new, v_new), strict=True):
        np.testing.assert_array_equal(x, appended(cache, y, lengths, table))
    if tokens == 1:
        new = k_new[:, 0], v_new[:, 0]
        again = append_kv(k, v, new[0], new[1], lengths, page_table=table)
        assert_close(again, got, 0)


@pytest.mark.parametrize("page", [None, 4])
def test_append_of_a_single_token(page: int | None) -> None:
    """In one scatter, not in a kernel that reads what was there and one that writes."""
    rng = np.random.default_rng(0)
    k, v = normal(rng, 1, 16, 2, 3), normal(rng, 1, 16, 2, 4)
    table = None
    if page is not None:
        k, v, table = paged(rng, (k, v), np.full(1, 16), page, 0)
        table[0, 2] = -1
    k_new, v_new = normal(rng, 1, 1, 2, 3), normal(rng, 1, 1, 2, 4)
    append = jax.jit(append_kv)
    for length in (0, 7, 9, 15, 16, 17, 2**31 - 1, -1):
        lengths = np.array([length], np.int32)
        got = append(k, v, k_new, v_new, lengths, page_table=table)
        for x, cache, y in zip(got, (k, v), (k_new, v_new), strict=True):
            np.testing.assert_array_equal(x, appended(cache, y, lengths, table))
    lowered = append.lower(k, v, k_new, v_new, lengths, page_table=table)
    assert lowered.as_text().count("tensor<1x2x2x3xf32>) -> tensor") == 1


def test_append_of_nothing() -> None:
    _, k, v, lengths = problem()
    got = append_kv(k, v, k[:, :0], v[:, :0], lengths)
    assert_close(got, (jnp.asarray(k), jnp.asarray(v)), 0)
    empty = np.zeros((4, 0), np.int32)
    got = append_kv(k, v, k[:, :1], v[:, :1], lengths, page_table=empty)
    assert_close(got, (jnp.asarray(k), jnp.asarray(v)), 0)
    assert (np.asarray(with_lse(*problem()[:4], page_table=empty)[0]) == 0).all()


def test_append_quantises() -> None:
    values = np.array([0.0, 0.24, 0.25, 0.75, -1.25, 100.0, -1e9, 300.0], np.float32)
    new = np.stack([values, 2 * values]).reshape(1, 1, 2, 8)
    scales = np.array([0.5, 1.0], np.float32)
    cache, lengths = np.zeros((1, 2, 2, 8), np.int8), np.array([1], np.int32)
    got = append_kv(cache, cache, new, new, lengths, k_scale=scales, v_scale=scales)
    row = [0, 0, 0, 2, -2, 127, -127, 127]  # halves to even
    for x in got:
        np.testing.assert_array_equal(x[0, 1], [row, row])
    cache = np.zeros((1, 2, 2, 8), E4M3)
    got, _ = append_kv(cache, cache, new, new, lengths, k_scale=np.float32(0.5))
    want = np.clip(new[0, 0] / 0.5, -448, 448).astype(E4M3)
    np.testing.assert_array_equal(np.asarray(got)[0, 1], want)
    assert np.isfinite(np.asarray(got, np.float32)).all()


@pytest.mark.parametrize("quantised", ["int8", "float8_e4m3fn"])
def test_quantised_round_trip(quantised: str) -> None:
    """What was appended is attended with about the error of its format."""
    query, k, v, lengths = problem()
    scale = np.abs(k).max((0, 1, 3)) / (127 if quantised == "int8" else 448)
    value_scale = np.abs(v).max((0, 1, 3)) / (127 if quantised == "int8" else 448)
    scales = {"k_scale": scale, "v_scale": value_scale}
    empty = jnp.zeros(k.shape, quantised), jnp.zeros(v.shape, quantised)
    zero = np.zeros(4, np.int32)
    caches = append_kv(*empty, k, v, zero, **scales)
    out, _ = with_lse(query, *caches, lengths, **scales)
    want, _ = with_lse(query, k, v, lengths)
    assert_close(out, want, 0.05 if quantised == "int8" else 0.15)


@pytest.mark.parametrize("page", [None, 8])
def test_gradients_of_append(page: int | None) -> None:
    """New values take the places of old ones, which then count for nothing."""
    _, k, v, _, *tables = problem(page)
    table = tables[0] if tables else None
    lengths = np.array([0, 2, 23, -1], np.int32)
    rng = np.random.default_rng(1)
    new, weight = normal(rng, 4, 2, 4, 16), normal(rng, *k.shape)

    def loss(k, new):
        got, _ = append_kv(k, v, new, new[..., :8], lengths, page_table=table)
        return (got * weight).sum()

    got = jax.grad(loss, (0, 1))(k, new)
    places = appended(
        np.zeros(k.shape), 1 + np.arange(8.0).reshape(4, 2, 1, 1), lengths, table
    )
    want = np.zeros(new.shape)
    for i in range(8):
        want[i // 2, i % 2] = np.where(places == 1 + i, weight, 0).sum((0, 1))
    assert_close(got, (np.where(places, 0, weight), want), 1e-6)


@pytest.mark.parametrize("page", [None, 8])
def test_gradients_of_append_without_room(page: int | None) -> None:
    """A cache of no tokens or no pages takes nothing."""
    empty = np.zeros((0, page, 2, 4) if page else (2, 0, 2, 4), np.float32)
    table = np.zeros((2, 3), np.int32) if page else None
    new, lengths = np.ones((2, 1, 2, 4), np.float32), np.array([0, 1], np.int32)

    def loss(cache, new):
        k, v = append_kv(cache, cache, new, new, lengths, page_table=table)
        return k.sum() + v.sum()

    got = jax.grad(loss, (0, 1))(empty, new)
    assert_close(got, (empty, np.zeros_like(new)), 0)


# Not bfloat16: XLA's scatter on the CPU may take it through float32. For GPUs
# gpu/decode_kernel_test.py has all types.
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("tokens", [1, 4])
def test_append_is_in_place_when_donated(
    dtype: str, page: int | None, tokens: int
) -> None:
    """The results are the memory of the operands, and no operation copies a cache."""
    shape = (4, 64, 2, 32)
    k, v = jnp.zeros(shape, dtype), jnp.ones(shape, dtype)
    new = jnp.ones((4, tokens, 2, 32), jnp.float32)
    lengths = jnp.array([0, 3, 30, 63], jnp.int32)
    table = None
    if page is not None:
        k, v = (x.reshape(32, page, 2, 32) for x in (k, v))
        table = jnp.arange(32, dtype=jnp.int32).reshape(4, page)

    def step(k, v, new, lengths):
        return append_kv(k, v, new, new, lengths, page_table=table)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(k, v, new, lengths).compile()
    text = str(compiled.as_text())
    alias = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert alias is not None
    for i in (0, 1):
        assert re.search(rf"\{{{i}\}}: \({i}, ", alias.group(1))
    size = ",".join(map(str, k.shape))
    copies = [
        line
        for line in text.splitlines()
        if re.search(rf"= \w+\[{size}\]\S* copy(-start)?\(", line)
    ]
    assert not copies
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < k.nbytes
    addresses = [x.unsafe_buffer_pointer() for x in (k, v)]
    got = compiled(k, v, new, lengths)
    assert [x.unsafe_buffer_pointer() for x in got] == addresses


def test_sharded_append() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    _, k, v, lengths = problem()
    new = k[:, :2] + 1, v[:, :2] + 1
    want = append_kv(k, v, *new, lengths)
    sharding = NamedSharding(mesh, P("x", None, "y"))
    args = jax.device_put((k, v, *new), sharding)
    placed = jax.device_put(lengths, NamedSharding(mesh, P("x")))
    compiled = jax.jit(append_kv, donate_argnums=(0, 1)).lower(*args, placed).compile()
    assert "all-gather" not in str(compiled.as_text())
    got = compiled(*args, placed)
    assert_close(got, want, 0)
    assert got[0].sharding.is_equivalent_to(sharding, 4)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((C, C, C.astype(int), C, L), {}, "k_new must be floating"),
        ((C, C, C, C[..., :3], L), {}, r"v_new must be \[B,T,K,Hv\]"),
        ((C, C, C, C[:, :2], L), {}, "v_new must have all but the width"),
        ((C, C, C[:1], C[:1], L[:1]), {}, "batch B=2 .* needs page_table"),
        ((C, C, C, C, L[:1]), {}, "cache_seqlens must be"),
        ((C, C, C, C, L), {"page_table": L}, "page_table must be"),
        ((C, C, C, C, L), {"k_scale": 1.0}, "k_scale is for"),
        ((C[0], C, C, C, L), {}, "k_cache must be"),
    ],
)
def test_errors_of_append(args: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        append_kv(*args, **options)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x"), P()])
@pytest.mark.parametrize("page", [None, 2])
def test_explicit_axes(page: int | None, spec: P) -> None:
    """Caches keep their shardings, whatever those of the other arguments."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), (AxisType.Explicit,))
    rng = np.random.default_rng(0)
    new, lengths = normal(rng, 4, 3, 4, 8), np.array([0, 3, 1, 5], np.int32)
    cache, options = normal(rng, 4, 6, 4, 8), {}
    if page is not None:
        cache = cache.reshape(12, 2, 4, 8)
        options = {"page_table": np.arange(12, dtype=np.int32).reshape(4, 3)}
    wanted = append_kv(cache, cache, new, new, lengths, **options)
    with jax.set_mesh(mesh):

        def put(x: np.ndarray, spec: P) -> jax.Array:
            return jax.device_put(x, NamedSharding(mesh, spec))

        caches = put(cache, spec)
        given = put(new, P("x")), new, put(lengths, P("x"))
        got = append_kv(caches, caches, *given, **options)
        jitted = jax.jit(append_kv)(caches, caches, *given, **options)

        def total(cache: jax.Array) -> jax.Array:
            return (append_kv(cache, cache, *given, **options)[0] ** 2).sum()

        gradient = jax.grad(total)(caches)
        for x in (*got, *jitted, gradient):
            assert jax.typeof(x).sharding.spec[:3] == (*spec, None, None, None)[:3]
    assert_close(got, wanted, 0)
    assert_close(jitted, wanted, 0)
    places = wanted[0] == cache
    assert_close(gradient, np.where(places, 2 * cache, 0), 0)
