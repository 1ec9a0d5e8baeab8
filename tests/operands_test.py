"""How the handlers read query, key and value: their own C++, called on the CPU.

`emulator/operands.cc` decodes buffers and attributes as the handlers of the kernels do
and copies what kernels would read.
"""

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash._src import inner, packed
from jax_flash._src.config import AttentionConfig

ROOT = Path(__file__).parent.parent
TARGET = "read_operands"

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def handler(tmp_path_factory: pytest.TempPathFactory) -> None:
    # A process can register a target once; pytest-xdist may come back to this module.
    library = tmp_path_factory.mktemp("operands") / "operands.so"
    here = ROOT / "tests" / "emulator"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-o", str(library)]
    command += [f"-I{here / 'include'}", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", jax.ffi.include_dir(), str(here / "operands.cc")]
    subprocess.run(command, check=True)
    capsule = jax.ffi.pycapsule(getattr(ctypes.CDLL(str(library)), TARGET))
    jax.ffi.register_ffi_target(TARGET, capsule, platform="cpu")


def config_of(*orders: tuple[int, ...]) -> AttentionConfig:
    return AttentionConfig(scale=1.0, orders=orders)


def read(config: AttentionConfig, *operands: Any, shapes: Any, **changes: Any) -> Any:
    """What is read as query, key and value; batch dimensions, and the alignments."""
    results = [jax.ShapeDtypeStruct(shape, operands[0].dtype) for shape in shapes]
    call = jax.ffi.ffi_call(
        TARGET,
        [*results, jax.ShapeDtypeStruct((12,), jnp.int32)],
        input_layouts=inner._layouts(config, ()),
    )
    attributes = inner._attributes(config) | changes
    return jax.jit(lambda *x: call(*x, **attributes))(*operands)


def numbered(*shape: int) -> jax.Array:
    """Every element another number, as far as bfloat16 tells them apart."""
    bits = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape) % 0x7F00
    return jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)


def assert_read(got: Any, *expected: Any) -> None:
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(
            np.ascontiguousarray(x).view(np.uint16).reshape(-1),
            np.ascontiguousarray(y).view(np.uint16).reshape(-1),
        )


def test_three_arrays_of_any_order() -> None:
    query, key, value = numbered(3, 2, 5, 4, 8), numbered(1, 2, 6, 2, 8), None
    value = numbered(3, 1, 6, 2, 16)
    config = config_of((1, 2, 0, 3, 4), (0, 1, 2, 3, 4), (3, 0, 1, 2, 4))
    shapes = [(6, 5, 4, 8), (6, 6, 2, 8), (6, 6, 2, 16)]
    *got, facts = read(config, query, key, value, shapes=shapes)
    full = [jnp.broadcast_to(x, (3, 2, *x.shape[2:])) for x in (query, key, value)]
    assert_read(got, *full)
    assert facts[:5].tolist() == [2, 16, 16, 16, 0]


@pytest.mark.parametrize("width", [8, 6, 3])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)], ids=str)
def test_one_array_of_all_three(heads: tuple[int, int], width: int) -> None:
    query_heads, kv_heads = heads
    whole = numbered(3, 5, (query_heads + 2 * kv_heads) * width)
    config = packed.packed(config_of(*((0, 1, 2, 3),) * 3), heads)
    parts = packed.split(heads, whole)
    *got, facts = read(config, *[whole] * 3, shapes=[x.shape for x in parts])
    assert_read(got, *parts)
    alignment = {8: 16, 6: 4, 3: 2}[width]
    assert facts[1:4].tolist() == [alignment] * 3


@pytest.mark.parametrize("precision", [None, "highest", "tf32"])
@pytest.mark.parametrize("width", [4, 3])
def test_float32(width: int, precision: str | None) -> None:
    whole = jnp.arange(3 * 5 * 8 * width, dtype=jnp.float32).reshape(3, 5, -1)
    parts = packed.split((4, 2), whole)
    config = packed.packed(config_of(*((0, 1, 2, 3),) * 3), (4, 2))
    config = dataclasses.replace(config, precision=precision)
    *got, facts = read(config, *[whole] * 3, shapes=[x.shape for x in parts])
    assert_read(got, *parts)
    alignment = {4: 16, 3: 4}[width]
    element_type = 3 if precision == "tf32" else 2
    assert facts[1:5].tolist() == [alignment] * 3 + [element_type]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3)], ids=str)
def test_one_array_of_any_order(order: tuple[int, ...]) -> None:
    heads = 4, 2
    whole = numbered(3, 2, 5, 64)
    config = packed.packed(config_of(*((0, 1, 2, 3, 4),) * 3), heads)
    config = dataclasses.replace(config, orders=(order,))
    parts = packed.split(heads, whole)
    shapes = [(6, *x.shape[2:]) for x in parts]
    *got, facts = read(config, *[whole] * 3, shapes=shapes)
    assert_read(got, *parts)
    assert facts[0] == (1 if order == (0, 1, 2, 3) else 2)


def interval_operands(*more: Any) -> list[Any]:
    """Of 5 rows, 6 keys, 4 heads and 2 batch entries: tensors, intervals, the rest."""
    tensors = numbered(2, 5, 4, 8), numbered(2, 6, 2, 8), numbered(2, 6, 2, 8)
    shapes = (1, 64, 4), (1, 1, 8), (1, 64), (1, 1, 8)
    return [*tensors, *(jnp.zeros(shape, jnp.int32) for shape in shapes), *more]


def read_intervals(*more: Any, **changes: Any) -> list[int]:
    operands = interval_operands(*more)
    order = tuple(range(4))
    call = jax.ffi.ffi_call(
        TARGET,
        [
            *(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in operands[:3]),
            jax.ShapeDtypeStruct((12,), jnp.int32),
        ],
    )
    attributes = inner._attributes(config_of(order, order, order))
    attributes |= {"has_intervals": True, **changes}
    return jax.jit(lambda *x: call(*x, **attributes))(*operands)[3].tolist()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_bias_and_mask(dtype: Any) -> None:
    """Strides of 0 along what shares them, rows of whole eights and of 16 bytes."""
    given = {"has_mask": True, "has_bias": True}
    bits, bias = jnp.zeros((2, 1, 5, 4), jnp.uint32), jnp.zeros((2, 4, 5, 8), dtype)
    number = [jnp.bfloat16, jnp.float16, jnp.float32].index(dtype)
    facts = read_intervals(bits, bias, **given)
    assert facts[5:] == [160, 40, 8, 20, 0, 4, number]
    facts = read_intervals(bits[:1, :, :1], bias[:1, :, :1], **given)
    assert facts[5:] == [0, 8, 0, 0, 0, 0, number]


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.zeros((2, 4, 5, 6), np.float32), "rows of 8"),
        (np.zeros((2, 3, 5, 8), np.float32), "does not fit 4 heads"),
        (np.zeros((3, 4, 5, 8), np.float32), "the batch dims of"),
        (np.zeros((2, 4, 5, 8), np.int32), "bias must be bf16, f16 or f32"),
    ],
)
def test_bias_that_does_not_fit(bias: np.ndarray, message: str) -> None:
    with pytest.raises(Exception, match=message):
        read_intervals(bias, has_bias=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tf32": True}, "tf32 is for query of f32, got BF16"),
        ({"packed_heads": np.int64(3)}, "7 heads, which do not divide its width"),
        ({"packed_kv_heads": np.int64(0)}, "an array of 4 heads of queries and 0"),
        ({"packed_heads": np.int64(5), "packed_kv_heads": np.int64(1)}, "do not div"),
        ({"query_order": np.array([0, 2, 1])}, "no permutation that ends with"),
        ({"packed_heads": np.int64(0), "packed_kv_heads": np.int64(0)}, "at least one"),
    ],
)
def test_what_does_not_fit_is_an_error(changes: dict[str, Any], message: str) -> None:
    whole = numbered(3, 5, 64)
    config = packed.packed(config_of(*((0, 1, 2, 3),) * 3), (4, 2))
    shapes = [x.shape for x in packed.split((4, 2), whole)]
    with pytest.raises(Exception, match=message):
        read(config, *[whole] * 3, shapes=shapes, **changes)
