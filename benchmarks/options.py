"""Options of attention beside the dense causal call of the same size.

    python -m benchmarks.options           # about 2 minutes
    python -m benchmarks.options --smoke   # tiny, on any machine

Kernels with intervals run only if JAX_FLASH_OPTION_KERNELS=1 is in the environment. The
time is that of all kernels of a call: what XLA computes of segment ids or offsets right
before the kernel is in it. "work" are the pairs of query and key that a call looks at
over those of the dense one, "rate" is the pairs per second over the dense call's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from benchmarks import timing

DOCUMENTS = 16
WIDTHS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A self-attention [1, length, heads, width], causal everywhere.

    Attributes:
      length: of the sequence, in which the documents are packed.
      heads: of queries, keys and values alike.
      width: of all of them.
    """

    length: int
    heads: int
    width: int

    def inputs(self) -> tuple[jax.Array, ...]:
        """Query, key, value and a cotangent, random normal."""
        shape = (1, self.length, self.heads, self.width)
        keys = jax.random.split(jax.random.key(0), 4)
        return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    def offsets(self) -> np.ndarray:
        """Where documents of random lengths begin, and the end."""
        rng = np.random.default_rng(0)
        cuts = rng.choice(np.arange(1, self.length), DOCUMENTS - 1, replace=False)
        return np.array([0, *np.sort(cuts), self.length], np.int32)


@dataclasses.dataclass(frozen=True)
class Row:
    """A call of query, key, value and further operands, and the pairs it looks at."""

    attention: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]
    pairs: float


def rows(problem: Problem, implementation: str) -> dict[str, Row]:
    """The calls by name; the first is the one that the others are measured by."""
    offsets = problem.offsets()
    lengths = np.diff(offsets).astype(float)
    ids = jnp.asarray(np.repeat(np.arange(DOCUMENTS), lengths.astype(int))[None])
    ids = ids.astype(jnp.int32)
    dense = problem.length * (problem.length + 1) / 2
    packed = float((lengths * (lengths + 1) / 2).sum())
    # Windows cut long documents.
    window = problem.length // 16
    short = np.minimum(lengths, window)
    within = float((short * (short + 1) / 2 + (lengths - short) * (window + 1)).sum())
    powers = -8.0 * np.arange(1, problem.heads + 1) / problem.heads
    slopes = jnp.asarray(np.exp2(powers), jnp.float32)
    sinks = jnp.ones(problem.heads, jnp.float32)

    def mha(query: Any, key: Any, value: Any, **options: Any) -> jax.Array:
        options |= {"is_causal": True, "implementation": implementation}
        return jax_flash.mha(query, key, value, **options)

    def segments(query: Any, key: Any, value: Any, ids: Any) -> jax.Array:
        return mha(query, key, value, q_segment_ids=ids, kv_segment_ids=ids)

    def varlen(query: Any, key: Any, value: Any, offsets: Any) -> jax.Array:
        options = {"is_causal": True, "implementation": implementation}
        tensors = query[0], key[0], value[0]
        return jax_flash.mha_varlen(*tensors, offsets, **options)[None]

    def softcap(query: Any, key: Any, value: Any) -> jax.Array:
        return mha(query, key, value, softcap=30.0)

    def alibi(query: Any, key: Any, value: Any, slopes: Any) -> jax.Array:
        return mha(query, key, value, bias=jax_flash.alibi(slopes))

    def all_of_them(query: Any, key: Any, value: Any, ids: Any, sinks: Any) -> Any:
        options = {"q_segment_ids": ids, "kv_segment_ids": ids, "sinks": sinks}
        options |= {"window_size": (window, 0), "softcap": 30.0}
        return mha(query, key, value, **options)

    return {
        "dense": Row(mha, (), dense),
        f"segments ({DOCUMENTS} documents)": Row(segments, (ids,), packed),
        f"varlen ({DOCUMENTS} documents)": Row(varlen, (jnp.asarray(offsets),), packed),
        "softcap": Row(softcap, (), dense),
        "alibi": Row(alibi, (slopes,), dense),
        "segments + window + sinks + softcap": Row(all_of_them, (ids, sinks), within),
    }


def call_of(row: Row, inputs: tuple[jax.Array, ...], backward: bool) -> timing.Call:
    """The forward, or forward and backward in one program, compiled."""

    def forward(tensors: Any, cotangent: Any, operands: Any) -> Any:
        del cotangent
        return row.attention(*tensors, *operands)

    def both(tensors: Any, cotangent: Any, operands: Any) -> Any:
        out, vjp = jax.vjp(lambda *a: row.attention(*a, *operands), *tensors)
        return out, vjp(cotangent)

    arguments = inputs[:3], inputs[3], row.operands
    compiled = jax.jit(both if backward else forward).lower(*arguments).compile()
    return timing.Call(
        lambda: compiled(*arguments), jax.block_until_ready, lambda result: result
    )


def measure(problem: Problem, protocol: timing.Protocol, implementation: str) -> None:
    """Prints one line for each call, forward and with the backward."""
    inputs = jax.block_until_ready(problem.inputs())
    for backward in (False, True):
        table = rows(problem, implementation)
        calls = {name: call_of(row, inputs, backward) for name, row in table.items()}
        samples = timing.measure(calls, protocol)
        kind = "forward and backward" if backward else "forward"
        print(
            f"d{problem.width} n{problem.length} h{problem.heads} causal, {kind}",
            f"{'us':>10} {'work':>7} {'rate':>7} kernels",
            flush=True,
        )
        first, speed = next(iter(table)), 0.0
        for name, sample in samples.items():
            if sample.errors:
                print(f"  {name:38} {sample.errors[0]}")
                continue
            us = statistics.median(sample.kernel_us or sample.wall_us)
            pairs = table[name].pairs
            speed = pairs / us if name == first else speed
            rate = f"{pairs / us / speed:7.3f}" if speed else f"{'-':>7}"
            work = pairs / table[first].pairs
            kernels = len(sample.kernels) or "?"
            print(f"  {name:38} {us:10.1f} {work:7.3f} {rate} {kernels}", flush=True)


def main() -> None:
    """Runs the cells."""
    parser = argparse.ArgumentParser(description="options beside the dense call")
    parser.add_argument("--smoke", action="store_true", help="tiny, by plain JAX")
    parser.add_argument("--length", type=int, default=16384)
    arguments = parser.parse_args()
    print(jax.devices()[0].device_kind, "CUPTI" if timing.cupti() else "wall time")
    if arguments.smoke:
        protocol = timing.Protocol(rounds=1, seconds=0.0, idle=0.0)
        measure(Problem(96, 2, 16), protocol, "xla")
        return
    if os.environ.get("JAX_FLASH_OPTION_KERNELS") != "1":
        parser.error("JAX_FLASH_OPTION_KERNELS=1 must be in the environment")
    for width in WIDTHS:
        problem = Problem(arguments.length, 2048 // width, width)
        measure(problem, timing.Protocol(rounds=2, seconds=0.04), "cuda")


if __name__ == "__main__":
    main()
