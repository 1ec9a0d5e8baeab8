"""Bitwise equality of repeated calls."""

from typing import Any

import chex
import jax
import numpy as np
import pytest
import specs

from jax_flash import mha

REPEATS = 50

SPECS = (
    # Keys split among thread blocks.
    specs.Spec(1, 16, 8192, 32, 8, 128),
    specs.Spec(1, 16, 8192, 32, 8, 128, is_causal=True),
    specs.Spec(1, 2, 5000, 8, 1, 64, dtype="float16"),
    specs.Spec(2, 5, 3001, 6, 2, 256, key_lengths=(3001, 700)),
    specs.Spec(1, 3, 2000, 7, 1, 96, window_size=(900, 10)),
    # Packed heads without a split.
    specs.Spec(9, 7, 300, 48, 6, 128, is_causal=True),
    specs.Spec(3, 40, 500, 16, 2, 64, is_causal=True, query_lengths=(40, 3, 0)),
    # More blocks than fit at once, longest first.
    specs.Spec(2, 1024, 1024, 16, 4, 64, is_causal=True),
    specs.Spec(2, 1024, 1024, 16, 16, 128, is_causal=True),
    specs.Spec(2, 1000, 1100, 20, 20, 256, dtype="float16", is_causal=True),
    specs.Spec(2, 777, 1500, 10, 10, 192, 128, is_causal=True),
    specs.Spec(1, 4096, 4096, 4, 4, 128, window_size=(512, 0), is_causal=True),
    specs.Spec(4, 512, 512, 32, 32, 64),
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_repeated_calls_are_equal(spec: specs.Spec) -> None:
    operands = {k: x for k, x in spec.options.items() if isinstance(x, np.ndarray)}
    options = {k: x for k, x in spec.options.items() if k not in operands}

    def call(query: Any, key: Any, value: Any, operands: Any) -> Any:
        return mha(
            query,
            key,
            value,
            **operands,
            **options,
            return_lse=True,
            implementation="cuda",
        )

    jitted = jax.jit(call)
    arguments = jax.device_put((*spec.arrays(), operands))
    first = jitted(*arguments)
    # Started back to back: some find the chip busy with the one before.
    again = [jitted(*arguments) for _ in range(REPEATS)]
    for one in again:
        chex.assert_trees_all_equal(one, first)
