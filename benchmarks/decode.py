"""Decoding beside its peers: microseconds and GB/s of the keys and values read.

PYTHONPATH=.gpu:. python -m benchmarks.decode

Arms take turns in one process. A program is a chain of calls, each on the result of
the one before and on a cache of its own, so that small caches are not found in the L2.
`kernel` is the time inside kernels by CUPTI, `chain` the wall time of a chain divided
by its calls, gaps between kernels included.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from benchmarks.timing import Call, Protocol, Samples, Summary, measure, short

ROTATED = 260e6
"""Bytes of caches that a chain goes through; several times the L2."""
LONGEST_CHAIN = 16
TOLERANCE = 2e-2
SCALE = 1 / 32
"""Of quantised keys and values: int8 reaches 4 standard deviations, float8 14."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem: T queries of each of B sequences with caches [B, S, K, D].

    Attributes:
      batch, room, heads, kv_heads, width, tokens: B, S, N, K, D and T.
      ragged: lengths spread evenly over 1..S in random order, else all S.
      page: tokens of a page, 0 for contiguous caches.
      cache: dtype of the caches; queries are bfloat16.
    """

    batch: int
    room: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    tokens: int = 1
    ragged: bool = False
    page: int = 0
    cache: str = "bfloat16"

    @property
    def name(self) -> str:
        """For example "b64 n4096 32/8 d128 page16"."""
        parts = [f"b{self.batch}", f"n{self.room}", f"{self.heads}/{self.kv_heads}"]
        parts.append(f"d{self.width}")
        parts += [f"q{self.tokens}"] * (self.tokens > 1)
        parts += ["ragged"] * self.ragged + [f"page{self.page}"] * (self.page > 0)
        parts += [self.cache] * self.quantised
        return " ".join(parts)

    @property
    def quantised(self) -> bool:
        """Whether the caches have scales."""
        return self.cache != "bfloat16"

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token."""
        return 2 * self.kv_heads * self.width * jnp.dtype(self.cache).itemsize

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int32 [B]."""
        if not self.ragged:
            return np.full(self.batch, self.room, np.int32)
        even = np.linspace(1, self.room, self.batch).astype(np.int32)
        return np.random.default_rng(0).permutation(even)

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values that one call has to read."""
        return float(self.lengths.sum()) * self.token_bytes

    def inputs(self) -> tuple[Any, list[Any], Any, Any]:
        """Query, caches of the calls of a chain, lengths, page table or None."""
        whole = self.batch * self.room * self.token_bytes
        count = int(min(LONGEST_CHAIN, max(1, -(-ROTATED // whole))))
        shape = (self.batch, self.room, self.kv_heads, self.width)
        table = None
        if self.page:
            slots = self.room // self.page
            pages = self.batch * slots
            shape = (pages, self.page, self.kv_heads, self.width)
            order = np.random.default_rng(0).permutation(pages).astype(np.int32)
            table = jnp.asarray(order.reshape(self.batch, slots))
        keys = jax.random.split(jax.random.key(0), 2 * count + 1)
        query_shape = (self.batch, self.tokens, self.heads, self.width)
        query = jax.random.normal(keys[0], query_shape, jnp.bfloat16)

        @jax.jit
        def draw(key: jax.Array) -> jax.Array:
            x = jax.random.normal(key, shape, jnp.bfloat16)
            if self.quantised:
                x = x / SCALE
            if self.cache == "int8":
                x = jnp.clip(jnp.rint(x), -127, 127)
            return x.astype(self.cache)

        caches = [(draw(keys[2 * i + 1]), draw(keys[2 * i + 2])) for i in range(count)]
        return query, caches, jnp.asarray(self.lengths), table


CELLS = (
    Cell(1, 1024),
    Cell(1, 4096),
    Cell(1, 8192),
    Cell(1, 32768),
    Cell(1, 131072),
    Cell(4, 2048),
    Cell(16, 1024),
    Cell(8, 8192),
    Cell(64, 4096),
    Cell(128, 8192),
    Cell(64, 8192, ragged=True),
    Cell(8, 32768, 8, 1),
    Cell(16, 8192, 64, 8, 64),
    Cell(64, 4096, 9, 3, 64),
    Cell(16, 8192, 16, 16, 256),
    *(Cell(64, 4096, page=page) for page in (16, 64, 128)),
    *(
        Cell(batch, 32768, page=page, cache=cache)
        for batch, page in ((8, 0), (32, 0), (32, 64))
        for cache in ("bfloat16", "float8_e4m3fn", "int8")
    ),
    *(Cell(8, 8192, tokens=tokens) for tokens in (4, 16, 64)),
    *(Cell(1, 65536, tokens=tokens) for tokens in (1, 4, 16, 64)),
)

Attention = Callable[..., jax.Array]


def ours(implementation: str, cell: Cell) -> Attention:
    """`decode_mha` by one implementation."""
    scale = SCALE if cell.quantised else None

    def run(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        return jax_flash.decode_mha(
            query,
            k,
            v,
            lengths,
            page_table=table,
            k_scale=scale,
            v_scale=scale,
            implementation=implementation,
        )

    return run


def cudnn(cell: Cell) -> Attention:
    """`jax.nn` with lengths; its causal mask is aligned top-left, so one query only."""
    if cell.quantised:
        raise NotImplementedError("has no scales")
    if cell.page:
        raise NotImplementedError("takes no pages")
    if cell.tokens > 1:
        raise NotImplementedError("aligns several queries top-left")

    def run(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        del table
        return jax.nn.dot_product_attention(
            query, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
        )

    return run


def fa3(splits: int, cell: Cell) -> Attention:
    """FlashAttention-3 with a fixed number of splits."""
    if cell.quantised:
        raise NotImplementedError("takes an 8-bit cache with an 8-bit query only")
    if cell.width != 128:
        raise NotImplementedError("built for width 128 only")
    call = importlib.import_module("flash_attn3_jax").flash_mha_with_kvcache

    def run(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        out = call(
            query,
            k,
            v,
            cache_seqlens=lengths,
            page_table=table,
            is_causal=True,
            num_splits=splits,
        )
        return out[0] if isinstance(out, tuple) else out

    return run


ARMS: dict[str, Callable[[Cell], Attention]] = {
    "jax_flash": functools.partial(ours, "cuda"),
    "jax_flash_xla": functools.partial(ours, "xla"),
    "cudnn": cudnn,
    "fa3": functools.partial(fa3, 1),
    "fa3_8": functools.partial(fa3, 8),
    "fa3_32": functools.partial(fa3, 32),
}
DEFAULT_ARMS = ("jax_flash", "cudnn", "fa3", "fa3_8", "fa3_32")


def chain(attention: Attention) -> Callable:
    """A program of one call for each cache, and the first call's result."""

    def run(query: Any, caches: Any, lengths: Any, table: Any) -> Any:
        first = None
        for k, v in caches:
            query = attention(query, k, v, lengths, table)
            first = query if first is None else first
        return query, first

    return run


def run_cell(
    cell: Cell, arms: list[str], protocol: Protocol
) -> tuple[dict[str, Samples], dict[str, str], int]:
    """Samples and reasons for not running, by arm, and the calls of a chain."""
    inputs = cell.inputs()
    calls, why_not, firsts = {}, {}, {}
    for arm in arms:
        try:
            program = jax.jit(chain(ARMS[arm](cell))).lower(*inputs).compile()
            firsts[arm] = np.asarray(program(*inputs)[1], np.float32)
        except Exception as error:  # a peer may fail in any way
            why_not[arm] = short(error)
            continue
        calls[arm] = Call(
            run=functools.partial(program, *inputs),
            wait=jax.block_until_ready,
            heads=lambda result: result[1][0, :, :2],
        )
    for arm, first in firsts.items():
        other = next(iter(firsts.values()))
        difference = float(np.abs(first - other).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(other).max())):
            why_not[arm] = f"differs from {next(iter(firsts))} by {difference:.3g}"
            del calls[arm]
    return measure(calls, protocol), why_not, len(inputs[1])


def main() -> int:
    """Prints a table; 1 if our arm failed somewhere, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS)
    parser.add_argument(
        "--cells", default="", help="only cells with this in their name"
    )
    parser.add_argument("--seconds", type=float, default=0.02, help="of one turn")
    parser.add_argument("--budget", type=float, default=110.0, help="seconds in all")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    start = time.monotonic()
    protocol = Protocol(rounds=3, seconds=args.seconds, idle=0.02, most=100)
    print(f"device: {jax.devices()[0].device_kind}")
    print(f"{'cell':32} {'arm':14} {'kernel us':>10} {'GB/s':>6} {'chain us':>9}")
    rows, failed = [], False
    for cell in (cell for cell in CELLS if args.cells in cell.name):
        if time.monotonic() - start > args.budget:
            print(f"out of time before {cell.name}", file=sys.stderr)
            break
        samples, why_not, count = run_cell(cell, list(args.arms), protocol)
        for arm in args.arms:
            sample = samples.get(arm)
            errors = [why_not[arm]] if arm in why_not else []
            errors += sample.errors if sample is not None else []
            if errors or sample is None or not sample.wall_us:
                print(
                    f"{cell.name:32} {arm:14} {errors[0] if errors else 'no samples'}"
                )
                failed |= arm == "jax_flash"
                continue
            wall = Summary.of(sample.wall_us).median_us / count
            kernel = wall
            if sample.kernel_us:
                kernel = Summary.of(sample.kernel_us).median_us / count
            rate = cell.kv_bytes / kernel / 1e3
            print(f"{cell.name:32} {arm:14} {kernel:10.1f} {rate:6.0f} {wall:9.1f}")
            row = dataclasses.asdict(cell) | {"name": cell.name, "arm": arm}
            rows.append(row | {"kernel_us": kernel, "gb_s": rate, "chain_us": wall})
    if args.json is not None:
        device = jax.devices()[0].device_kind
        args.json.write_text(json.dumps({"device": device, "rows": rows}, indent=1))
    print(f"{time.monotonic() - start:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
