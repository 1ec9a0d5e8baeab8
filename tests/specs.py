"""The shape table that tests, GPU tests and benchmarks share."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

SEQUENCE_LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 1000, 2048, 4097)
UNEQUAL_LENGTHS = (
    (1, 2),
    (1, 2048),
    (2, 1),
    (2, 129),
    (63, 65),
    (64, 1000),
    (65, 64),
    (127, 4097),
    (128, 63),
    (129, 127),
    (1000, 2048),
    (2048, 128),
    (4097, 1000),
)
WIDTHS = (16, 33, 64, 80, 96, 128, 192, 256)
UNEQUAL_WIDTHS = (
    (192, 128),
    (16, 33),
    (33, 16),
    (96, 64),
    (64, 128),
    (80, 256),
    (1, 1),
)
HEADS = ((2, 2), (6, 2), (8, 2), (8, 1), (5, 1))
"""(query heads, key/value heads): N / K in 1, 3, 4, 8 and N."""
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One attention problem.

    Attributes:
      batch, query_length, key_length, heads, kv_heads, head_dim, value_dim: the sizes
        B, T, S, N, K, H, Hv; value_dim 0 stands for head_dim.
      dtype: NumPy name of the dtype of query, key and value.
      is_causal, causal_alignment, window_size: the options of `mha`.
      query_lengths, key_lengths: `query_seq_lengths` and `key_value_seq_lengths`.
    """

    batch: int
    query_length: int
    key_length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int = 0
    dtype: str = "bfloat16"
    is_causal: bool = False
    causal_alignment: str = "bottom_right"
    window_size: tuple[int | None, int | None] | None = None
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """(H, Hv)."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of query, key and value."""
        width, value_width = self.widths
        keys = (self.batch, self.key_length, self.kv_heads)
        query = (self.batch, self.query_length, self.heads, width)
        return query, (*keys, width), (*keys, value_width)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `mha`, lengths as int32 arrays."""
        result: dict[str, Any] = {}
        if self.is_causal:
            result["is_causal"] = True
        if self.causal_alignment != "bottom_right":
            result["causal_alignment"] = self.causal_alignment
        if self.window_size is not None:
            result["window_size"] = self.window_size
        if self.query_lengths is not None:
            result["query_seq_lengths"] = np.asarray(self.query_lengths, np.int32)
        if self.key_lengths is not None:
            result["key_value_seq_lengths"] = np.asarray(self.key_lengths, np.int32)
        return result

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Standard normal query, key and value in the spec's dtype."""
        import jax.numpy as jnp

        rng = np.random.default_rng(seed)
        dtype = jnp.dtype(self.dtype)
        return tuple(
            rng.standard_normal(shape, np.float32).astype(dtype)
            for shape in self.shapes
        )

    def __str__(self) -> str:
        width, value_width = self.widths
        parts = [
            f"b{self.batch}",
            f"t{self.query_length}",
            f"s{self.key_length}",
            f"n{self.heads}",
            f"k{self.kv_heads}",
            f"h{width}" if width == value_width else f"h{width}v{value_width}",
            {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[self.dtype],
        ]
        if self.is_causal:
            parts.append("causal")
        if self.causal_alignment == "top_left":
            parts.append("topleft")
        if self.window_size is not None:
            parts.append("window" + "_".join(str(side) for side in self.window_size))
        if self.query_lengths is not None:
            parts.append("q" + "_".join(map(str, self.query_lengths)))
        if self.key_lengths is not None:
            parts.append("kv" + "_".join(map(str, self.key_lengths)))
        return "-".join(parts)


MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "top_left"},
    {"window_size": (17, 5)},
    {"window_size": (0, 0)},
    {"is_causal": True, "window_size": (100, None)},
    {"window_size": (None, 3), "causal_alignment": "top_left"},
    {"window_size": (70, 70), "causal_alignment": "top_left"},
)


def _lengths_table() -> Iterator[Spec]:
    """All sequence lengths, equal and not, under the masks."""
    pairs = [(n, n) for n in SEQUENCE_LENGTHS] + list(UNEQUAL_LENGTHS)
    for i, (rows, keys) in enumerate(pairs):
        heads, kv_heads = HEADS[i % len(HEADS)]
        width = (64, 128)[i % 2]
        batch = 1 if max(rows, keys) > 1000 else 2
        # The first three masks everywhere; the windows in turn.
        masks = (*MASKS[:3], MASKS[3 + i % (len(MASKS) - 3)])
        for j, mask in enumerate(masks):
            dtype = DTYPES[(i + j) % 2]
            yield Spec(batch, rows, keys, heads, kv_heads, width, dtype=dtype, **mask)


def _widths_table() -> Iterator[Spec]:
    """All widths in both dtypes, on lengths that end inside a tile."""
    widths = [(w, w) for w in WIDTHS] + list(UNEQUAL_WIDTHS)
    for (width, value_width), dtype in itertools.product(widths, DTYPES):
        for mask in (MASKS[0], MASKS[1]):
            yield Spec(2, 200, 333, 4, 2, width, value_width, dtype, **mask)


def _heads_table() -> Iterator[Spec]:
    """All head groupings."""
    for (heads, kv_heads), dtype in itertools.product(HEADS, DTYPES):
        yield Spec(2, 130, 190, heads, kv_heads, 64, dtype=dtype, is_causal=True)


def _valid_lengths_table() -> Iterator[Spec]:
    """Zero, partial, full and too large lengths, under every mask."""
    for i, mask in enumerate(MASKS):
        tables: tuple[dict[str, Any], ...] = (
            {"query_lengths": (0, 1, 100, 150)},
            {"key_lengths": (0, 1, 150, 300)},
            {"query_lengths": (150, 77, 0, 1), "key_lengths": (130, 300, 5, 0)},
        )
        for lengths in tables:
            dtype = DTYPES[i % 2]
            yield Spec(4, 150, 300, 4, 2, 64, dtype=dtype, **mask, **lengths)


GPU_TABLE = tuple(
    dict.fromkeys(
        itertools.chain(
            _lengths_table(), _widths_table(), _heads_table(), _valid_lengths_table()
        )
    )
)
"""What the kernels must get right."""

CPU_TABLE = (
    Spec(2, 7, 9, 4, 2, 16, dtype="float32"),
    Spec(2, 7, 9, 4, 2, 16, 8, dtype="float32", is_causal=True),
    Spec(1, 9, 7, 3, 1, 5, dtype="float32", is_causal=True),
    Spec(1, 9, 7, 3, 3, 5, 7, "float32", True, "top_left"),
    Spec(2, 12, 12, 8, 2, 16, dtype="float32", window_size=(3, 2)),
    Spec(2, 12, 5, 8, 1, 16, dtype="float32", window_size=(0, None)),
    Spec(1, 65, 129, 2, 2, 33, 16, "bfloat16", True),
    Spec(1, 64, 64, 6, 2, 64, dtype="float16", window_size=(17, 5)),
    Spec(2, 33, 65, 2, 1, 16, dtype="bfloat16"),
    Spec(
        4,
        12,
        15,
        4,
        2,
        8,
        dtype="float32",
        is_causal=True,
        query_lengths=(12, 7, 0, 1),
        key_lengths=(13, 15, 5, 0),
    ),
    Spec(
        4,
        12,
        15,
        4,
        2,
        8,
        dtype="bfloat16",
        causal_alignment="top_left",
        window_size=(4, 1),
        query_lengths=(0, 1, 9, 20),
    ),
    Spec(3, 6, 10, 2, 2, 4, dtype="float32", key_lengths=(0, 4, 99)),
)
"""A small subset of every kind, for machines without a GPU."""

BENCHMARK_TOKENS, BENCHMARK_HIDDEN = 16384, 2048

BENCHMARK_CELLS = tuple(
    Spec(
        batch=BENCHMARK_TOKENS // length,
        query_length=length,
        key_length=length,
        heads=BENCHMARK_HIDDEN // width,
        kv_heads=BENCHMARK_HIDDEN // width,
        head_dim=width,
        is_causal=is_causal,
    )
    for width in (64, 128, 256)
    for is_causal in (False, True)
    for length in (512, 1024, 2048, 4096, 8192, 16384)
)
"""16k tokens and a hidden size of 2048, cut into sequences and heads."""

RAGGED_CELLS = (
    # Small: one sequence, few queries on many keys, causal and without a mask (where
    # peers that align masks at the top left compute the same).
    Spec(1, 1024, 1024, 32, 8, 128, is_causal=True),
    Spec(1, 4096, 4096, 32, 8, 128, is_causal=True),
    Spec(1, 256, 8192, 32, 8, 128, is_causal=True),
    Spec(1, 256, 8192, 32, 8, 128),
    Spec(1, 16, 8192, 32, 8, 128, is_causal=True),
    Spec(1, 16, 8192, 32, 8, 128),
    # One query: what decode kernels are for.
    *(
        Spec(batch, 1, n, 32, 8, 128)
        for batch in (1, 16)
        for n in (512, 1024, 2048, 4096, 8192)
    ),
    # A window, widths between the usual ones, f16, grouped heads, narrower values.
    Spec(1, 16384, 16384, 16, 16, 128, is_causal=True, window_size=(1024, 0)),
    Spec(4, 4096, 4096, 26, 26, 80, is_causal=True),
    Spec(4, 4096, 4096, 21, 21, 96, is_causal=True),
    Spec(4, 4096, 4096, 11, 11, 192, is_causal=True),
    Spec(4, 4096, 4096, 11, 11, 192, 128, is_causal=True),
    Spec(4, 4096, 4096, 16, 16, 128, dtype="float16", is_causal=True),
    Spec(4, 4096, 4096, 32, 8, 128, is_causal=True),
)
"""Where the usual cells say little; widths that do not divide 2048 come close to it."""

BACKWARD_RAGGED_CELLS = (
    # Grouped heads: gradients of key and value sum over the group.
    *(
        Spec(BENCHMARK_TOKENS // n, n, n, 32, 8, 128, is_causal=True)
        for n in (1024, 4096, 16384)
    ),
    Spec(4, 4096, 4096, 32, 8, 128),
    Spec(1, 1024, 1024, 32, 8, 128, is_causal=True),
    # A window, widths between the usual ones, narrower values, f16.
    Spec(1, 16384, 16384, 16, 16, 128, is_causal=True, window_size=(1024, 0)),
    Spec(4, 4096, 4096, 21, 21, 96, is_causal=True),
    Spec(4, 4096, 4096, 11, 11, 192, is_causal=True),
    Spec(4, 4096, 4096, 11, 11, 192, 128, is_causal=True),
    Spec(4, 4096, 4096, 16, 16, 128, dtype="float16", is_causal=True),
)
"""The same for the backward."""
