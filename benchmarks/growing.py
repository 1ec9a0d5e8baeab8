"""What scores cost that leave the range of the sm_90 forward's softmax.

    python -m benchmarks.growing                       # 12 cells, about a minute
    python -m benchmarks.growing --cells 'd64.*causal'
    python -m benchmarks.growing --smoke               # tiny, on any machine

The kernel takes a row's maximum in its first tile of keys and afterwards only where the
row's sum of exponentials says that it left the range (docs/design/fwd_sm90.md). It goes
from the last tile to the first; here logits grow on this way, by one component of query
and key:

- "grow": by 8 a tile, so that rows leave the range in the second tile, and from then on
  take maxima and move their reference points in every tile;
- "jump": by 90 in every second tile, so that exponentials overflow again and again,
  whose scores are then computed a second time. Nothing costs more.

Each of all rows, and of one row in 64: a warp of every warpgroup.
Every result is compared with float32. Times are of kernels, in turn in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys

import jax
import jax.numpy as jnp

from benchmarks import baselines, bench, timing
from benchmarks.baselines import Arrays, Cell

TILE = {64: 128, 128: 128, 256: 64}
"""Keys of a tile, by width."""


@dataclasses.dataclass(frozen=True)
class Growth:
    """How logits grow from the last tile of keys to the first.

    Attributes:
      step: by how much.
      tiles: in which of them: every one, every second one.
      spacing: which rows: all of them, one of 64.
    """

    step: float
    tiles: int
    spacing: int


ROWS: dict[str, Growth | None] = {
    "ordinary": None,
    "grow, 1 row in 64": Growth(8, 1, 64),
    "grow, all rows": Growth(8, 1, 1),
    "jump, 1 row in 64": Growth(90, 2, 64),
    "jump, all rows": Growth(90, 2, 1),
}

CELLS = tuple(
    Cell(
        batch=16384 // length,
        query_length=length,
        key_length=length,
        heads=2048 // width,
        kv_heads=2048 // width,
        head_dim=width,
        is_causal=is_causal,
    )
    for width in TILE
    for is_causal in (False, True)
    for length in (4096, 16384)
)
SMOKE_CELLS = (Cell(1, 256, 256, 2, 2, 64, is_causal=True),)


def grown(inputs: Arrays, growth: Growth | None) -> Arrays:
    """Query, key and value [B, T, N, D] with logits that grow, the first two changed.

    Of keys, the first component counts the tiles (times `growth.tiles`) from the last
    one on; bfloat16 holds numbers up to 256 exactly.
    """
    query, key, value = inputs
    if growth is None:
        return inputs
    length, width = key.shape[1], key.shape[3]
    tile = (length - 1 - jnp.arange(length)) // TILE[width] // growth.tiles
    chosen = jnp.arange(query.shape[1]) % growth.spacing == 0
    slope = jnp.where(chosen, growth.step * width**0.5, 0)[None, :, None]
    query = query.at[..., 0].set(slope.astype(query.dtype))
    key = key.at[..., 0].set(tile[None, :, None].astype(key.dtype))
    return query, key, value


def measure(cell: Cell, arm: baselines.Arm, protocol: timing.Protocol) -> bool:
    """Prints a cell's line; returns whether all calls ran and were right."""
    compiled = arm.compile(cell)
    inputs = jax.block_until_ready(cell.inputs())
    calls: dict[str, timing.Call] = {}
    wrong: dict[str, str] = {}
    for name, growth in ROWS.items():
        changed = jax.block_until_ready(grown(inputs, growth))
        calls[name] = arm.bind(compiled, cell, changed)
        expected = baselines.reference(cell, changed)
        if reason := bench.check(calls[name], cell, expected):
            wrong[name] = reason
    samples = timing.measure(calls, protocol)
    wrong |= {name: one.errors[0] for name, one in samples.items() if one.errors}
    times = {
        name: one.median_us() for name, one in samples.items() if name not in wrong
    }
    line = f"{cell.name:20}"
    for name in ROWS:
        us = times.get(name)
        ratio = us / times["ordinary"] if us and "ordinary" in times else None
        if name == "ordinary":
            line += f"{'-' if us is None else f'{us:.1f}':>20}"
        else:
            line += f"{'-' if ratio is None else f'{ratio:.2f}':>20}"
    print("\n".join([line, *(f"  {name}: {why}" for name, why in wrong.items())]))
    sys.stdout.flush()
    return not wrong


def main() -> int:
    """Runs the cells; 1 if a call failed or was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default="", help="regular expression on cell names")
    parser.add_argument("--smoke", action="store_true", help="tiny, by plain JAX")
    arguments = parser.parse_args()
    print(jax.devices()[0].device_kind, "CUPTI" if timing.cupti() else "wall time")
    print("microseconds with ordinary scores, and the time of the others over that")
    print(f"{'':20}" + "".join(f"{name:>20}" for name in ROWS), flush=True)
    cells, arm = CELLS, baselines.ARMS["jax_flash"]
    protocol = timing.Protocol(rounds=3, seconds=0.02, idle=0.02)
    if arguments.smoke:
        cells, arm = SMOKE_CELLS, baselines.ARMS["jax_flash_xla"]
        protocol = timing.Protocol(rounds=1, seconds=0.0, idle=0.0)
    right = True
    for cell in cells:
        if re.search(arguments.cells, cell.name):
            right = measure(cell, arm, protocol) and right
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
