"""Calls of one program for `command_buffer_test`, checked here, counted there.

XLA is asked by its flags to run the program as a CUDA graph and to log that. Between
the calls lengths change, in the memory that the graph has recorded and in other memory.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import specs
from gpu_helpers import assert_result
from gradient_helpers import Problem, assert_gradients, problem_of

from jax_flash import mha

CALLS = 12
SPEC = specs.Spec(3, 200, 1000, 8, 2, 128)
SHORT = 5  # queries of a second call, which splits its keys
SOFTCAP = 3.0  # of a third one, whose kernels have intervals


def program(query: Any, key: Any, value: Any, dout: Any, lengths: Any) -> Any:
    """Three calls and a gradient with operations around them."""
    options: dict[str, Any] = {
        "key_value_seq_lengths": lengths,
        "is_causal": True,
        "return_lse": True,
        "implementation": "cuda",
    }
    doubled = query + query
    first, vjp = jax.vjp(lambda *x: mha(*x, **options), doubled, key, value)
    gradients = vjp((dout, jax.numpy.zeros_like(first[1])))
    short = mha(doubled[:, :SHORT], key, value, **options)
    capped = mha(doubled, key, value, softcap=SOFTCAP, **options)
    return (first, short, capped), gradients


def main() -> None:
    """Raises if a result is wrong."""
    rng = np.random.default_rng(0)
    compiled = jax.jit(program)
    # Donation keeps the address.
    write = jax.jit(lambda old, new: new + 0, donate_argnums=0, keep_unused=True)
    kept: list[Any] = []
    device = lengths = None
    for i in range(CALLS):
        values = rng.integers(0, SPEC.key_length + 1, SPEC.batch, dtype=np.int32)
        if i % 4 == 0 or device is None or lengths is None:
            problem = problem_of(SPEC, i)
            device = jax.device_put((*problem.arrays, problem.dout))
            lengths = jax.device_put(values)
            kept.append((device, lengths))  # so that the next ones lie elsewhere
        else:
            address = lengths.unsafe_buffer_pointer()
            lengths = jax.block_until_ready(write(lengths, jax.device_put(values)))
            assert lengths.unsafe_buffer_pointer() == address
            kept[-1] = (device, lengths)
        print(f"call {i} begins", file=sys.stderr, flush=True)
        results = jax.block_until_ready(compiled(*device, lengths))
        print(f"call {i} ends", file=sys.stderr, flush=True)
        query, key, value, dout = (np.asarray(x) for x in device)
        query = query + query
        given = {"key_value_seq_lengths": values, "is_causal": True}
        gradients = tuple(np.asarray(x) for x in results[1])
        assert_gradients(gradients, Problem((query, key, value), given, dout))
        capped = given | {"softcap": SOFTCAP}
        calls = (query, given), (query[:, :SHORT], given), (query, capped)
        for (rows, own), result in zip(calls, results[0], strict=True):
            out, lse = (np.asarray(x) for x in result)
            assert_result((out, lse), ((rows, key, value), own))
        del results
    print("correct calls:", CALLS)


if __name__ == "__main__":
    main()
