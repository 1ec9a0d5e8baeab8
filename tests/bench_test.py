"""The benchmark's measuring code, without a GPU."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest

# The benchmarks are no part of the package, so the repository must be on the path.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import baselines, bench, timing
from benchmarks.baselines import Cell
from benchmarks.timing import Call


class FakeCupti:
    """CUPTI's binding, answering with given (kernel name, milliseconds)."""

    def __init__(self, timings: list[tuple[str, float]]) -> None:
        self.timings = timings

    def _cupti_init(self) -> None:
        pass

    def _cupti_get_timings(self, finalize: bool) -> list[tuple[str, float]]:
        assert finalize
        return self.timings


def call_of(run: Any) -> Call:
    return Call(run=run, wait=lambda result: None, heads=lambda result: result)


def test_kernel_times_sum_the_kernels_of_a_call() -> None:
    binding = FakeCupti([("a", 0.5), ("b", 0.25), ("a", 0.75), ("b", 0.25)])
    times, names = timing.kernel_times(binding, call_of(lambda: 0), 2)
    assert times == [750.0, 1000.0]
    assert names == ["a", "b"]


@pytest.mark.parametrize("timings", [[], [("a", 0.5)] * 3])
def test_kernel_times_refuse_uneven_launches(timings: list[tuple[str, float]]) -> None:
    with pytest.raises(RuntimeError, match=f"{len(timings)} kernels in 2 calls"):
        timing.kernel_times(FakeCupti(timings), call_of(lambda: 0), 2)


def test_summary() -> None:
    summary = timing.Summary.of([float(x) for x in range(11)])
    assert (summary.median_us, summary.p10_us, summary.p90_us) == (5.0, 1.0, 9.0)
    assert timing.Summary.of([3.0]) == timing.Summary(3.0, 3.0, 3.0, 1)


def test_arms_take_turns_and_a_failing_one_is_named() -> None:
    order: list[str] = []

    def failing() -> None:
        raise ValueError("no such kernel\nand more")

    calls = {
        "a": call_of(lambda: order.append("a")),
        "bad": call_of(failing),
        "b": call_of(lambda: order.append("b")),
    }
    protocol = timing.Protocol(rounds=2, seconds=1e-9, idle=0.0)
    samples = timing.measure(calls, protocol)
    assert samples["bad"].errors == ["ValueError: no such kernel"]
    assert len(samples["a"].wall_us) == 2
    turns = "".join(order[2 * 7 :])  # after warm-up and probe: 1 + 2 * 3 calls each
    assert turns == "aaabbbaaabbb"


def test_cell() -> None:
    cell = Cell(4, 512, 512, 8, 2, 64, True)
    assert cell.name == "d64 n512 h8/2 causal"
    assert cell.flops == 4 * 4 * 8 * 512 * 512 * 64 / 2
    assert Cell(1, 16, 32, 2, 2, 64, False).name == "d64 n16x32"


def test_record_prefers_kernel_time() -> None:
    cell = Cell(1, 1000, 1000, 1, 1, 250, False)
    samples = timing.Samples(kernel_us=[1000.0], wall_us=[2000.0])
    entry = bench.record(cell, samples)
    assert entry["timer"] == "kernel"
    assert entry["tflops"] == pytest.approx(1.0)


def test_every_arm_that_cannot_run_says_why() -> None:
    cell = Cell(1, 16, 32, 4, 2, 64, True)
    reasons = bench.unsupported(list(baselines.ARMS.values()), cell)
    assert "jax_flash_xla" not in reasons
    assert set(baselines.ARMS) - set(reasons) == {"jax_flash_xla"}
    assert all(reasons.values())


def test_wrong_result_is_not_timed() -> None:
    cell = Cell(1, 16, 16, 2, 2, 8, False, "float32")
    inputs = cell.inputs()
    arm = baselines.ARMS["jax_flash_xla"]
    compiled = {
        (arm.name, cell): arm.compile(Cell(1, 16, 16, 2, 2, 8, True, "float32"))
    }
    calls, skipped = bench.bind([arm], cell, inputs, compiled, True)
    assert not calls
    assert "wrong result: relative error" in skipped[arm.name]


def test_row_compares_the_first_arm() -> None:
    arms = {name: {"tflops": t} for name, t in (("a", 30.0), ("b", 40.0))}
    line = bench.row({"name": "cell", "arms": arms}, ["a", "b", "c"])
    assert line.split() == ["cell", "30", "40", "-", "0.75", "-"]
