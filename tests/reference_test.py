"""The jnp specification against float64, materialised and chunked."""

from typing import Any

import baseline
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import specs
from helpers import OPTION_COUNT, options_of_every_kind, shrink_blocks

import jax_flash
from jax_flash._src import blocks


@pytest.fixture(params=["materialised", "chunked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the specification, the chunked one with tiny blocks."""
    if request.param == "chunked":
        shrink_blocks(monkeypatch)
    return request.param


def check(
    arrays: tuple[np.ndarray, ...],
    options: dict[str, Any],
    expected: oracle.Result,
    plain: bool = True,
) -> None:
    """Compares with float64; `plain`: jnp without our rules can compute it too."""
    out, lse = jax_flash.mha(
        *map(jnp.asarray, arrays), **options, return_lse=True, implementation="xla"
    )
    chex.assert_shape(out, expected.out.shape)
    chex.assert_type(out, arrays[0].dtype)
    chex.assert_type(lse, jnp.float32)
    if plain:
        baseline.assert_accurate(out, *arrays, expected=expected.out, **options)
    else:
        np.testing.assert_allclose(out, expected.out, rtol=1e-5, atol=1e-5)
    empty = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    np.testing.assert_array_equal(np.asarray(out)[np.swapaxes(empty, 1, 2)], 0)
    finite = ~empty
    tolerance = 1e-5 if arrays[0].dtype == np.float32 else 1e-4
    np.testing.assert_allclose(
        np.asarray(lse)[finite], expected.lse[finite], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("spec", specs.CPU_TABLE, ids=str)
def test_table(spec: specs.Spec, path: str) -> None:
    arrays = spec.arrays()
    check(arrays, spec.options, oracle.attention(*arrays, **spec.options))


@pytest.mark.parametrize("index", range(OPTION_COUNT))
def test_options(index: int, path: str) -> None:
    spec = specs.Spec(2, 11, 13, 4, 2, 8, 6, dtype="float32")
    options = options_of_every_kind(2, 11, 13, 4)[index]
    arrays = spec.arrays()
    check(arrays, options, oracle.attention(*arrays, **options))


def test_padding_may_hold_anything(path: str) -> None:
    spec = specs.Spec(2, 9, 11, 4, 2, 8, dtype="float32")
    query, key, value = spec.arrays()
    query[0, 5:], key[1, 6:], value[1, 6:] = np.nan, np.inf, np.nan
    options = {
        "query_seq_lengths": np.array([5, 9]),
        "key_value_seq_lengths": np.array([11, 6]),
    }
    arrays = query, key, value
    check(arrays, options, oracle.attention(*arrays, **options), plain=False)


def test_padding_segments_may_hold_anything(path: str) -> None:
    spec = specs.Spec(1, 6, 8, 2, 1, 4, dtype="float32")
    query, key, value = spec.arrays()
    query[0, 4:], key[0, :2], value[0, :2] = np.nan, np.nan, np.inf
    options = {
        "q_segment_ids": np.array([0, 0, 1, 1, -1, -2]),
        "kv_segment_ids": np.array([-1, -1, 0, 0, 0, 1, 1, 1]),
    }
    arrays = query, key, value
    check(arrays, options, oracle.attention(*arrays, **options), plain=False)


def test_infinite_bias_makes_an_empty_row(path: str) -> None:
    arrays = specs.Spec(1, 6, 8, 2, 1, 4, dtype="float32").arrays()
    bias = np.zeros((6, 8), np.float32)
    bias[2] = -np.inf
    bias[3, :5] = -np.inf
    expected = oracle.attention(*arrays, bias=bias)
    check(arrays, {"bias": bias}, expected, plain=False)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits(size: float, path: str) -> None:
    query, key, value = specs.Spec(1, 6, 9, 2, 2, 4, dtype="float32").arrays()
    query = query * np.float32(size)
    out = jax_flash.mha(query, key, value, implementation="xla")
    expected = oracle.attention(query, key, value).out
    np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-2)


def test_blocks_cover_a_large_problem() -> None:
    """The default blocks, on a problem too large to be held at once."""
    spec = specs.Spec(1, 2900, 3100, 2, 1, 8, dtype="float32", window_size=(300, 5))
    arrays = spec.arrays()
    check(arrays, spec.options, oracle.attention(*arrays, **spec.options))


def test_memory_is_linear_in_the_lengths() -> None:
    size = 1 << 15
    spec = specs.Spec(1, size, size, 1, 1, 8, dtype="float32")
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in spec.shapes]
    run = jax.jit(lambda *a: jax_flash.mha(*a, is_causal=True, implementation="xla"))
    memory = run.lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 8 * blocks.MATERIALISE * 4 < size * size * 4


def test_float64() -> None:
    with jax.enable_x64(True):
        spec = specs.Spec(2, 7, 9, 4, 2, 8, dtype="float32")
        arrays = [x.astype(np.float64) for x in spec.arrays()]
        out, lse = jax_flash.mha(*arrays, is_causal=True, return_lse=True)
        chex.assert_type([out, lse], jnp.float64)
        expected = oracle.attention(*arrays, is_causal=True)
        np.testing.assert_allclose(out, expected.out, atol=1e-13)
        np.testing.assert_allclose(lse, expected.lse, atol=1e-13)
