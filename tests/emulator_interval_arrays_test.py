"""The kernels that compute the arrays of calls with intervals, run on the CPU."""

import ctypes
import shutil
from collections.abc import Callable
from typing import Any
from unittest import mock

import intervals_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import aligned, build
from intervals_test import CASES, CAUSAL, LARGER, ids, segments
from mask_ranges_test import mask_of

from jax_flash._src import intervals, registry

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

_OPERANDS = (
    ("has_ids", "row_ids"),
    ("has_ids", "key_ids"),
    ("has_query_lengths", "query_lengths"),
    ("has_kv_lengths", "key_lengths"),
    ("has_offsets", "row_offsets"),
    ("has_offsets", "key_offsets"),
    ("has_mask", "row_ranges"),
    ("has_mask", "row_hidden"),
)
_RESULTS = ("rows", "row_tiles", "keys", "key_tiles")


class Params(ctypes.Structure):
    """As in csrc/ops/intervals.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sizes", *(x[1] for x in _OPERANDS))),
        *(
            (name, ctypes.c_int32)
            for name in (
                "offsets",
                "window_left",
                "window_right",
                "most_queries",
                "most_keys",
            )
        ),
        ("bottom_right", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in _RESULTS),
        *((name, ctypes.c_int32) for name in ("sequences", "row_count", "key_count")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("intervals", tmp_path_factory.mktemp("intervals"))


def held(x: Any) -> np.ndarray:
    copy = aligned(x.shape, np.int32, 0)
    copy[...] = x
    return copy


def calls_of(library: ctypes.CDLL) -> Callable:
    """`jax.ffi.ffi_call` that runs the emulated kernels, outside of jit."""

    def ffi_call(target: str, results: Any) -> Callable:
        assert target == registry.INTERVALS_TARGET

        def run(sizes: Any, *others: Any, **attributes: Any) -> list[jax.Array]:
            names = [name for flag, name in _OPERANDS if attributes[flag]]
            given = {"sizes": held(sizes)}
            given |= {n: held(x) for n, x in zip(names, others, strict=True)}
            # What is not written is noticed.
            made = {
                name: aligned(x.shape, x.dtype, -77)
                for name, x in zip(_RESULTS, results, strict=True)
            }
            longest = [int(attributes[f"max_seqlen_{x}"]) for x in "qk"]
            most = [intervals.MAX_LENGTH if n < 0 else n for n in longest]
            params = Params(
                **{name: x.ctypes.data for name, x in (given | made).items()},
                offsets=given["row_offsets"].shape[1] if "row_offsets" in given else 0,
                **{
                    # As csrc/ffi/intervals.cc bounds them.
                    name: min(int(attributes[name]), intervals.MAX_LENGTH)
                    for name in ("window_left", "window_right")
                },
                most_queries=most[0],
                most_keys=most[1],
                bottom_right=attributes["bottom_right"],
                sequences=results[0].shape[0],
                row_count=results[1].shape[1],
                key_count=results[3].shape[1],
            )
            assert library.intervals(ctypes.byref(params)) == 0
            return [jnp.asarray(x) for x in made.values()]

        return run

    return ffi_call


def assert_made(
    library: ctypes.CDLL, config: Any, operands: dict[str, Any], expected: Any
) -> None:
    """What the emulated kernels make is what is expected, to the bit."""
    with (
        jax.disable_jit(),
        mock.patch.object(jax.ffi, "ffi_call", calls_of(library)),
    ):
        made = intervals.by_kernel(config, operands)
    for name, x, y in zip(_RESULTS, made, expected, strict=True):
        np.testing.assert_array_equal(x, y, name)


@pytest.mark.parametrize("name", [*CASES, *LARGER])
def test_kernels_compute_the_same(library: ctypes.CDLL, name: str) -> None:
    sizes, given, fields = (CASES | LARGER)[name]
    o = intervals_test.operands_of(sizes, given, intervals_test.batch_of(given))
    config = intervals_test.config_of(o, fields)
    wide = {"window_left", "window_right"} & set(fields)
    bounded = {n: min(fields[n], intervals.MAX_LENGTH // 2) for n in wide}
    expected = intervals.intervals(intervals_test.config_of(o, fields | bounded), o)
    assert_made(library, config, o, expected)


def test_more_tiles_of_keys_than_shared_memory_holds(library: ctypes.CDLL) -> None:
    sizes = 70, 132_000
    keys = np.arange(sizes[1])[None] // 300
    rows = np.linspace(0, keys.max() + 3, sizes[0], dtype=int)[None]
    o = intervals_test.operands_of(sizes, segments(rows, keys), 1)
    config = intervals_test.config_of(o, {})
    assert_made(library, config, o, intervals.intervals(config, o))


@pytest.mark.parametrize("kind", ["blocks", "band", "row", "none", "random"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_masks(library: ctypes.CDLL, kind: str, with_ids: bool) -> None:
    """Ranges of a boolean mask, of more sequences than the ids are of."""
    sizes = 200, 330
    given = segments(ids(1, 200, 3, 0.1), ids(1, 330, 3, 0.1)) if with_ids else {}
    o = intervals_test.operands_of(sizes, given, 2)
    o["mask"] = jnp.asarray(mask_of(kind, (2, 1, *sizes)))
    config = intervals_test.config_of(o, CAUSAL)
    expected = intervals.intervals(config, o)
    assert_made(library, config, o, expected)


def test_batch_dimensions(library: ctypes.CDLL) -> None:
    """Operands that share sequences, each along another dimension."""
    o = {
        "query": jnp.ones((2, 3, 4, 70, 1, 1)),
        "key": jnp.ones((2, 3, 1, 130, 1, 1)),
        "q_segment_ids": jnp.asarray(ids(3, 70, 2).reshape(1, 3, 1, 70)),
        "kv_segment_ids": jnp.asarray(ids(1, 130, 2).reshape(1, 1, 1, 130)),
        "key_value_seq_lengths": jnp.array([[[60]], [[130]]], jnp.int32),
    }
    config = intervals_test.config_of(o, CAUSAL)
    expected = intervals.intervals(config, o)
    assert_made(library, config, o, expected)
