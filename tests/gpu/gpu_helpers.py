"""What the GPU tests share: running the kernels with poisoned outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import baseline
import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jax_flash import mha

# Relative to the size of the logits, which lse is as large as.
LSE_TOLERANCE = 2e-6


def poisoned_call(call: Callable, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> Any:
    """`call` whose results are written where there was NaN.

    Buffers of NaN are donated to the program, so they become its results' memory.

    Args:
      call: a function of arrays that returns as many arrays as there are shapes.
      shapes: (shape, dtype) of its results.

    Returns:
      A function of the same arguments: (results, addresses of the donated buffers).
    """

    def with_poison(poison: Any, *args: Any) -> Any:
        return call(*args)

    jitted = jax.jit(with_poison, donate_argnums=0, keep_unused=True)

    def run(*args: Any) -> Any:
        poison = [jnp.full(shape, jnp.nan, dtype) for shape, dtype in shapes]
        addresses = [x.unsafe_buffer_pointer() for x in poison]
        return jitted(poison, *args), addresses

    return run


def run_kernel(query: Any, key: Any, value: Any, **given: Any) -> tuple[Any, Any]:
    """(out, lse) of the CUDA kernel as NumPy arrays, its results poisoned before."""
    operands = {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
    options = {name: x for name, x in given.items() if name not in operands}

    def call(query: Any, key: Any, value: Any, operands: dict[str, Any]) -> Any:
        return mha(
            query,
            key,
            value,
            **operands,
            **options,
            return_lse=True,
            implementation="cuda",
        )

    batch, rows, heads, _ = query.shape
    results = (
        ((batch, rows, heads, value.shape[-1]), query.dtype),
        ((batch, heads, rows), np.float32),
    )
    arguments = jax.device_put((query, key, value, operands))
    got, donated = poisoned_call(call, results)(*arguments)
    assert [x.unsafe_buffer_pointer() for x in got] == donated
    return np.asarray(got[0]), np.asarray(got[1])


def assert_correct(query: Any, key: Any, value: Any, **given: Any) -> None:
    """The kernel against float64: out, lse, and exact zeros in rows without keys."""
    out, lse = run_kernel(query, key, value, **given)
    expected = oracle.attention(query, key, value, **given)
    clean = oracle.without_padding(query, key, value, given)
    q, k, v = (x.astype(query.dtype) for x in clean)
    baseline.assert_accurate(out, q, k, v, expected.out, **given)
    empty = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (np.moveaxis(out, 1, 2)[empty].astype(np.float32) == 0).all()
    difference = np.where(empty, 0, lse - np.where(empty, 0, expected.lse))
    largest = np.abs(np.where(empty, 0, expected.lse)).max(initial=1)
    assert np.isfinite(difference).all()
    assert np.abs(difference).max(initial=0) <= LSE_TOLERANCE * largest
