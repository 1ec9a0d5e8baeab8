"""Problems for kernels with intervals; interval_checks.py compares with float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
from interval_arrays import (
    hidden,
    interval_arrays,
    mask_of_blocks,
    random_bias,
    random_mask,
    striped_mask,
)

from jax_flash._src import dropout, intervals

DROPOUT_KEY = np.array([7, 11], np.uint32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask that is data, and options of scores. A batch size of 1 is shared.

    Attributes:
      shape: (B, T, S, N, K).
      q_ids: int [1 or B, T], negative where a row is dead.
      kv_ids: int [1 or B, S], negative where a key is dead.
      seen: bool [1 or B, T, S], which keys each row sees.
      position: int [1 or B, T], the key that each row is aligned with.
      wide: as for `interval_arrays`.
      options: `softcap` and `scale`, as of `mha`.
      slopes: f32 [1 or B, N], or none.
      wants_slopes: whether a backward has their gradient.
      dropout_rate: by DROPOUT_KEY.
      bias: bf16, f16 or f32 [1 or B, 1 or N, 1 or T, S], or none.
      mask: bool of such a shape, or none.
      unread: keys that are hidden so that nobody may read them.
    """

    shape: tuple[int, int, int, int, int]
    q_ids: np.ndarray
    kv_ids: np.ndarray
    seen: np.ndarray
    position: np.ndarray
    wide: bool = False
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    slopes: np.ndarray | None = None
    wants_slopes: bool = False
    dropout_rate: float = 0.0
    bias: np.ndarray | None = None
    mask: np.ndarray | None = None
    unread: slice = dataclasses.field(default_factory=lambda: slice(0, 0))

    def arrays(self) -> dict[str, np.ndarray]:
        """Operands beside those of attention."""
        result = interval_arrays(
            self.seen, self.q_ids, self.kv_ids, self.position, self.wide
        )
        if self.slopes is not None:
            result["slopes"] = self.slopes.astype(np.float32)
        if self.dropout_rate:
            batch, _, _, heads, _ = self.shape
            seeds = dropout.seeds(jnp.asarray(DROPOUT_KEY), (batch,), heads)
            result["seeds"] = np.asarray(seeds)
        if self.bias is not None:
            result["bias"] = np.asarray(intervals.bias_rows(jnp.asarray(self.bias)))
        if self.mask is not None:
            bits = intervals.mask_bits(jnp.asarray(self.mask), self.shape[2])
            result["mask"] = np.asarray(bits)
            tiles = result["row_tiles"]
            found = hidden(self.mask, self.shape[1])
            # What no sequence that shares the record sees.
            if len(tiles) == 1:
                found = np.bitwise_and.reduce(found, 0, keepdims=True)
            tiles[:, :, 6:] = found
        return result

    def distance(self) -> np.ndarray:
        """Of each key from the one that a row is aligned with: [1 or B, T, S]."""
        return np.abs(self.position[..., None] - np.arange(self.shape[2]))

    def numbers(self) -> dict[str, float]:
        """Options that are no arrays."""
        rate = self.dropout_rate
        return self.options | {"dropout": oracle.threshold(rate) if rate else 0}

    def given(self) -> dict[str, Any]:
        """The same for `oracle.attention`."""
        mask = self.seen[:, None]
        given = self.options | {"mask": mask if self.mask is None else mask & self.mask}
        if self.slopes is not None:
            given["bias"] = -self.slopes[:, :, None, None] * self.distance()[:, None]
        if self.bias is not None:
            given["bias"] = given.get("bias", 0) + self.bias.astype(np.float64)
        if self.dropout_rate:
            given |= {"dropout_rate": self.dropout_rate, "dropout_key": DROPOUT_KEY}
        return given


def of_options(
    shape: tuple[int, int, int, int, int],
    q_ids: Any = 0,
    kv_ids: Any = 0,
    *,
    rest: dict[str, Any] | None = None,
    **given: Any,
) -> Case:
    """A case by ids (no axis for the batch: shared) and other options of `mha`."""
    batch, rows, keys, _, _ = shape
    q_ids, kv_ids = np.atleast_2d(q_ids), np.atleast_2d(kv_ids)
    of_lengths = ("query_seq_lengths", "key_value_seq_lengths")
    batch = batch if any(name in given for name in of_lengths) else 1
    batch = max(batch, len(q_ids), len(kv_ids))
    q_ids = np.broadcast_to(q_ids, (batch, rows)).copy()
    kv_ids = np.broadcast_to(kv_ids, (batch, keys)).copy()
    for ids, name in zip((q_ids, kv_ids), of_lengths, strict=True):
        for b, length in enumerate(given.get(name, ())):
            ids[b, length:] = -1
    full = (batch, 1, rows, keys)
    seen = oracle.allowed(
        full, given | {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
    )
    position = oracle.aligned(full, given)
    return Case(shape, q_ids, kv_ids, seen[:, 0], position, **(rest or {}))


def packed(
    shape: tuple[int, int, int, int, int],
    sequences: list[tuple[int, int]],
    is_causal: bool,
    **rest: Any,
) -> Case:
    """Sequences of (rows, keys) one after another, as of `mha_varlen`; then padding."""
    _, rows, keys, _, _ = shape
    q_ids, kv_ids = np.full((1, rows), -1), np.full((1, keys), -1)
    position = np.zeros((1, rows), int)
    row = key = 0
    for i, (some_rows, some_keys) in enumerate(sequences):
        q_ids[0, row : row + some_rows] = i
        kv_ids[0, key : key + some_keys] = i
        # The last row is aligned with the last key.
        position[0, row : row + some_rows] = key + some_keys - some_rows
        position[0, row : row + some_rows] += np.arange(some_rows)
        row, key = row + some_rows, key + some_keys
    seen = (q_ids[..., None] == kv_ids[:, None]) & (q_ids >= 0)[..., None]
    if is_causal:
        seen &= np.arange(keys) <= position[..., None]
    return Case(shape, q_ids, kv_ids, seen, position, **rest)


def with_a_hole() -> Case:
    """Tiles amid those that rows see, and those of a whole block of keys."""
    mask = np.ones((1, 1, 200, 520), bool)
    mask[..., 128:384] = mask[:, :, :130, 448:512] = False
    rest = {"mask": mask, "unread": slice(128, 384)}
    return of_options((1, 200, 520, 2, 1), rest=rest)


def biased_with_holes(dtype: str) -> Case:
    """A bias, and tiles that the mask hides from all rows, or from some blocks."""
    mask = np.random.default_rng(6).random((2, 1, 300, 900)) < 0.9
    mask[..., 128:512] = mask[1, :, :140, 640:768] = mask[0, ..., 768:] = False
    rest = {"bias": random_bias((1, 2, 300, 900), dtype), "mask": mask}
    return of_options((2, 300, 900, 2, 1), rest=rest)


def _sorted(rng: np.random.Generator, length: int, ids: int) -> np.ndarray:
    return np.sort(rng.integers(0, ids, length))


def _cases() -> dict[str, Callable[[], Case]]:
    rng = np.random.default_rng(5)
    runs = [np.stack([_sorted(rng, n, 5) for _ in range(2)]) for n in (200, 230)]
    mixed = [rng.integers(0, 3, n) for n in (170, 300)]
    holes = [np.stack([_sorted(rng, n, 3) for _ in range(2)]) for n in (280, 400)]
    for ids in holes:
        ids[rng.random(ids.shape) < 0.3] = -1
    holes[0][0, 64:200] = holes[1][0, 100:330] = -7  # whole tiles
    holes[0][1] = -1  # nothing at all
    halves = np.repeat([0, 1, 2, 3, -1, 4], [64, 64, 192, 64, 64, 128])
    scattered = np.where(rng.random(300) < 0.2, -1, 0)
    alternating = np.arange(200) // 3 % 4
    documents = np.repeat([-1, 0, 1, 2], [40, 300, 70, 290])
    # Blocks of rows of the sm_90 forward begin with some of them.
    ragged = [3, 130, 9, 70, 1, 1, 100, 260, 31, 129, 20, 60]
    many = np.repeat(np.arange(12), ragged)
    many[many == 10] = -1
    return {
        # Whole tiles are clean here.
        "one id": lambda: of_options((1, 150, 600, 2, 1)),
        "one row and key": lambda: of_options((1, 1, 1, 1, 1)),
        "causal": lambda: of_options((2, 300, 300, 2, 1), is_causal=True),
        "dead rows in clean tiles": lambda: of_options((1, 300, 512, 1, 1), scattered),
        "sorted ids": lambda: of_options((2, 200, 230, 2, 2), runs[0], runs[1]),
        "sorted ids, causal": lambda: of_options(
            (2, 200, 230, 2, 1),
            runs[0],
            runs[1],
            is_causal=True,
            causal_alignment="top_left",
        ),
        "unsorted ids": lambda: of_options((2, 170, 300, 2, 1), mixed[0], mixed[1]),
        "unsorted ids, causal, wide": lambda: of_options(
            (1, 200, 200, 2, 1),
            alternating,
            alternating,
            rest={"wide": True},
            is_causal=True,
        ),
        # Masks on the left of tiles behind which all rows have seen keys.
        "documents, causal": lambda: of_options(
            (1, 700, 700, 2, 1), documents, documents, is_causal=True
        ),
        "documents, window": lambda: of_options(
            (1, 700, 700, 1, 1), documents, documents, window_size=(200, 10)
        ),
        "ragged documents, causal": lambda: of_options(
            (1, 814, 814, 2, 1), many, many, is_causal=True
        ),
        "ragged documents, options": lambda: of_options(
            (1, 814, 814, 1, 1),
            many,
            many,
            rest={"options": {"softcap": 20.0}, "slopes": np.array([[0.05]])},
            window_size=(150, 0),
        ),
        "ragged, packed": lambda: packed(
            (1, 600, 700, 1, 1),
            [(3, 40), (140, 10), (1, 250), (60, 60), (90, 0), (130, 170), (161, 161)],
            True,
        ),
        "negative ids": lambda: of_options((2, 280, 400, 1, 1), holes[0], holes[1]),
        "negative ids, window, wide": lambda: of_options(
            (2, 280, 400, 2, 1),
            holes[0],
            holes[1],
            rest={"wide": True},
            window_size=(90, 30),
        ),
        "lengths": lambda: of_options(
            (3, 150, 177, 2, 1),
            rest={"options": {"scale": -0.3}},
            is_causal=True,
            window_size=(40, None),
            query_seq_lengths=(150, 70, 0),
            key_value_seq_lengths=(100, 177, 9),
        ),
        "packed": lambda: packed(
            (1, 330, 420, 2, 1),
            [(1, 1), (70, 90), (64, 0), (0, 20), (30, 15), (128, 256), (3, 3)],
            False,
        ),
        "packed, causal": lambda: packed(
            (1, 330, 420, 4, 2),
            [(128, 128), (1, 130), (100, 70), (60, 60)],
            True,
            slopes=np.array([[0.5, 0.25, 0.1, 0.0]]),
        ),
        "soft cap": lambda: of_options(
            (1, 150, 300, 2, 1), rest={"options": {"softcap": 2.0, "scale": 0.5}}
        ),
        "slopes": lambda: of_options(
            (2, 200, 180, 2, 2),
            rest={"slopes": np.array([[0.3, 0.05], [0.02, -0.01]])},
            is_causal=True,
        ),
        "soft cap and slopes": lambda: of_options(
            (1, 130, 200, 4, 2),
            rest={
                "options": {"softcap": 1.5, "scale": -0.4},
                "slopes": np.array([[0.1, 0.02, 0.2, 0.0]]),
            },
            window_size=(100, 50),
        ),
        # Tiles that are seen in full. Of scores far below the cap, ...
        "small soft cap": lambda: of_options(
            (1, 150, 600, 2, 1), rest={"options": {"softcap": 50.0, "scale": 0.2}}
        ),
        # ... but for some of them, ...
        "soft cap of scores that are mostly small": lambda: of_options(
            (1, 150, 600, 1, 1), rest={"options": {"softcap": 8.0, "scale": -0.1}}
        ),
        # ... of scores a little and far below the cap, ...
        "wide soft cap": lambda: of_options(
            (1, 150, 600, 2, 1), rest={"options": {"softcap": 50.0, "scale": 1.0}}
        ),
        # ... and of some above it in a few of the rows.
        "soft cap that some scores pass": lambda: of_options(
            (1, 150, 600, 1, 1), rest={"options": {"softcap": 3.0, "scale": 0.12}}
        ),
        # Before, around and after the keys that rows are aligned with.
        "slopes, all keys": lambda: of_options(
            (1, 150, 600, 2, 1),
            scattered[:150],
            rest={"slopes": np.array([[0.3, -0.004]])},
        ),
        "slopes, positions in any order": lambda: dataclasses.replace(
            of_options((1, 150, 600, 1, 1), rest={"slopes": np.array([[0.02]])}),
            position=600 + np.random.default_rng(6).permutation(150)[None],
        ),
        "slopes, later keys": lambda: of_options(
            (1, 70, 600, 2, 1),
            rest={
                "options": {"softcap": 20.0},
                "slopes": np.array([[0.02, 0.0]]),
            },
            causal_alignment="top_left",
        ),
        "slopes, distant keys": lambda: of_options(
            (1, 64, 3000, 1, 1),
            rest={"slopes": np.array([[0.0039]])},
            is_causal=True,
        ),
        # Clean tiles, which have no mask, and others.
        "dropout": lambda: of_options(
            (2, 150, 600, 2, 1), rest={"dropout_rate": 0.3}, is_causal=True
        ),
        "dropout, soft cap, dead rows": lambda: of_options(
            (1, 170, 300, 2, 2),
            scattered[:170],
            rest={"dropout_rate": 0.7, "options": {"softcap": 2.0}},
        ),
        "mask": lambda: of_options(
            (2, 150, 333, 2, 1), rest={"mask": random_mask((1, 2, 150, 333))}
        ),
        "mask of blocks": lambda: of_options(
            (2, 130, 600, 2, 1), rest={"mask": mask_of_blocks((2, 1, 130, 600), 0.3)}
        ),
        "mask of blocks, causal": lambda: of_options(
            (1, 300, 300, 2, 2),
            is_causal=True,
            rest={"mask": mask_of_blocks((1, 2, 300, 300), 0.2)},
        ),
        "mask of keys, dead rows": lambda: of_options(
            (2, 170, 300, 2, 1),
            scattered[:170],
            rest={"mask": random_mask((2, 1, 1, 300))},
            is_causal=True,
        ),
        "bias": lambda: of_options(
            (1, 140, 300, 2, 1),
            rest={"bias": random_bias((1, 2, 140, 300), "bfloat16")},
        ),
        "bias in f32, shared by rows": lambda: of_options(
            (2, 150, 333, 2, 2),
            rest={"bias": random_bias((2, 1, 1, 333), "float32"), "dropout_rate": 0.4},
            is_causal=True,
        ),
        "bias and mask": lambda: of_options(
            (2, 130, 200, 4, 2),
            mixed[0][:130],
            mixed[1][:200],
            rest={
                "bias": random_bias((1, 4, 130, 200), "float16"),
                "mask": random_mask((2, 1, 130, 200)),
                "slopes": np.array([[0.1, 0.02, 0.2, 0.0]]),
            },
        ),
        # Whole tiles that the mask hides, from some rows or from none.
        "mask and dropout, many keys": lambda: of_options(
            (1, 150, 900, 2, 1),
            rest={"mask": striped_mask((1, 2, 150, 900)), "dropout_rate": 0.3},
        ),
        "bias, mask and dropout": lambda: of_options(
            (2, 200, 520, 2, 1),
            rest={
                "bias": random_bias((1, 2, 200, 520), "bfloat16"),
                "mask": striped_mask((2, 1, 200, 520)),
                "dropout_rate": 0.3,
            },
            is_causal=True,
        ),
        # Sums of the gradient of queries that start from zeros, and others.
        "bias, tiles hidden": lambda: biased_with_holes("bfloat16"),
        "bias in f32, tiles hidden": lambda: biased_with_holes("float32"),
        "packed, many keys and few": lambda: packed(
            (1, 270, 2600, 1, 1), [(100, 2300), (90, 200), (60, 40)], False
        ),
        # Tiles that see most of 64 keys but not all.
        "causal, more keys": lambda: of_options((1, 200, 240, 2, 1), is_causal=True),
        # Halves of blocks of 128 keys that some or all of the block's tiles of rows do
        # not meet, the first or the last of them.
        "documents of whole tiles, causal": lambda: of_options(
            (1, 576, 576, 2, 1), halves, halves, is_causal=True
        ),
        "documents of whole tiles, window": lambda: of_options(
            (1, 576, 576, 2, 2),
            halves,
            halves,
            rest={"dropout_rate": 0.3},
            window_size=(100, 100),
        ),
        "packed, dropout": lambda: packed(
            (1, 230, 300, 2, 1),
            [(3, 40), (100, 130), (1, 50), (96, 60)],
            True,
            dropout_rate=0.3,
        ),
        # Tiles on the diagonal, before it and after it, and a slope of 0.
        "gradient of slopes": lambda: of_options(
            (2, 150, 300, 2, 1),
            rest={
                "slopes": np.array([[0.3, 0.0], [0.02, -0.01]]),
                "wants_slopes": True,
            },
            query_seq_lengths=(150, 70),
            key_value_seq_lengths=(260, 200),
        ),
        "gradient of slopes, soft cap, dropout": lambda: packed(
            (1, 230, 300, 2, 2),
            [(3, 40), (100, 130), (1, 50), (96, 60)],
            False,
            slopes=np.array([[0.05, 0.01]]),
            wants_slopes=True,
            options={"softcap": 1.5, "scale": 0.5},
            dropout_rate=0.3,
        ),
        "bias, soft cap, dropout": lambda: of_options(
            (1, 150, 260, 2, 1),
            rest={
                "bias": random_bias((1, 2, 150, 260), "bfloat16"),
                "options": {"softcap": 1.5, "scale": 0.5},
                "dropout_rate": 0.3,
            },
        ),
    }


CASES = _cases()


EVERY_OPTION = (
    "negative ids",
    "ragged documents, options",
    "lengths",
    "mask of blocks, causal",
    "gradient of slopes, soft cap, dropout",
    "bias, soft cap, dropout",
)
"""Small cases that between them have all options."""

SHARED_ARRAYS = ("bias in f32, shared by rows", "bias and mask")
"""Larger ones, of biases of other types."""


@functools.cache
def case(name: str) -> Case:
    return CASES[name]()
