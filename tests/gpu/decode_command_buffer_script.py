"""Calls of one program for `decode_kernel_test`: lengths change in a CUDA graph."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import oracle

from jax_flash import decode_mha

CALLS = 12


def main() -> None:
    """Raises if a result is wrong."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((4, 2, 8, 128), np.float32).astype(jnp.bfloat16)
    k, v = (
        rng.standard_normal((4, 2048, 2, 128), np.float32).astype(jnp.bfloat16)
        for _ in range(2)
    )

    @jax.jit
    def program(query: Any, k: Any, v: Any, lengths: Any) -> Any:
        first = decode_mha(query + query, k, v, lengths, implementation="cuda")
        return first, decode_mha(first, k, v, lengths, implementation="cuda")

    # Donation keeps the address.
    write = jax.jit(lambda old, new: new + 0, donate_argnums=0, keep_unused=True)
    arrays = jax.device_put((query, k, v))
    one, two = (jax.device_put((query[:n], k[:n], v[:n])) for n in (1, 2))
    lengths = jax.device_put(np.zeros(4, np.int32))
    for _ in range(CALLS):
        values = rng.integers(0, 2049, 4, dtype=np.int32)
        lengths = write(lengths, jax.device_put(values))
        first, second = jax.block_until_ready(program(*arrays, lengths))
        given = {"key_value_seq_lengths": values, "is_causal": True}
        for q, got in ((query + query, first), (np.asarray(first), second)):
            want = oracle.attention(q, k, v, **given).out
            error = np.abs(np.asarray(got, np.float64) - want).max()
            assert error < 3e-2, error
        # Other executables, the same bits: by clusters of 16 where there are any, and
        # cut elsewhere.
        for arrays_of in (one, two):
            few = len(arrays_of[0])
            fewer = jax.block_until_ready(program(*arrays_of, lengths[:few]))
            for got, want in zip(fewer, (first, second), strict=True):
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want)[:few])
        # The graph once more, with nothing else in between.
        again = program(*arrays, lengths)
        for got, want in zip(again, (first, second), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    print("correct calls:", CALLS)


if __name__ == "__main__":
    main()
