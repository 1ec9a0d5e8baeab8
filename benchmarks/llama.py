"""Steps of a Llama-3-8B with random weights: decoding and prefill.

    PYTHONPATH=. python -m benchmarks.llama             # H200: 4k decoding, 8k prefill
    python -m benchmarks.llama --batches 1 16 --no-prefill
    python -m benchmarks.llama --smoke                  # tiny, on any machine

Needs jax, flax and numpy. It compiles all programs first, then measures cell by cell,
for as long as is left of `--budget` seconds, and ends with the ratios to the targets.

The model of examples/llama in bfloat16. Three arms take turns on the same weights and
caches:

  jax_flash   `step` or `prefill` and `sample`, contiguous caches
  jax_nn      `jax.nn.dot_product_attention` by cuDNN, then `lax.top_k` and a draw
  paged       as jax_flash, the memory seen as pages in random order; decoding only

All draw with top-k 50 and top-p 0.9. A decoding step reads every weight but the
embedding table, and keys and values of the whole context: `bound` is those bytes at 4.3
TB/s. The bound of prefill is its matrix products at the speed of one of 8192 x 8192 x
8192, measured in the same process. Times are wall times of steps started back to back;
`kernels` is the time inside kernels by CUPTI.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "llama"))

import llama_model
import llama_weights
from llama_model import Caches, Config, Llama, Sampling

import jax_flash
from benchmarks.ops import xla_top_k_top_p
from benchmarks.timing import Call, Protocol, Samples, Summary, measure, short

BANDWIDTH = 4.3e12
"""Bytes a second: what an H200 reaches of its 4.8e12."""
PAGE = 64
SAMPLING = Sampling(1.0, top_k=50, top_p=0.9)
# Between logits of arms, root mean square over that of the logits: bfloat16, 32 layers.
TOLERANCE = 0.1
ARMS = ("jax_flash", "jax_nn", "paged")
"""In the order of their turns. Pages come last: see `run_cell`."""
MANY = 64
"""Sequences from which on products are not cut along what they sum over."""
ROUNDS = 3
SHORTEST, LONGEST = 0.02, 0.3
"""Seconds of a turn, which the budget is spread over."""

LLAMA3_8B = Config(
    vocabulary=128256,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=14336,
    rope_theta=5e5,
    tied=False,
    context=8192,
    dtype=jnp.dtype("bfloat16"),
)
SMOKE = dataclasses.replace(
    LLAMA3_8B, vocabulary=512, width=64, layers=2, heads=4, kv_heads=2, head_dim=16,
    hidden=96,
)  # fmt: skip

Program = Callable[..., tuple[jax.Array, jax.Array, Caches]]
"""From model, tokens, caches and key to drawn tokens, logits, and caches."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A step: `tokens` new ones of each of `batch` sequences, `context` with them."""

    batch: int
    context: int
    tokens: int = 1

    @property
    def is_prefill(self) -> bool:
        """Whether the sequences begin here."""
        return self.tokens == self.context

    @property
    def name(self) -> str:
        """For example "decode b16 n4096"."""
        kind = "prefill" if self.is_prefill else "decode"
        return f"{kind} b{self.batch} n{self.context}"

    def nbytes(self, config: Config) -> int:
        """What a decoding step has to read: weights, keys and values."""
        each = jnp.dtype(config.dtype).itemsize
        kv = 2 * config.kv_heads * config.head_dim * config.layers
        weights = matrix_weights(config) + config.vocabulary * config.width
        return each * (weights + self.batch * self.context * kv)

    def flops(self, config: Config) -> float:
        """Of the matrix products; those of attention of the causal half."""
        layers = 2 * matrix_weights(config) * self.batch * self.tokens
        head = 2 * config.vocabulary * config.width * self.batch
        pairs = self.batch * self.tokens * self.tokens / 2
        attention = 4 * config.layers * config.heads * config.head_dim * pairs
        return layers + head + attention


def matrix_weights(config: Config) -> int:
    """Weights of all projections of the layers."""
    heads = 2 * (config.heads + config.kv_heads) * config.head_dim
    return config.layers * config.width * (heads + 3 * config.hidden)


def random_model(config: Config) -> Llama:
    """Weights that keep the variance of the stream, drawn on the device."""
    shapes = nnx.state(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    values = {}
    for number, (path, leaf) in enumerate(nnx.to_flat_state(shapes)):
        key = jax.random.key(number)
        if len(leaf.shape) == 1:
            values[path] = jnp.ones(leaf.shape, leaf.dtype)
        else:
            # Kernels are [in, out], weights and tables [out, in].
            size = leaf.shape[0] if path[-1] == "kernel" else leaf.shape[1]
            drawn = draw(key, leaf.shape, leaf.dtype)
            values[path] = drawn * jnp.asarray(size**-0.5, leaf.dtype)
    return llama_weights.with_values(config, values)


def filled_caches(config: Config, cell: Cell) -> Caches:
    """Contiguous caches of random keys and values, as they are before the step."""
    shape = (cell.batch, cell.context, config.kv_heads, config.head_dim)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(1), 2 * config.layers)
    drawn = [draw(key, shape, config.dtype) for key in keys]
    lengths = jnp.full(cell.batch, cell.context - cell.tokens, jnp.int32)
    return Caches(drawn[: config.layers], drawn[config.layers :], lengths)


def again(before: Caches, after: Caches) -> Caches:
    """What a step leaves, with the lengths before it: every step is the same one."""
    return dataclasses.replace(after, lengths=before.lengths)


def ours(cell: Cell) -> Program:
    """What `examples/llama` does."""
    run = llama_model.prefill if cell.is_prefill else llama_model.step
    counts = np.full(cell.batch, cell.tokens, np.int32)

    def program(model: Llama, tokens: jax.Array, caches: Caches, key: jax.Array) -> Any:
        logits, after = run(model, tokens, jnp.asarray(counts), caches)
        return SAMPLING.draw(logits, key), logits, again(caches, after)

    return program


def paged(cell: Cell) -> Program:
    """The same on the same memory, whose pages belong to the sequences at random."""
    if cell.is_prefill:
        raise NotImplementedError("prefill attends to the new tokens only")
    page = min(PAGE, cell.context)
    slots = cell.context // page
    order = np.random.default_rng(0).permutation(cell.batch * slots)
    table = order.reshape(cell.batch, slots).astype(np.int32)

    def program(model: Llama, tokens: jax.Array, caches: Caches, key: jax.Array) -> Any:
        shape = caches.k[0].shape

        def cut(x: jax.Array) -> jax.Array:
            return x.reshape(-1, page, *shape[2:])

        pages = jax.tree.map(cut, dataclasses.replace(caches, lengths=()))
        pages = dataclasses.replace(
            pages, lengths=caches.lengths, page_table=jnp.asarray(table)
        )
        drawn, logits, pages = ours(cell)(model, tokens, pages, key)
        k, v = ([x.reshape(shape) for x in y] for y in (pages.k, pages.v))
        return drawn, logits, Caches(k, v, pages.lengths)

    return program


def jax_nn(cell: Cell, implementation: Any) -> Program:
    """The same model with attention of `jax.nn`, and sampling by `lax.top_k`."""

    def program(model: Llama, tokens: jax.Array, caches: Caches, key: jax.Array) -> Any:
        layers = []
        positions = caches.lengths[:, None] + jnp.arange(cell.tokens, dtype=jnp.int32)
        turned = functools.partial(
            jax_flash.rope, positions=positions, inv_freq=model.config.frequencies
        )
        attend_nn = functools.partial(
            jax.nn.dot_product_attention, implementation=implementation
        )

        def attend(index: int, qkv: jax.Array) -> jax.Array:
            query, key, value = llama_model.split_heads(qkv, model.config)
            query, key = turned(query), turned(key)
            layers.append(caches.layer(index).append(key, value))
            if cell.is_prefill:
                return attend_nn(query, key, value, is_causal=True)
            return attend_nn(
                query,
                layers[-1].k,
                layers[-1].v,
                key_value_seq_lengths=caches.lengths + cell.tokens,
            )

        x, residual = model.hidden(tokens, attend)
        logits = model.logits(x[:, -1], residual[:, -1])
        k, v = [layer.k for layer in layers], [layer.v for layer in layers]
        after = again(caches, Caches(k, v, layers[-1].lengths))
        return xla_top_k_top_p(logits, key), logits, after

    return program


def program_of(arm: str, cell: Cell) -> Program:
    """What an arm runs."""
    if arm == "jax_nn":
        gpu = jax.default_backend() == "gpu"
        return jax_nn(cell, "cudnn" if gpu else "xla")
    return {"jax_flash": ours, "paged": paged}[arm](cell)


def tokens_of(cell: Cell, config: Config) -> jax.Array:
    """Random tokens, int32 [batch, tokens]."""
    shape = (cell.batch, cell.tokens)
    return jax.random.randint(jax.random.key(0), shape, 0, config.vocabulary, jnp.int32)


def weights(model: Llama) -> list[jax.Array]:
    """Of a model in a fixed order: a list is handed to a program in little time."""
    return jax.tree.leaves(nnx.state(model))


def of_weights(program: Program, model: Llama) -> Callable[..., Any]:
    """The same program from `weights` of such a model."""
    graph, state = nnx.split(model)
    structure = jax.tree.structure(state)

    def run(given: list[jax.Array], *others: Any) -> Any:
        return program(nnx.merge(graph, jax.tree.unflatten(structure, given)), *others)

    return run


def options(cell: Cell) -> dict[str, Any] | None:
    """Of the compiler, for all arms.

    XLA tries kernels on operands that fit the L2 cache. For many rows it so comes to
    sums of parts, which have to be written and read again.
    """
    if cell.batch < MANY or cell.is_prefill or jax.default_backend() != "gpu":
        return None
    return {"xla_gpu_experimental_force_split_k": 1}


def compiled(cell: Cell, config: Config, model: Llama) -> dict[str, Any]:
    """The program of each arm, or why there is none, as text.

    One after the other: XLA chooses the kernels of the first arm's matrix products by
    trial, and takes the same for the others.
    """
    caches = jax.eval_shape(lambda: filled_caches(config, cell))
    tokens, key = tokens_of(cell, config), jax.random.key(0)
    programs: dict[str, Any] = {}
    for arm in ARMS:
        try:
            program = jax.jit(
                of_weights(program_of(arm, cell), model), donate_argnums=2
            )
            lowered = program.lower(weights(model), tokens, caches, key)
            programs[arm] = lowered.compile(compiler_options=options(cell))
        except Exception as error:  # an arm may fail in any way
            programs[arm] = short(error)
    return programs


def run_cell(
    cell: Cell,
    config: Config,
    model: Llama,
    programs: dict[str, Any],
    protocol: Protocol,
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Samples of the arms, and why others did not run."""
    held, given = [filled_caches(config, cell)], weights(model)
    tokens, key = tokens_of(cell, config), jax.random.key(0)
    calls, why_not = {}, {}
    expected = None
    # Pages in random order are other sequences, and write where contiguous caches do
    # not, so they come last.
    for name, program in programs.items():
        if isinstance(program, str):
            why_not[name] = program
            continue
        # A failed call may have taken the caches with it.
        if held[0].k[0].is_deleted():
            held[0] = filled_caches(config, cell)
        try:
            _, logits, held[0] = program(given, tokens, held[0], key)
            logits = np.asarray(logits)
        except Exception as error:  # an arm may fail in any way
            why_not[name] = short(error)
            continue
        if name != "paged":
            expected = logits if expected is None else expected
            difference = float((logits - expected).std() / expected.std())
            if not difference <= TOLERANCE:
                why_not[name] = f"logits differ by {difference:.2g} of their size"
                continue

        def run(program: Any = program) -> jax.Array:
            drawn, _, held[0] = program(given, tokens, held[0], key)
            return drawn

        calls[name] = Call(run, jax.block_until_ready, lambda result: result)
    return measure(calls, protocol), why_not


def ceiling(size: int, dtype: Any, protocol: Protocol) -> float:
    """Operations a second of one matrix product of this size."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    call = Call(lambda: product(a, b), jax.block_until_ready, lambda result: result)
    samples = measure({"matmul": call}, protocol)["matmul"]
    return 2 * size**3 / Summary.of(samples.wall_us).median_us * 1e6


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, on any machine")
    parser.add_argument("--batches", type=int, nargs="*", help="of decoding: 1 16 64")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument(
        "--budget", type=float, default=100.0, help="seconds for everything, 100"
    )
    parser.add_argument("--json", type=pathlib.Path, help="results go here, too")
    arguments = parser.parse_args(argv)
    if arguments.batches is None:
        arguments.batches = [2] if arguments.smoke else [1, 16, 64]
    if any(batch < 1 for batch in arguments.batches):
        parser.error(f"needs --batches of at least 1, got {arguments.batches}")
    if not arguments.budget > 0:
        parser.error(f"needs a positive --budget, got {arguments.budget}")
    return arguments


def turn_seconds(remaining: float, cells: int) -> float:
    """Length of a turn's two measurements, so that `cells` cells fit.

    A third of the time goes to what comes before the turns of a cell.
    """
    turns = 2 * ROUNDS * len(ARMS) * cells
    return min(LONGEST, max(SHORTEST, 2 / 3 * remaining / turns))


def limit(cell: Cell) -> float:
    """What a step may take at most, in times of its bound."""
    if cell.is_prefill:
        return 1 / 0.6
    return 1.1 if cell.batch >= 16 else 1.25


def row_of(cell: Cell, arm: str, sample: Samples, bound: float) -> dict[str, Any]:
    """The figures of an arm, in milliseconds."""
    ms = Summary.of(sample.wall_us).median_us / 1e3
    kernels = None
    if sample.kernel_us:
        kernels = Summary.of(sample.kernel_us).median_us / 1e3
    return {
        "cell": cell.name,
        "arm": arm,
        "ms": ms,
        "kernels_ms": kernels,
        "bound_ms": bound,
    }


def print_targets(cells: list[Cell], rows: list[dict[str, Any]]) -> None:
    """How our arms stand to the bounds, and to `jax_nn`."""
    print(f"\n{'target':18} {'arm':10} {'of bound':>9} {'at most':>8} {'':4} to jax_nn")
    times = {(row["cell"], row["arm"]): row["ms"] for row in rows}
    bounds = {row["cell"]: row["bound_ms"] for row in rows}
    for cell in cells:
        beside = times.get((cell.name, "jax_nn"))
        for arm in ("jax_flash", "paged"):
            ms = times.get((cell.name, arm))
            if ms is None:
                continue
            ratio, most = ms / bounds[cell.name], limit(cell)
            faster = "-" if beside is None else f"{beside / ms:.2f} times as fast"
            print(
                f"{cell.name:18} {arm:10} {ratio:9.3f} {most:8.3f} "
                f"{'met' if ratio <= most else 'no':4} {faster}"
            )


def main(argv: list[str] | None = None) -> int:
    """Prints a table; 1 if one of our arms failed, else 0."""
    start = time.perf_counter()
    arguments = parse_arguments(argv)
    config = SMOKE if arguments.smoke else LLAMA3_8B
    context, prompt, matmul = (128, 64, 64) if arguments.smoke else (4096, 8192, 8192)
    protocol = Protocol(rounds=ROUNDS, seconds=0.002, idle=0.0, most=50)
    cells = [Cell(batch, context) for batch in arguments.batches]
    if not arguments.no_prefill:
        cells.append(Cell(1, prompt, prompt))
    device = jax.devices()[0].device_kind
    if not arguments.smoke:
        protocol = dataclasses.replace(protocol, seconds=LONGEST)
    peak = ceiling(matmul, config.dtype, protocol)
    print(f"{device}, {config.dtype} product at {peak / 1e12:.3g} TFLOP/s", flush=True)
    model = random_model(config)
    with concurrent.futures.ThreadPoolExecutor(max(1, len(cells))) as pool:
        programs = list(pool.map(lambda cell: compiled(cell, config, model), cells))
    print(f"compiled after {time.perf_counter() - start:.0f} s")
    print(f"{'cell':18} {'arm':10} {'ms':>9} {'kernels':>9} {'bound':>9} {'ratio':>6}")
    rows, failed = [], False
    for number, cell in enumerate(cells):
        remaining = arguments.budget - (time.perf_counter() - start)
        if remaining <= 0:
            print(f"{cell.name:18} left out: --budget {arguments.budget:g} is spent")
            continue
        if not arguments.smoke:
            seconds = turn_seconds(remaining, len(cells) - number)
            protocol = dataclasses.replace(protocol, seconds=seconds)
        bound = cell.nbytes(config) / BANDWIDTH * 1e3
        if cell.is_prefill:
            bound = cell.flops(config) / peak * 1e3
        samples, why_not = run_cell(cell, config, model, programs[number], protocol)
        for arm in ARMS:
            sample = samples.get(arm, Samples(errors=[why_not.get(arm, "")]))
            if sample.errors or not sample.wall_us:
                print(f"{cell.name:18} {arm:10} {' '.join(sample.errors)}", flush=True)
                failed |= arm == "jax_flash" or (arm == "paged" and not cell.is_prefill)
                continue
            row = row_of(cell, arm, sample, bound)
            kernels = row["kernels_ms"]
            inside = "-" if kernels is None else f"{kernels:.3f}"
            print(
                f"{cell.name:18} {arm:10} {row['ms']:9.3f} {inside:>9} {bound:9.3f}"
                f" {row['ms'] / bound:6.2f}",
                flush=True,
            )
            rows.append(row | {"peak_tflops": peak / 1e12})
    print_targets(cells, rows)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"device": device, "rows": rows}, indent=1)
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
