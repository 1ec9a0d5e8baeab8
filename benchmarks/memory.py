"""Peak memory of forward and backward against sequence length.

    python -m benchmarks.memory             # B1 H8 D128, 16k to 128k; needs a GPU
    python -m benchmarks.memory --smoke     # compiled only, on any machine

Beyond the eight tensors that such a step cannot do without (query, key, value, output
and their cotangents), by the compiler's plan and by what the device had in use.
Returns 1 if that grows faster than the length, or beyond the limit at 128k.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import jax
import jax.numpy as jnp

import jax_flash

LENGTHS = (1 << 14, 1 << 15, 1 << 16, 1 << 17)
SMOKE_LENGTHS = (1 << 13, 1 << 14, 1 << 15)
HEADS, WIDTH = 8, 128
# At the largest of `LENGTHS`, beyond the tensors.
LIMIT = 3e9
# Linear memory has the same bytes for each token at all lengths, or fewer.
GROWTH = 1.25


@dataclasses.dataclass(frozen=True)
class Usage:
    """Bytes of one length.

    Attributes:
      length: tokens.
      tensors: arguments and results of the program.
      planned: what the compiled program allocates beyond them.
      measured: peak of the device beyond them, None if it was not run.
    """

    length: int
    tensors: int
    planned: int
    measured: int | None

    @property
    def beyond(self) -> int:
        """The larger of planned and measured."""
        return max(self.planned, self.measured or 0)


def step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    *,
    implementation: str,
) -> tuple[jax.Array, ...]:
    """Output and the gradients of query, key and value."""

    def attention(*operands: jax.Array) -> jax.Array:
        return jax_flash.mha(*operands, implementation=implementation)

    out, pullback = jax.vjp(attention, query, key, value)
    return out, *pullback(cotangent)


def usage_of(length: int, implementation: str, run: bool) -> Usage:
    """Compiles a step of [1, length, HEADS, WIDTH] in bfloat16, and runs it."""
    shape = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16)
    lowered = jax.jit(step, static_argnames="implementation").lower(
        *[shape] * 4, implementation=implementation
    )
    compiled = lowered.compile()
    plan = compiled.memory_analysis()
    assert plan is not None
    tensors = plan.argument_size_in_bytes + plan.output_size_in_bytes
    measured = None
    if run:
        device = jax.devices()[0]
        inputs = [
            jax.random.normal(key, shape.shape, shape.dtype)
            for key in jax.random.split(jax.random.key(0), 4)
        ]
        jax.block_until_ready(compiled(*inputs))
        stats = device.memory_stats()
        if stats is not None:
            # The peak of the process: lengths must come in rising order.
            measured = stats["peak_bytes_in_use"] - tensors
    return Usage(length, tensors, plan.temp_size_in_bytes, measured)


def details(implementation: str) -> list[str]:
    """How an implementation runs the step, kernels by name, if it says so."""
    shape = jax.ShapeDtypeStruct((1, LENGTHS[0], HEADS, WIDTH), jnp.bfloat16)
    explanation = jax_flash.explain(shape, shape, shape, implementation=implementation)
    return list(explanation.details.values())


def failures(usages: list[Usage]) -> list[str]:
    """What is wrong with the usages of rising lengths."""
    found = []
    first = usages[0]
    for usage in usages[1:]:
        growth = (usage.beyond / usage.length) / (first.beyond / first.length)
        if growth > GROWTH:
            found.append(
                f"{growth:.2f} times the bytes for each token at {usage.length} as at "
                f"{first.length}"
            )
    last = usages[-1]
    if last.length == LENGTHS[-1] and last.beyond > LIMIT:
        found.append(f"{last.beyond / 1e9:.2f} GB beyond the tensors at {last.length}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if memory is not linear in the length or beyond the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="compile only, shorter")
    parser.add_argument("--implementation", help="default: cuda, with --smoke xla")
    arguments = parser.parse_args(argv)
    implementation = arguments.implementation or ("xla" if arguments.smoke else "cuda")
    print(f"{jax.devices()[0].device_kind}, {implementation}, B1 H{HEADS} D{WIDTH}; MB")
    print(f"{'tokens':>8} {'tensors':>9} {'planned beyond':>15} {'peak beyond':>12}")
    for detail in details(implementation):
        print(detail)
    usages = []
    for length in SMOKE_LENGTHS if arguments.smoke else LENGTHS:
        usage = usage_of(length, implementation, run=not arguments.smoke)
        usages.append(usage)
        peak = "-" if usage.measured is None else f"{usage.measured / 1e6:.0f}"
        print(
            f"{length:>8} {usage.tensors / 1e6:>9.0f} {usage.planned / 1e6:>15.0f} "
            f"{peak:>12}",
            flush=True,
        )
    wrong = failures(usages)
    for line in wrong:
        print(f"wrong: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
