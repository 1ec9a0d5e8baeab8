"""The source of the kernels in csrc/ops, run on the CPU, against the specification."""

import ctypes
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import aligned, build

from jax_flash._src import norm_op, sample_reference

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

TYPES = ("float32", "bfloat16", "float16")
"""In the order of ops::Element."""


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("ops", tmp_path_factory.mktemp("ops"))


def held(x: Any) -> np.ndarray:
    """A copy at a multiple of 16 bytes."""
    x = np.asarray(x)
    copy = aligned(x.shape, x.dtype, 0)
    copy[...] = x
    return copy


def pointer(x: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


def rows_of_every_kind(size: int, dtype: str) -> np.ndarray:
    """Normal logits, ties, all equal, some or all absent, infinite."""
    rng = np.random.default_rng(size)
    x = (3 * rng.standard_normal((8, size))).astype(np.float32)
    x[1] = np.round(x[1])
    x[2] = 0.5
    x[3, ::3] = -np.inf
    x[4, size // 2] = np.inf
    x[5, 1::2] = np.nan
    x[6] = -np.inf
    x[7] = np.where(np.arange(size) % 2, 0.0, -0.0)
    return x.astype(jnp.dtype(dtype))


# top_k, top_p, min_p, temperature
PARAMETERS: dict[str, tuple[Any, Any, Any, float]] = {
    "plain": (None, None, None, 1.0),
    "greedy": (None, None, None, 0.0),
    "k": (50, None, None, 0.7),
    "k and p": (50, 0.9, None, 1.0),
    "most that is ranked": (256, 0.97, None, 2.0),
    "k by histograms": (300, None, 0.001, 1.5),
    "k and p by histograms": (900, 0.8, None, 1.0),
    "p": (None, 0.9, None, 1.0),
    "small p": (None, 1e-6, None, 1.0),
    "min_p": (None, None, 0.05, 1.0),
    "all": (700, 0.95, 0.01, 3.0),
}


# Of an emulated device. A row has 1, 2, 4 or 8 thread blocks, if it is long enough.
MULTIPROCESSORS = (1, 16, 32, 64)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("size", [1, 5, 1000, 1027, 9000, 20000])
def test_sample(ops: ctypes.CDLL, size: int, name: str) -> None:
    number = list(PARAMETERS).index(name) + size
    multiprocessors = MULTIPROCESSORS[number % 4 if size < 20000 else 3]
    dtype = TYPES[number % 3]
    x = rows_of_every_kind(size, dtype)
    rng = np.random.default_rng(1)
    mask = rng.random((8, size)) < 0.5 if number % 2 else None
    k, p, min_p, temperature = PARAMETERS[name]

    def full(value: Any, dtype: Any) -> Any:
        return None if value is None else jnp.full(8, value, dtype)

    for seed in range(2):
        table = sample_reference.parameters(
            jax.random.key_data(jax.random.key(seed)),
            jnp.full(8, temperature, jnp.float32),
            full(k, jnp.int32),
            full(p, jnp.float32),
            full(min_p, jnp.float32),
        )
        expected = sample_reference.sample(
            jnp.asarray(x), table, None if mask is None else jnp.asarray(mask)
        )
        tokens = aligned((8,), np.int32, -7)
        arrays = [held(x), held(table), None if mask is None else held(mask)]
        # Two groups of four rows.
        assert not ops.sample(
            pointer(arrays[0]), 0, pointer(arrays[1]), pointer(arrays[2]), 0,
            pointer(tokens), 2, 4, size, TYPES.index(dtype), multiprocessors,
        )  # fmt: skip
        np.testing.assert_array_equal(tokens, expected)


def test_shared_logits_and_mask(ops: ctypes.CDLL) -> None:
    """Logits of one group for all, and one mask for all rows."""
    x = rows_of_every_kind(500, "float32")[:2]
    mask = np.arange(500) % 3 > 0
    table = sample_reference.parameters(
        jax.random.key_data(jax.random.key(0)), jnp.ones(6), None, None, None
    )
    every = jnp.tile(x, (3, 1))
    expected = sample_reference.sample(every, table, jnp.tile(mask, (6, 1)))
    tokens = aligned((6,), np.int32, -7)
    arrays = held(x), held(table), held(mask)
    assert not ops.sample(
        pointer(arrays[0]), 1, pointer(arrays[1]), pointer(arrays[2]), 3,
        pointer(tokens), 3, 2, 500, 0, 1,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("k", [1, 20, 256])
@pytest.mark.parametrize("size", [1, 300, 1027, 9000, 20000])
@pytest.mark.parametrize("dtype", TYPES)
def test_top_k(ops: ctypes.CDLL, dtype: str, size: int, k: int) -> None:
    multiprocessors = MULTIPROCESSORS[(size + k) % 4 if size < 20000 else 3]
    k = min(k, size)
    x = rows_of_every_kind(size, dtype)
    expected_values, expected = sample_reference.top_k(jnp.asarray(x), k)
    values, indices = aligned((8, k), x.dtype, 7), aligned((8, k), np.int32, -7)
    array = held(x)
    assert not ops.top_k(
        pointer(array), pointer(values), pointer(indices), 1, 8, size, k,
        TYPES.index(dtype), multiprocessors,
    )  # fmt: skip
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(
        values.view(np.uint8), np.asarray(expected_values).view(np.uint8)
    )


def norm_inputs(
    groups: int, rows: int, columns: int, dtype: str, f32_weight: bool
) -> dict[str, jax.Array]:
    rng = np.random.default_rng(columns)
    shapes = {
        "x": (groups, rows, columns),
        "residual": (groups, rows, columns),
        "weight": (groups, columns),
        "dy": (groups, rows, columns),
        "dsum": (groups, rows, columns),
    }
    arrays = {n: jnp.asarray(rng.standard_normal(s), dtype) for n, s in shapes.items()}
    if f32_weight:
        arrays["weight"] = arrays["weight"].astype(jnp.float32)
    return arrays


def assert_near(actual: np.ndarray, expected: Any, dtype: str) -> None:
    expected = np.asarray(expected, np.float64)
    # Of two results that are rounded from about the same number.
    step = 1e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= step * np.maximum(np.abs(expected), 0.1)).all(), error.max()


COLUMNS = (1, 8, 100, 512, 520, 1000, 2048, 4096, 4100)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm(
    ops: ctypes.CDLL, dtype: str, columns: int, residual: bool, few: bool
) -> None:
    number = COLUMNS.index(columns) + residual
    groups, rows = 2, 5
    f32_weight = dtype == "float32" or number % 3 == 0
    arrays = norm_inputs(groups, rows, columns, dtype, f32_weight)
    x_shared = number % 4 == 1 and not residual
    weight_shared = number % 2 == 1
    if x_shared:
        arrays["x"] = arrays["x"][:1]
    if weight_shared:
        arrays["weight"] = arrays["weight"][:1]
    names = ("x", "weight", "residual") if residual else ("x", "weight")
    options = norm_op.NormOptions(1e-5, "forward", residual)
    expected = norm_op.FORWARD.reference(*(arrays[n] for n in names), options=options)
    given = {n: held(arrays[n]) for n in names}
    y = aligned((groups, rows, columns), arrays["x"].dtype)
    total = aligned(y.shape, y.dtype) if residual else None
    scale = aligned((groups, rows), np.float32)
    assert not ops.rms_norm(
        pointer(given["x"]), int(x_shared), pointer(given.get("residual")),
        pointer(given["weight"]), int(weight_shared), pointer(y), pointer(total),
        pointer(scale), groups, rows, columns, ctypes.c_float(1e-5), int(f32_weight),
        TYPES.index(dtype), 132 if few else 1,
    )  # fmt: skip
    assert_near(y, expected[0], dtype)
    if total is not None:
        np.testing.assert_array_equal(total, expected[1])
    assert_near(scale, expected[-1], "float32")


@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_backward(
    ops: ctypes.CDLL, dtype: str, columns: int, with_sum: bool
) -> None:
    number = COLUMNS.index(columns) + with_sum
    groups, rows, blocks = 2, 7, 1 + number % 3
    f32_weight = dtype == "float32" or number % 3 == 0
    arrays = norm_inputs(groups, rows, columns, dtype, f32_weight)
    x, weight = arrays["x"], arrays["weight"]
    x_shared, weight_shared = number % 4 == 1, number % 2 == 1
    if x_shared:
        x = x[:1]
    if weight_shared:
        weight = weight[:1]
    wide = jnp.broadcast_to(x, (groups, rows, columns)).astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1) + jnp.float32(1e-5))
    operands = [x, weight, scale, arrays["dy"]]
    if with_sum:
        operands.append(arrays["dsum"])
    options = norm_op.NormOptions(1e-5, "backward", with_sum)
    dx, dweight = norm_op.BACKWARD.reference(
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        scale,
        *(a.astype(jnp.float32) for a in operands[3:]),
        options=options,
    )
    given = list(map(held, operands))
    got = aligned((groups, rows, columns), x.dtype)
    parts = aligned((groups, blocks, columns), np.float32)
    assert not ops.rms_norm_bwd(
        pointer(given[0]), int(x_shared), pointer(given[1]), int(weight_shared),
        pointer(given[2]), pointer(given[3]), pointer(given[4] if with_sum else None),
        pointer(got), pointer(parts), groups, rows, columns, blocks, int(f32_weight),
        TYPES.index(dtype),
    )  # fmt: skip
    error = np.abs(got.astype(np.float64) - np.asarray(dx, np.float64))
    step = 4e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    assert (error <= step * np.maximum(np.abs(dx), 1)).all(), error.max()
    np.testing.assert_allclose(parts.sum(1), dweight, rtol=1e-4, atol=1e-5)
