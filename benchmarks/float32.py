"""Attention of float32 beside what XLA makes of `jax.nn.dot_product_attention`.

    python -m benchmarks.float32                       # under a minute
    python -m benchmarks.float32 --causal --backward   # other cells
    python -m benchmarks.float32 --option softcap      # with an option of `mha`
    python -m benchmarks.float32 --smoke               # tiny, on any machine

Arms take turns on the same inputs. A line has the time of all kernels of a call, the
rate, the difference from XLA's result with precision "highest" in the Frobenius norm,
and the speed over XLA's with default precision (TF32 on GPUs) and with "highest". With
an option XLA's are those of this package's own jnp, which has no array of all scores.
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
PRECISIONS = (None, "tf32", "highest")
REFERENCES = ("xla default", "xla highest")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A self-attention [1, length, heads, width] of float32."""

    length: int
    heads: int
    width: int
    is_causal: bool
    backward: bool
    option: str | None = None

    @property
    def flops(self) -> float:
        """Of the products that a mask leaves; five instead of two in the backward."""
        pairs = self.length**2 / (2 if self.is_causal else 1)
        return 4 * pairs * self.heads * self.width * (3.5 if self.backward else 1)

    def __str__(self) -> str:
        mask = " causal" if self.is_causal else ""
        kind = "forward and backward" if self.backward else "forward"
        option = f" {self.option}" if self.option else ""
        return f"d{self.width} n{self.length} h{self.heads}{mask}{option}, {kind}"


def _documents(cell: Cell) -> dict[str, Any]:
    """Sixteen of equal lengths."""
    ids = jnp.arange(cell.length)[None] * 16 // cell.length
    return {"q_segment_ids": ids, "kv_segment_ids": ids}


def _scores(cell: Cell) -> jax.Array:
    shape = (1, 1, cell.length, cell.length)
    return jax.random.normal(jax.random.key(1), shape, jnp.float32)


OPTIONS: dict[str, Callable[[Cell], tuple[dict[str, Any], dict[str, Any]]]] = {
    "segments": lambda cell: (_documents(cell), {}),
    "softcap": lambda cell: ({}, {"softcap": 30.0}),
    "alibi": lambda cell: (
        {"bias": jax_flash.alibi(jnp.geomspace(0.5, 0.004, cell.heads))},
        {},
    ),
    "bias": lambda cell: ({"bias": _scores(cell)}, {}),
    "mask": lambda cell: ({"mask": _scores(cell) < 0.5}, {}),
    "dropout": lambda cell: (
        {"dropout_key": jax.random.key(2)},
        {"dropout_rate": 0.1},
    ),
}
"""Arrays and other arguments of `mha` for a cell, by the name of the option."""


def arms(
    cell: Cell, implementation: str, static: dict[str, Any]
) -> dict[str, Callable[..., jax.Array]]:
    """Functions of query, key, value and named arrays by name, XLA's last."""

    def own(
        precision: str | None, implementation: str = implementation
    ) -> Callable[..., jax.Array]:
        def call(query: Any, key: Any, value: Any, given: dict[str, Any]) -> jax.Array:
            return jax_flash.mha(
                query,
                key,
                value,
                is_causal=cell.is_causal,
                precision=precision,
                implementation=implementation,
                **static,
                **given,
            )

        return call

    def xla(precision: str) -> Callable[..., jax.Array]:
        def call(query: Any, key: Any, value: Any, _: dict[str, Any]) -> jax.Array:
            with jax.default_matmul_precision(precision):
                return jax.nn.dot_product_attention(
                    query, key, value, is_causal=cell.is_causal, implementation="xla"
                )

        return call

    calls = {precision or "default": own(precision) for precision in PRECISIONS}
    if cell.option:
        references = [own("tf32", "xla"), own("highest", "xla")]
    else:
        references = [xla("default"), xla("highest")]
    return calls | dict(zip(REFERENCES, references, strict=True))


def call_of(
    attention: Callable[..., jax.Array], cell: Cell, given: dict[str, Any]
) -> timing.Call:
    """The forward, or forward and backward in one program, compiled."""
    shape = (1, cell.length, cell.heads, cell.width)
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, cotangent = (jax.random.normal(k, shape, jnp.float32) for k in keys)

    def both(query: Any, key: Any, value: Any, given: Any, cotangent: Any) -> Any:
        def f(*arrays: jax.Array) -> jax.Array:
            return attention(*arrays, given)

        out, vjp = jax.vjp(f, query, key, value)
        return out, *vjp(cotangent)

    arguments: tuple[Any, ...] = (*inputs, given)
    if cell.backward:
        arguments = (*arguments, cotangent)
    compiled = jax.jit(both if cell.backward else attention).lower(*arguments).compile()
    return timing.Call(
        lambda: compiled(*arguments), jax.block_until_ready, jax.tree.leaves
    )


def measure(cell: Cell, protocol: timing.Protocol, implementation: str) -> bool:
    """Prints a line for each arm; whether this package's ran."""
    calls, failed, results = {}, {}, {}
    given, static = OPTIONS[cell.option](cell) if cell.option else ({}, {})
    functions = arms(cell, implementation, static)
    for name, attention in functions.items():
        try:
            calls[name] = call_of(attention, cell, given)
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
    for name in functions:
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
    parser.add_argument("--option", choices=OPTIONS, help="an option of `mha`")
    arguments = parser.parse_args()
    print(jax.devices()[0].device_kind, "CUPTI" if timing.cupti() else "wall time")
    complete = True
    if arguments.smoke:
        protocol = timing.Protocol(rounds=1, seconds=0.0, idle=0.0)
        cells = [Cell(96, 2, 16, True, backward) for backward in (False, True)]
        cells += [Cell(96, 2, 16, True, True, option) for option in OPTIONS]
        for cell in cells:
            complete = measure(cell, protocol, "xla") and complete
        return int(not complete)
    protocol = timing.Protocol(rounds=2, seconds=0.03)
    for width in arguments.widths:
        for length in arguments.lengths:
            given = arguments.causal, arguments.backward, arguments.option
            cell = Cell(length, 2048 // width, width, *given)
            complete = measure(cell, protocol, "cuda") and complete
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
