"""Sampling and RMSNorm beside what XLA makes of the same mathematics.

    python -m benchmarks.ops             # about 40 s; --quick: half
    python -m benchmarks.ops --smoke     # tiny, on any machine

Kernel time by CUPTI (wall time where there is none), median of several rounds in turn.
The inputs of successive calls are different buffers that together exceed the L2, so
every call reads from memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash
from benchmarks import timing

ROTATED_BYTES = 256 << 20
MOST_BUFFERS = 64
VOCABULARY = 128256


def xla_top_k_top_p(x: jax.Array, key: jax.Array) -> jax.Array:
    """Top-k 50 and top-p 0.9 by lax.top_k, then a categorical draw."""
    values, indices = jax.lax.top_k(x, 50)
    p = jax.nn.softmax(values, -1)
    kept = jnp.cumsum(p, -1) - p < 0.9
    drawn = jax.random.categorical(key, jnp.where(kept, values, -jnp.inf))
    return jnp.take_along_axis(indices, drawn[:, None], 1)[:, 0]


def xla_top_p(x: jax.Array, key: jax.Array) -> jax.Array:
    """Top-p 0.9 by a sort of the row."""
    indices = jnp.argsort(x, -1, descending=True)
    values = jnp.take_along_axis(x, indices, 1)
    p = jax.nn.softmax(values, -1)
    kept = jnp.cumsum(p, -1) - p < 0.9
    drawn = jax.random.categorical(key, jnp.where(kept, values, -jnp.inf))
    return jnp.take_along_axis(indices, drawn[:, None], 1)[:, 0]


def xla_norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
    """RMSNorm of the rounded sum, as one writes it."""
    total = x + residual
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype), total


def our_norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
    """The same by this package."""
    return jax_flash.rms_norm(x, weight, residual=residual)


def gradient(f: Callable) -> Callable:
    """The gradients by all arguments for cotangents that are the inputs themselves."""

    def run(x: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        _, vjp = jax.vjp(f, x, residual, weight)
        return vjp((residual, x))

    return run


def sampling_arms(batch: int, dtype: str, size: int) -> tuple[dict[str, Any], Any, int]:
    """Arms by name, what makes inputs from a seed, and the bytes a call must move."""
    draw = jax_flash.sample
    arms = {
        "ours top-k 50 top-p 0.9": functools.partial(draw, top_k=50, top_p=0.9),
        "xla  top-k 50 top-p 0.9": xla_top_k_top_p,
        "ours top-p 0.9": functools.partial(draw, top_p=0.9),
        "ours plain": draw,
        "xla  categorical": lambda x, key: jax.random.categorical(key, x),
        "ours greedy": functools.partial(draw, temperature=0),
        "xla  argmax": lambda x, key: jnp.argmax(x, -1),
        "ours top_k(50)": lambda x, key: jax_flash.top_k(x, 50),
        "xla  top_k(50)": lambda x, key: jax.lax.top_k(x, 50),
    }
    if batch < 128:  # a sort of 128 rows takes 2 ms
        arms["xla  top-p 0.9 by sort"] = xla_top_p

    def make(seed: int) -> Any:
        key = jax.random.key(seed)
        return jax.random.normal(key, (batch, size), dtype), key

    return arms, make, batch * size * jnp.dtype(dtype).itemsize


def norm_arms(rows: int, columns: int) -> tuple[dict[str, Any], Any, int]:
    """The same for norms."""
    arms = {
        "ours": our_norm,
        "xla": xla_norm,
        "ours gradients": gradient(our_norm),
        "xla  gradients": gradient(xla_norm),
    }
    weight = jnp.ones(columns, jnp.bfloat16)

    def make(seed: int) -> Any:
        x, residual = jax.random.normal(
            jax.random.key(seed), (2, rows, columns), jnp.bfloat16
        )
        return x, residual, weight

    return arms, make, 4 * rows * columns * 2


def measure(
    title: str, arms: dict[str, Any], make: Any, nbytes: int, rounds: int, calls: int
) -> None:
    """Prints one line for each arm: time, bytes that must move / time, kernels."""
    count = max(2, min(MOST_BUFFERS, ROTATED_BYTES // nbytes + 1))
    inputs = jax.block_until_ready([make(seed) for seed in range(count)])
    binding = timing.cupti()
    prepared = {}
    for name, f in arms.items():
        compiled = jax.jit(f).lower(*inputs[0]).compile()
        turn = itertools.cycle(inputs)

        def run(compiled: Any = compiled, turn: Any = turn) -> Any:
            return compiled(*next(turn))

        call = timing.Call(run, jax.block_until_ready, lambda result: result)
        jax.block_until_ready(run())
        prepared[name] = call
    times: dict[str, list[float]] = {name: [] for name in arms}
    kernels: dict[str, int] = dict.fromkeys(arms, 0)
    for _ in range(rounds):
        for name, call in prepared.items():
            if binding is None:
                times[name].append(timing.wall_time(call, calls))
            else:
                got, names = timing.kernel_times(binding, call, calls)
                times[name] += got
                kernels[name] = len(names)
    print(f"{title}, {nbytes / 2**20:.1f} MB")
    for name, values in times.items():
        us = statistics.median(values)
        rate = nbytes / us / 1e6
        print(f"  {name:26} {us:9.1f} us {rate:6.2f} TB/s {kernels[name]:3} kernels")
    sys.stdout.flush()


def main() -> None:
    """Runs the cells."""
    parser = argparse.ArgumentParser(
        description="sample, top_k and rms_norm beside what XLA does"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny problems")
    parser.add_argument("--quick", action="store_true", help="fewer cells")
    arguments = parser.parse_args()
    small, quick = arguments.smoke, arguments.quick
    rounds, calls = (1, 2) if small else (3, 20)
    print(jax.devices()[0].device_kind, "CUPTI" if timing.cupti() else "wall time")
    batches = (1, 16, 128) if not small else (2,)
    for batch in batches:
        for dtype in ("float32",) if quick or small else ("float32", "bfloat16"):
            size = 1000 if small else VOCABULARY
            arms, make, nbytes = sampling_arms(batch, dtype, size)
            title = f"sampling B={batch} V={size} {dtype}"
            measure(title, arms, make, nbytes, rounds, calls)
    shapes = ((64, 4096), (8192, 4096), (8192, 8192), (65536, 512))
    if quick:
        shapes = shapes[:2]
    for rows, columns in ((8, 64),) if small else shapes:
        arms, make, nbytes = norm_arms(rows, columns)
        title = f"residual + RMSNorm {rows} x {columns} bfloat16"
        measure(title, arms, make, nbytes, rounds, calls)


if __name__ == "__main__":
    main()
