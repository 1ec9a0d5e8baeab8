"""The kernels on shards of several GPUs give what they give on one.

Of 16-bit operands both are compared with each other in float32, at twice what one
rounding of the largest value may differ.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apart, mesh_of, sharded
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import decode_mha, mha, ring_mha, ulysses_mha
from jax_flash.parallel import zigzag_order

SIZE = jax.device_count()
LENGTH = 256 * SIZE
RUNS = np.cumsum(np.random.default_rng(2).random((2, LENGTH)) < 0.01, 1, np.int32)

pytestmark = pytest.mark.skipif(SIZE < 2, reason="one device")

KERNEL = functools.partial(mha, implementation="cuda", return_lse=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window_size": (100, None)},
    "segments": {"is_causal": True, "q_segment_ids": RUNS, "kv_segment_ids": RUNS},
    "soft cap": {"softcap": 5.0},
}


def operands(width: int = 128) -> tuple[jax.Array, ...]:
    """Query, key, value and a cotangent."""
    keys = jax.random.split(jax.random.key(1), 4)
    heads = (8, 2 * SIZE, 2 * SIZE, 8)
    return tuple(
        jax.random.normal(key, (2, LENGTH, n, width), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )


def both(f: Callable) -> Callable:
    """Results and gradients of `f` of query, key and value, for a cotangent."""

    @jax.jit
    def run(query: Any, key: Any, value: Any, dout: Any) -> Any:
        (out, lse), pullback = jax.vjp(f, query, key, value)
        return out, lse, *pullback((dout, jnp.ones_like(lse)))

    return run


def assert_equal(actual: Any, expected: Any) -> None:
    for x, y in zip(actual, expected, strict=True):
        bound = 2.0**-7 if y.dtype == jnp.bfloat16 else 1e-4
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=bound * np.abs(y).max())


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
@pytest.mark.parametrize("name", OPTIONS)
def test_sequences(name: str, f: Callable) -> None:
    tensors, (arrays, rest) = operands(), apart(OPTIONS[name])
    expected = both(functools.partial(KERNEL, **arrays, **rest))(*tensors)
    parallel = sharded(f, SIZE, arrays, implementation="cuda", **rest)
    assert_equal(both(parallel)(*tensors), expected)


def test_zigzag() -> None:
    order = zigzag_order(LENGTH, SIZE)
    back = np.argsort(order)
    ring = sharded(
        ring_mha, SIZE, implementation="cuda", layout="zigzag", is_causal=True
    )

    def in_order(*tensors: jax.Array) -> Any:
        out, lse = ring(*(x[:, order] for x in tensors))
        return out[:, back], lse[..., back]

    tensors = operands(64)
    expected = both(functools.partial(KERNEL, is_causal=True))(*tensors)
    assert_equal(both(in_order)(*tensors), expected)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x"), P(None, "x")], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_sharded_operands(width: int, spec: P) -> None:
    """Batch and heads stay where they are; a sharded sequence is gathered."""
    tensors = operands(width)
    run = both(functools.partial(KERNEL, is_causal=True))
    sharding = NamedSharding(mesh_of(SIZE), spec)
    assert_equal(run(*jax.device_put(tensors, sharding)), run(*tensors))


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=str)
def test_decoding(spec: P) -> None:
    query, key, value, _ = operands()
    lengths = np.array([LENGTH, 77], np.int32)
    decode = jax.jit(functools.partial(decode_mha, implementation="cuda"))
    expected = decode(query[:, :1], key, value, lengths)
    mesh = mesh_of(SIZE)
    given = jax.device_put((query[:, :1], key, value), NamedSharding(mesh, spec))
    actual = decode(*given, jax.device_put(lengths, NamedSharding(mesh, P())))
    np.testing.assert_array_equal(
        np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    )
