"""The kernels' own source code, run on the CPU thread for thread, against float64.

`emulator/` stands in for CUDA. What it cannot see (races, asynchrony, speed) is for
`tests/gpu`; wrong indices, masks and barriers fail here, on any machine that has g++.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_flash._src import plan

ROOT = Path(__file__).parent.parent

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

# fmt: off
_POINTERS = (
    "query", "key", "value", "out", "dout", "lse", "dlse", "query_lengths",
    "key_lengths", "dquery", "dkey", "dvalue", "workspace", "rows", "row_tiles", "keys",
    "key_tiles", "slopes", "queue", "seeds", "bias", "mask", "dbias",
    "dslopes",
)
_STRIDES = ("bias_strides", "mask_strides", "dbias_strides")
_INTS = (
    "batch", "query_length", "key_length", "heads", "kv_heads", "head_dim",
    "head_dim_v", "window_left", "window_right", "bottom_right", "f16", "f32_results",
    "deterministic", "multiprocessors", "parts", "tf32_products", "dropout",
    "bias_type", "dbias_shared",
)
# fmt: on


class Arguments(ctypes.Structure):
    """As in emulator/problem.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("batch_strides", ctypes.c_int64 * 3),
        ("interval_stride", ctypes.c_int64),
        ("slope_stride", ctypes.c_int64),
        ("seed_stride", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in _STRIDES),
        ("part_floats", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in _INTS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def build(name: str, folder: Path) -> ctypes.CDLL:
    """Compiles `emulator/<name>.cc` with the kernels it includes."""
    here = ROOT / "tests" / "emulator"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-Wno-psabi"]
    command += ["-U_FORTIFY_SOURCE", "-D__CUDACC__", f"-I{here}"]
    command += [f"-I{here / 'include'}", f"-I{ROOT / 'csrc'}"]
    command += ["-o", str(folder / f"{name}.so")]
    subprocess.run([*command, str(here / f"{name}.cc")], check=True)
    return ctypes.CDLL(str(folder / f"{name}.so"))


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("mha_fwd", tmp_path_factory.mktemp("forward"))


@pytest.fixture(scope="module")
def backward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("mha_bwd", tmp_path_factory.mktemp("backward"))


def aligned(shape: tuple[int, ...], dtype: Any, fill: float = np.nan) -> np.ndarray:
    """An array at a multiple of 16 bytes, as XLA's are, full of `fill`."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 16, np.uint8)
    start = -raw.ctypes.data % 16
    array = raw[start : start + size].view(dtype).reshape(shape)
    array[...] = fill
    return array


TOLERANCES = {"bfloat16": 0.01, "float16": 0.002}
"""Of gradients, relative."""

BIAS_TYPES = ("bfloat16", "float16", "float32")


def strides_of(x: np.ndarray) -> list[int]:
    """Strides of the first three of four dims in elements, 0 where x is shared."""
    return [
        0 if size == 1 else stride // x.itemsize
        for size, stride in zip(x.shape[:3], x.strides[:3], strict=True)
    ]


def call(
    function: Any,
    given: dict[str, Any],
    arrays: dict[str, np.ndarray],
    results: dict[str, np.ndarray],
    **ways: Any,
) -> None:
    """Calls a function of the library: `given` are options of `mha`.

    Among `arrays` may be those of a call with intervals, `slopes` [1 or B, N], `seeds`
    uint32 [1 or B, N, 2] of dropout, whose rate in parts of 256 is an option, and
    `bias` and `mask`, of 4 dims, size 1 where they are shared; the same for a result
    `dbias`.
    """
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    lengths = {
        ours: np.asarray(given[theirs], np.int32)
        for ours, theirs in (
            ("query_lengths", "query_seq_lengths"),
            ("key_lengths", "key_value_seq_lengths"),
        )
        if theirs in given
    }
    held = {}
    for name, x in (arrays | lengths).items():
        held[name] = aligned(x.shape, x.dtype, 0)
        held[name][...] = x
    left, right = given.get("window_size") or (None, None)
    right = 0 if given.get("is_causal") else right
    batch, rows, heads, width = query.shape
    arguments = Arguments(
        **{name: x.ctypes.data for name, x in (held | results).items()},
        **ways,
        batch_strides=(ctypes.c_int64 * 3)(*(x[0].size for x in (query, key, value))),
        interval_stride=len(arrays.get("rows", ())) > 1,
        slope_stride=heads * (len(arrays.get("slopes", ())) > 1),
        seed_stride=2 * heads * (len(arrays.get("seeds", ())) > 1),
        **{
            f"{name}_strides": (ctypes.c_int64 * 3)(*strides_of(x))
            for name, x in (held | results).items()
            if f"{name}_strides" in _STRIDES
        },
        bias_type=BIAS_TYPES.index(str(held["bias"].dtype)) if "bias" in held else 0,
        dbias_shared="dbias" in results
        and results["dbias"].shape[:3] != (batch, heads, rows),
        batch=batch,
        query_length=rows,
        key_length=key.shape[1],
        heads=heads,
        kv_heads=key.shape[2],
        head_dim=width,
        head_dim_v=value.shape[-1],
        window_left=-1 if left is None else left,
        window_right=-1 if right is None else right,
        bottom_right=given.get("causal_alignment") != "top_left",
        f16=query.dtype == np.float16,
        scale=given.get("scale", width**-0.5),
        softcap=given.get("softcap", 0),
        dropout=given.get("dropout", 0),
    )
    assert function(ctypes.byref(arguments)) == 0


def spoil_keys(arrays: dict[str, np.ndarray], given: dict[str, Any]) -> None:
    """NaN in the keys and values that may not be read."""
    for b, length in enumerate(given.get("key_value_seq_lengths", ())):
        arrays["key"][b, length:] = arrays["value"][b, length:] = np.nan


CASES = {
    "whole tiles": ((1, 128, 256, 2, 2), {}),
    "ragged": ((1, 200, 300, 2, 1), {}),
    "causal": ((1, 300, 300, 2, 2), {"is_causal": True}),
    "padding before the rows": ((1, 250, 250, 2, 1), {"is_causal": True}),
    "warpgroups without rows": ((1, 200, 700, 1, 1), {}),
    "one row and key": ((1, 1, 1, 1, 1), {}),
    "packed heads": ((1, 100, 300, 8, 2), {"is_causal": True}),
    "more rows than keys": ((1, 277, 150, 1, 1), {"is_causal": True}),
    "top left": (
        (1, 200, 150, 1, 1),
        {"is_causal": True, "causal_alignment": "top_left", "window_size": (30, None)},
    ),
    "window": ((1, 270, 290, 1, 1), {"window_size": (100, 20)}),
    "lengths": (
        (3, 150, 177, 2, 1),
        {
            "is_causal": True,
            "query_seq_lengths": (150, 70, 0),
            "key_value_seq_lengths": (100, 177, 9),
        },
    ),
    "no keys": ((2, 70, 80, 1, 1), {"key_value_seq_lengths": (0, 80)}),
    "scale": ((1, 70, 80, 1, 1), {"scale": -0.3}),
}


def problem(
    shape: tuple[int, ...], width: int, value_width: int, dtype: str
) -> dict[str, np.ndarray]:
    batch, rows, keys, heads, kv_heads = shape
    rng = np.random.default_rng(0)
    shapes = {
        "query": (batch, rows, heads, width),
        "key": (batch, keys, kv_heads, width),
        "value": (batch, keys, kv_heads, value_width),
    }
    return {
        name: rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
        for name, shape in shapes.items()
    }


def growing(keys: int, jump: float) -> np.ndarray:
    """Shifts of logits that grow by `jump` from tile to tile of 128 keys."""
    return jump * (np.arange(keys) // 128)[::-1]


def grow(arrays: dict[str, np.ndarray], jump: float) -> None:
    """Adds `growing` to the scores of one head."""
    query, key = arrays["query"], arrays["key"]
    query[..., 0] = 32
    shift = growing(key.shape[1], jump) * query.shape[-1] ** 0.5 / 32
    key[..., 0] = shift[None, :, None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (256, 256), (40, 56)])
def test_forward_sm90(forward: ctypes.CDLL, widths: tuple[int, int], case: str) -> None:
    shape, given = CASES[case]
    number = list(CASES).index(case) + widths[0]
    dtype = ("bfloat16", "float16")[number % 2]
    arrays = problem(shape, *widths, dtype)
    check_forward(forward.mha_fwd_sm90, arrays, given, 1 + number % 3)


@pytest.mark.parametrize("jump", [5, 30, 100])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_sm90_of_growing_scores(
    forward: ctypes.CDLL, width: int, jump: float
) -> None:
    """Scores that leave the range of the first tile's maximum, and overflow."""
    arrays = problem((1, 170, 600, 1, 1), width, width, "bfloat16")
    grow(arrays, jump)
    check_forward(forward.mha_fwd_sm90, arrays, {}, 1)


SPLITS = {
    "2, packed heads": ((1, 5, 1100, 8, 2), 64, {}),
    "2, lengths": (
        (2, 40, 700, 1, 1),
        256,
        {"is_causal": True, "key_value_seq_lengths": (90, 650)},
    ),
    "4, no rows or keys": (
        (2, 70, 2100, 1, 1),
        128,
        {"query_seq_lengths": (70, 1), "key_value_seq_lengths": (0, 2001)},
    ),
    "8": ((1, 33, 2080, 1, 1), 256, {"window_size": (2050, 0)}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_forward_sm90_of_split_keys(forward: ctypes.CDLL, case: str) -> None:
    """Clusters of thread blocks that share the keys, and each other's memory."""
    shape, width, given = SPLITS[case]
    dtype = ("bfloat16", "float16")[len(case) % 2]
    arrays = problem(shape, width, width, dtype)
    check_forward(forward.mha_fwd_sm90, arrays, given, 132)


PARTS: dict[str, Any] = {
    "empty sequences, short and long ones": (
        (6, 33, 1100, 8, 1),
        (128, 128),
        4,
        {"key_value_seq_lengths": (1100, 0, 1, 20, 700, 1063)},
    ),
    "a window, rows without keys, padding rows of three warpgroups": (
        (2, 30, 1500, 8, 1),
        (64, 40),
        5,
        {"key_value_seq_lengths": (1500, 17), "window_size": (900, 0)},
    ),
    "all tiles in one part, another sequence in many": (
        (2, 17, 1030, 8, 1),
        (256, 136),
        16,
        {"key_value_seq_lengths": (18, 1030)},
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_forward_sm90_of_parts(forward: ctypes.CDLL, case: str) -> None:
    """Parts of the keys with results of their own, as decoding asks for them.

    A sequence has the same bits alone, on another number of multiprocessors.
    """
    shape, (width, value_width), parts, given = PARTS[case]
    dtype = ("bfloat16", "float16")[len(case) % 2]
    arrays = problem(shape, width, value_width, dtype)
    given = given | {"is_causal": True}
    got = check_forward(forward.mha_fwd_sm90, arrays, given, 3, parts)
    last = slice(shape[0] - 1, None)
    given["key_value_seq_lengths"] = given["key_value_seq_lengths"][last]
    alone = {name: x[last] for name, x in arrays.items()}
    again = check_forward(forward.mha_fwd_sm90, alone, given, 132, parts)
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(x[last], y)


def check_forward(
    function: Any,
    arrays: dict[str, np.ndarray],
    given: dict[str, Any],
    multiprocessors: int,
    parts: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    query, value = arrays["query"], arrays["value"]
    expected = oracle.attention(query, arrays["key"], value, **given)
    spoil_keys(arrays, given)
    batch, rows, heads, _ = query.shape
    out = aligned((batch, rows, heads, value.shape[-1]), query.dtype)
    lse = aligned((batch, heads, rows), np.float32)
    results = {"out": out, "lse": lse}
    if parts > 1:
        floats = parts * (lse.size + -(-out.size // 2))
        results["workspace"] = aligned((floats,), np.float32)
    call(
        function,
        given,
        arrays,
        results,
        multiprocessors=multiprocessors,
        parts=parts,
    )
    dead = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), dead)
    lse_error = np.abs(np.where(dead, 0, lse) - np.where(dead, 0, expected.lse))
    assert lse_error.max() <= 2e-6 * max(1, np.abs(expected.lse[~dead]).max(initial=0))
    step = 2.0**-8 if query.dtype != np.float16 else 2.0**-11
    error = np.abs(out.astype(np.float64) - expected.out)
    assert error.max() <= 2 * step * np.abs(expected.out).max(initial=0)
    return out, lse


def check_floats(
    out: np.ndarray, lse: np.ndarray, expected: oracle.Result, tolerance: float
) -> None:
    """Results of float32, to `tolerance` of the largest; rows without keys are 0."""
    dead = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), dead)
    exact_lse = np.where(dead, 0, expected.lse)
    for x, exact in ((out, expected.out), (np.where(dead, 0, lse), exact_lse)):
        assert np.abs(x - exact).max() <= tolerance * max(1, np.abs(exact).max())
    assert (np.moveaxis(out, 1, 2)[dead] == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (40, 56), (72, 120)])
def test_backward_sm90(
    backward: ctypes.CDLL, widths: tuple[int, int], case: str
) -> None:
    number = list(CASES).index(case) + widths[0]
    tile = 64 if max(widths) <= 64 else 128
    check_backward(backward.mha_bwd_sm90, widths, case, number, number % 2 == 1, tile)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("widths", [(96, 96), (88, 72)])
def test_backward_sm90_of_width_96(
    backward: ctypes.CDLL, widths: tuple[int, int], case: str
) -> None:
    number = list(CASES).index(case) + widths[1] // 8
    check_backward(backward.mha_bwd_sm90, widths, case, number, False, 128)


CASES_OF_PAIRS = CASES | {
    "one of a pair is not seen": (
        (1, 60, 128, 2, 1),
        {"is_causal": True, "causal_alignment": "top_left"},
    ),
    "pairs are not seen": (
        (1, 90, 400, 1, 1),
        {"window_size": (50, 0), "key_value_seq_lengths": (350,)},
    ),
}
WIDTHS_OF_PAIRS = ((256, 256), (192, 128), (200, 232), (160, 192))


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("case", CASES_OF_PAIRS)
def test_paired_backward_sm90(backward: ctypes.CDLL, case: str, turn: int) -> None:
    """Clusters of two thread blocks, which exchange dS; each case at two widths."""
    number = list(CASES_OF_PAIRS).index(case)
    widths = WIDTHS_OF_PAIRS[(number + turn) % 4]
    tile = 256 if max(widths) > 192 else 192
    number += number // 4 + 3 * turn
    check_backward(backward.mha_bwd_sm90, widths, case, number, tile == 192, tile)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("widths", "f16", "tile"),
    [((64, 64), False, 64), ((128, 120), True, 128), ((33, 17), False, 64)],
)
def test_backward_sm80(
    backward: ctypes.CDLL, widths: tuple[int, int], f16: bool, tile: int, case: str
) -> None:
    number = list(CASES).index(case)
    check_backward(backward.mha_bwd_sm80, widths, case, number, f16, tile)


@pytest.mark.parametrize("case", ["causal", "lengths"])
def test_wide_backward_sm80(backward: ctypes.CDLL, case: str) -> None:
    check_backward(backward.mha_bwd_sm80, (256, 256), case, 3, False, 256)


@pytest.mark.parametrize(
    ("widths", "tile", "case", "parts"),
    [
        ((64, 64), 64, "packed heads", 4),
        ((128, 120), 128, "packed heads", 2),
        ((72, 88), 128, "lengths", 2),
        ((256, 256), 256, "padding before the rows", 2),
        ((256, 200), 256, "ragged", 2),
        ((160, 128), 192, "packed heads", 2),
    ],
)
def test_backward_sm90_of_split_groups(
    backward: ctypes.CDLL, widths: tuple[int, int], tile: int, case: str, parts: int
) -> None:
    """The heads of a group in blocks of their own, each with room for its gradients."""
    for number in (parts, 7 - parts):
        check_backward(
            backward.mha_bwd_sm90,
            widths,
            case,
            number,
            tile == 192,
            tile,
            parts=parts,
        )


def check_backward(
    function: Any,
    widths: tuple[int, int],
    case: str,
    number: int,
    f16: bool,
    tile: int,
    *,
    parts: int = 0,
) -> None:
    dtype = "float16" if f16 else "bfloat16"
    results, expected = run_backward(
        function, widths, case, number, dtype, tile, parts=parts
    )
    check_gradients(results, expected, TOLERANCES[dtype])


def check_gradients(
    results: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    tolerance: float,
    least: float = 1e-3,
) -> None:
    """Norms of errors against those of gradients, or `least` if that is more.

    Differences of large numbers may be small, or 0 for a single key.
    """
    for name, exact in expected.items():
        result = results[name].astype(np.float64)
        assert np.isfinite(result).all(), name
        bound = tolerance * max(least, np.linalg.norm(exact))
        assert np.linalg.norm(result - exact) <= bound, name


def run_backward(
    function: Any,
    widths: tuple[int, int],
    case: str,
    number: int,
    dtype: str,
    tile: int,
    *,
    parts: int = 0,
    **more: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gradients of one case, run in one of several ways by its number.

    `parts` of a group of heads have room if sums have an order, else one sum of any
    number of them; more than 1: on a GPU that is large enough.

    Returns:
      What the kernel wrote, and the exact gradients, both by name of the operand.
    """
    shape, given = CASES_OF_PAIRS[case]
    ways = list(itertools.product((False, True), repeat=3))
    with_dlse, f32_results, deterministic = ways[number % len(ways)]
    arrays = problem(shape, *widths, dtype)
    query, key, value = arrays.values()
    batch, rows, heads, _ = query.shape
    rng = np.random.default_rng(1)
    exact = oracle.attention(query, key, value, **given)
    arrays["lse"] = exact.lse.astype(np.float32)
    arrays["out"] = exact.out.astype(query.dtype)
    dout = rng.standard_normal(exact.out.shape, np.float32)
    arrays["dout"] = dout.astype(query.dtype)
    if with_dlse:
        arrays["dlse"] = rng.standard_normal(exact.lse.shape, np.float32)
    dead = np.isneginf(exact.lse)
    dead_rows = np.moveaxis(dead, 1, 2)
    expected = oracle.gradients(
        query,
        key,
        value,
        np.where(dead_rows[..., None], 0, arrays["dout"]),
        np.where(dead, 0, arrays["dlse"]) if with_dlse else None,
        **given,
    )
    for name in ("query", "out", "dout"):
        arrays[name][dead_rows] = np.nan
    if with_dlse:
        arrays["dlse"][dead] = np.nan
    spoil_keys(arrays, given)

    gradient_dtype = np.dtype(np.float32) if f32_results else query.dtype
    results = {
        f"d{name}": aligned(arrays[name].shape, gradient_dtype)
        for name in ("query", "key", "value")
    }
    padded = plan.padded_rows(rows) * batch * heads
    size = padded * (tile + 2) + padded // plan.TURN_ROWS + plan.QUEUE_ENTRIES
    part_floats = part_room(arrays, deterministic, parts)
    workspace = aligned((size + part_floats,), np.float32)
    # Thread blocks run one after another: none may wait for a later one. On Hopper they
    # work in pairs over width 128, and then in an order where there is no mask, too.
    masked = given.get("is_causal") or "window_size" in given
    ordered = deterministic or (tile > 128 and not masked)
    few = (1 + (tile > 128)) * (1 if ordered else 1 + number % 3)
    call(
        function,
        given,
        arrays,
        results | {"workspace": workspace},
        f32_results=f32_results,
        deterministic=deterministic,
        multiprocessors=132 if parts > 1 else few,
        part_floats=part_floats,
        **more,
    )
    assert np.isfinite(workspace[size:]).all()
    return {name[1:]: x for name, x in results.items()}, expected


def part_room(
    arrays: dict[str, np.ndarray],
    deterministic: bool,
    parts: int,
    has_intervals: bool = False,
) -> int:
    """Floats for `parts` of groups of heads: with no order of sums, of one sum."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    batch, _, heads, width = query.shape
    room = plan.backward_parts(
        batch,
        heads,
        key.shape[2],
        key.shape[1],
        query.dtype,
        width,
        value.shape[-1],
        has_intervals,
        deterministic,
    )
    one = room // (heads // key.shape[2])
    return one * (parts if deterministic else min(parts, 1))
