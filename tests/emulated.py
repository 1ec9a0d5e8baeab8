"""What tests of emulated kernels share: builds, calls, problems and bounds.

`emulator/` stands in for CUDA.
"""

import ctypes
import itertools
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle

from jax_flash._src import plan

ROOT = Path(__file__).parent.parent

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


def backward_problem(
    shape: tuple[int, ...],
    given: dict[str, Any],
    widths: tuple[int, int],
    dtype: str,
    with_dlse: bool = False,
    unread_rows: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a backward is given, with NaN where it may not look, and exact gradients.

    `unread_rows` are those whose queries it may not read, bool [B, T]; else it may not
    read those of rows that see nothing.
    """
    arrays = problem(shape, *widths, dtype)
    query, key, value = arrays.values()
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
    query[dead_rows if unread_rows is None else unread_rows] = np.nan
    arrays["out"][dead_rows] = arrays["dout"][dead_rows] = np.nan
    if with_dlse:
        arrays["dlse"][dead] = np.nan
    spoil_keys(arrays, given)
    return arrays, expected


def call_backward(
    function: Any,
    given: dict[str, Any],
    arrays: dict[str, np.ndarray],
    tile: int,
    *,
    parts: int = 0,
    f32_results: bool = False,
    deterministic: bool = False,
    more_results: dict[str, np.ndarray] | None = None,
    **more: int,
) -> dict[str, np.ndarray]:
    """What the kernel of width `tile` writes, by name of the operand.

    `more_results` are written beside the gradients of query, key and value.
    """
    batch, rows, heads, _ = arrays["query"].shape
    dtype = np.dtype(np.float32) if f32_results else arrays["query"].dtype
    results = {
        f"d{name}": aligned(arrays[name].shape, dtype)
        for name in ("query", "key", "value")
    }
    results |= more_results or {}
    padded = plan.padded_rows(rows) * batch * heads
    size = padded * (tile + 2) + padded // plan.TURN_ROWS + plan.QUEUE_ENTRIES
    if "rows" in arrays:
        size += plan.queue_size(batch, arrays["key"].shape[1])
    part_floats = part_room(arrays, deterministic, parts)
    workspace = aligned((size + part_floats,), np.float32)
    call(
        function,
        given,
        arrays,
        results | {"workspace": workspace},
        f32_results=f32_results,
        deterministic=deterministic,
        part_floats=part_floats,
        **more,
    )
    assert np.isfinite(workspace[size:]).all()
    return {name[1:]: x for name, x in results.items()}


def run_backward(
    function: Any,
    widths: tuple[int, int],
    case: str,
    number: int,
    dtype: str,
    tile: int,
    *,
    parts: int = 0,
    **more: Any,
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
    arrays, expected = backward_problem(shape, given, widths, dtype, with_dlse)
    # Thread blocks run one after another: none may wait for a later one. On Hopper they
    # work in pairs over width 128, and then in an order where there is no mask, too.
    masked = given.get("is_causal") or "window_size" in given
    ordered = deterministic or (tile > 128 and not masked)
    few = (1 + (tile > 128)) * (1 if ordered else 1 + number % 3)
    results = call_backward(
        function,
        given,
        arrays,
        tile,
        parts=parts,
        f32_results=f32_results,
        deterministic=deterministic,
        multiprocessors=132 if parts > 1 else few,
        **more,
    )
    return results, expected


def part_room(arrays: dict[str, np.ndarray], deterministic: bool, parts: int) -> int:
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
        "rows" in arrays,
        deterministic,
    )
    one = room // (heads // key.shape[2])
    return one * (parts if deterministic else min(parts, 1))
