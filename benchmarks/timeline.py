"""When the kernels of packed documents run, in calls started back to back.

    python -m benchmarks.timeline              # a few seconds
    python -m benchmarks.timeline --backward
    python -m benchmarks.timeline --smoke      # tiny, on any machine: wall time alone

For each call that `benchmarks.options` has of documents, and its peers: the wall time
of one, and of each kernel, in microseconds after the last kernel of the call before has
ended, its start, its end and how long it ran. Kernels that wait for the one before them
start early, so what counts is when they end. A negative start is before that end.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import statistics
import sys
import tempfile

import jax
from jax.profiler import ProfileData

from benchmarks import options, timing

CALLS = 20
Event = tuple[float, float, str]
"""Start and end in microseconds, and the name of a kernel."""


def traced(call: timing.Call) -> list[Event]:
    """The kernels of CALLS calls back to back, by their ends; none without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = None
            for _ in range(CALLS):
                result = call.run()
            call.wait(result)
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(file))
        lines = [line for plane in data.planes for line in plane.lines]
        names = [plane.name for plane in data.planes for _ in plane.lines]
        events = [
            (e.start_ns / 1e3, (e.start_ns + e.duration_ns) / 1e3, e.name)
            for name, line in zip(names, lines, strict=True)
            if "GPU" in name and "Stream" in line.name
            for e in line.events
        ]
    return sorted(events, key=lambda event: event[1])


def short(name: str) -> str:
    """The part of a kernel's name that tells it from others."""
    found = re.search(
        r"[a-z]+(?:_[a-z0-9]+)*_kernel|flash\w*Fwd\w*|flash\w*Bwd\w*", name
    )
    return (found.group() if found else name)[:60]


def report(name: str, call: timing.Call) -> None:
    """Prints the medians over all calls but the first."""
    for _ in range(3):
        call.wait(call.run())
    wall = min(timing.wall_time(call, 10 * CALLS) for _ in range(2))
    print(f"{name:38} {wall:8.1f} us of one of many")
    events = traced(call)
    kernels, rest = divmod(len(events), CALLS)
    if rest or not kernels:
        print(f"  {len(events)} kernels in {CALLS} calls")
        return
    calls = [events[i : i + kernels] for i in range(0, len(events), kernels)]
    zeros = [before[-1][1] for before in calls[:-1]]
    for i, (_, _, kernel) in enumerate(calls[0]):
        pairs = zip(zeros, calls[1:], strict=True)
        own = [(c[i][0] - zero, c[i][1] - zero) for zero, c in pairs]
        start, end = (statistics.median(x) for x in zip(*own, strict=True))
        ran = statistics.median(y - x for x, y in own)
        print(f"  {start:9.1f} {end:9.1f} {ran:9.1f}  {short(kernel)}")


def main() -> None:
    """Prints the timelines."""
    parser = argparse.ArgumentParser(description="when kernels of documents run")
    parser.add_argument("--smoke", action="store_true", help="tiny, by plain JAX")
    parser.add_argument("--backward", action="store_true", help="with the backward")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--width", type=int, default=128, choices=options.WIDTHS)
    arguments = parser.parse_args()
    length, width = arguments.length, arguments.width
    problem = options.Problem(length, 2048 // width, width)
    if arguments.smoke:
        problem = options.Problem(96, 2, 16)
    inputs = jax.block_until_ready(problem.inputs())
    own = options.rows(problem, "xla" if arguments.smoke else "cuda")
    wanted = (options.SEGMENTS, options.VARLEN)
    table = {name: own[name] for name in wanted}
    if not arguments.smoke:
        peers = options.peers(problem, own, arguments.backward)
        table |= {n: row for n, row in peers.items() if row.like in wanted}
    calls, skipped = options.prepare(table, inputs, arguments.backward)
    for name, reason in skipped.items():
        print(f"{name:38} {reason}")
    for name, call in calls.items():
        report(name, call)


if __name__ == "__main__":
    sys.exit(main())
