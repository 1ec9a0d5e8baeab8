"""What the GPU tests share: running the kernels with poisoned outputs."""

from typing import Any

import baseline
import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jax_flash import mha

# Relative to the size of the logits, which lse is as large as.
LSE_TOLERANCE = 2e-6


def poison(*shapes_and_dtypes: tuple[tuple[int, ...], Any]) -> list[int]:
    """Fills device memory of these sizes with NaN and frees it.

    The allocator hands the same blocks to the next results of these sizes.

    Returns:
      Their addresses.
    """
    arrays = [
        jnp.full(shape, jnp.nan, dtype) for shape, dtype in shapes_and_dtypes if shape
    ]
    jax.block_until_ready(arrays)
    addresses = [array.unsafe_buffer_pointer() for array in arrays]
    for array in arrays:
        array.delete()
    return addresses


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

    arguments = jax.device_put((query, key, value, operands))
    compiled = jax.jit(call).lower(*arguments).compile()
    batch, rows, heads, _ = query.shape
    poison(
        ((batch, rows, heads, value.shape[-1]), query.dtype),
        ((batch, heads, rows), jnp.float32),
    )
    out, lse = compiled(*arguments)
    return np.asarray(out), np.asarray(lse)


def assert_correct(query: Any, key: Any, value: Any, **given: Any) -> None:
    """The kernel against float64: out, lse, and exact zeros in rows without keys."""
    out, lse = run_kernel(query, key, value, **given)
    expected = oracle.attention(query, key, value, **given)
    clean = oracle.without_padding(query, key, value, given)
    clean = [x.astype(query.dtype) for x in clean]
    baseline.assert_accurate(out, *clean, expected.out, **given)
    empty = np.isneginf(expected.lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (np.moveaxis(out, 1, 2)[empty].astype(np.float32) == 0).all()
    difference = np.where(empty, 0, lse - np.where(empty, 0, expected.lse))
    largest = np.abs(np.where(empty, 0, expected.lse)).max(initial=1)
    assert np.isfinite(difference).all()
    assert np.abs(difference).max(initial=0) <= LSE_TOLERANCE * largest
