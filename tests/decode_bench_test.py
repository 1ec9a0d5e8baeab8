"""The benchmark of decoding, without a GPU."""

import dataclasses
import json
import pathlib
import sys

import pytest

# The benchmarks are no part of the package, so the repository must be on the path.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import decode


@pytest.mark.usefixtures("usual_promotion")
def test_decode_smoke(tmp_path: pathlib.Path) -> None:
    """Arms that need no GPU run, Pallas interpreted, and agree; others say why not."""
    out = tmp_path / "decode.json"
    assert decode.main(["--smoke", "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    ran = {(row["name"], row["arm"]) for row in data["rows"]}
    skipped = {(one["name"], one["arm"]): one["why"] for one in data["skipped"]}
    names = [cell.name for cell in decode.SMOKE_CELLS]
    both = {(name, arm) for name in names for arm in decode.SMOKE_ARMS}
    assert ran | skipped.keys() == both
    single, several, paged, quantised, f32 = names
    only_one = "NotImplementedError: takes one query of each sequence"
    private = [skipped.pop((name, "cudnn_paged")) for name in names]
    assert private[:2] == ["NotImplementedError: takes pages only: see cudnn"] * 2
    assert "cuDNN" in private[2]
    assert private[3] == "NotImplementedError: has no scales"
    assert private[4] == private[0]
    assert skipped == {(several, "pallas_4"): only_one}
    assert {(name, "pallas_4") for name in (single, paged, quantised, f32)} <= ran


@pytest.mark.parametrize(
    ("arm", "cell", "why"),
    [
        ("cudnn_paged", decode.Cell(1, 64, page=16, tokens=2), "several queries"),
        ("pallas", decode.Cell(1, 64, cache="int8"), "scales for pages only"),
        ("fa3_16", decode.Cell(1, 64, width=256), "widths up to 128"),
        ("fa3", decode.Cell(1, 64, cache="int8"), "8-bit query"),
    ],
)
def test_limits_of_decode_arms(arm: str, cell: decode.Cell, why: str) -> None:
    assert arm in decode.ARMS
    with pytest.raises(NotImplementedError, match=why):
        decode.ARMS[arm](cell)


def test_decode_is_compared_with_the_fastest_peer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = {
        "fast": {"jax_flash": 10.0, "fa3": 30.0, "fa3_8": 20.0},
        "slow": {"jax_flash": 20.0, "jax_flash_xla": 1.0, "cudnn": 10.0},
        "alone": {"jax_flash": 10.0},
    }
    rows = [
        {"name": name, "arm": arm, "chain_us": us}
        for name, by_arm in times.items()
        for arm, us in by_arm.items()
    ]
    found = decode.compare(rows, "jax_flash")
    assert found == {"fast": (2.0, "fa3_8"), "slow": (0.5, "cudnn")}
    decode.print_comparison(found, "jax_flash")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("geometric mean 1.000 of 2 cells")
    assert lines[1:] == ["  below 1: slow: 0.500 of cudnn"]


def test_decode_chains_read_more_than_the_l2() -> None:
    small, large = decode.Cell(1, 1024), decode.Cell(128, 8192)
    calls, chains = small.chains(16, decode.ROTATED)
    assert calls == 16
    assert calls * chains * small.kv_bytes >= decode.ROTATED
    assert large.chains(16, decode.ROTATED) == (1, 1)
    turns = decode.in_turn(lambda q, caches, n, table: caches, 0, [1, 2], 0, None)
    assert [turns() for _ in range(5)] == [1, 2, 1, 2, 1]


def test_decode_variants_are_compared_with_the_plain_cell() -> None:
    plain = decode.Cell(1, 64, page=16)
    cells = {
        plain: 10.0,
        dataclasses.replace(plain, tokens=4): 11.0,
        dataclasses.replace(plain, cache="int8"): 6.0,
        dataclasses.replace(plain, page=0): 8.0,
        decode.Cell(2, 64, tokens=4): 1.0,
    }
    rows = [
        dataclasses.asdict(cell) | {"arm": "jax_flash", "chain_us": us}
        for cell, us in cells.items()
    ]
    rows.append(rows[0] | {"arm": "fa3", "chain_us": 1.0})
    assert decode.variants(rows, "jax_flash") == {
        "b1 n64 32/8 d128 page16": 1.25,
        "b1 n64 32/8 d128 q4 page16": 1.1,
        "b1 n64 32/8 d128 page16 int8": 0.6,
    }


def test_every_variant_has_its_plain_cell() -> None:
    rows = [
        dataclasses.asdict(cell) | {"arm": "jax_flash", "chain_us": 1.0}
        for cell in decode.VARIANTS
    ]
    plain = {cell for cell in decode.VARIANTS if cell.tokens == 1}
    plain = {cell for cell in plain if not cell.quantised and not cell.page}
    names = {cell.name for cell in decode.VARIANTS if cell not in plain}
    assert decode.variants(rows, "jax_flash").keys() == names
