"""The decode kernels' own source on the CPU, thread for thread, against float64."""

import ctypes
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from decode_helpers import paged, quantised
from emulated import build
from emulated_decode import QUANTISED, check, problem, run

from jax_flash._src import decode_plan


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("decode", tmp_path_factory.mktemp("decode"))


@pytest.mark.parametrize("splits", [1, 4])
def test_an_infinite_sink_takes_all(library: ctypes.CDLL, splits: int) -> None:
    query, k, v = problem(5, 2, 2, 4, 2, 96, 64)
    lengths = np.array([96, 0], np.int32)
    sinks = np.array([[1, np.inf, 2, 3]], np.float32)

    def call(sinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ways: dict[str, Any] = {"sinks": sinks, "num_splits": splits}
        return run(library, query, k, v, lengths, **ways)

    out, lse = call(sinks)
    finite = np.where(np.isinf(sinks), np.float32(0), sinks)
    expected, expected_lse = call(finite)
    check((expected, expected_lse), query, k, v, lengths, sinks=finite)
    expected[:, :, 1] = 0
    expected_lse[0, 1] = np.inf
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("order", [0, 5])
@pytest.mark.parametrize("batch", [5, 3])
def test_whole_groups_for_some_thread_blocks(
    library: ctypes.CDLL, batch: int, order: int
) -> None:
    """As many groups as two thread blocks on each multiprocessor, or cut ones."""
    query, k, v = problem(6, batch, 1, 2, 1, 1024, 64)
    lengths = np.full(batch, 1024, np.int32)
    lengths[-1] = 1000
    ways: dict[str, Any] = {"num_splits": 16, "multiprocessors": 4}
    out, lse = run(library, query, k, v, lengths, order=order, **ways)
    for b in range(batch):
        one = slice(b, b + 1)
        alone = run(library, query[one], k[one], v[one], lengths[one], **ways)
        np.testing.assert_array_equal(out[one], alone[0])
        np.testing.assert_array_equal(lse[one], alone[1])
    check((out, lse), query, k, v, lengths)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("page", [None, 1, 16, 48])
def test_lengths(library: ctypes.CDLL, page: int | None, dtype: str) -> None:
    """Around tiles, splits and pages, in one ragged batch with NaN beyond."""
    lengths = [0, 1, 15, 16, 17, 47, 48, 63, 64, 65, 127, 128, 129, 192, 300, -3]
    lengths = np.array(lengths, np.int32)
    room = 192
    query, k, v = problem(0, len(lengths), 1, 4, 2, room, 64, dtype=dtype)
    for b, length in enumerate(lengths):
        k[b, max(length, 0) :] = v[b, max(length, 0) :] = np.nan
    given = query, k, v, lengths
    if page is not None:
        rng = np.random.default_rng(1)
        k_pool, v_pool, table = paged(rng, (k, v), lengths, page, np.nan)
        got = run(library, query, k_pool, v_pool, lengths, page_table=table)
    else:
        got = run(library, *given)
    check(got, *given)


@pytest.mark.parametrize("seed", range(30))
def test_random(library: ctypes.CDLL, seed: int) -> None:
    check_random(library, seed, "float16", 8)


@pytest.mark.parametrize("seed", range(20))
def test_random_float32(library: ctypes.CDLL, seed: int) -> None:
    """Up to 8 rows in a tile, or several such tiles; rows of whole 16 bytes."""
    check_random(library, seed, "float32", 4)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("seed", range(15))
def test_random_many_rows(library: ctypes.CDLL, seed: int, capability: int) -> None:
    """More than a warp's, which on 9.0 are those of one or two warpgroups."""
    check_random(library, 100 + seed, "float16", 8, (11, 17, 40), 128, capability)


def check_random(
    library: ctypes.CDLL,
    seed: int,
    dtype: str,
    multiple: int,
    token_counts: Sequence[int] = (1, 1, 2, 5, 9),
    widest: int = 256,
    capability: int = 90,
) -> None:
    pick, rng = random.Random(seed), np.random.default_rng(seed)
    batch, kv_heads = pick.randint(1, 3), pick.randint(1, 2)
    heads = kv_heads * pick.choice((1, 3, 4, 8, 16))
    tokens = pick.choice(token_counts)
    if tokens > 9:
        heads = kv_heads * pick.choice((2, 3, 5))
    page, slots = pick.choice((8, 16, 32, 40)), pick.randint(1, 9)
    room = page * slots
    most = widest // multiple
    widths = [
        multiple * pick.randint(1, pick.choice((most // 4, most // 2, most)))
        for _ in range(2)
    ]
    query, k, v = problem(
        seed, batch, tokens, heads, kv_heads, room, *widths, dtype=dtype
    )
    if pick.random() < 0.5 and dtype == "float16":
        query, k, v = (x.astype(jnp.bfloat16) for x in (query, k, v))
    lengths = np.array([pick.randint(0, room) for _ in range(batch)], np.int32)
    options: dict[str, Any] = {}
    if pick.random() < 0.5:
        options["window"] = pick.randint(0, 150)
    if pick.random() < 0.3:
        options["softcap"] = 2.0
    if pick.random() < 0.4:
        options["sinks"] = rng.standard_normal((pick.choice((1, batch)), heads))
        options["sinks"] = options["sinks"].astype(np.float32)
    if pick.random() < 0.4:
        options["slopes"] = 0.1 * rng.standard_normal((pick.choice((1, batch)), heads))
        options["slopes"] = options["slopes"].astype(np.float32)
    if pick.random() < 0.3:
        options["scale"] = pick.choice((0.0, -0.2, 1.0))
    ways: dict[str, Any] = {"num_splits": pick.choice((None, 1, 2, 5))}
    ways["multiprocessors"] = pick.randint(1, 5)
    ways["capability"] = capability
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = np.nan
    if pick.random() < 0.5:
        k_pool, v_pool, ways["page_table"] = paged(rng, (k, v), lengths, page, np.nan)
        got = run(library, query, k_pool, v_pool, lengths, **ways, **options)
    else:
        got = run(library, query, k, v, lengths, **ways, **options)
    check(got, query, k, v, lengths, **options)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_every_value_of_a_byte(library: ctypes.CDLL, dtype: str) -> None:
    """Keys pick one row each, values hold all finite bytes: exact up to f16 weights."""
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype))
    finite = np.isfinite(every.astype(np.float32))
    every = np.where(finite, every, every[:1])
    v = every.reshape(1, 1, 1, 256)
    k = np.zeros((1, 1, 1, 16), every.dtype)
    query = np.ones((1, 1, 1, 16), np.float16)
    out, _ = run(library, query, k, v, np.ones(1, np.int32))
    np.testing.assert_array_equal(out.ravel(), every.astype(np.float16))
    # One key of all bytes, one column of the query at a time: lse is the logit.
    k = v
    for first in range(0, 256, 64):
        query = np.eye(256, dtype=np.float16)[None, first : first + 64, None]
        given = query.transpose(0, 2, 1, 3)
        got = run(library, given, k, v, np.ones(1, np.int32), scale=1.0)[1]
        want = every.astype(np.float32)[first : first + 64]
        np.testing.assert_allclose(got.ravel(), want, rtol=1e-6)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("seed", range(20))
def test_quantised(library: ctypes.CDLL, dtype: str, seed: int) -> None:
    pick, rng = random.Random(seed), np.random.default_rng(seed)
    batch, kv_heads = pick.randint(1, 3), pick.randint(1, 2)
    heads = kv_heads * pick.choice((1, 3, 4, 16))
    tokens = pick.choice((1, 1, 2, 9))
    page, slots = pick.choice((1, 16, 40)), pick.randint(1, 9)
    room = page * slots
    widths = [16 * pick.randint(1, pick.choice((4, 8, 16))) for _ in range(2)]
    query, k, v = problem(seed, batch, tokens, heads, kv_heads, room, *widths)
    if pick.random() < 0.5:
        # Beyond what f16 holds; the logits stay small.
        query = query.astype(jnp.bfloat16) * jnp.bfloat16(1e6)
        query = np.asarray(query)
    query_size = 1e6 if query.dtype != np.float16 else 1.0
    lengths = np.array([pick.randint(0, room) for _ in range(batch)], np.int32)
    scales = {}
    for name in ("k_scale", "v_scale"):
        shape = (pick.choice((1, batch)), kv_heads)
        scales[name] = rng.uniform(0.02, 0.05, shape).astype(np.float32)
    k, k_want = quantised(dtype, k, scales["k_scale"])
    v, v_want = quantised(dtype, v, scales["v_scale"])
    options: dict[str, Any] = {"scale": widths[0] ** -0.5 / query_size}
    if pick.random() < 0.5:
        options["window"] = pick.randint(0, 150)
    if pick.random() < 0.3:
        options["softcap"] = 2.0
    ways: dict[str, Any] = {"num_splits": pick.choice((None, 1, 2, 5))}
    fill = np.float32(np.nan).astype(k.dtype) if dtype != "int8" else 127
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = fill
    if pick.random() < 0.5:
        k, v, ways["page_table"] = paged(rng, (k, v), lengths, page, fill)
    got = run(library, query, k, v, lengths, **ways, **scales, **options)
    check(got, query, k_want, v_want, lengths, **options)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_scales_may_be_left_out(library: ctypes.CDLL, dtype: str) -> None:
    query, k, v = problem(5, 2, 1, 4, 2, 70, 64)
    ones = np.ones((1, 2), np.float32)
    k, v = (quantised(dtype, x, ones)[0] for x in (k, v))
    lengths = np.array([70, 3], np.int32)
    got = run(library, query, k, v, lengths)
    check(got, query, k.astype(np.float32), v.astype(np.float32), lengths)


@pytest.mark.parametrize(
    ("tokens", "dtype", "capability"),
    [
        (2, "float16", 90),
        (10, "float16", 80),
        (10, "float16", 90),
        (40, "float16", 90),
        (2, "float32", 90),
        (5, "float32", 90),
    ],
)
def test_neighbours_do_not_matter(
    library: ctypes.CDLL, tokens: int, dtype: str, capability: int
) -> None:
    """The same bits alone and in a batch, wherever thread blocks cut the work.

    Room for 18 splits, so for whole groups of them and for one that is not.
    """
    query, k, v = problem(3, 4, tokens, 4, 2, 1100, 64, dtype=dtype)
    lengths = np.array([1000, 0, 130, 1100], np.int32)
    ways: dict[str, Any] = {"sinks": np.ones((1, 4), np.float32), "num_splits": 18}
    ways["capability"] = capability
    together = run(library, query, k, v, lengths, multiprocessors=1, **ways)
    check(together, query, k, v, lengths, sinks=ways["sinks"])
    for multiprocessors in (2, 3, 5):
        again = run(
            library, query, k, v, lengths, multiprocessors=multiprocessors, **ways
        )
        assert_same_bits(again, together)
    for b in range(4):
        one = slice(b, b + 1)
        given = query[one], k[one], v[one], lengths[one]
        for multiprocessors in (1, 7):
            alone = run(library, *given, multiprocessors=multiprocessors, **ways)
            assert_same_bits(alone, [x[one] for x in together])


@pytest.mark.parametrize(
    ("tokens", "heads", "widths", "dtype", "capability"),
    [
        (1, 2, (64,), "float16", 90),  # lanes share the groups of splits of a row
        (2, 8, (64, 40), "float16", 90),
        (10, 8, (16, 72), "float16", 80),
        (10, 8, (16, 72), "float16", 90),
        (3, 6, (16,), "int8", 90),
    ],
)
def test_whoever_comes_last(
    library: ctypes.CDLL,
    tokens: int,
    heads: int,
    widths: tuple[int, ...],
    dtype: str,
    capability: int,
) -> None:
    """Thread blocks in any order give the same bits, one launch after the other.

    An empty sequence, some of a part of a group of splits, and one of three groups; in
    pieces of many splits, of a few, and of one, which leave thread blocks without any.
    """
    lengths = np.array([0, 130, 400, 1100], np.int32)
    query, k, v = problem(11, 4, tokens, heads, 2, 1100, *widths)
    if dtype == "int8":
        k, v = (quantised(dtype, x, np.ones((1, 2), np.float32))[0] for x in (k, v))
    given = query, k, v, lengths
    ways: dict[str, Any] = {"num_splits": 18, "capability": capability}
    first = run(library, *given, multiprocessors=1, **ways)
    check(first, query, k.astype(np.float32), v.astype(np.float32), lengths)
    for ways["multiprocessors"] in (2, 5, 30):
        counters = np.zeros(library.counters_of(ways["multiprocessors"]), np.uint32)
        for order in range(4):
            again = run(library, *given, order=order, counters=counters, **ways)
            assert_same_bits(again, first)


@pytest.mark.parametrize("length", [1024, 450])
def test_whole_groups(library: ctypes.CDLL, length: int) -> None:
    """Where the longest piece of work is no longer, none cuts a group of splits.

    So with 1 and 2 multiprocessors, with 16 or 8 splits of each sequence.
    """
    query, k, v = problem(7, 3, 1, 2, 1, length, 16)
    lengths = np.full(3, length, np.int32)
    first, *others = (
        run(library, query, k, v, lengths, num_splits=16, multiprocessors=n)
        for n in (1, 2, 3, 5, 99)
    )
    check(first, query, k, v, lengths)
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.parametrize(
    ("kv_heads", "room", "cluster", "paging", "dtype"),
    [
        (8, 512, 8, False, "float16"),
        (8, 2112, 16, False, "float16"),
        (5, 4096, 16, False, "float16"),
        (8, 512, 8, True, "float16"),
        (8, 2112, 16, True, "float16"),
        (5, 4096, 16, True, "float16"),
        (8, 512, 8, True, "float32"),
    ],
)
def test_clusters(
    library: ctypes.CDLL,
    kv_heads: int,
    room: int,
    cluster: int,
    paging: bool,
    dtype: str,
) -> None:
    """One sequence's splits, added up by a cluster: the bits of who comes last.

    With 8 or 33 splits of 64 keys, or 32 of 128, and 132 multiprocessors.
    """
    query, k, v = problem(8, 1, 1, 3 * kv_heads, kv_heads, room, 64, 40, dtype=dtype)
    sinks = np.ones((1, 3 * kv_heads), np.float32)
    for length in (0, 1, 65, room // 3, room - 70, room):
        given, table = (k.copy(), v.copy()), None
        lengths = np.array([length], np.int32)
        for x in given:
            x[:, length:] = np.nan
        k_held, v_held = given
        if paging:
            rng = np.random.default_rng(length)
            k_held, v_held, table = paged(rng, given, lengths, 16, np.nan)
        held = query, k_held, v_held, lengths
        ways: dict[str, Any] = {"sinks": sinks, "page_table": table}
        ways["num_splits"] = room // 64 if room < 4096 else 32
        got = run(library, *held, multiprocessors=132, **ways)
        assert library.cluster_of_last() == cluster
        check(got, query, given[0], given[1], lengths, sinks=sinks)
        want = run(library, *held, multiprocessors=3, **ways)
        assert library.cluster_of_last() == 1
        assert_same_bits(got, want)


def test_clusters_of_several_tiles(library: ctypes.CDLL) -> None:
    """10 rows of float32 are two tiles, each with a cluster of its own."""
    query, k, v = problem(8, 1, 5, 4, 2, 512, 36, dtype="float32")
    for length in (3, 130, 512):
        held = query, k, v, np.array([length], np.int32)
        got = run(library, *held, num_splits=8, multiprocessors=132)
        assert library.cluster_of_last() == 8
        check(got, *held)
        assert_same_bits(run(library, *held, num_splits=8), got)
        assert library.cluster_of_last() == 1


@pytest.mark.parametrize(
    ("batch", "tokens", "room", "num_splits"),
    [(2, 1, 512, 8), (1, 17, 512, 8), (1, 1, 64, 1), (1, 1, 4224, 66)],
)
def test_no_clusters(
    library: ctypes.CDLL, batch: int, tokens: int, room: int, num_splits: int
) -> None:
    """Several sequences, many rows, one split, or too many for a cluster."""
    query, k, v = problem(9, batch, tokens, 2, 2, room, 16)
    lengths = np.full(batch, room, np.int32)
    ways: dict[str, Any] = {"num_splits": num_splits, "multiprocessors": 132}
    got = run(library, query, k, v, lengths, **ways)
    assert library.cluster_of_last() == 1
    check(got, query, k, v, lengths)


def assert_same_bits(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads"), [(1, 3, 3), (1, 20, 10), (64, 6, 3), (9, 16, 1)]
)
def test_crews(library: ctypes.CDLL, tokens: int, heads: int, kv_heads: int) -> None:
    """Numbers of heads and tiles of rows that thread blocks can and cannot share."""
    query, k, v = problem(6, 2, tokens, heads, kv_heads, 700, 16)
    lengths = np.array([700, 200], np.int32)
    first = run(library, query, k, v, lengths, num_splits=11)
    check(first, query, k, v, lengths)
    again = run(library, query, k, v, lengths, num_splits=11, multiprocessors=11)
    assert_same_bits(again, first)


def test_many_sequences(library: ctypes.CDLL) -> None:
    query, k, v = problem(4, 1100, 1, 1, 1, 8, 8)
    lengths = np.random.default_rng(0).integers(0, 9, 1100).astype(np.int32)
    check(run(library, query, k, v, lengths), query, k, v, lengths)


@pytest.mark.parametrize("room", [0, 1, 64, 65, 1000, 8192, 131072])
@pytest.mark.parametrize("window", [-1, 0, 1, 63, 64, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_splits_suffice(room: int, window: int, tokens: int) -> None:
    """No length needs more splits than the workspace has, nor starts off a unit."""
    kinds = ((1, None), (8, None), (64, None), (1, 3), (1, 1000))
    for (kv_heads, num_splits), width, size in itertools.product(
        kinds, (64, 256), (1, 2, 4)
    ):
        keys, splits = decode_plan.splits_of(
            room, tokens, window, 4 * tokens, kv_heads, num_splits, width, size
        )
        assert keys % decode_plan.SPLIT_UNIT == 0
        assert keys >= decode_plan.SPLIT_UNIT
        assert splits >= 1
        assert num_splits is None or window >= 0 or splits <= num_splits
        for length in {0, 1, room // 3, room // 2 + 1, room - 1, room} - {-1}:
            first = 0 if window < 0 else max(0, length - tokens - window)
            needed = math.ceil(length / keys) - min(first, length) // keys
            assert needed <= splits
