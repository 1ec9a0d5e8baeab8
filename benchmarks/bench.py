"""Attention by this package and its peers, side by side in one process.

    python -m benchmarks.bench                  # the 36 main cells, default arms
    python -m benchmarks.bench --set ragged     # small and ragged ones; or all
    python -m benchmarks.bench --set backward   # the backward alone; backward_ragged
    python -m benchmarks.bench --cells 'd128.*causal' --arms jax_flash,cudnn --check
    python -m benchmarks.bench --smoke          # tiny, on any machine

Writes benchmarks/results/<name>.json after every cell and prints one line for each,
with the reason under it of every arm that did not run.
docs/benchmarks.md has the protocol.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import json
import math
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash
from benchmarks import baselines, timing
from benchmarks.baselines import ARMS, Arm, Arrays, Cell
from tests import specs

ROOT = pathlib.Path(__file__).parent
# Relative error in the Frobenius norm against float32: rounding the output to the
# dtype gives a third of this, rounding the weights as well about as much.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}
# A backward rounds the weights, their gradients and the output: twice that.
BACKWARD_FACTOR = 2
# The arm that a row's ratio is taken to, beside the best of all.
RATIO_ARM = "torch_fa2"
COMPILE_THREADS = 8
# Cells that are compiled together, before any of them is timed: a width of a main set.
PORTION = 12
# A kernel that only a forward may run; the backward's may name the forward as well.
FORWARD_KERNEL = re.compile(
    r"^(?!.*(bwd|bprop|backward)).*(fwd|fprop|forward|flash_attention_sm90)", re.I
)


def cell_of(spec: specs.Spec) -> Cell:
    """A row of the shape table that tests share."""
    window = None
    if spec.window_size is not None:
        left, right = spec.window_size
        assert left is not None
        assert right is not None
        window = left, right
    return Cell(
        batch=spec.batch,
        query_length=spec.query_length,
        key_length=spec.key_length,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        is_causal=spec.is_causal,
        dtype=spec.dtype,
        value_dim=spec.value_dim,
        window_size=window,
    )


def backwards(cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The same problems as backwards."""
    return tuple(dataclasses.replace(cell, backward=True) for cell in cells)


# What --set chooses from.
CELLS: dict[str, tuple[Cell, ...]] = {
    "main": tuple(map(cell_of, specs.BENCHMARK_CELLS)),
    "ragged": tuple(map(cell_of, specs.RAGGED_CELLS)),
    "backward": backwards(tuple(map(cell_of, specs.BENCHMARK_CELLS))),
    "backward_ragged": backwards(tuple(map(cell_of, specs.BACKWARD_RAGGED_CELLS))),
}

# How a set is measured unless the command line says otherwise.
PROTOCOLS = {
    "main": timing.Protocol(),
    "ragged": timing.Protocol(),
    "backward": timing.Protocol(rounds=2, seconds=0.04, idle=0.05),
    "backward_ragged": timing.Protocol(rounds=2, seconds=0.04, idle=0.05),
}

# The same in small, for any machine.
_SMOKE_MAIN = (
    Cell(2, 64, 64, 4, 2, 32, is_causal=False),
    Cell(2, 64, 64, 4, 2, 32, is_causal=True),
)
_SMOKE_RAGGED = (
    Cell(1, 4, 64, 4, 2, 32, is_causal=True),
    Cell(1, 4, 64, 4, 2, 32, is_causal=False),
    Cell(2, 64, 64, 2, 2, 32, is_causal=True, window_size=(16, 0)),
    Cell(2, 64, 64, 2, 2, 24, is_causal=True, value_dim=16, dtype="float16"),
)
SMOKE_CELLS: dict[str, tuple[Cell, ...]] = {
    "main": _SMOKE_MAIN,
    "ragged": _SMOKE_RAGGED,
    "backward": backwards(_SMOKE_MAIN),
    "backward_ragged": backwards(_SMOKE_RAGGED),
}


def unsupported(arms: list[Arm], cell: Cell) -> dict[str, str]:
    """Arms that cannot run a cell, each with the reason."""
    reasons = {arm.name: arm.why_not(cell) for arm in arms}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def compile_all(
    arms: list[Arm], cells: list[Cell]
) -> tuple[dict[tuple[str, Cell], Any], dict[str, float]]:
    """Compiles every arm for every cell, in threads, before any of them is timed.

    Returns:
      What `Arm.bind` takes, or the exception, for each (arm name, cell), and the
      seconds that each arm took, summed over its cells.
    """
    seconds = {arm.name: 0.0 for arm in arms}

    def one(arm: Arm, cell: Cell) -> Any:
        start = time.perf_counter()
        try:
            return arm.compile(cell)
        except Exception as error:
            return error
        finally:
            seconds[arm.name] += time.perf_counter() - start

    jobs = [
        (arm, cell)
        for cell in cells
        for arm in arms
        if arm.name not in unsupported(arms, cell)
    ]
    with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as pool:
        results = pool.map(lambda job: one(*job), jobs)
    compiled = {
        (arm.name, cell): result
        for (arm, cell), result in zip(jobs, results, strict=True)
    }
    return compiled, seconds


def compile_portion(arms: list[Arm], cells: list[Cell]) -> dict[tuple[str, Cell], Any]:
    """`compile_all`, saying which arm took how long."""
    start = time.perf_counter()
    compiled, seconds = compile_all(arms, cells)
    each = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items())
    total = time.perf_counter() - start
    print(f"compiled {len(cells)} cells in {total:.0f} s; in threads: {each}")
    return compiled


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected||; NaN if `actual` has any."""
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def check(call: timing.Call, cell: Cell, expected: Arrays) -> str | None:
    """Why a call's result is wrong, None if it is right."""
    actual = call.heads(call.run())
    names = ("dq", "dk", "dv") if cell.backward else ("out",)
    limit = TOLERANCE[cell.dtype] * (BACKWARD_FACTOR if cell.backward else 1)
    wrong = []
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        error = relative_error(ours, theirs)
        if not error <= limit:
            wrong.append(f"relative error {error:.1e} of {name}")
    return f"wrong result: {', '.join(wrong)}" if wrong else None


def forward_kernels(cell: Cell, kernels: list[str]) -> str | None:
    """Why the kernels of a call are not those of a backward alone, None if they are."""
    found = [name for name in kernels if FORWARD_KERNEL.match(name)]
    if cell.backward and found:
        return f"a forward is among the kernels of the backward: {found[0][:100]}"
    return None


def bind(
    arms: list[Arm],
    cell: Cell,
    inputs: Arrays,
    compiled: dict[tuple[str, Cell], Any],
    checked: bool,
) -> tuple[dict[str, timing.Call], dict[str, str]]:
    """Calls of the arms that can run, and reasons of those that cannot."""
    skipped = unsupported(arms, cell)
    calls: dict[str, timing.Call] = {}
    expected = baselines.reference(cell, inputs) if checked else None
    for arm in arms:
        if arm.name in skipped:
            continue
        ready = compiled[arm.name, cell]
        try:
            if isinstance(ready, Exception):
                raise ready
            call = arm.bind(ready, cell, inputs)
            reason = None if expected is None else check(call, cell, expected)
        except Exception as error:  # a peer may fail in any way; it is named
            reason = timing.short(error)
        if reason is None:
            calls[arm.name] = call
        else:
            skipped[arm.name] = reason
    return calls, skipped


def record(cell: Cell, samples: timing.Samples) -> dict[str, Any]:
    """One arm's entry in the results; TFLOP/s from kernel time where there is any."""
    entry: dict[str, Any] = {"kernels": samples.kernels}
    for name, values in (
        ("kernel", samples.kernel_us),
        ("burst", samples.burst_us),
        ("wall", samples.wall_us),
    ):
        if values:
            entry[name] = dataclasses.asdict(timing.Summary.of(values))
    entry["timer"] = "kernel" if "kernel" in entry else "wall"
    entry["tflops"] = cell.flops / entry[entry["timer"]]["median_us"] / 1e6
    return entry


def run_cell(
    arms: list[Arm],
    cell: Cell,
    compiled: dict[tuple[str, Cell], Any],
    protocol: timing.Protocol,
    clocks: timing.ClockLog,
    *,
    checked: bool,
) -> dict[str, Any]:
    """Measures every arm on one cell; the cell's entry in the results."""
    inputs = jax.block_until_ready(cell.inputs())
    calls, skipped = bind(arms, cell, inputs, compiled, checked)
    clocks.drain()
    samples = timing.measure(calls, protocol)
    entries: dict[str, Any] = {}
    for name, one in samples.items():
        if one.errors:
            skipped[name] = one.errors[0]
        elif reason := forward_kernels(cell, one.kernels):
            skipped[name] = reason
        else:
            entries[name] = record(cell, one)
    return {
        "name": cell.name,
        "cell": dataclasses.asdict(cell),
        "flops": cell.flops,
        "checked": checked,
        "arms": entries,
        "skipped": skipped,
        "clocks": clocks.drain(),
    }


def run_set(
    arms: list[Arm],
    cells: list[Cell],
    name: str,
    arguments: argparse.Namespace,
    clocks: timing.ClockLog,
    start: float,
) -> Iterator[dict[str, Any]]:
    """Compiles a portion of a set, measures its cells one by one, and so on.

    Stops when --budget seconds have passed since `start`.
    """

    def late() -> bool:
        return time.perf_counter() - start > arguments.budget

    protocol = protocol_of(arguments, name)
    for first in range(0, len(cells), PORTION):
        if late():
            return
        portion = cells[first : first + PORTION]
        compiled = compile_portion(arms, portion)
        for cell in portion:
            if late():
                return
            yield run_cell(
                arms, cell, compiled, protocol, clocks, checked=arguments.check
            )


def best_peer(result: dict[str, Any], names: list[str]) -> tuple[float, str] | None:
    """Speed of the first arm over that of the fastest peer, and which one that is."""
    arms = result["arms"]
    peers = [n for n in names[1:] if n in arms and not n.startswith("jax_flash")]
    if names[0] not in arms or not peers:
        return None
    best = max(peers, key=lambda name: arms[name]["tflops"])
    return arms[names[0]]["tflops"] / arms[best]["tflops"], best


def figure(entry: dict[str, Any], detailed: bool) -> str:
    """TFLOP/s; detailed: microseconds / TFLOP/s / kernels of a call."""
    if not detailed:
        return f"{entry['tflops']:.3g}"
    median = entry[entry["timer"]]["median_us"]
    kernels = len(entry["kernels"]) or "?"
    return f"{median:.1f} / {entry['tflops']:.0f} / {kernels}"


def column_width(detailed: bool) -> int:
    """Characters of a table's column."""
    return 20 if detailed else 14


def row(result: dict[str, Any], names: list[str], detailed: bool = False) -> str:
    """A table line: each arm's figure, ratio of the first to the best and to one."""
    arms, width = result["arms"], column_width(detailed)
    cells = [figure(arms[n], detailed) if n in arms else "-" for n in names]
    best = best_peer(result, names)
    cells.append("-" if best is None else "{:.2f} {}".format(*best))
    both = names[0] in arms and RATIO_ARM in arms
    ratio = arms[names[0]]["tflops"] / arms[RATIO_ARM]["tflops"] if both else None
    cells.append("-" if ratio is None else f"{ratio:.2f}")
    return f"{result['name']:32}" + "".join(f" {cell:>{width - 1}}" for cell in cells)


def reasons(result: dict[str, Any]) -> list[str]:
    """The lines under a table line: why an arm has no figure in it."""
    return [f"  no {name}: {why}" for name, why in result["skipped"].items()]


def skipped_cells(results: list[dict[str, Any]]) -> list[str]:
    """A line for every arm and reason, with the number of cells that it cost."""
    count = collections.Counter(
        pair for result in results for pair in result["skipped"].items()
    )
    return [
        f"no {name} in {cells} of {len(results)} cells: {why}"
        for (name, why), cells in sorted(count.items())
    ]


def heading(names: list[str], detailed: bool = False) -> str:
    """The line above the table."""
    width = column_width(detailed)
    unit = "us / TFLOP/s / kernels" if detailed else "TFLOP/s"
    titles = [*names, "to best peer", f"to {RATIO_ARM}"]
    return f"{unit:32}" + "".join(f" {title:>{width - 1}}" for title in titles)


def summary(results: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """The first arm against the best peer over a set of cells."""
    ratios = {result["name"]: best_peer(result, names) for result in results}
    known = {name: best for name, best in ratios.items() if best is not None}
    return {
        "geometric_mean": geometric_mean([ratio for ratio, _ in known.values()]),
        "compared": len(known),
        "not_compared": [name for name, best in ratios.items() if best is None],
        "below_one": {name: best for name, best in known.items() if best[0] < 1},
        "own_arms": own_arms(results, names),
    }


def geometric_mean(ratios: list[float]) -> float | None:
    """None of no ratios."""
    if not ratios:
        return None
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def own_arms(results: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Speed of this package's other arms over the first: mean, least, and where."""
    found: dict[str, Any] = {}
    for name in names[1:]:
        if not name.startswith("jax_flash"):
            continue
        ratios = {
            result["name"]: arms[name]["tflops"] / arms[names[0]]["tflops"]
            for result in results
            if {name, names[0]} <= (arms := result["arms"]).keys()
        }
        if ratios:
            worst = min(ratios, key=lambda cell: ratios[cell])
            mean = geometric_mean(list(ratios.values()))
            found[name] = {"geometric_mean": mean, "least": (ratios[worst], worst)}
    return found


def print_summary(name: str, overall: dict[str, Any], arm: str) -> None:
    """Geometric mean and the cells that are slower than the best peer."""
    for other, found in overall["own_arms"].items():
        least, cell = found["least"]
        print(
            f"{name}: {other} over {arm}, geometric mean "
            f"{found['geometric_mean']:.3f}, least {least:.3f} at {cell}"
        )
    mean, count = overall["geometric_mean"], overall["compared"]
    if mean is None:
        print(f"{name}: nothing to compare {arm} with")
        return
    print(
        f"{name}: {arm} over the best peer, geometric mean {mean:.3f} of {count} cells"
    )
    for cell, (ratio, best) in overall["below_one"].items():
        print(f"  below 1: {cell}: {ratio:.3f} of {best}")
    for cell in overall["not_compared"]:
        print(f"  not compared: {cell}")


def git_commit() -> str:
    """Commit of the working tree, with "+" if it has changes; "unknown" without git."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(ROOT), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return None if done.returncode else done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    return commit + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def describe(arguments: argparse.Namespace, arms: list[Arm]) -> dict[str, Any]:
    """What a reader needs in order to judge or repeat the figures."""
    fields = "name,driver_version,clocks.max.sm,power.limit,memory.total"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.bench", *sys.argv[1:]]),
        "commit": arguments.commit or git_commit(),
        "device": jax.devices()[0].device_kind,
        "nvidia_smi": dict(
            zip(fields.split(","), timing.nvidia_smi(fields), strict=False)
        ),
        "python": platform.python_version(),
        "versions": {
            **{arm.package: arm.version() for arm in arms},
            "jax_flash": jax_flash.__version__,
            "jax": jax.__version__,
        },
        "arms_not_asked_for": not_asked_for(arguments),
        "protocol": {
            **{
                name: dataclasses.asdict(protocol_of(arguments, name))
                for name in chosen_sets(arguments)
            },
            "kernel_timer": "CUPTI" if timing.cupti() is not None else None,
            "inputs": "random normal",
        },
    }


def default_arms(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The arms of a run without --arms."""
    if arguments.smoke:
        return baselines.SMOKE_ARMS
    if arguments.set.startswith("backward"):
        return baselines.BACKWARD_ARMS
    return baselines.DEFAULT_ARMS


def not_asked_for(arguments: argparse.Namespace) -> list[str]:
    """The arms that --arms left out of the usual ones."""
    return [name for name in default_arms(arguments) if name not in arguments.arms]


def chosen_sets(arguments: argparse.Namespace) -> list[str]:
    """The sets of cells that --set names."""
    return [name for name in CELLS if arguments.set in (name, "all")]


def protocol_of(arguments: argparse.Namespace, cells: str) -> timing.Protocol:
    """How a set is measured: its protocol with what the command line changes."""
    given = {name: getattr(arguments, name) for name in ("rounds", "seconds", "idle")}
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(PROTOCOLS[cells], **changes)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; also checks the names of arms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", default="main", choices=[*CELLS, "all"])
    parser.add_argument("--cells", default="", help="regular expression on cell names")
    parser.add_argument("--arms", help=f"comma-separated, of {', '.join(ARMS)}")
    parser.add_argument("--check", action="store_true", help="validate before timing")
    parser.add_argument("--smoke", action="store_true", help="tiny cells, any machine")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--rounds", type=int, help="turns of every arm")
    parser.add_argument("--seconds", type=float, help="length of a turn's measurement")
    parser.add_argument("--idle", type=float, help="pause before a turn")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no further cell starts; those left out are named",
    )
    parser.add_argument("--commit", help="where git cannot tell")
    parser.add_argument("--out", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args(argv)
    names = list(default_arms(arguments))
    if arguments.arms:
        names = arguments.arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"unknown arms {unknown}; there are {list(ARMS)}")
    arguments.arms = names
    return arguments


def default_out(description: dict[str, Any], cells: str) -> pathlib.Path:
    """benchmarks/results/<device>-<date>-<set>.json."""
    device = re.sub(r"[^a-z0-9]+", "-", description["device"].lower()).strip("-")
    return ROOT / "results" / f"{device}-{description['date'][:10]}-{cells}.json"


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if no arm of any cell ran or an arm gave a wrong result."""
    arguments = parse_arguments(argv)
    table = SMOKE_CELLS if arguments.smoke else CELLS
    chosen = {
        name: [cell for cell in table[name] if re.search(arguments.cells, cell.name)]
        for name in chosen_sets(arguments)
    }
    if arguments.list:
        print("\n".join(cell.name for cells in chosen.values() for cell in cells))
        return 0
    arms = [ARMS[name] for name in arguments.arms]
    description = describe(arguments, arms)
    out = arguments.out or default_out(description, arguments.set)
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    results: list[dict[str, Any]] = []

    def write() -> dict[str, Any]:
        summaries = {
            name: summary([r for r in results if r["set"] == name], arguments.arms)
            for name in chosen
        }
        data = {**description, "summary": summaries, "results": results}
        out.write_text(json.dumps(data, indent=1) + "\n")
        return summaries

    print(description["device"])
    if missing := description["arms_not_asked_for"]:
        print(f"not asked for: {', '.join(missing)}")
    with timing.ClockLog() as clocks:
        for name, cells in chosen.items():
            detailed = name.endswith("ragged")
            print(heading(arguments.arms, detailed), flush=True)
            for result in run_set(arms, cells, name, arguments, clocks, start):
                results.append({"set": name, **result})
                lines = [row(result, arguments.arms, detailed), *reasons(result)]
                print("\n".join(lines), flush=True)
                write()
    measured = {(result["set"], result["name"]) for result in results}
    left_out = [
        cell.name
        for name, cells in chosen.items()
        for cell in cells
        if (name, cell.name) not in measured
    ]
    if left_out:
        print(f"no time for {', '.join(left_out)}")
    print("\n".join(skipped_cells(results)))
    for name, overall in write().items():
        print_summary(name, overall, arguments.arms[0])
    print(f"{time.perf_counter() - start:.0f} s; {out}")
    wrong = any(
        why.startswith("wrong result")
        for result in results
        for why in result["skipped"].values()
    )
    return int(wrong or not any(result["arms"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
