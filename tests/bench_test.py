"""The benchmark's measuring code, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

# The benchmarks are no part of the package, so the repository must be on the path.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax_flash
from benchmarks import (
    baselines,
    bench,
    decode,
    float32,
    gradients,
    growing,
    memory,
    options,
    timeline,
    timing,
)
from benchmarks.baselines import Cell
from benchmarks.timing import Call
from jax_flash._src import compat


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


def test_rounds_without_kernel_times(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = FakeCupti([("a", 0.25)] * 3)
    monkeypatch.setattr(timing, "cupti", lambda: binding)
    protocol = timing.Protocol(rounds=3, seconds=1e-9, idle=0.0, kernel_rounds=1)
    samples = timing.measure({"a": call_of(lambda: None)}, protocol)["a"]
    assert samples.kernel_us == [250.0] * 3
    assert len(samples.wall_us) == 3


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
    assert cell.name == "b4 d64 n512 h8/2 causal"
    assert cell.flops == 4 * 4 * 8 * 512 * 512 * 64 / 2
    assert Cell(1, 16, 32, 2, 2, 64, False).name == "b1 d64 n16x32"
    cell = Cell(4, 4096, 4096, 2, 2, 192, True, "float16", 128, (9, 0))
    assert cell.name == "d192v128 n4096 w9/0 causal f16"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (5, 0), (3, 4)])
@pytest.mark.parametrize("lengths", [(20, 20), (7, 30), (30, 7)])
def test_operations_and_reference_of_masks(
    lengths: tuple[int, int], window: tuple[int, int] | None, is_causal: bool
) -> None:
    rows, keys = lengths
    cell = Cell(2, rows, keys, 4, 2, 8, is_causal, "float32", 6, window)
    ok = oracle.visible(rows, keys, rows, keys, is_causal, window_size=window)
    pairs = ok.sum()
    if is_causal and window is None and rows == keys:
        pairs = rows * keys / 2
    assert cell.flops == 2 * 2 * 4 * pairs * (8 + 6)
    inputs = cell.inputs()
    options = {"is_causal": is_causal, "window_size": window}
    expected = oracle.attention(*inputs, **options).out[0, :, :2]
    live = ok.any(1)
    got = np.asarray(baselines.reference(cell, inputs)[0])
    np.testing.assert_allclose(got[live], expected[live], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "mask",
    [{}, {"is_causal": True}, {"is_causal": True, "window_size": (5, 0)}],
    ids=["full", "causal", "window"],
)
def test_reference_of_gradients(mask: dict[str, Any], kv_heads: int) -> None:
    options = {"is_causal": False, **mask}
    cell = Cell(2, 7, 30, 4, kv_heads, 8, **options, dtype="float32", value_dim=6)
    inputs = dataclasses.replace(cell, backward=True).inputs()
    operands = [np.asarray(x, np.float64) for x in inputs]
    expected = oracle.gradients(*operands, **mask)
    got = baselines.reference(dataclasses.replace(cell, backward=True), inputs)
    pairs = 2 if kv_heads == 4 else 1
    for name, count, ours in zip(
        ("query", "key", "value"), (2, pairs, pairs), got, strict=True
    ):
        wanted = expected[name][0, :, :count]
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5, err_msg=name)


def test_operations_of_a_backward() -> None:
    forward = Cell(4, 512, 512, 8, 2, 64, True)
    backward = dataclasses.replace(forward, backward=True)
    assert backward.flops == 2.5 * forward.flops
    narrow = dataclasses.replace(backward, value_dim=32)
    assert narrow.flops == backward.flops * (3 * 64 + 2 * 32) / (5 * 64)
    assert backward.name == f"{forward.name} bwd"


def test_a_backward_is_compiled_apart_from_its_forward() -> None:
    cell = Cell(2, 40, 56, 4, 2, 16, True, "float32", backward=True)

    def forward_once(*operands: Any) -> Any:
        jax.debug.callback(lambda: None)  # leaves a mark in the program
        return baselines.ours("xla")(cell)(*operands)

    programs = gradients.compile_backward(forward_once, cell.shapes)
    assert "callback" in programs.forward.as_text()
    assert "callback" not in programs.backward.as_text()
    inputs = cell.inputs()
    result = gradients.bind_backward(programs, inputs).run()
    pullback = jax.vjp(baselines.ours("xla")(cell), *inputs[:3])[1]
    for ours, wanted in zip(result, pullback(inputs[3]), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


def test_a_forward_among_the_kernels_of_a_backward_is_refused() -> None:
    forward = Cell(1, 16, 16, 2, 2, 8, False)
    backward = dataclasses.replace(forward, backward=True)
    kernels = ["mha_bwd_kernel<Fwd>", "cudnn_sdpa_sm90_flash_bprop", "loop_add_fusion"]
    assert bench.forward_kernels(backward, kernels) is None
    for name in ("mha_fwd_kernel<9>", "FlashAttnFwdSm90", "cudnn_flash_fprop_wgmma"):
        assert name in str(bench.forward_kernels(backward, [*kernels, name]))
        assert bench.forward_kernels(forward, [name]) is None


def test_wrong_gradients_are_named() -> None:
    cell = Cell(1, 16, 16, 2, 2, 8, False, "float32", backward=True)
    one = jnp.ones((16, 2, 8))
    call = call_of(lambda: (one, one, 2 * one))
    reason = bench.check(call, cell, (one, one * 1.0001, one))
    assert reason == "wrong result: relative error 1.0e+00 of dv"
    nan = call_of(lambda: (one * jnp.nan, one, one))
    assert "nan of dq" in str(bench.check(nan, cell, (one, one, one)))


def test_protocol_of_a_set() -> None:
    quick = bench.PROTOCOLS["backward"]
    arguments = bench.parse_arguments(["--set=backward", "--rounds=7"])
    changed = dataclasses.replace(quick, rounds=7)
    assert bench.protocol_of(arguments, "backward") == changed
    assert bench.protocol_of(bench.parse_arguments([]), "main") == timing.Protocol()
    assert bench.PROTOCOLS.keys() == bench.CELLS.keys() == bench.SMOKE_CELLS.keys()


def test_names_tell_cells_apart() -> None:
    cells = [cell for one in bench.CELLS.values() for cell in one]
    assert len({cell.name for cell in cells}) == len(cells)


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


def test_peers_that_align_at_the_top_left_get_the_cell_without_a_mask() -> None:
    cell = Cell(1, 16, 32, 4, 2, 64, True)
    for name in ("xla", "cudnn", "tokamax"):
        reason = {
            "xla": baselines.score_memory,
            "cudnn": baselines.jax_nn_limits,
            "tokamax": baselines.top_left,
        }[name](cell)
        assert "top left" in str(reason)
    twin = dataclasses.replace(cell, is_causal=False)
    assert baselines.score_memory(twin) is None
    assert baselines.jax_nn_limits(twin) is None
    ragged = bench.CELLS["ragged"]
    for cell in ragged:
        if cell.aligned:
            assert dataclasses.replace(cell, is_causal=False) in ragged


def entry(tflops: float, kernels: int = 1) -> dict[str, Any]:
    return {
        "tflops": tflops,
        "timer": "kernel",
        "kernel": {"median_us": 12.34},
        "kernels": ["k"] * kernels,
    }


def test_row_compares_the_first_arm() -> None:
    arms = {"a": entry(30), "b": entry(40), "jax_flash_xla": entry(50, 3)}
    names = ["a", "jax_flash_xla", "b", "c"]
    line = bench.row({"name": "cell", "arms": arms}, names)
    assert line.split() == ["cell", "30", "50", "40", "-", "0.75", "b", "-"]
    line = bench.row({"name": "cell", "arms": arms}, names, detailed=True)
    assert "12.3 / 50 / 3" in line


def test_summary_over_a_set(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        {"name": "fast", "arms": {"a": entry(40), "b": entry(10), "c": entry(20)}},
        {"name": "slow", "arms": {"a": entry(10), "b": entry(20)}},
        {"name": "alone", "arms": {"a": entry(10)}},
    ]
    overall = bench.summary(results, ["a", "b", "c"])
    assert overall["geometric_mean"] == pytest.approx(1.0)
    assert overall["compared"] == 2
    assert overall["not_compared"] == ["alone"]
    assert overall["own_arms"] == {}
    assert overall["below_one"] == {"slow": (0.5, "b")}
    bench.print_summary("main", overall, "a")
    assert "below 1: slow: 0.500 of b" in capsys.readouterr().out
    bench.print_summary("main", bench.summary(results[2:], ["a", "b"]), "a")
    assert "nothing to compare" in capsys.readouterr().out


def test_summary_of_our_other_arms(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        {"name": "x", "arms": {"jax_flash": entry(40), "jax_flash_slow": entry(10)}},
        {"name": "y", "arms": {"jax_flash": entry(10), "jax_flash_slow": entry(10)}},
        {"name": "z", "arms": {"jax_flash": entry(10)}},
    ]
    overall = bench.summary(results, ["jax_flash", "jax_flash_slow"])
    own = overall["own_arms"]["jax_flash_slow"]
    assert own == {"geometric_mean": pytest.approx(0.5), "least": (0.25, "x")}
    bench.print_summary("backward", overall, "jax_flash")
    assert "mean 0.500, least 0.250 at x" in capsys.readouterr().out


@pytest.mark.parametrize("cells", list(bench.CELLS))
def test_smoke(cells: str, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "results.json"
    quick = ["--rounds=1", "--seconds=0.001", "--idle=0"]
    arguments = ["--smoke", "--check", f"--set={cells}", *quick, f"--out={out}"]
    assert bench.main(arguments) == 0
    data = json.loads(out.read_text())
    assert {result["set"] for result in data["results"]} == {cells}
    assert data["summary"][cells]["compared"] >= 2


def usages(*beyond: int) -> list[memory.Usage]:
    return [
        memory.Usage(length, 0, size, None)
        for length, size in zip(memory.LENGTHS, beyond, strict=True)
    ]


def test_memory_is_judged_by_the_bytes_of_a_token() -> None:
    assert not memory.failures(usages(300, 500, 1000, 2000))
    assert not memory.failures(usages(100, 200, 480, 800))
    quadratic = memory.failures(usages(1, 4, 16, 64))
    assert len(quadratic) == 3
    assert "8.00 times the bytes for each token at 131072" in quadratic[-1]
    large = [int(x * 1e9) for x in (0.5, 1, 2, 4)]
    assert memory.failures(usages(*large)) == ["4.00 GB beyond the tensors at 131072"]
    peak = [
        dataclasses.replace(one, measured=2 * one.planned) for one in usages(*large)
    ]
    assert "8.00 GB" in memory.failures(peak)[-1]


def test_memory_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of the jnp path; it is linear too."""
    assert memory.main(["--smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        [str(length), str(round(8 * length * 8 * 128 * 2 / 1e6))]
        for length in memory.SMOKE_LENGTHS
    ]


@pytest.mark.usefixtures("usual_promotion")
def test_float32_smoke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arms run and compute the same."""
    monkeypatch.setattr(sys, "argv", ["float32", "--smoke"])
    assert float32.main() == 0
    lines = capsys.readouterr().out.splitlines()
    cells = 2 + len(float32.OPTIONS)
    assert len(lines) == 1 + cells * (1 + 5)
    arms = [line.split() for line in lines if line.startswith("  ")]
    assert len(arms) == 5 * cells
    assert all(float(fields[-3]) < 1e-6 for fields in arms)


@pytest.mark.usefixtures("usual_promotion")
def test_options_smoke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call runs, and its pairs are those that its mask leaves."""
    monkeypatch.setattr(sys, "argv", ["options", "--smoke"])
    assert options.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * (1 + 13 + 8)
    assert "Error" not in "".join(lines)
    assert sum("needs an NVIDIA GPU" in line for line in lines) == 2 * 6
    for name in ("dense by xla", "segments by xla, a mask"):
        compared = [line for line in lines if re.match(rf"  {name} .* \d+\.\d+$", line)]
        assert len(compared) == 2
    problem = options.Problem(96, 2, 16)
    document = np.repeat(np.arange(options.DOCUMENTS), np.diff(problem.offsets))
    distance = np.subtract.outer(np.arange(96), np.arange(96))
    seen = np.equal.outer(document, document) & (distance >= 0)
    rows = options.rows(problem, "xla")
    dense, packed, within = 96 * 97 / 2, seen.sum(), (seen & (distance <= 6)).sum()
    blocks = np.asarray(rows["mask of a quarter of the blocks"].operands[0])[0, 0]
    in_blocks = (blocks & (distance >= 0)).sum()
    masks = [dense, packed, in_blocks]
    pairs = [dense, packed, packed, *[dense] * 4, *[96**2] * 2, *masks, within]
    assert [row.pairs for row in rows.values()] == pairs
    np.testing.assert_array_equal(
        rows["mask of the documents"].operands[0][0, 0],
        np.equal.outer(document, document),
    )


@pytest.mark.parametrize("name", [name for name in growing.ROWS if name != "ordinary"])
def test_logits_grow_from_the_last_tile(name: str) -> None:
    growth = growing.ROWS[name]
    assert growth is not None
    cell = Cell(1, 128, 1024, 1, 1, 256, is_causal=False)
    query, key, _ = growing.grown(cell.inputs(), growth)
    first = (x[0, :, 0, 0].astype(jnp.float32) for x in (query, key))
    logits = np.multiply.outer(*map(np.asarray, first)) / 16
    # The last 64 keys come first.
    rows, tiles = logits[:: growth.spacing], logits[:, ::-64]
    np.testing.assert_allclose(rows, np.repeat(rows[:, ::64], 64, axis=1))
    steps = np.diff(tiles[:: growth.spacing], axis=1)
    expected = [growth.step * (i % growth.tiles == 0) for i in range(1, 16)]
    np.testing.assert_allclose(steps, np.broadcast_to(expected, steps.shape))
    assert np.count_nonzero(logits.any(axis=1)) == 128 / growth.spacing


def test_growing_smoke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["growing", "--smoke"])
    assert growing.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len(re.findall(r" \d+\.\d+", lines[-1])) == len(growing.ROWS)


def test_timeline_smoke(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["timeline", "--smoke"])
    timeline.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == ["segments", "varlen"]
    assert lines[1::2] == [f"  0 kernels in {timeline.CALLS} calls"] * 2


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The arms take this machine for one with a GPU, and import peers anew."""
    monkeypatch.setattr(baselines, "on_gpu", lambda: True)
    baselines.import_error.cache_clear()
    yield monkeypatch
    baselines.import_error.cache_clear()


def test_tokamax_has_no_limit_in_the_backward(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setitem(sys.modules, "tokamax", types.ModuleType("tokamax"))
    assert "tokamax" in baselines.BACKWARD_ARMS
    for cell in bench.CELLS["backward"]:
        assert baselines.ARMS["tokamax"].why_not(cell) is None


def test_an_arm_that_fails_is_named_under_every_cell(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(cell: Cell) -> Any:
        raise RuntimeError(f"no kernel for {cell.head_dim}\nand more")

    arm = dataclasses.replace(baselines.ARMS["xla"], name="broken", compile=broken)
    monkeypatch.setitem(bench.ARMS, "broken", arm)
    monkeypatch.setattr(bench, "PORTION", 1)
    out = tmp_path / "results.json"
    quick = ["--smoke", "--rounds=1", "--seconds=0", "--idle=0", f"--out={out}"]
    assert bench.main([*quick, "--arms=jax_flash_xla,broken"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "not asked for: xla"
    reason = "RuntimeError: no kernel for 32"
    rows = [i for i, line in enumerate(lines) if line.startswith("b2 d32 n64 h4/2")]
    assert [lines[i + 1] for i in rows] == [f"  no broken: {reason}"] * 2
    assert f"no broken in 2 of 2 cells: {reason}" in lines
    assert json.loads(out.read_text())["arms_not_asked_for"] == ["xla"]

    def stop(result: Any, names: Any, detailed: bool) -> str:
        if "causal" in result["name"]:
            raise KeyboardInterrupt
        return result["name"]

    monkeypatch.setattr(bench, "row", stop)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*quick, "--arms=jax_flash_xla"])
    assert len(json.loads(out.read_text())["results"]) == 1


def test_cells_without_time_are_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--budget=0", f"--out={tmp_path / 'results.json'}"]
    assert bench.main(arguments) == 1
    expected = "no time for b2 d32 n64 h4/2, b2 d32 n64 h4/2 causal"
    assert expected in capsys.readouterr().out.splitlines()


def fake_cudnn(
    query: Any, key: Any, value: Any, bias: Any, q_seqlen: Any, kv_seqlen: Any,
    q_offsets: Any, kv_offsets: Any, k_table: Any, v_table: Any, *rest: Any,
) -> Any:  # fmt: skip
    """What JAX's private module gives cuDNN, read as its documentation says."""
    kinds = compat.cudnn_attention().MaskType
    if k_table.ndim == 4:
        assert kinds.PADDING in rest
        assert k_table is v_table
        whole = query.shape[0], -1, *key.shape[2:]
        key, value = (x[k_table[:, 0, :, 0]].reshape(whole) for x in (key, value))
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=kv_seqlen
        )
    assert kinds.PADDING_CAUSAL in rest
    assert q_offsets is kv_offsets
    assert q_seqlen is kv_seqlen
    starts = q_offsets[0, :-1]
    column = jnp.arange(query.shape[1])
    ids = jnp.searchsorted(starts, column, side="right") - 1
    right = (q_seqlen[0] == jnp.bincount(ids, length=len(starts))).all()
    mask = (ids[:, None] == ids) & right
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """JAX's private module with its checks and without cuDNN."""
    module = compat.cudnn_attention()
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(module, "_dot_product_attention", fake_cudnn)
    return module


@pytest.mark.usefixtures("usual_promotion")
def test_decode_by_the_paged_call_of_cudnn(cudnn: Any) -> None:
    cell = decode.Cell(2, 256, 4, 2, 16, page=16, ragged=True)
    query, [(k, v)], lengths, table = cell.inputs(1)
    arguments = query, k, v, lengths, table
    expected = decode.ours("xla", cell)(*arguments).astype(jnp.float32)
    got = decode.cudnn_paged(cell)(*arguments).astype(jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-2)


@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize("backward", [False, True])
def test_peers_of_options(
    a_gpu: pytest.MonkeyPatch, cudnn: Any, backward: bool
) -> None:
    """With plain JAX behind the peers' signatures; one that is wrong is named."""
    problem = options.Problem(96, 2, 16)
    longest = np.diff(problem.offsets).max()
    plain = jax.nn.dot_product_attention

    def dot_product_attention(*args: Any, implementation: str = "xla", **rest: Any):
        assert implementation in ("xla", "cudnn")
        return plain(*args, implementation="xla", **rest)

    def not_causal(query, key, value, softmax_scale=None, is_causal=False):
        return plain(query, key, value)

    def varlen(query, key, value, cu_seqlens, max_seqlen, *, is_causal=False):
        assert max_seqlen == longest
        options = {"is_causal": is_causal, "implementation": "xla"}
        return jax_flash.mha_varlen(query, key, value, cu_seqlens, **options)

    dew = types.ModuleType("dew_flash_attn")
    dew.__dict__.update(flash_mha=not_causal, flash_mha_varlen=varlen)
    a_gpu.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    a_gpu.setitem(sys.modules, "dew_flash_attn", dew)
    a_gpu.setitem(sys.modules, "flash_attn3_jax", types.ModuleType("flash_attn3_jax"))
    own = options.rows(problem, "xla")
    table = own | options.peers(problem, own, backward)
    calls, skipped = options.prepare(table, problem.inputs(), backward)
    assert skipped.keys() == {"dense by fa3_dew", "varlen by fa3_jax"}, skipped
    assert skipped["dense by fa3_dew"].startswith("out differs from ours by")
    assert skipped["varlen by fa3_jax"] == "built for width 128 only, not 16"
    assert calls.keys() == table.keys() - skipped.keys()


def test_peers_of_options_at_full_size(a_gpu: pytest.MonkeyPatch) -> None:
    problem = options.Problem(16384, 16, 128)
    own = options.rows(problem, "cuda")
    reasons = {k: row.why_not for k, row in options.peers(problem, own, True).items()}
    assert reasons["dense by xla"] == "would materialise 52 GB of scores"
    assert "import dew_flash_attn: " in str(reasons["varlen by fa3_dew"])
    assert reasons["segments by cudnn, packed"] is None
