"""The kernels with intervals, run on the CPU as in emulator_test.py."""

import ctypes
import shutil
from typing import Any

import interval_cases
import numpy as np
import pytest
from emulator_test import Arguments, build, growing

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
    arrays = interval_cases.operands(case.shape, widths, dtype)
    interval_cases.check_forward(
        library.mha_fwd_intervals_sm90, case, arrays, 1 + number % 3
    )


@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90_skips_what_a_mask_hides(forward: ctypes.CDLL, width: int) -> None:
    """Tiles that all rows of a block do not see are not read: NaN is there."""
    case = interval_cases.with_a_hole()
    arrays = interval_cases.operands(case.shape, (width, width), "bfloat16")
    interval_cases.check_forward(forward.mha_fwd_intervals_sm90, case, arrays, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"options": {"softcap": 600.0}},
    "slopes": {"slopes": np.array([[0.05]])},
    "both": {"options": {"softcap": 600.0}, "slopes": np.array([[0.05]])},
    "mask": {
        "mask": interval_cases.striped_mask((1, 1, 170, 600)),
        "dropout_rate": 0.3,
    },
}


@pytest.mark.parametrize(
    ("jump", "options"),
    [(5, "plain"), (30, "plain"), (100, "plain")]
    + [(jump, name) for jump in (30, 100) for name in OPTIONS if name != "plain"]
    + [(5, "window"), (30, "window"), (100, "window")],
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
    arrays = interval_cases.operands(case.shape, (width, width), "bfloat16")
    arrays["query"][..., 0] = 32
    shift = growing(600, jump) * width**0.5 / 32
    if window:
        shift[:90] += width**0.5
    arrays["key"][..., 0] = shift[None, :, None]
    interval_cases.check_forward(forward.mha_fwd_intervals_sm90, case, arrays, 1)


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize(("block", "others"), [(128, 5000), (64, 900), (128, 1 << 17)])
def test_longest_documents_first(
    forward: ctypes.CDLL, of_keys: bool, block: int, others: int
) -> None:
    """`queue` is 0, then the blocks of each sequence, by their documents."""
    rng = np.random.default_rng(block + of_keys)
    batch, length = 2, 20_000  # more blocks than a thread block has threads

    def records(tiles: int, limit: int, unit: int) -> np.ndarray:
        """Random hulls [batch, tiles], some of them empty."""
        ends = np.sort(rng.integers(0, -(-limit // unit), (batch, tiles, 2)), -1) * unit
        ends[rng.random(ends.shape[:2]) < 0.2] = 0
        return np.pad(ends, ((0, 0), (0, 0), (0, 6))).astype(np.int32)

    rows, keys = (others, length) if of_keys else (length, others)
    row_count, key_count = -(-rows // 64), -(-keys // 64)
    row_tiles = records(row_count, keys, 1)
    key_tiles = records(key_count, rows, 64)
    queue = np.full(plan.queue_size(batch, length), -1, np.int32)
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
    assert forward.work_order(ctypes.byref(arguments), of_keys, block) == 0

    def document(sequence: int, number: int) -> int:
        own = (key_tiles if of_keys else row_tiles)[sequence]
        some = own[number * block // 64 : (number + 1) * block // 64]
        some = some[some[:, 0] < some[:, 1]]
        if not some.size:
            return -1
        first, end = some[:, 0].min(), some[:, 1].max()
        if of_keys:
            last = row_tiles[sequence, min(end // 64, row_count) - 1]
            meets = key_tiles[sequence, min(-(-last[0] // 64), key_count - 1)]
            return max(0, end - meets[0])
        meets = key_tiles[sequence, first // 64]
        last = row_tiles[sequence, max(1, min(meets[1] // 64, row_count)) - 1]
        return max(0, last[1] - first)

    assert queue[0] == 0
    used = plan.QUEUE_HEADER + batch * -(-length // plan.QUEUE_ROWS)
    assert (queue[used:] == -1).all()
    orders = queue[plan.QUEUE_HEADER : used].reshape(batch, -1)
    count = -(-length // block)
    for sequence, order in enumerate(orders):
        lengths = [document(sequence, number) for number in range(count)]
        direction = 1 if of_keys else -1
        expected = sorted(range(count), key=lambda n: (-lengths[n], direction * n))
        assert list(order[:count]) == expected
        assert (order[count:] == -1).all()
        assert lengths[expected[0]] > lengths[expected[-1]] == -1
