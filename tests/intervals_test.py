"""The arrays of kernels with intervals, against a literal reading of their contract."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from jax import export

from jax_flash._src import intervals, mask
from jax_flash._src.config import AttentionConfig

TILE, BEYOND = intervals.TILE, intervals.MAX_LENGTH
DEAD = (0, 0, -1, 0)
"""The record of a row that sees nothing."""

_rng = np.random.default_rng(2)


def ids(batch: int, length: int, count: int, padding: float = 0.0) -> np.ndarray:
    """Random ids; some of them negative."""
    drawn = _rng.integers(0, count, (batch, length)).astype(np.int32)
    return np.where(_rng.random(drawn.shape) < padding, -drawn - 1, drawn)


def runs(batch: int, length: int, count: int) -> np.ndarray:
    """Sorted ids, far apart, with padding at the end."""
    sorted_ids = np.sort(ids(batch, length, count), -1) * 1000000007 % (2**31 - 1)
    sorted_ids[:, -length // 9 :] = -5
    return np.sort(sorted_ids.astype(np.uint32), -1).astype(np.int32)


def segments(q_ids: np.ndarray, kv_ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}


def offsets(q: list[int], k: list[int]) -> dict[str, np.ndarray]:
    return {"cu_seqlens_q": np.array([q]), "cu_seqlens_k": np.array([k])}


def lengths(q: list[int], k: list[int]) -> dict[str, np.ndarray]:
    return {
        "query_seq_lengths": np.array(q),
        "key_value_seq_lengths": np.array(k),
    }


CAUSAL = {"window_right": 0}
TOP_LEFT = {"window_right": 0, "bottom_right": False}
WINDOW = {"window_left": 40, "window_right": 9}
PACKED = offsets([3, 80, 80, 160, 161, 300], [0, 90, 96, 96, 250, 301])
SORTED = runs(1, 300, 6)

# (T, S), operands, fields of the config.
CASES: dict[str, tuple[tuple[int, int], dict[str, np.ndarray], dict[str, Any]]] = {
    "everything": ((150, 200), {}, {}),
    "whole tiles": ((128, 192), {}, {}),
    "one row and key": ((1, 1), {}, CAUSAL),
    "causal": ((200, 330), {}, CAUSAL),
    "causal, few keys": ((330, 130), {}, CAUSAL),
    "window": ((260, 260), {}, WINDOW),
    "window beyond the keys": (
        (260, 70),
        {},
        {"window_left": 3, "bottom_right": False},
    ),
    "lengths": ((150, 200), lengths([150, 70, 0, 9], [0, 199, 50, 130]), WINDOW),
    "keys of other lengths": (
        (90, 140),
        {"key_value_seq_lengths": np.array([140, 64])},
        TOP_LEFT,
    ),
    "documents": ((300, 300), segments(SORTED, SORTED), CAUSAL),
    "long documents": (
        (520, 520),
        segments(*[np.repeat([[4, 9]], [200, 320], -1).astype(np.int32)] * 2),
        CAUSAL,
    ),
    "other documents": ((200, 330), segments(runs(2, 200, 4), runs(2, 330, 3)), {}),
    "unsorted": ((200, 260), segments(ids(2, 200, 3), ids(2, 260, 4)), {}),
    "unsorted, few": ((300, 300), segments(*[ids(1, 300, 90)] * 2), CAUSAL),
    "padding": (
        (200, 200),
        segments(ids(2, 200, 2, 0.3), ids(2, 200, 2, 0.3)),
        WINDOW,
    ),
    "shared ids": (
        (150, 140),
        segments(ids(1, 150, 2), ids(3, 140, 2, 0.1))
        | lengths([150, 20, 0], [140, 99, 9]),
        CAUSAL,
    ),
    "dead tiles": (
        (320, 256),
        segments(
            np.repeat([[-1, 1, -1, 1, 1]], 64, -1), np.repeat([[1, 1, -1, 1]], 64, -1)
        ),
        {},
    ),
    "packed": ((310, 320), PACKED, {}),
    "packed, causal": ((310, 320), PACKED, CAUSAL),
    "packed, window": ((310, 320), PACKED, WINDOW | {"bottom_right": False}),
    "packed, bounds": (
        (310, 320),
        PACKED,
        {"max_seqlen_q": 70, "max_seqlen_k": 50, **CAUSAL},
    ),
    "packed with ids": (
        (310, 320),
        PACKED | segments(ids(1, 310, 2), ids(1, 320, 2, 0.1)),
        CAUSAL,
    ),
    "no sequences": ((40, 30), offsets([0], [0]), {}),
}


def shuffled(batch: int, length: int, count: int) -> np.ndarray:
    """Documents whose ids do not grow, each in one piece or two."""
    rng = np.random.default_rng(length)
    pieces = rng.permutation(np.repeat(np.arange(count), 2))
    cuts = np.sort(rng.integers(0, length, (batch, 2 * count - 1)), -1)
    which = (np.arange(length)[:, None] >= cuts[:, None]).sum(-1)
    return pieces[which].astype(np.int32)


LARGER: dict[str, tuple[tuple[int, int], dict[str, np.ndarray], dict[str, Any]]] = {
    "shuffled documents": (
        (900, 2500),
        segments(shuffled(2, 900, 9), shuffled(2, 2500, 9)),
        {},
    ),
    "shuffled documents, causal": (
        (2300, 2300),
        segments(*[shuffled(1, 2300, 12)] * 2),
        CAUSAL,
    ),
    "long documents, window": (
        (2300, 2300),
        segments(*[runs(1, 2300, 3)] * 2),
        {"window_left": 700, "window_right": 0},
    ),
    "unsorted, window": (
        (300, 2200),
        segments(ids(2, 300, 50), ids(2, 2200, 50)),
        {"window_left": 1500, "window_right": 200},
    ),
    "many packed": (
        (900, 1100),
        offsets(*[sorted(_rng.integers(0, n, 300)) for n in (900, 1100)]),
        CAUSAL,
    ),
    "one id, top left": (
        (700, 2200),
        segments(np.zeros((1, 700), int), np.zeros((1, 2200), int)),
        TOP_LEFT,
    ),
    "widest windows": (
        (100, 90),
        segments(ids(1, 100, 2), ids(1, 90, 2)),
        {"window_left": 2**31 - 1, "window_right": 2**30},
    ),
    "extreme ids": (
        (130, 200),
        segments(*[ids(1, n, 2) * (2**31 - 1) for n in (130, 200)]),
        WINDOW,
    ),
}
"""Cases for kernels alone: too large to be looked at element by element."""


def operands_of(
    sizes: tuple[int, int], given: dict[str, np.ndarray], batch: int
) -> dict[str, jax.Array]:
    rows, keys = sizes
    arrays = {n: jnp.asarray(x, jnp.int32) for n, x in given.items()}
    shapes = {"query": rows, "key": keys, "value": keys}
    qkv = {n: jnp.ones((batch, size, 1, 1)) for n, size in shapes.items()}
    return qkv | arrays


def batch_of(given: dict[str, np.ndarray]) -> int:
    return max([len(x) for x in given.values()], default=1)


def config_of(o: dict[str, Any], fields: dict[str, Any]) -> AttentionConfig:
    return AttentionConfig(scale=1.0, present=tuple(o), **fields)


class Dense:
    """What the specification says, as dense arrays of one sequence each."""

    def __init__(
        self, config: AttentionConfig, o: dict[str, jax.Array], sizes: tuple[int, int]
    ) -> None:
        rows, keys = sizes
        self.batch = o["query"].shape[0]
        row, key = (jnp.arange(n, dtype=jnp.int32) for n in sizes)
        where = mask.locate(config, o, row, rows, keys)
        with jax.numpy_rank_promotion("allow"):
            seen = mask.allowed(o, where, key)[..., 0, :, :]
        full = self.batch, *sizes
        self.seen = np.broadcast_to(seen, full)
        self.position = np.broadcast_to(where.position, full[:2])
        spaces = mask.zero_padding(config, o)
        self.dead_keys = np.asarray(spaces["key"])[..., 0, 0] == 0
        no_ids = np.zeros(1, int)
        self.row_ids = np.broadcast_to(o.get("q_segment_ids", no_ids), full[:2])
        self.key_ids = np.broadcast_to(
            o.get("kv_segment_ids", no_ids), (self.batch, keys)
        )

    def padded(self, b: int) -> np.ndarray:
        """The mask of a sequence in whole tiles."""
        pad = [(0, -n % TILE) for n in self.seen.shape[1:]]
        return np.pad(self.seen[b], pad)


@pytest.mark.parametrize("name", CASES)
def test_arrays(name: str) -> None:
    sizes, given, fields = CASES[name]
    o = operands_of(sizes, given, batch_of(given))
    config = config_of(o, fields)
    made = intervals.intervals(config, o)
    dense = Dense(config, o, sizes)
    shared = 1 if batch_of(given) == 1 else dense.batch
    row_count, key_count = (-(-n // TILE) for n in sizes)
    assert [x.shape for x in made] == [
        (shared, row_count * TILE, 4),
        (shared, row_count, 8),
        (shared, key_count * TILE),
        (shared, key_count, 8),
    ]
    assert {x.dtype for x in made} == {np.dtype(np.int32)}
    for b in range(shared):
        one = [np.asarray(x[b]) for x in made]
        check_rows(one[0], one[2], dense, b)
        check_row_tiles(one[1], one[0], dense.padded(b))
        check_key_tiles(one[3], one[1], one[2], dense.padded(b))


def check_rows(records: np.ndarray, key_ids: np.ndarray, dense: Dense, b: int) -> None:
    """Records and ids are the mask; intervals are as narrow as can be."""
    rows, keys = dense.seen.shape[1:]
    key = np.arange(len(key_ids))
    first, end, row_id, position = records.T
    inside = (first[:, None] <= key) & (key < end[:, None])
    got = inside & (row_id[:, None] == key_ids)
    np.testing.assert_array_equal(got, dense.padded(b))
    alive = got.any(1)
    assert (records[~alive] == DEAD).all()
    np.testing.assert_array_equal(first[alive], got.argmax(1)[alive])
    last = len(key) - 1 - got[:, ::-1].argmax(1)
    np.testing.assert_array_equal(end[alive], last[alive] + 1)
    some = alive[:rows]
    np.testing.assert_array_equal(position[:rows][some], dense.position[b][some])
    np.testing.assert_array_equal(row_id[:rows][some], dense.row_ids[b][some])
    live_ids = np.where(dense.dead_keys[b], -1, dense.key_ids[b])
    np.testing.assert_array_equal(key_ids[:keys], live_ids)
    np.testing.assert_array_equal(key_ids[keys:], -1)


def check_row_tiles(tiles: np.ndarray, records: np.ndarray, seen: np.ndarray) -> None:
    """Hulls, cores and flags of tiles of rows."""
    np.testing.assert_array_equal(tiles[:, 6:], 0)
    for i, (first, end, core_first, core_end, dead, mixed, *_) in enumerate(tiles):
        part = slice(i * TILE, (i + 1) * TILE)
        alive = seen[part].any(1)
        assert dead == (not alive.all())
        if not alive.any():
            assert (first, end, core_first, core_end, mixed) == (0, 0, 0, BEYOND, 0)
            continue
        some = seen[part].any(0).nonzero()[0]
        assert (first, end) == (some[0], some[-1] + 1)
        live = records[part][alive]
        full = all(seen[part][alive][n, x[0] : x[1]].all() for n, x in enumerate(live))
        assert mixed == (not full)
        if mixed:
            assert (core_first, core_end) == (0, 0)
        else:
            assert (core_first, core_end) == (live[:, 0].max(), live[:, 1].min())
            assert seen[part][alive][:, core_first:core_end].all()


def check_key_tiles(
    tiles: np.ndarray, row_tiles: np.ndarray, key_ids: np.ndarray, seen: np.ndarray
) -> None:
    """The order of sums stands on exact ranges of rows."""
    np.testing.assert_array_equal(tiles[:, 3:], 0)
    by_tile = seen.any(1).reshape(-1, TILE).any(1)
    for i, (first, end, dead, *_) in enumerate(tiles):
        part = slice(i * TILE, (i + 1) * TILE)
        meets = (row_tiles[:, 0] < part.stop) & (row_tiles[:, 1] > part.start)
        numbers = np.flatnonzero(meets & by_tile)
        want = (0, 0) if not len(numbers) else (numbers[0], numbers[-1] + 1)
        assert (first, end) == (want[0] * TILE, want[1] * TILE)
        assert dead == (key_ids[part] < 0).any()


def test_the_checks_can_fail() -> None:
    """A wrong bound of a record is noticed, whichever it is."""
    sizes, given, fields = CASES["long documents"]
    o = operands_of(sizes, given, 1)
    config = config_of(o, fields)
    made = [np.asarray(x[0]) for x in intervals.intervals(config, o)]
    dense = Dense(config, o, sizes)
    seen = dense.padded(0)

    def check(some: list[np.ndarray]) -> None:
        check_rows(some[0], some[2], dense, 0)
        check_row_tiles(some[1], made[0], seen)
        check_key_tiles(some[3], made[1], made[2], seen)

    check(made)
    for array, columns in ((0, range(4)), (1, range(6)), (3, range(3))):
        for column in columns:
            wrong = [x.copy() for x in made]
            wrong[array][2, column] += 1
            with pytest.raises(AssertionError):
                check(wrong)


def test_clean_work_is_found() -> None:
    """Causal documents: the tiles below the diagonal of a document take no mask."""
    document = np.repeat([[0, 1]], [256, 512], -1)
    sizes = (768, 768)
    o = operands_of(sizes, segments(document, document), 1)
    made = intervals.intervals(config_of(o, CAUSAL), o)
    for i, tile in enumerate(np.asarray(made.row_tiles[0])):
        start = 0 if i < 4 else 256
        core = (start, i * TILE + 1)  # of the keys that the first of the rows sees
        assert tuple(tile[:6]) == (start, (i + 1) * TILE, *core, 0, 0)
    for i, tile in enumerate(np.asarray(made.key_tiles[0])):
        assert tuple(tile[:3]) == (i * TILE, 256 if i < 4 else 768, 0)


def test_many_batch_dimensions() -> None:
    """Sequences that share a mask are not repeated."""
    rows, keys = 70, 130
    o = {
        "query": jnp.ones((2, 3, 4, rows, 1, 1)),
        "key": jnp.ones((2, 3, 1, keys, 1, 1)),
        "q_segment_ids": jnp.asarray(ids(3, rows, 2).reshape(1, 3, 1, rows)),
        "kv_segment_ids": jnp.asarray(ids(1, keys, 2).reshape(1, 1, 1, keys)),
        "key_value_seq_lengths": jnp.array([[[60]], [[130]]], jnp.int32),
    }
    made = intervals.intervals(config_of(o, CAUSAL), o)
    assert made.rows.shape == (2, 3, 1, 128, 4)
    assert made.keys.shape == (2, 3, 1, 192)
    for b in range(2):
        for c in range(3):
            one = {
                "query": o["query"][b, c, :1],
                "key": o["key"][b, c],
                "q_segment_ids": o["q_segment_ids"][0, c],
                "kv_segment_ids": o["kv_segment_ids"][0, 0],
                "key_value_seq_lengths": o["key_value_seq_lengths"][b, 0],
            }
            alone = intervals.intervals(config_of(one, CAUSAL), one)
            for x, y in zip(made, alone, strict=True):
                np.testing.assert_array_equal(x[b, c], y)
    plain = {name: o[name] for name in ("query", "key")}
    made = intervals.intervals(config_of(plain, CAUSAL), plain)
    assert made.key_tiles.shape == (1, 1, 1, 3, 8)


def test_symbolic_lengths() -> None:
    """As `jax.export` has them: one program for all T and S."""
    batch, rows, keys = export.symbolic_shape("b, t, s")
    names = ("query", "key", "q_segment_ids", "kv_segment_ids")
    config = AttentionConfig(scale=1.0, window_right=0, present=names)

    def f(*args: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(intervals.intervals(config, dict(zip(names, args, strict=True))))

    shapes = [(batch, rows, 1, 1), (batch, keys, 1, 1), (batch, rows), (batch, keys)]
    dtypes = [jnp.float32] * 2 + [jnp.int32] * 2
    types = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
    exported = export.export(jax.jit(f))(*types)
    for sizes in ((70, 130), (200, 64)):
        given = segments(ids(2, sizes[0], 3, 0.1), ids(2, sizes[1], 3, 0.1))
        o = operands_of(sizes, given, 2)
        args = [o[name] for name in names]
        for x, y in zip(exported.call(*args), f(*args), strict=True):
            np.testing.assert_array_equal(x, y)


def test_no_array_of_rows_by_keys() -> None:
    """Memory stays linear: the largest array on the way is far from T * S."""
    size = 2048
    document = np.sort(ids(1, size, 16), -1)
    o = operands_of((size, size), segments(document, document), 1)
    config = config_of(o, CAUSAL)
    jaxpr = jax.make_jaxpr(lambda o: intervals.intervals(config, o))(o)
    sizes = [v.aval.size for e in equations(jaxpr) for v in e.outvars]
    assert max(sizes) <= size * 8
