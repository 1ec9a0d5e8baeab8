"""How the benchmarks measure: kernel time by CUPTI, wall time back to back, clocks.

Kernel time is what the GPU spends inside kernels, summed over all kernels of a call,
what runs beside another one but once;
CUPTI sees those of every library in the process, so one method serves all arms.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

MICROSECONDS_PER_MILLISECOND = 1e3


@dataclasses.dataclass(frozen=True)
class Call:
    """One prepared problem of one arm.

    Attributes:
      run: starts the computation and returns its result without waiting.
      wait: waits for a result of `run`.
      heads: what the check compares of a result, in float32: the first two heads of
        the first batch entry of the output, [T, 2, Dv], or of each gradient. Of those
        of key and value, the heads that belong to these.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], None]
    heads: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Median and spread of samples, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Summary:
        """Summarises at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def cupti() -> Any | None:
    """JAX's CUPTI binding, or None where there is no GPU or no binding."""
    if jax.default_backend() != "gpu":
        return None
    try:
        from jax.experimental.mosaic.gpu import profiler
    except ImportError:
        return None
    # The profiler's `measure` takes JAX functions only; the binding under it sees the
    # kernels of every library in the process.
    library = getattr(profiler, "mosaic_gpu_lib", None)
    return getattr(library, "_mosaic_gpu_ext", None)


def kernel_calls(
    binding: Any, call: Call, iterations: int
) -> list[list[tuple[str, float]]]:
    """The kernels of each of `iterations` calls: names, microseconds.

    Raises:
      RuntimeError: no kernel was seen, or calls did not launch equal numbers of them.
    """
    binding._cupti_init()
    try:
        result = None
        for _ in range(iterations):
            result = call.run()
        call.wait(result)
    finally:
        timings = binding._cupti_get_timings(True)
    kernels, rest = divmod(len(timings), iterations)
    if rest or not kernels:
        raise RuntimeError(f"{len(timings)} kernels in {iterations} calls")
    named = [
        (name, MICROSECONDS_PER_MILLISECOND * duration) for name, duration in timings
    ]
    return [named[i : i + kernels] for i in range(0, len(named), kernels)]


def kernel_times(
    binding: Any, call: Call, iterations: int
) -> tuple[list[float], list[str]]:
    """Kernel time of each of `iterations` calls, and the names of a call's kernels.

    Returns:
      Microseconds per call [iterations], kernel names of one call.

    Raises:
      RuntimeError: as `kernel_calls`.
    """
    calls = kernel_calls(binding, call, iterations)
    totals = [sum(us for _, us in kernels) for kernels in calls]
    return totals, [name for name, _ in calls[0]]


def wall_time(call: Call, iterations: int) -> float:
    """Microseconds per call of `iterations` calls started back to back.

    The device stays busy as long as a call takes longer than starting one does.
    """
    start = time.perf_counter()
    result = None
    for _ in range(iterations):
        result = call.run()
    call.wait(result)
    return (time.perf_counter() - start) * 1e6 / iterations


@dataclasses.dataclass
class Samples:
    """What was measured of one arm in one cell."""

    kernel_us: list[float] = dataclasses.field(default_factory=list)
    burst_us: list[float] = dataclasses.field(default_factory=list)
    wall_us: list[float] = dataclasses.field(default_factory=list)
    kernels: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    def median_us(self) -> float:
        """Of kernel times, or of wall times where there is no CUPTI."""
        return statistics.median(self.kernel_us or self.wall_us)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How long and how often.

    Attributes:
      rounds: how often every arm has its turn.
      seconds: length of one turn's kernel measurement, and of its wall measurement.
      idle: pause before a turn, so that no arm inherits its predecessor's heat.
      burst: calls at the start of a turn that count as a burst.
      most: limit on the calls of a turn.
      kernel_rounds: rounds, the first ones, that also measure kernel time: to start and
        end CUPTI takes longer than short calls do.
    """

    rounds: int = 3
    seconds: float = 0.06
    idle: float = 0.08
    burst: int = 3
    most: int = 500
    kernel_rounds: int = 1_000


def measure(calls: dict[str, Call], protocol: Protocol) -> dict[str, Samples]:
    """Measures arms in turn: A B C, A B C, ... so that drift meets all of them.

    Args:
      calls: prepared call of each arm, on the same inputs.
      protocol: lengths and pauses.

    Returns:
      Samples of each arm; an arm that fails keeps its error and loses later turns.
    """
    binding = cupti()
    samples = {name: Samples() for name in calls}
    iterations: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call.wait(call.run())
            probe = min(wall_time(call, 3), wall_time(call, 3))
        except Exception as error:
            samples[name].errors.append(short(error))
            continue
        wanted = round(protocol.seconds * 1e6 / probe)
        iterations[name] = max(3, min(protocol.most, wanted))
    for done in range(protocol.rounds):
        profiler = binding if done < protocol.kernel_rounds else None
        for name, count in iterations.items():
            if samples[name].errors:
                continue
            time.sleep(protocol.idle)
            take_turn(profiler, calls[name], count, protocol, samples[name])
    return samples


def take_turn(
    binding: Any | None, call: Call, count: int, protocol: Protocol, samples: Samples
) -> None:
    """One turn of one arm: kernel times where CUPTI is there, then wall time."""
    try:
        if binding is not None:
            times, samples.kernels = kernel_times(binding, call, count)
            samples.kernel_us += times
            samples.burst_us += times[: protocol.burst]
        samples.wall_us.append(wall_time(call, count))
    except Exception as error:
        samples.errors.append(short(error))


def short(error: Exception) -> str:
    """First line of an error, with its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def nvidia_smi(fields: str) -> list[str]:
    """Values that nvidia-smi gives for the first GPU; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return [] if done.returncode or not lines else lines[0].split(", ")


class ClockLog:
    """SM clock, power and temperature, sampled by nvidia-smi while a block runs."""

    FIELDS = ("sm_mhz", "power_w", "celsius")
    PERIOD_MS = 100

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def __enter__(self) -> ClockLog:
        self.process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi") is not None:
            command = [
                "nvidia-smi",
                "--id=0",
                "--query-gpu=clocks.sm,power.draw,temperature.gpu",
                "--format=csv,noheader,nounits",
                f"--loop-ms={self.PERIOD_MS}",
            ]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self.rows.append([float(value) for value in line.split(",")])
            except ValueError:  # "[N/A]": this sample does not exist
                continue

    def __exit__(self, *unused: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def drain(self) -> dict[str, list[float]]:
        """Minimum, median and maximum of each field since the last call."""
        rows, self.rows = self.rows, []
        if not rows:
            return {}
        columns = zip(*rows, strict=True)
        return {
            field: [min(values), statistics.median(values), max(values)]
            for field, values in zip(self.FIELDS, columns, strict=True)
        }
