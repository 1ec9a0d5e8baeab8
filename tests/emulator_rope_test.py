"""The source of the kernel of `rope_append_kv`, run on the CPU, against jnp."""

import ctypes
import itertools
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from emulated import aligned, build

from jax_flash._src import rope_reference
from jax_flash._src.rope_reference import RopeConfig

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

TYPES = ("float32", "bfloat16", "float16")
"""In the order of ops::Element."""

LARGEST = 2**31 - 1


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("rope", tmp_path_factory.mktemp("rope"))


def held(x: np.ndarray, at: int = 0) -> np.ndarray:
    """A copy, `at` bytes behind a multiple of 16."""
    room = aligned((x.nbytes + 16,), np.uint8, 0)
    copy = room[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def pointer(x: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


def problem(
    dtype: str, tokens: int, heads: tuple[int, int], widths: tuple[int, int], page: int
) -> dict[str, np.ndarray]:
    """Operands of six sequences, some without a place; `page` 0: no page table.

    Of pages there are two pools, for three sequences each.
    """
    rng = np.random.default_rng(0)
    outer, batch, room = (2, 3, 8) if page else (1, 6, 8)
    n, k = heads

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    lead = (outer, 11, page) if page else (outer, batch, room)
    given = {
        "query": normal(outer, batch, tokens, n, widths[0]),
        "k_new": normal(outer, batch, tokens, k, widths[0]),
        "v_new": normal(outer, batch, tokens, k, widths[1]),
        "k_cache": normal(*lead, k, widths[0]),
        "v_cache": normal(*lead, k, widths[1]),
    }
    lengths = np.array([0, 3, room - 1, -1, room, LARGEST], np.int32)
    given["cache_seqlens"] = lengths.reshape(outer, batch)
    if page:
        slots = room // page
        table = np.full((6, slots), 10**6, np.int32)
        # One of the first pool, one that is switched off, and both of the second pool.
        for sequences in ([0, 3], [1, 4, 5]):
            own = rng.permutation(11)[: len(sequences) * slots]
            table[sequences] = own.reshape(-1, slots)
        table[2, -1] = -1
        given["page_table"] = table.reshape(outer, batch, slots)
    return given


def run(
    kernel: ctypes.CDLL,
    given: dict[str, np.ndarray],
    interleaved: bool,
    shift: int = 0,
    packed: bool = False,
) -> list[np.ndarray]:
    """`[query, k_cache, v_cache]` of the kernel.

    Args:
      kernel: the library.
      given: operands.
      interleaved: whether neighbours are pairs.
      shift: bytes behind a multiple of 16 at which arrays begin.
      packed: query, keys and values of a token lie together.
    """
    o = {n: held(x, shift if x.dtype != np.int32 else 0) for n, x in given.items()}
    o["inv_freq"] = held(given["inv_freq"])
    out = held(np.full_like(o["query"], np.nan), shift)
    outer, batch, tokens, heads, width = o["query"].shape
    _, pages, page_size, kv_heads, value_width = o["v_cache"].shape
    total = outer * batch
    names = ("query", "k_new", "v_new")
    sources = [pointer(o[n]) for n in names]
    strides = [o[n].shape[-2] * o[n].shape[-1] for n in names]
    if packed:
        flat = [o[n].reshape(total, tokens, -1) for n in names]
        together = held(np.concatenate(flat, -1), shift)
        starts = itertools.accumulate([0, *strides[:2]])
        sources = [
            ctypes.c_void_p(together.ctypes.data + at * together.itemsize)
            for at in starts
        ]
        strides = [together.shape[-1]] * 3
    table = o.get("page_table")
    tokens_of = [x for pair in zip(sources, strides, strict=True) for x in pair]
    assert not kernel.rope_append(
        *(ctypes.c_int64(x) if isinstance(x, int) else x for x in tokens_of),
        pointer(o["cache_seqlens"]), pointer(o["inv_freq"]),
        int(o["inv_freq"].shape[1] == 1), pointer(table), pointer(out),
        pointer(o["k_cache"]), pointer(o["v_cache"]), total, tokens, heads, kv_heads,
        width, value_width, o["inv_freq"].shape[-1],
        batch if table is not None else total, pages, page_size,
        1 if table is None else table.shape[-1], int(interleaved),
        TYPES.index(str(out.dtype)),
    )  # fmt: skip
    return [out, o["k_cache"], o["v_cache"]]


def check(got: list[np.ndarray], given: dict[str, Any], interleaved: bool) -> None:
    """Turned elements to rounding, all others to the bit."""
    config = RopeConfig(interleaved, "page_table" in given)
    operands = [jnp.asarray(given[name]) for name in config.present]
    want = [np.asarray(x) for x in rope_reference.rope_append(*operands, config=config)]
    turning = 2 * given["inv_freq"].shape[-1]
    dtype = want[0].dtype
    # XLA and the C library differ in the last bits of sines, more of large angles.
    step = 2e-6 if dtype == np.float32 else float(jnp.finfo(dtype).eps)
    for actual, expected in zip(got[:2], want[:2], strict=True):
        actual, expected = (x.astype(np.float64) for x in (actual, expected))
        error = np.abs(actual - expected)[..., :turning]
        size = np.maximum(np.abs(expected[..., :turning]), 1)
        assert (error <= step * size).all(), error.max()
        np.testing.assert_array_equal(actual[..., turning:], expected[..., turning:])
    same = np.all(want[1] == given["k_cache"], (-1, -2))
    np.testing.assert_array_equal(got[1][same], given["k_cache"][same])
    assert 0 < (~same).sum() < same.size
    np.testing.assert_array_equal(got[2], want[2])


# Heads, widths of keys and values, pairs: of whole vectors, and not.
SHAPES = [
    ((4, 2), (16, 16), 8),
    ((32, 8), (128, 128), 64),
    ((6, 2), (32, 8), 8),
    ((3, 3), (10, 7), 5),
    ((5, 1), (24, 16), 4),
    ((2, 1), (300, 3), 150),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", TYPES)
def test_rope_append(
    kernel: ctypes.CDLL,
    dtype: str,
    shape: int,
    tokens: int,
    page: int,
    interleaved: bool,
) -> None:
    heads, widths, pairs = SHAPES[shape]
    given = problem(dtype, tokens, heads, widths, page)
    rng = np.random.default_rng(1)
    shared = (shape + tokens) % 2
    batch = (1, 1) if shared else given["cache_seqlens"].shape
    given["inv_freq"] = inv_freq = rng.random((*batch, pairs)).astype(np.float32)
    if shared:
        given["cache_seqlens"][-1, -1] = 1000
    else:  # about the largest int32, where angles are far from exact
        inv_freq[-1, -1] = 0
    got = run(kernel, given, interleaved, packed=shape % 2 == 1)
    check(got, given, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_arrays_at_any_address(kernel: ctypes.CDLL, interleaved: bool) -> None:
    given = problem("bfloat16", 2, (4, 2), (16, 16), 4)
    given["cache_seqlens"][-1, -1] = 70
    given["inv_freq"] = np.linspace(0, 1, 8, dtype=np.float32)[None, None]
    check(run(kernel, given, interleaved, shift=2), given, interleaved)


def test_positions_far_away(kernel: ctypes.CDLL) -> None:
    """Angles up to 10^6 are those of float32, to the last bits."""
    given = problem("float32", 1, (2, 1), (128, 128), 0)
    lengths = np.array([[0, 3, 10**4, 10**5, 10**6 - 1, 10**6]], np.int32)
    given["cache_seqlens"] = lengths
    powers = 10000.0 ** -(np.arange(64) / 64)
    given["inv_freq"] = powers.astype(np.float32)[None, None]
    out, _, _ = run(kernel, given, False)
    angles = lengths[..., None].astype(np.float32) * given["inv_freq"]
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    a, b = np.split(given["query"][:, :, 0].astype(np.float64), 2, -1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    want = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    np.testing.assert_allclose(out[:, :, 0], want, rtol=0, atol=1e-6)
