"""The kernels with intervals, run on the CPU as in emulator_test.py."""

import ctypes
import shutil
from typing import Any

import interval_cases
import interval_checks
import numpy as np
import pytest
from emulated import Arguments, aligned, build, grow, problem

from jax_flash._src import plan

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("mha_fwd_intervals", tmp_path_factory.mktemp("forward"))


@pytest.mark.parametrize("name", interval_cases.CASES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90(forward: ctypes.CDLL, width: int, name: str) -> None:
    check_forward(forward, (width, width), name)


@pytest.mark.parametrize("name", ["negative ids", "soft cap and slopes"])
@pytest.mark.parametrize("widths", [(40, 56), (128, 72)])
def test_forward_sm90_of_odd_widths(
    forward: ctypes.CDLL, widths: tuple[int, int], name: str
) -> None:
    check_forward(forward, widths, name)


def check_forward(library: ctypes.CDLL, widths: tuple[int, int], name: str) -> None:
    case = interval_cases.case(name)
    number = list(interval_cases.CASES).index(name) + widths[0] // 64
    dtype = ("bfloat16", "float16")[number % 2]
    arrays = problem(case.shape, *widths, dtype)
    interval_checks.check_forward(
        library.mha_fwd_intervals_sm90, case, arrays, 1 + number % 3
    )


@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90_skips_what_a_mask_hides(forward: ctypes.CDLL, width: int) -> None:
    """Tiles that all rows of a block do not see are not read: NaN is there."""
    case = interval_cases.with_a_hole()
    arrays = problem(case.shape, width, width, "bfloat16")
    interval_checks.check_forward(forward.mha_fwd_intervals_sm90, case, arrays, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"options": {"softcap": 600.0}},
    "slopes": {"slopes": np.array([[0.05]])},
    "both": {"options": {"softcap": 600.0}, "slopes": np.array([[0.05]])},
    "tight cap": {"options": {"softcap": 60.0}},
    "mask": {
        "mask": interval_cases.striped_mask((1, 1, 170, 600)),
        "dropout_rate": 0.3,
    },
    "bias": {"bias": interval_cases.random_bias((1, 1, 170, 600), "bfloat16")},
    "bias in f32 and mask": {
        "bias": interval_cases.random_bias((1, 1, 170, 600), "float32"),
        "mask": interval_cases.striped_mask((1, 1, 170, 600)),
    },
}


@pytest.mark.parametrize(
    ("jump", "options"),
    [(5, "plain"), (30, "plain"), (100, "plain")]
    + [(jump, name) for jump in (30, 100) for name in OPTIONS if name != "plain"]
    + [(5, "tight cap"), (5, "window"), (30, "window"), (100, "window")],
)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90_of_growing_scores(
    forward: ctypes.CDLL, width: int, jump: float, options: str
) -> None:
    """Scores that leave the range of the first tile's maximum, and overflow."""
    dead = np.arange(170) % 5 == 2
    # No row sees the first 90 keys, whose scores are the largest of their tile.
    window = {"window_size": (340, None)} if options == "window" else {}
    case = interval_cases.of_options(
        (1, 170, 600, 1, 1),
        np.where(dead, -1, 0),
        rest=OPTIONS.get(options),
        **window,
    )
    arrays = problem(case.shape, width, width, "bfloat16")
    grow(arrays, jump)
    if window:
        arrays["key"][:, :90, :, 0] += width**0.5
    interval_checks.check_forward(forward.mha_fwd_intervals_sm90, case, arrays, 1)


# The ends of the ranges, and errors of tanh: relative, absolute, and of its derivative.
POLYNOMIALS = {
    "small": (0.35, 3.1e-6, 1.05e-6, 8e-7),
    "wide": (0.8, 1.3e-6, 9e-7, 1.2e-6),
}


def tanh_polynomials(
    library: ctypes.CDLL, scale: float, softcap: float, factor: float, scores: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values by both polynomials, and for which of the scores they hold."""
    scores = np.asarray(scores, np.float32)
    values = np.empty((2, scores.size), np.float32)
    holds = np.empty((2, scores.size), np.bool_)
    library.tanh_polynomials(
        *(ctypes.c_float(x) for x in (scale, softcap, factor)),
        scores.size,
        *(ctypes.c_void_p(x.ctypes.data) for x in (scores, values, holds)),
    )
    names = ("small", "wide")
    return dict(zip(names, values, strict=True)), dict(zip(names, holds, strict=True))


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize(
    ("scale", "softcap", "factor"), [(1.0, 1.0, 1.0), (-0.09, 30.0, 43.3), (3, 0.1, 1)]
)
def test_polynomials_for_tanh(
    forward: ctypes.CDLL, name: str, scale: float, softcap: float, factor: float
) -> None:
    """Errors up to the end of the range, and where that is."""
    end, relative, absolute, of_derivative = POLYNOMIALS[name]
    x = np.linspace(-1.2 * end, 1.2 * end, 200_001)
    scores = (x * softcap / scale).astype(np.float32)
    x = scores.astype(np.float64) * np.float32(scale) / np.float32(softcap)
    values, holds = tanh_polynomials(forward, scale, softcap, factor, scores)
    inside = np.abs(x) < end * (1 - 1e-6)
    assert holds[name][inside].all()
    assert not holds[name][np.abs(x) > end * (1 + 1e-6)].any()
    got = values[name][inside].astype(np.float64) / np.float32(factor)
    exact = np.tanh(x[inside])
    error = np.abs(got - exact)
    assert (error <= relative * np.abs(exact)).all()
    assert error.max() <= absolute
    assert np.abs(got**2 - exact**2).max() <= of_derivative


def test_polynomials_for_tanh_hold_for_numbers_alone(forward: ctypes.CDLL) -> None:
    _, holds = tanh_polynomials(forward, 1, 2, 3, [np.nan, np.inf, -np.inf, 1e30])
    assert not any(x.any() for x in holds.values())


@pytest.mark.parametrize(
    ("scale", "softcap"), [(1e-20, 1.0), (1.0, 1e-30), (1e12, 1.0), (1.0, 1e12)]
)
def test_small_polynomial_of_extreme_factors(
    forward: ctypes.CDLL, scale: float, softcap: float
) -> None:
    """It holds for no score rather than for numbers that float32 does not have."""
    factor = softcap * 1.442695
    scores = np.array([0, 1, 1e-30, 1e10]) * (softcap / scale * 0.1)
    values, holds = tanh_polynomials(forward, scale, softcap, factor, scores)
    assert not holds["small"].any()
    assert np.isnan(values["small"]).any() or not values["small"].any()


@pytest.mark.parametrize(("block", "rows"), [(128, 5000), (64, 900), (128, 1 << 17)])
def test_longest_documents_first(forward: ctypes.CDLL, block: int, rows: int) -> None:
    """`queue` of a backward is 0, then blocks of each sequence, by their documents."""
    rng = np.random.default_rng(block + 1)
    batch, keys = 2, 20_000  # more blocks than a thread block has threads

    def records(tiles: int, limit: int, unit: int) -> np.ndarray:
        """Random hulls [batch, tiles], some of them empty."""
        ends = np.sort(rng.integers(0, -(-limit // unit), (batch, tiles, 2)), -1) * unit
        ends[rng.random(ends.shape[:2]) < 0.2] = 0
        return np.pad(ends, ((0, 0), (0, 0), (0, 6))).astype(np.int32)

    row_count, key_count = -(-rows // 64), -(-keys // 64)
    row_tiles = records(row_count, keys, 1)
    key_tiles = records(key_count, rows, 64)
    queue = np.full(plan.queue_size(batch, keys), -1, np.int32)
    arguments = Arguments(
        key_tiles=key_tiles.ctypes.data,
        row_tiles=row_tiles.ctypes.data,
        queue=queue.ctypes.data,
        interval_stride=1,
        batch=batch,
        query_length=rows,
        key_length=keys,
        scale=1.0,
    )
    assert forward.work_order(ctypes.byref(arguments), block) == 0

    def document(sequence: int, number: int) -> int:
        some = key_tiles[sequence, number * block // 64 : (number + 1) * block // 64]
        some = some[some[:, 0] < some[:, 1]]
        if not some.size:
            return -1
        end = some[:, 1].max()
        last = row_tiles[sequence, min(end // 64, row_count) - 1]
        meets = key_tiles[sequence, min(-(-last[0] // 64), key_count - 1)]
        return max(0, end - meets[0])

    assert queue[0] == 0
    used = plan.QUEUE_HEADER + batch * key_count
    assert (queue[used:] == -1).all()
    orders = queue[plan.QUEUE_HEADER : used].reshape(batch, -1)
    count = -(-keys // block)
    for sequence, order in enumerate(orders):
        lengths = [document(sequence, number) for number in range(count)]
        expected = sorted(range(count), key=lambda n: (-lengths[n], n))
        assert list(order[:count]) == expected
        assert (order[count:] == -1).all()
        assert lengths[expected[0]] > lengths[expected[-1]] == -1


def documents_of(lengths: list[int]) -> np.ndarray:
    """What causal documents, and runs of -n dead rows, give each row: first, end."""
    parts, start = [], 0
    for length in lengths:
        rows = start + np.arange(abs(length))
        first, end = (np.full_like(rows, start), rows + 1) if length > 0 else (0, 0)
        parts.append(np.stack(np.broadcast_arrays(first, end, rows)[:2], -1))
        start += abs(length)
    return np.concatenate(parts)


def row_list(
    library: ctypes.CDLL, sequences: list[np.ndarray], cutting: bool
) -> list[list[tuple[int, int]]]:
    """The blocks (first, end) of each sequence in their order, by the kernel.

    `sequences` are equally long, of (first, end) of the keys of each row.
    """
    length = len(sequences[0])
    tiles = -(-length // 64)
    batch = len(sequences)
    rows = np.zeros((batch, tiles * 64, 4), np.int32)
    for own, sequence in zip(rows, sequences, strict=True):
        own[:length, :2] = sequence
    own = rows[..., :2].reshape(batch, tiles, 64, 2)
    live = own[..., 0] < own[..., 1]
    first = np.where(live, own[..., 0], 1 << 30)
    row_tiles = np.zeros((batch, tiles, 8), np.int32)
    row_tiles[..., 1] = own[..., 1].max(-1)
    row_tiles[..., 0] = np.where(row_tiles[..., 1] > 0, first.min(-1), 0)
    row_tiles[..., 2] = np.where(live, own[..., 0], 0).max(-1)
    row_tiles[..., 3] = np.where(live, own[..., 1], 1 << 30).min(-1)
    row_tiles[..., 4] = ~live.all(-1)
    key_tiles = np.zeros((batch, tiles, 8), np.int32)
    starts = 64 * np.arange(tiles)[:, None]
    for sequence, keys in zip(row_tiles, key_tiles, strict=True):
        meets = (sequence[:, 0] < starts + 64) & (sequence[:, 1] > starts)
        keys[:, 0] = 64 * meets.argmax(1)
        keys[:, 1] = np.where(meets.any(1), 64 * (tiles - meets[:, ::-1].argmax(1)), 0)
    queue = aligned((plan.row_list_size(batch, length),), np.int32, -1)
    arguments = Arguments(
        rows=rows.ctypes.data,
        row_tiles=row_tiles.ctypes.data,
        key_tiles=key_tiles.ctypes.data,
        queue=queue.ctypes.data,
        interval_stride=1,
        batch=batch,
        query_length=length,
        key_length=length,
        scale=1.0,
    )
    assert library.row_list(ctypes.byref(arguments), cutting) == 0
    assert queue[0] == 0
    entries = 1 + tiles + -(-length // plan.ROW_LIST_CHUNK)
    used = plan.QUEUE_HEADER + 2 * batch * entries
    assert (queue[used:] == -1).all()
    result = []
    for own in queue[plan.QUEUE_HEADER : used].reshape(batch, entries, 2):
        count = own[0, 1]
        assert 0 < count < entries
        assert (own[1 : entries - count] == -1).all()
        blocks = own[entries - count :]
        result.append([(int(at), int(at + size)) for at, size in blocks])
    return result


def expected_blocks(keys: np.ndarray) -> list[tuple[int, int]]:
    """The blocks of a sequence by their rows, as docs/design/intervals.md says."""
    length = len(keys)
    live = keys[:, 0] < keys[:, 1]
    apart = (keys[1:, 0] >= keys[:-1, 1]) | (keys[:-1, 0] >= keys[1:, 1])
    begins = (live[1:] != live[:-1]) | (live[1:] & apart)
    cuts = np.array([0, *(np.flatnonzero(begins) + 1), length])

    def last_cut(row: int) -> int:
        return int(cuts[np.searchsorted(cuts, row, "right") - 1])

    stops = [length]
    for row in range(plan.ROW_LIST_CHUNK, length, plan.ROW_LIST_CHUNK):
        stops.append(row - (row - last_cut(row)) % 128)
    stops.sort()
    piece = 512 * 64
    blocks, start = [], 0
    for stop in stops:
        # What lies behind a piece is not looked at.
        known = min(length, -(-stop // piece) * piece)
        while start < stop:
            end = full = min(start + 128, stop)
            cut = last_cut(full)
            if start < cut < full:
                ends = last_cut(min(full + 128, known)) > full
                fits = last_cut(min(cut + 128, known)) > cut
                if not ends or (fits and full - cut < 48):
                    end = cut
            blocks.append((start, end))
            start = end
    return blocks


def random_lengths(seed: int, total: int, largest: int) -> list[int]:
    """Lengths of documents that add up to `total`, some of dead rows."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := total - sum(map(abs, lengths))) > 0:
        length = int(min(left, rng.integers(1, largest, endpoint=True)))
        lengths.append(length if rng.random() < 0.9 or length == left else -length)
    return lengths


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [
        ([1], [(0, 1)]),
        ([300], [(0, 128), (128, 256), (256, 300)]),
        # Documents that fit share a block.
        ([20, 30, 78, 1], [(0, 128), (128, 129)]),
        # One that does not begins a block of its own.
        ([20, 300], [(0, 20), (20, 148), (148, 276), (276, 320)]),
        ([90, 90], [(0, 90), (90, 180)]),
        # But not if that would make one more block.
        ([130, 130], [(0, 128), (128, 256), (256, 260)]),
        ([70, 70], [(0, 128), (128, 140)]),
        ([100, -200, 50], [(0, 100), (100, 228), (228, 350)]),
    ],
)
def test_blocks_begin_with_documents(
    forward: ctypes.CDLL, lengths: list[int], blocks: list[tuple[int, int]]
) -> None:
    (found,) = row_list(forward, [documents_of(lengths)], cutting=True)
    assert sorted(found) == blocks == expected_blocks(documents_of(lengths))


@pytest.mark.parametrize("largest", [1, 5, 81, 200, 1000, 5000])
def test_blocks_of_random_documents(forward: ctypes.CDLL, largest: int) -> None:
    """Of documents short and long, in one piece of a sequence and in three."""
    length = 70_001 if largest == 1000 else 9_000
    lengths = [random_lengths(seed, length, largest) for seed in range(2)]
    if largest == 81:  # as many blocks as documents can make
        lengths[1] = [81] * (length // 81) + [length % 81]
    sequences = [documents_of(own) for own in lengths]
    for keys, found in zip(sequences, row_list(forward, sequences, True), strict=True):
        expected = expected_blocks(keys)
        assert sorted(found) == expected
    (found,) = row_list(forward, sequences[:1], cutting=False)
    natural = [(i, min(i + 128, length)) for i in range(0, length, 128)]
    assert sorted(found) == natural


def test_blocks_of_long_documents_first(forward: ctypes.CDLL) -> None:
    lengths = [64, 640, -128, 1024, 192]
    (found,) = row_list(forward, [documents_of(lengths)], cutting=True)
    ends = np.cumsum(np.abs(lengths))
    assert found == [
        *((at, at + 128) for at in range(1728, 831, -128)),
        *((at, at + 128) for at in range(576, 63, -128)),
        (1984, 2048),
        (1856, 1984),
        (0, 64),
        (704, 832),
    ]
    assert ends[-1] == 2048


def test_blocks_of_a_ragged_mask_are_of_one_document(forward: ctypes.CDLL) -> None:
    """Long blocks come first whichever keys a mask hides at the ends of rows."""
    rng = np.random.default_rng(0)
    end = np.arange(1, 2049)
    keys = np.stack([rng.integers(0, 9, end.size), end - rng.integers(0, 9, end.size)])
    (found,) = row_list(forward, [keys.T], cutting=False)
    assert found == [(at, at + 128) for at in range(1920, -1, -128)]
