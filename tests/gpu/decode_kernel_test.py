"""The decode kernels against float64: lengths, pages, options; what stays the same."""

import concurrent.futures
import functools
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import choice_test
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from decode_helpers import paged, quantised

from jax_flash import alibi, append_kv, decode_mha, explain

# Of float32 that of its products, and of logits.
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19}
PAGE = 64
SCRIPT = Path(__file__).with_name("decode_command_buffer_script.py")


def problem(
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    room: int,
    *widths: int,
    dtype: str = "bfloat16",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, tokens, heads, widths[0]),
        (batch, room, kv_heads, widths[0]),
        (batch, room, kv_heads, widths[-1]),
    )
    query, k, v = (
        rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
        for shape in shapes
    )
    return query, k, v


def run(query: Any, k: Any, v: Any, lengths: Any, **options: Any) -> Any:
    call = jax.jit(
        lambda arrays, operands: decode_mha(
            *arrays,
            **operands,
            **{n: x for n, x in options.items() if not isinstance(x, np.ndarray)},
            return_lse=True,
            implementation="cuda",
        )
    )
    operands = {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    out, lse = call((query, k, v, lengths), operands)
    return np.asarray(out), np.asarray(lse)


def check(got: Any, query: Any, k: Any, v: Any, lengths: Any, **options: Any) -> None:
    """Out within what rounding probabilities and results gives; exact empty rows."""
    options.pop("num_splits", None)
    window = options.pop("window_size", None)
    given = {"key_value_seq_lengths": lengths, "is_causal": True, **options}
    if window is not None:
        given["window_size"] = (window[0], None)
    want = oracle.attention(query, k, v, **given)
    out, lse = got
    out = out.astype(np.float64)
    largest = max(1.0, np.abs(want.out).max(initial=0))
    bound = 2 * EPSILON[str(query.dtype)] * largest
    assert np.abs(out - want.out).max(initial=0) <= bound
    empty = np.isneginf(want.lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (np.moveaxis(out, 1, 2)[empty] == 0).all()
    difference = np.where(empty, 0, lse) - np.where(empty, 0, want.lse)
    # Logits are rounded to f32.
    logits = np.abs(np.where(empty, 0, want.lse)).max(initial=1)
    assert np.abs(difference).max(initial=0) <= 5e-6 + 2e-6 * logits


def check_alone(
    got: Any, arrays: tuple[np.ndarray, ...], alone: Sequence[int], few: int
) -> None:
    """Sequences that run alone give the same bits; the first `few` are right.

    Args:
      got: out and lse of a call.
      arrays: its query, caches and lengths.
      alone: which sequences run alone.
      few: how many are compared with float64.
    """
    for b in alone:
        one = slice(b, b + 1)
        result = run(*(x[one] for x in arrays))
        chex.assert_trees_all_equal(result, tuple(x[one] for x in got))
    check(tuple(x[:few] for x in got), *(x[:few] for x in arrays))


EDGES = (0, 1, PAGE - 1, PAGE, PAGE + 1, 15, 16, 17, 500, 1023, 1024, 2000, -3)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("page", [None, 1, 16, PAGE, 100])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_lengths(width: int, page: int | None, tokens: int) -> None:
    room = 1024 if page != 100 else 1100
    lengths = np.array(EDGES, np.int32)
    query, k, v = problem(0, len(EDGES), tokens, 8, 2, room, width)
    for b, length in enumerate(lengths):
        k[b, max(length, 0) :] = v[b, max(length, 0) :] = np.nan
    if page is None:
        got = run(query, k, v, lengths)
    else:
        rng = np.random.default_rng(1)
        k_pool, v_pool, table = paged(rng, (k, v), lengths, page, np.nan)
        got = run(query, k_pool, v_pool, lengths, page_table=table)
    check(got, query, k, v, lengths)


def test_an_infinite_sink_takes_all() -> None:
    query, k, v = problem(5, 2, 2, 8, 2, 4096, 128)
    lengths = np.array([4000, 0], np.int32)
    sinks = np.arange(8, dtype=np.float32)
    sinks[3] = np.inf
    out, lse = run(query, k, v, lengths, sinks=sinks)
    finite = np.where(np.isinf(sinks), np.float32(0), sinks)
    expected, expected_lse = (x.copy() for x in run(query, k, v, lengths, sinks=finite))
    expected[:, :, 3] = 0
    expected_lse[0, 3] = np.inf
    chex.assert_trees_all_equal((out, lse), (expected, expected_lse))


@pytest.mark.parametrize("seed", range(100))
def test_random(seed: int) -> None:
    pick, rng = random.Random(seed), np.random.default_rng(seed)
    batch, kv_heads = pick.randint(1, 5), pick.randint(1, 8)
    heads = kv_heads * pick.choice((1, 2, 3, 4, 8, 16))
    tokens = pick.choice((1, 1, 1, 2, 4, 16, 64))
    page = pick.choice((1, 8, 16, 48, 256))
    room = page * pick.randint(1, max(1, 3000 // page))
    widths = [8 * pick.randint(1, pick.choice((8, 16, 32))) for _ in range(2)]
    dtype = pick.choice(("bfloat16", "float16"))
    query, k, v = problem(
        seed, batch, tokens, heads, kv_heads, room, *widths, dtype=dtype
    )
    lengths = rng.integers(0, room + 1, batch).astype(np.int32)
    options: dict[str, Any] = {"num_splits": pick.choice((None, 1, 3, 100))}
    if pick.random() < 0.4:
        options["window_size"] = (pick.randint(0, 500), None)
    if pick.random() < 0.3:
        options["softcap"] = 5.0
    if pick.random() < 0.3:
        options["sinks"] = rng.standard_normal((batch, heads)).astype(np.float32)
    if pick.random() < 0.3:
        slopes = 0.1 * rng.standard_normal((batch, heads), np.float32)
        options["bias"] = alibi(slopes)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = np.nan
    if pick.random() < 0.5:
        k_pool, v_pool, table = paged(rng, (k, v), lengths, page, np.nan)
        got = run(query, k_pool, v_pool, lengths, page_table=table, **options)
    else:
        got = run(query, k, v, lengths, **options)
    check(got, query, k, v, lengths, **options)


QUANTISED = ("float8_e4m3fn", "int8")


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("page", [None, 1, 16, 100])
@pytest.mark.parametrize("tokens", [1, 16])
def test_quantised(dtype: str, width: int, page: int | None, tokens: int) -> None:
    """Scales of each head; whatever is beyond the lengths; queries of both types."""
    room = 1024 if page != 100 else 1100
    lengths = np.array(EDGES, np.int32)
    kind = "bfloat16" if width == 128 else "float16"
    query, k, v = problem(0, len(EDGES), tokens, 8, 2, room, width, dtype=kind)
    scales = {
        "k_scale": np.array([0.02, 0.04], np.float32),
        "v_scale": np.array([0.03, 0.01], np.float32),
    }
    k, k_want = quantised(dtype, k, scales["k_scale"][None])
    v, v_want = quantised(dtype, v, scales["v_scale"][None])
    fill = 127 if dtype == "int8" else np.nan
    for b, length in enumerate(lengths):
        k[b, max(length, 0) :] = v[b, max(length, 0) :] = fill
    options: dict[str, Any] = dict(scales)
    if page is not None:
        rng = np.random.default_rng(1)
        k, v, options["page_table"] = paged(rng, (k, v), lengths, page, fill)
    check(run(query, k, v, lengths, **options), query, k_want, v_want, lengths)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_every_value_of_a_byte(dtype: str) -> None:
    """Exactly; NaN of float8 where the GPU has the conversion."""
    v = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).reshape(1, 1, 1, 256)
    k = np.zeros((1, 1, 1, 16), v.dtype)
    query = np.ones((1, 1, 1, 16), np.float16)
    out, _ = run(query, k, v, np.ones(1, np.int32))
    want = v.astype(np.float16)
    if float(jax.devices()[0].compute_capability) < 8.9:
        want = np.where(np.isnan(want), np.copysign(480, want), want)
    np.testing.assert_array_equal(out, want)


def test_large_queries_with_quantised_caches() -> None:
    """The kernel multiplies in float16; queries beyond its range are no problem."""
    query, k, v = problem(0, 2, 1, 8, 2, 300, 128)
    lengths = np.array([300, 7], np.int32)
    ones = np.ones((1, 2), np.float32)
    (k, k_want), (v, v_want) = (quantised("int8", 30 * x, ones) for x in (k, v))
    query = np.asarray(query * jnp.bfloat16(1e8))
    got = run(query, k, v, lengths, scale=1e-10)
    check(got, query, k_want, v_want, lengths, scale=1e-10)


@pytest.mark.parametrize(
    ("batch", "tokens", "room", "width"),
    [
        (6, 2, 4096, 128),  # splits cut anywhere
        (12, 16, 8192, 64),  # whole groups of them, on 132 multiprocessors
        (300, 1, 512, 128),  # one thread block for all of a sequence
        (40, 5, 2000, 256),
    ],
)
def test_same_bits_again_and_alone(
    batch: int, tokens: int, room: int, width: int
) -> None:
    query, k, v = problem(0, batch, tokens, 16, 4, room, width)
    lengths = np.random.default_rng(1).integers(0, room + 1, batch).astype(np.int32)
    if batch == 12:
        lengths[:] = room
    lengths[:2] = room, 0
    first = run(query, k, v, lengths)
    for _ in range(5):
        chex.assert_trees_all_equal(run(query, k, v, lengths), first)
    check_alone(first, (query, k, v, lengths), (0, 1, 2, 5, batch - 1), 6)


def test_programs_take_turns() -> None:
    """Three executables, 50 times each: every one has counters of its own.

    Their sequences are cut differently, and one has no room for a second split.
    """
    shapes = ((3, 1, 8192, 128), (16, 9, 1024, 64), (5, 2, 100, 128))
    programs = []
    for seed, (batch, tokens, room, width) in enumerate(shapes):
        arrays = problem(seed, batch, tokens, 16, 4, room, width)
        lengths = np.random.default_rng(seed).integers(0, room + 1, batch)
        arrays = (*arrays, lengths.astype(np.int32))
        call = jax.jit(functools.partial(decode_mha, implementation="cuda"))
        programs.append((call, jax.device_put(arrays)))
    results = [[f(*arrays) for f, arrays in programs] for _ in range(50)]
    for first, *others in zip(*results, strict=True):
        assert all(bool((x == first).all()) for x in others)
    for (_, arrays), got in zip(programs, results[0], strict=True):
        query, k, v, lengths = map(np.asarray, arrays)
        given = {"key_value_seq_lengths": lengths, "is_causal": True}
        want = oracle.attention(query, k, v, **given).out
        assert np.abs(np.asarray(got, np.float64) - want).max() < 3e-2


def test_one_program_from_two_host_threads() -> None:
    """They share its counters, and the device runs one call after the other."""
    calls = []
    for seed in range(2):
        arrays = problem(seed, 3, 1, 16, 4, 8192, 128)
        lengths = np.random.default_rng(seed).integers(0, 8193, 3)
        calls.append(jax.device_put((*arrays, lengths.astype(np.int32))))
    shapes = jax.eval_shape(lambda *a: a, *calls[0])
    program = functools.partial(decode_mha, implementation="cuda")
    compiled = jax.jit(program).lower(*shapes).compile()
    want = [np.asarray(compiled(*arrays)) for arrays in calls]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda i: compiled(*calls[i % 2]), range(100))
        for i, got in enumerate(results):
            np.testing.assert_array_equal(np.asarray(got), want[i % 2])


def test_one_program_on_several_devices() -> None:
    """Each has counters of its own."""
    devices = jax.device_count()
    if devices < 2:
        pytest.skip("one device")
    query, k, v = problem(0, 2 * devices, 1, 16, 4, 8192, 128)
    lengths = np.random.default_rng(0).integers(0, 8193, 2 * devices).astype(np.int32)
    want = run(query, k, v, lengths)[0]
    mesh = jax.make_mesh((devices,), ("x",))
    by_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    program = jax.jit(functools.partial(decode_mha, implementation="cuda"))
    for _ in range(10):
        got = program(*jax.device_put((query, k, v, lengths), by_batch))
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(
    ("tokens", "room", "count"), [(1, 2048, 1), (2, 65536, 1), (16, 65536, 2)]
)
def test_few_kernels(batch: int, tokens: int, room: int, count: int) -> None:
    """One for few rows, by clusters or by who comes last, and two for many."""
    query = jnp.ones((batch, tokens, 8, 128), jnp.bfloat16)
    k, v = (jnp.ones((batch, room, 2, 128), jnp.bfloat16) for _ in range(2))
    lengths = jnp.full(batch, room, jnp.int32)
    names = choice_test.kernels(
        functools.partial(decode_mha, implementation="cuda"), query, k, v, lengths
    )
    assert len(names) == count, names
    assert "decode_split_kernel" in names[0]
    assert count == 1 or "decode_sum_kernel" in names[1]


@pytest.mark.parametrize(("heads", "room"), [(8, 1024), (8, 8192), (5, 4096)])
def test_one_sequence(heads: int, room: int) -> None:
    """Clusters add up its splits; beside another one who comes last does."""
    query, k, v = problem(0, 2, 1, 4 * heads, heads, room, 128)
    for length in (0, 1, 200, room // 2 + 7, room):
        lengths = np.array([length, room], np.int32)
        both = run(query, k, v, lengths)
        alone = run(query[:1], k[:1], v[:1], lengths[:1])
        chex.assert_trees_all_equal(alone, tuple(x[:1] for x in both))
    check(both, query, k, v, lengths)


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "window", "room"),
    [
        (64, 32, 128, None, 4160),
        (64, 32, 64, None, 4160),
        (33, 64, 256, None, 4160),
        (64, 32, 128, 4090, 4160),
        (17, 32, 128, None, 4160),  # one block of rows of each head
        (17, 32, 64, None, 17000),  # 15 parts
    ],
)
def test_many_rows(
    tokens: int, heads: int, width: int, window: int | None, room: int
) -> None:
    """On Hopper by the forward kernel: the same bits alone as in a batch."""
    some = [room, tokens - 1, 4101]
    if room < 5000:
        some += [0, 1, tokens, 1000, -3]
    lengths = np.array(some, np.int32)
    query, k, v = problem(0, len(lengths), tokens, heads, 8, room, width)
    options = {} if window is None else {"window_size": (window, None)}
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, k, v))
    explanation = explain(*shapes, cache_seqlens=lengths, **options)
    assert "the forward kernel" in str(explanation)
    for b, length in enumerate(lengths):
        k[b, max(length, 0) :] = v[b, max(length, 0) :] = np.nan
    got = run(query, k, v, lengths, **options)
    check(got, query, k, v, lengths, **options)
    for b in range(3):
        one = slice(b, b + 1)
        alone = run(query[one], k[one], v[one], lengths[one], **options)
        chex.assert_trees_all_equal(alone, tuple(x[one] for x in got))


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize(
    ("tokens", "heads", "widths"),
    [(5, 32, (128,)), (16, 32, (128,)), (40, 24, (128, 72)), (9, 40, (64,))],
)
def test_rows_of_warpgroups(
    tokens: int, heads: int, widths: tuple[int, ...], page: int | None
) -> None:
    """Over 16 rows on Hopper: every option, and the same bits alone as in a batch."""
    room = 4160
    lengths = np.array([room, 0, 1, tokens - 1, tokens, 1000, 4101, -3], np.int32)
    query, k, v = problem(0, len(lengths), tokens, heads, 8, room, *widths)
    for b, length in enumerate(lengths):
        k[b, max(length, 0) :] = v[b, max(length, 0) :] = np.nan
    sinks = np.linspace(-2, 4, heads, dtype=np.float32)
    options = {"window_size": (3000, None), "softcap": 3.0, "sinks": sinks}
    keys, values, ways = k, v, {}
    if page is not None:
        rng = np.random.default_rng(1)
        keys, values, table = paged(rng, (k, v), lengths, page, np.nan)
        ways["page_table"] = table
    got = run(query, keys, values, lengths, **ways)
    check(got, query, k, v, lengths)
    limited = run(query, keys, values, lengths, **ways, **options)
    check(limited, query, k, v, lengths, **options)
    for b in (0, 3, 6):
        one = slice(b, b + 1)
        if page is None:
            alone = run(query[one], k[one], v[one], lengths[one])
        else:
            way = {"page_table": ways["page_table"][one]}
            alone = run(query[one], keys, values, lengths[one], **way)
        chex.assert_trees_all_equal(alone, tuple(x[one] for x in got))


def test_many_sequences() -> None:
    query, k, v = problem(0, 1300, 1, 4, 1, 80, 64)
    lengths = np.random.default_rng(0).integers(0, 81, 1300).astype(np.int32)
    check(run(query, k, v, lengths), query, k, v, lengths)


def test_scan_with_a_growing_cache() -> None:
    """One program, other lengths at every step, the cache written inside."""
    _, k, v = problem(0, 3, 1, 8, 2, 300, 128)
    query = problem(1, 3, 40, 8, 2, 1, 128)[0]
    start = np.array([0, 100, 250], np.int32)

    @jax.jit
    def generate(k: Any, v: Any, lengths: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            k, v, lengths = carry
            q, new = x
            k, v = append_kv(k, v, new, new, lengths)
            lengths = lengths + 1
            out = decode_mha(q, k, v, lengths, implementation="cuda")
            return (k, v, lengths), out

        new = query[:, :, :2].swapaxes(0, 1)
        return jax.lax.scan(step, (k, v, lengths), (query.swapaxes(0, 1), new))

    (k_end, v_end, lengths), outs = generate(k, v, start)
    k_end, v_end = np.asarray(k_end), np.asarray(v_end)
    for i in (0, 1, 20, 39):
        at = start + i + 1
        want = oracle.attention(
            query[:, i : i + 1], k_end, v_end, key_value_seq_lengths=at, is_causal=True
        ).out[:, 0]
        assert np.abs(np.asarray(outs[i], np.float64) - want).max() < 2e-2
    assert np.asarray(lengths).tolist() == [40, 140, 290]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("page", [None, 8])
def test_append_is_in_place_when_donated(dtype: str, page: int | None) -> None:
    """The memory stays the same, and no operation needs a second cache."""
    k, v = (jnp.zeros((4, 4096, 2, 128), dtype) for _ in range(2))
    table = None
    if page is not None:
        k, v = (x.reshape(-1, page, 2, 128) for x in (k, v))
        table = jnp.arange(len(k), dtype=jnp.int32).reshape(4, -1)
    new = jnp.ones((4, 2, 2, 128), jnp.float32)
    lengths = jnp.array([0, 3, 30, 4095], jnp.int32)

    def step(k: Any, v: Any, new: Any, lengths: Any) -> Any:
        return append_kv(k, v, new, new, lengths, page_table=table)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(k, v, new, lengths).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < k.nbytes // 4
    addresses = [x.unsafe_buffer_pointer() for x in (k, v)]
    got = compiled(k, v, new, lengths)
    assert [x.unsafe_buffer_pointer() for x in got] == addresses


def test_lengths_change_in_a_command_buffer() -> None:
    """The program runs as a CUDA graph; lengths change in the memory it reads."""
    flags = (
        "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL "
        "--xla_gpu_graph_min_graph_size=1"
    )
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "correct calls: 12" in done.stdout
