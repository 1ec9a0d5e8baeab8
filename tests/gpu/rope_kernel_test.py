"""The kernel of `rope_append_kv` against jnp on the same GPU, and in place."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_helpers import of_one_projection, rope_append_in_jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import KVCache, rope, rope_append_kv, rope_append_qkvpacked
from jax_flash._src import registry

TARGET = registry.ROPE_APPEND_TARGET
ROOM, PAGE = 96, 16
CACHES = ("k_cache", "v_cache")


def problem(
    dtype: str,
    batch: int,
    tokens: int | None,
    heads: tuple[int, int],
    widths: tuple[int, int],
    page: int | None = None,
) -> dict[str, jax.Array]:
    """Arguments; sequences without room, switched off, without some pages."""
    rng = np.random.default_rng(batch)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    shape = (batch,) if tokens is None else (batch, tokens)
    slots = ROOM // (page or ROOM)
    lead = (batch, ROOM) if page is None else (batch * slots + 3, page)
    lengths = rng.integers(0, ROOM, batch)
    for i, length in enumerate((ROOM - 1, -1, ROOM, 2**31 - 1)[: batch - 1]):
        lengths[1 + i] = length
    given = {
        "query": normal(*shape, heads[0], widths[0]),
        "k_new": normal(*shape, heads[1], widths[0]),
        "v_new": normal(*shape, heads[1], widths[1]),
        "k_cache": normal(*lead, heads[1], widths[0]),
        "v_cache": normal(*lead, heads[1], widths[1]),
        "cache_seqlens": jnp.asarray(lengths, jnp.int32),
    }
    if page is not None:
        table = rng.permutation(batch * slots).reshape(batch, slots)
        table[batch // 2, -1], table[batch - 1, -1] = -1, 10**6
        given["page_table"] = jnp.asarray(table, jnp.int32)
    return given


def check(got: Any, want: Any, given: dict[str, jax.Array]) -> None:
    """Sines differ in their last bits; what is not turned is the same."""
    dtype = given["query"].dtype
    step = 2e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    for x, y in zip(got[:2], want[:2], strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y)
        assert (error <= step * np.maximum(np.abs(y), 1)).all(), error.max()
    np.testing.assert_array_equal(got[2], want[2])
    kept = np.asarray((want[1] == given["k_cache"]).all(-1))
    np.testing.assert_array_equal(
        np.asarray(got[1])[kept], np.asarray(given["k_cache"])[kept]
    )


# Heads of queries and keys, widths of keys and values, options.
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "usual": ((32, 8), (128, 128), {"theta": 500000.0}),
    "interleaved": ((32, 8), (128, 128), {"interleaved": True}),
    "part": ((8, 8), (80, 80), {"rotary_dim": 32}),
    "part, interleaved": ((6, 3), (128, 64), {"rotary_dim": 64, "interleaved": True}),
    "odd": ((15, 5), (64, 64), {}),
    "no vectors": ((9, 3), (18, 7), {}),
    "no vectors, interleaved": ((3, 1), (50, 50), {"rotary_dim": 26}),
    "wide": ((4, 2), (256, 512), {}),
    "many pairs": ((2, 1), (1000, 8), {"inv_freq": np.linspace(0, 1, 500)}),
}


@pytest.mark.parametrize("page", [None, PAGE])
@pytest.mark.parametrize("tokens", [None, 1, 5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rope_append(
    dtype: str, case: str, tokens: int | None, page: int | None
) -> None:
    heads, widths, options = CASES[case]
    options = dict(options)
    if "inv_freq" in options:
        options["inv_freq"] = jnp.asarray(options["inv_freq"], jnp.float32)
    batch = (1, 7, 130)[(list(CASES).index(case) + (tokens or 0)) % 3]
    given = problem(dtype, batch, tokens, heads, widths, page)
    # Angles of float32 mean nothing at the largest length.
    given["cache_seqlens"] = jnp.minimum(given["cache_seqlens"], 10**6)
    step = jax.jit(functools.partial(rope_append_kv, **options))
    assert f'"{TARGET}"' in str(step.lower(**given).compile().as_text())
    want = jax.jit(functools.partial(rope_append_in_jnp, **options))(**given)
    got = step(**given)
    check(got, want, given)
    packed = jax.jit(functools.partial(rope_append_qkvpacked, **options))
    arrays = of_one_projection(given)
    assert "is_packed = true" in packed.lower(**arrays).as_text()
    jax.tree.map(np.testing.assert_array_equal, packed(**arrays), got)


def test_past_the_largest_int32() -> None:
    given = problem("float32", 7, 3, (4, 2), (64, 64))
    options = {"inv_freq": jnp.zeros(32, jnp.float32)}
    want = rope_append_in_jnp(**given, **options)
    check(jax.jit(functools.partial(rope_append_kv, **options))(**given), want, given)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_far_away(interleaved: bool) -> None:
    """Angles up to 10^6 are those of float32, to the last bits."""
    given = problem("float32", 64, None, (8, 2), (128, 128))
    lengths = np.random.default_rng(0).integers(0, 10**6, 64).astype(np.int32)
    given["cache_seqlens"] = jnp.asarray(lengths)
    step = jax.jit(functools.partial(rope_append_kv, interleaved=interleaved))
    got = np.asarray(step(**given)[0])
    powers = (10000.0 ** -(np.arange(0, 128, 2) / 128)).astype(np.float32)
    angles = (lengths[:, None].astype(np.float32) * powers).astype(np.float64)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    x = np.asarray(given["query"], np.float64)
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        pairs = np.stack([a * cos - b * sin, a * sin + b * cos], -1)
        want = pairs.reshape(x.shape)
    else:
        a, b = np.split(x, 2, -1)
        want = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_many_tokens() -> None:
    """Of a prompt, into a cache that it fills."""
    given = problem("bfloat16", 2, 3000, (32, 8), (128, 128))
    for name in CACHES:
        given[name] = jnp.zeros((2, 3000, *given[name].shape[2:]), jnp.bfloat16)
    given["cache_seqlens"] = jnp.array([0, 100], jnp.int32)
    check(jax.jit(rope_append_kv)(**given), jax.jit(rope_append_in_jnp)(**given), given)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("page", [None, PAGE])
@pytest.mark.parametrize("tokens", [None, 5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_place_when_donated(
    dtype: str, tokens: int | None, page: int | None, packed: bool
) -> None:
    """One call and nothing else, on the memory of the caches."""
    given = problem(dtype, 7, tokens, (32, 8), (128, 128), page)
    want = jax.jit(rope_append_in_jnp)(**given)
    kept = {n: np.array(x) for n, x in given.items()}
    function, given = rope_append_kv, dict(given)
    if packed:
        function, given = rope_append_qkvpacked, of_one_projection(given)
    compiled = jax.jit(function, donate_argnames=CACHES).lower(**given).compile()
    text = str(compiled.as_text())
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert not re.search(r" (copy|copy-start|scatter|fusion|transpose|slice)\(", text)
    addresses = [given[n].unsafe_buffer_pointer() for n in CACHES]
    got = compiled(**given)
    assert [x.unsafe_buffer_pointer() for x in got[1:]] == addresses
    check(got, want, {n: jnp.asarray(x) for n, x in kept.items()})


def test_what_is_not_donated_is_kept() -> None:
    given = problem("bfloat16", 7, 3, (4, 2), (64, 64))
    before = {n: np.array(given[n]) for n in CACHES}
    got = jax.jit(rope_append_kv)(**given)
    check(got, rope_append_in_jnp(**given), given)
    for name, x in before.items():
        np.testing.assert_array_equal(np.asarray(given[name]), x)


def test_many_steps_of_a_donated_cache() -> None:
    """A loop inside the program and one outside, as generation has them."""
    rng = np.random.default_rng(0)
    steps = 20
    new = jnp.asarray(rng.standard_normal((steps, 3, 12, 64)), jnp.bfloat16)

    def one(cache: KVCache, x: jax.Array) -> tuple[KVCache, jax.Array]:
        query, cache = cache.rope_append(x[:, :8], x[:, 8:10], x[:, 10:])
        return cache, query

    def fresh() -> KVCache:
        return KVCache.create(3, 32, 2, 64, dtype=jnp.bfloat16)

    inside, queries = jax.jit(lambda c: jax.lax.scan(one, c, new))(fresh())
    jitted = jax.jit(one, donate_argnums=0)
    cache = fresh()
    for i in range(steps):
        cache, query = jitted(cache, new[i])
        np.testing.assert_array_equal(query, queries[i])
    jax.tree.map(np.testing.assert_array_equal, cache, inside)
    at = jnp.arange(steps, dtype=jnp.int32)[:, None]
    key = np.asarray(rope(new[:, :, 8:10], at), np.float32).swapaxes(0, 1)
    got = np.asarray(cache.k[:, :steps], np.float32)
    np.testing.assert_allclose(got, key, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("page", [None, PAGE])
def test_vmap(page: int | None) -> None:
    given = problem("bfloat16", 4, 2, (8, 2), (64, 64), page)
    given["cache_seqlens"] = jnp.minimum(given["cache_seqlens"], ROOM)
    stacked = {n: jnp.stack([x, x[::-1]]) for n, x in given.items() if x.ndim > 2}
    lengths = given["cache_seqlens"]
    table = given.get("page_table")
    if table is not None:
        stacked["page_table"] = jnp.stack([table, table[::-1]])

    def of(f: Callable) -> Callable:
        return jax.jit(jax.vmap(lambda o: f(**o, cache_seqlens=lengths)))

    stacked = {n: stacked[n] for n in given if n in stacked}
    text = str(of(rope_append_kv).lower(stacked).compile().as_text())
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    check(of(rope_append_kv)(stacked), of(rope_append_in_jnp)(stacked), stacked)


@pytest.mark.parametrize("page", [None, PAGE])
def test_gradients(page: int | None) -> None:
    """Forward by the kernel, what is linear by jnp."""
    given = problem("float32", 4, 3, (8, 2), (32, 16), page)
    given["cache_seqlens"] = jnp.minimum(given["cache_seqlens"], ROOM)
    names = list(given)[:5]
    rest = {n: x for n, x in given.items() if n not in names}

    def of(f: Callable) -> Callable:
        def loss(*xs: jax.Array) -> jax.Array:
            results = f(**dict(zip(names, xs, strict=True)), **rest)
            return jnp.stack([jnp.sin(x).sum() for x in results]).sum()

        return jax.jit(jax.grad(loss, tuple(range(5))))

    arrays = [given[n] for n in names]
    assert f'"{TARGET}"' in str(of(rope_append_kv).lower(*arrays).compile().as_text())
    for x, y in zip(
        of(rope_append_kv)(*arrays), of(rope_append_in_jnp)(*arrays), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_several_devices() -> None:
    """Sequences, then heads, on devices of their own."""
    devices = jax.device_count()
    if devices < 2:
        pytest.skip("one device")
    given = problem("bfloat16", 4 * devices, 1, (4 * devices, devices), (64, 64))
    given["cache_seqlens"] = jnp.minimum(given["cache_seqlens"], ROOM)
    want = rope_append_in_jnp(**given)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    for spec in (("x",), (None, None, "x"), (None, "x")):
        placed = {}
        for name, x in given.items():
            own = () if spec == (None, "x") and name not in CACHES else spec[: x.ndim]
            own = own if any(own) else ()
            sharding = NamedSharding(mesh, P(*own))
            placed[name] = jax.device_put(x, sharding)
        compiled = jax.jit(rope_append_kv).lower(**placed).compile()
        assert f'"{TARGET}"' in str(compiled.as_text())
        check(compiled(**placed), want, given)
