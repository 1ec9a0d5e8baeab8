"""Attention by this package and its peers, side by side in one process.

    python -m benchmarks.bench                  # every benchmark cell, default arms
    python -m benchmarks.bench --cells 'd128.*causal' --arms jax_flash,cudnn --check
    python -m benchmarks.bench --smoke          # tiny, on any machine

Writes benchmarks/results/<name>.json and prints one line for each cell.
docs/benchmarks.md has the protocol.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
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
# The arm that a row's ratio is taken to, beside the best of all.
RATIO_ARM = "torch_fa2"
COMPILE_THREADS = 8


def benchmark_cells() -> list[Cell]:
    """The forward cells of the shape table that tests share."""
    return [
        Cell(
            batch=case.batch,
            query_length=case.query_length,
            key_length=case.key_length,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            is_causal=case.is_causal,
            dtype=case.dtype,
        )
        for case in specs.BENCHMARK_CELLS
    ]


def smoke_cells() -> list[Cell]:
    """Cells small enough for any machine."""
    return [Cell(2, 64, 64, 4, 2, 32, is_causal) for is_causal in (False, True)]


def unsupported(arms: list[Arm], cell: Cell) -> dict[str, str]:
    """Arms that cannot run a cell, each with the reason."""
    reasons = {arm.name: arm.why_not(cell) for arm in arms}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def compile_all(arms: list[Arm], cells: list[Cell]) -> dict[tuple[str, Cell], Any]:
    """Compiles every arm for every cell, in threads, before anything is timed.

    Returns:
      What `Arm.bind` takes, or the exception, for each (arm name, cell).
    """

    def one(arm: Arm, cell: Cell) -> Any:
        try:
            return arm.compile(cell)
        except Exception as error:
            return error

    jobs = [
        (arm, cell)
        for cell in cells
        for arm in arms
        if arm.name not in unsupported(arms, cell)
    ]
    with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as pool:
        results = pool.map(lambda job: one(*job), jobs)
    return {
        (arm.name, cell): result
        for (arm, cell), result in zip(jobs, results, strict=True)
    }


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected||; NaN if `actual` has any."""
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def check(call: timing.Call, cell: Cell, expected: jax.Array) -> str | None:
    """Why a call's result is wrong, None if it is right."""
    error = relative_error(call.heads(call.run()), expected)
    limit = TOLERANCE[cell.dtype]
    return None if error <= limit else f"wrong result: relative error {error:.1e}"


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


def row(result: dict[str, Any], names: list[str]) -> str:
    """A table line: TFLOP/s of each arm, ratio of the first to the best and to one."""
    arms = result["arms"]
    cells = [f"{arms[n]['tflops']:.3g}" if n in arms else "-" for n in names]

    def ratio(others: list[str]) -> str:
        present = [arms[name]["tflops"] for name in others if name in arms]
        if names[0] not in arms or not present:
            return "-"
        return f"{arms[names[0]]['tflops'] / max(present):.2f}"

    cells += [ratio(names[1:]), ratio([RATIO_ARM])]
    return f"{result['name']:24}" + "".join(f"{cell:>14}" for cell in cells)


def heading(names: list[str]) -> str:
    """The line above the table."""
    titles = [*names, "to best peer", f"to {RATIO_ARM}"]
    return f"{'TFLOP/s':24}" + "".join(f"{title:>14}" for title in titles)


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
        "protocol": {
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "idle": arguments.idle,
            "kernel_timer": "CUPTI" if timing.cupti() is not None else None,
            "inputs": "random normal",
        },
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; also checks the names of arms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default="", help="regular expression on cell names")
    parser.add_argument("--arms", help=f"comma-separated, of {', '.join(ARMS)}")
    parser.add_argument("--check", action="store_true", help="validate before timing")
    parser.add_argument("--smoke", action="store_true", help="tiny cells, any machine")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--rounds", type=int, default=timing.Protocol.rounds)
    parser.add_argument("--seconds", type=float, default=timing.Protocol.seconds)
    parser.add_argument("--idle", type=float, default=timing.Protocol.idle)
    parser.add_argument("--commit", help="where git cannot tell")
    parser.add_argument("--out", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args(argv)
    default = baselines.SMOKE_ARMS if arguments.smoke else baselines.DEFAULT_ARMS
    names = arguments.arms.split(",") if arguments.arms else list(default)
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"unknown arms {unknown}; there are {list(ARMS)}")
    arguments.arms = names
    return arguments


def default_out(description: dict[str, Any]) -> pathlib.Path:
    """benchmarks/results/<device>-<date>.json."""
    device = re.sub(r"[^a-z0-9]+", "-", description["device"].lower()).strip("-")
    return ROOT / "results" / f"{device}-{description['date'][:10]}.json"


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if no arm of any cell ran or an arm gave a wrong result."""
    arguments = parse_arguments(argv)
    cells = smoke_cells() if arguments.smoke else benchmark_cells()
    cells = [cell for cell in cells if re.search(arguments.cells, cell.name)]
    if arguments.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    arms = [ARMS[name] for name in arguments.arms]
    description = describe(arguments, arms)
    protocol = timing.Protocol(arguments.rounds, arguments.seconds, arguments.idle)
    start = time.perf_counter()
    compiled = compile_all(arms, cells)
    print(f"{description['device']}, compiled in {time.perf_counter() - start:.0f} s")
    print(heading(arguments.arms), flush=True)
    results: list[dict[str, Any]] = []
    with timing.ClockLog() as clocks:
        for cell in cells:
            results.append(
                run_cell(
                    arms, cell, compiled, protocol, clocks, checked=arguments.check
                )
            )
            print(row(results[-1], arguments.arms), flush=True)
    skipped = sorted(
        {(name, why) for result in results for name, why in result["skipped"].items()}
    )
    for name, why in skipped:
        print(f"skipped {name}: {why}")
    out = arguments.out or default_out(description)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**description, "results": results}, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; {out}")
    wrong = any(why.startswith("wrong result") for _, why in skipped)
    return int(wrong or not any(result["arms"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
