"""Attention of float32 beside what XLA makes of `jax.nn.dot_product_attention`.

    python -m benchmarks.float32                       # under a minute
    python -m benchmarks.float32 --causal --backward   # other cells
    python -m benchmarks.float32 --smoke               # tiny, on any machine

Arms take turns on the same inputs. A line has the time of all kernels of a call, the
rate, the difference from XLA's result with precision "highest" in the Frobenius norm,
and the speed over XLA's with default precision (TF32 on GPUs) and with "highest".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash
from benchmarks import timing

LENGTHS = (2048, 4096, 8192)
WIDTHS = (64, 128)
REFERENCES = ("xla default", "xla highest")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A self-attention [1, length, heads, width] of float32."""

    length: int
    heads: int
    width: int
    is_causal: bool
    backward: bool

    @property
    def flops(self) -> float:
        """Of the products that a mask leaves; five instead of two in the backward."""
        pairs = self.length**2 / (2 if self.is_causal else 1)
        return 4 * pairs * self.heads * self.width * (3.5 if self.backward else 1)

    def __str__(self) -> str:
        mask = " causal" if self.is_causal else ""
        kind = "forward and backward" if self.backward else "forward"
        return f"d{self.width} n{self.length} h{self.heads}{mask}, {kind}"


def arms(cell: Cell, implementation: str) -> dict[str, Callable[..., jax.Array]]:
    """Functions of query, key and value by name, XLA's last."""

    def own(precision: str | None) -> Callable[..., jax.Array]:
        def call(query: Any, key: Any, value: Any) -> jax.Array:
            return jax_flash.mha(
                query,
                key,
                value,
                is_causal=cell.is_causal,
                precision=precision,
                implementation=implementation,
            )

        return call

    def xla(precision: str) -> Callable[..., jax.Array]:
        def call(query: Any, key: Any, value: Any) -> jax.Array:
            with jax.default_matmul_precision(precision):
                return jax.nn.dot_product_attention(
                    query, key, value, is_causal=cell.is_causal, implementation="xla"
                )

        return call

    return {
        "default": own(None),
        "tf32": own("tf32"),
        "highest": own("highest"),
        REFERENCES[0]: xla("default"),
        REFERENCES[1]: xla("highest"),
    }


def call_of(attention: Callable[..., jax.Array], cell: Cell) -> timing.Call:
    """The forward, or forward and backward in one program, compiled."""
    shape = (1, cell.length, cell.heads, cell.width)
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, cotangent = (jax.random.normal(k, shape, jnp.float32) for k in keys)

    def both(*arrays: jax.Array) -> Any:
        out, vjp = jax.vjp(attention, *arrays[:3])
        return out, *vjp(arrays[3])

    arguments = (*inputs, cotangent) if cell.backward else tuple(inputs)
    compiled = jax.jit(both if cell.backward else attention).lower(*arguments).compile()
    return timing.Call(
        lambda: compiled(*arguments), jax.block_until_ready, jax.tree.leaves
    )


def measure(cell: Cell, protocol: timing.Protocol, implementation: str) -> bool:
    """Prints a line for each arm; whether this package's ran."""
    calls, failed, results = {}, {}, {}
    for name, attention in arms(cell, implementation).items():
        try:
            calls[name] = call_of(attention, cell)
            results[name] = calls[name].heads(calls[name].run())
        except Exception as error:  # XLA may be out of memory
            calls.pop(name, None)
            failed[name] = timing.short(error)
    exact = results.get(REFERENCES[1])
    differences = {
        name: max(
            float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
            for x, y in zip(result, exact, strict=True)
        )
        for name, result in results.items()
        if exact is not None
    }
    del results, exact
    samples = timing.measure(calls, protocol)
    failed |= {name: one.errors[0] for name, one in samples.items() if one.errors}
    times = {
        name: one.median_us() for name, one in samples.items() if name not in failed
    }
    print(f"{cell!s:44} {'us':>10} {'TFLOP/s':>8} {'differs':>8} over XLA", flush=True)
    for name in arms(cell, implementation):
        if name in failed:
            print(f"  {name:42} {failed[name]}")
            continue
        line = f"  {name:42} {times[name]:10.1f} {cell.flops / times[name] / 1e6:8.1f}"
        line += f" {differences.get(name, float('nan')):8.1e}"
        for reference in REFERENCES:
            ratio = times.get(reference, float("nan")) / times[name]
            line += f" {ratio:6.2f}"
        print(line, flush=True)
    return not failed.keys() & {"default", "tf32", "highest"}


def main() -> int:
    """Runs the cells; 1 if a call of this package failed."""
    parser = argparse.ArgumentParser(description="attention of float32 beside XLA")
    parser.add_argument("--smoke", action="store_true", help="tiny, by plain JAX")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backward", action="store_true")
    arguments = parser.parse_args()
    print(jax.devices()[0].device_kind, "CUPTI" if timing.cupti() else "wall time")
    complete = True
    if arguments.smoke:
        protocol = timing.Protocol(rounds=1, seconds=0.0, idle=0.0)
        cells = [Cell(96, 2, 16, True, backward) for backward in (False, True)]
        for cell in cells:
            complete = measure(cell, protocol, "xla") and complete
        return int(not complete)
    protocol = timing.Protocol(rounds=2, seconds=0.03)
    for width in arguments.widths:
        for length in arguments.lengths:
            cell = Cell(
                length, 2048 // width, width, arguments.causal, arguments.backward
            )
            complete = measure(cell, protocol, "cuda") and complete
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
