"""Decoding beside its peers: microseconds and GB/s of the keys and values read.

    PYTHONPATH=.gpu:. python -m benchmarks.decode
    python -m benchmarks.decode --set variants   # beside our own plain call
    python -m benchmarks.decode --smoke   # tiny, on any machine

Arms take turns in one process. A program is a chain of calls, each on the result of
the one before and on a cache of its own; it is run on several sets of caches in turn,
until all have been read, so that small caches are not found in the L2.
`kernel` is the time inside kernels by CUPTI, `chain` the wall time of a chain divided
by its calls, gaps between kernels included. An arm that does not run a cell says why.
After each cell come the seconds that it took, and how many of them for preparation.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from benchmarks.timing import Call, Protocol, Samples, Summary, measure, short
from jax_flash._src import compat, decode_plan
from jax_flash._src.decode_call import QUANTISED

ROTATED = 260e6
"""Bytes of caches that are read in turn; several times the L2."""
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
      cache: dtype of the caches; queries are float32 if it is, else bfloat16.
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
        parts += [self.cache] * (self.cache != "bfloat16")
        return " ".join(parts)

    @property
    def quantised(self) -> bool:
        """Whether the caches have scales."""
        return self.cache in QUANTISED

    @property
    def dtype(self) -> str:
        """Of queries and results."""
        return "float32" if self.cache == "float32" else "bfloat16"

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

    def chains(self, longest: int, rotated: float) -> tuple[int, int]:
        """Calls of a chain, at most `longest`, and chains that read `rotated` bytes."""
        whole = self.batch * self.room * self.token_bytes
        calls = int(min(longest, max(1, -(-rotated // whole))))
        return calls, int(max(1, -(-rotated // (calls * whole))))

    def inputs(self, count: int) -> tuple[Any, list[Any], Any, Any]:
        """Query, `count` caches, lengths, page table or None."""
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
        query = jax.random.normal(keys[0], query_shape, self.dtype)

        @jax.jit
        def draw(key: jax.Array) -> jax.Array:
            x = jax.random.normal(key, shape, self.dtype)
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
    *(
        Cell(batch, room, cache="float32")
        for batch, room in ((1, 8192), (8, 8192), (64, 4096))
    ),
)

VARIANTS = (
    *(
        Cell(batch, 32768, cache=cache)
        for batch in (1, 16)
        for cache in ("bfloat16", "float8_e4m3fn", "int8")
    ),
    *(
        Cell(batch, room, tokens=tokens)
        for batch, room in ((8, 8192), (1, 65536))
        for tokens in (1, 4, 16, 64)
    ),
    *(Cell(64, 4096, page=page) for page in (0, 16, 64, 256)),
    *(Cell(64, 8192, ragged=True, page=page) for page in (0, 16)),
)
"""8-bit caches, several tokens, pages and ragged lengths, each with its plain cell."""

SMOKE_CELLS = (
    Cell(2, 256, 4, 2, 16, ragged=True),
    Cell(2, 256, 4, 2, 16, tokens=3),
    Cell(2, 256, 4, 2, 16, page=16),
    Cell(2, 256, 4, 2, 16, page=16, cache="int8"),
    Cell(2, 256, 4, 2, 16, cache="float32"),
)

Attention = Callable[..., jax.Array]


def ours(implementation: str, cell: Cell, short: bool = False) -> Attention:
    """`decode_mha` by one implementation; short: with splits down to 64 keys."""
    scale = SCALE if cell.quantised else None
    rows = cell.tokens * cell.heads // cell.kv_heads
    size = jnp.dtype(cell.cache).itemsize
    many = decode_plan.enough_splits(rows, cell.kv_heads, size)
    splits = many if short else None

    def run(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        return jax_flash.decode_mha(
            query,
            k,
            v,
            lengths,
            page_table=table,
            k_scale=scale,
            v_scale=scale,
            num_splits=splits,
            implementation=implementation,
        )

    return run


def cudnn(cell: Cell) -> Attention:
    """`jax.nn` with lengths; its causal mask is aligned top-left, so one query only."""
    if cell.quantised:
        raise NotImplementedError("has no scales")
    if cell.dtype == "float32":
        raise NotImplementedError("takes no float32")
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


def cudnn_paged(cell: Cell) -> Attention:
    """A page table in cuDNN, by JAX's private call.

    As with `cudnn`, several queries would be masked from the top left.
    """
    if not cell.page:
        raise NotImplementedError("takes pages only: see cudnn")
    if cell.quantised:
        raise NotImplementedError("has no scales")
    if cell.tokens > 1:
        raise NotImplementedError("aligns several queries top-left")
    module = compat.cudnn_attention()

    def run(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        one = jnp.ones(cell.batch, jnp.int32)
        pages = table[:, None, :, None]
        return module.paged_attention(
            query,
            k,
            v,
            one,
            lengths,
            pages,
            pages,
            scale=cell.width**-0.5,
            mask_type=module.MaskType.PADDING,
        )

    return run


def xla(cell: Cell) -> Attention:
    """`jax.nn` by plain XLA; pages are gathered and 8-bit caches scaled before it."""

    def run(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        if table is not None:
            whole = cell.batch, cell.room, cell.kv_heads, cell.width
            # The table is right; a check would be one more pass over what is gathered.
            mode = "promise_in_bounds"
            k, v = (x.at[table].get(mode=mode).reshape(whole) for x in (k, v))
        if cell.quantised:
            k, v = (x.astype(query.dtype) * SCALE for x in (k, v))
        mask = None
        if cell.tokens > 1:
            behind = jnp.arange(cell.tokens - 1, -1, -1)
            end = lengths[:, None, None, None] - behind[:, None]
            mask = jnp.arange(cell.room) < end
        return jax.nn.dot_product_attention(
            query, k, v, mask=mask, key_value_seq_lengths=lengths, implementation="xla"
        )

    return run


def pallas(splits: int, cell: Cell) -> Attention:
    """JAX's Pallas kernels for decoding, with a fixed number of splits.

    They take one query of each sequence and read heads one after another: keys and
    values are each a pair of `heads_first`.
    """
    if cell.tokens > 1:
        raise NotImplementedError("takes one query of each sequence")
    if cell.quantised and not cell.page:
        raise NotImplementedError("has scales for pages only")
    name = "paged_attention" if cell.page else "decode_attention"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")
    # A tile of keys, and one of values, each twice: what shared memory holds.
    tile = 128 if cell.width <= 128 else 64
    interpret = jax.default_backend() == "cpu"

    def contiguous(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        del table
        # The call turns the caches; turning them before leaves XLA nothing to do.
        k, v = jnp.swapaxes(k[0], 1, 2), jnp.swapaxes(v[0], 1, 2)
        options = {"block_k": tile, "k_splits": splits, "interpret": interpret}
        return module.gqa(query[:, 0], k, v, kv_seq_len=lengths, **options)[:, None]

    def paged(query: Any, k: Any, v: Any, lengths: Any, table: Any) -> jax.Array:
        # The kernel does not scale scores.
        out = module.paged_attention(
            query[:, 0] * cell.width**-0.5,
            k[0],
            v[0],
            table,
            lengths,
            k[1],
            v[1],
            pages_per_compute_block=max(1, tile // cell.page),
            k_splits=splits,
            interpret=interpret,
        )
        return out[:, None]

    return paged if cell.page else contiguous


def heads_first(cell: Cell, caches: list[Any]) -> list[Any]:
    """Caches for `pallas`: [B, K, S, D] or [K, pages, page, D], each with its scales.

    Scales are float32, [K, pages, page], of 8-bit caches, None of others.
    """

    @jax.jit
    def turn(cache: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        cache = jnp.moveaxis(cache, 2, 0 if cell.page else 1)
        return cache, jnp.full(cache.shape[:3], SCALE) if cell.quantised else None

    return jax.block_until_ready([(turn(k), turn(v)) for k, v in caches])


def fa3(splits: int, cell: Cell) -> Attention:
    """FlashAttention-3 with a fixed number of splits; narrow heads in width 128."""
    if cell.quantised:
        raise NotImplementedError("takes an 8-bit cache with an 8-bit query only")
    if cell.dtype == "float32":
        raise NotImplementedError("takes no float32")
    if cell.width > 128:
        raise NotImplementedError("built for widths up to 128")
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
    "jax_flash_short": functools.partial(ours, "cuda", short=True),
    "jax_flash_xla": functools.partial(ours, "xla"),
    "cudnn": cudnn,
    "cudnn_paged": cudnn_paged,
    "xla": xla,
    "pallas": functools.partial(pallas, 16),
    "pallas_4": functools.partial(pallas, 4),
    "fa3": functools.partial(fa3, 1),
    "fa3_4": functools.partial(fa3, 4),
    "fa3_8": functools.partial(fa3, 8),
    "fa3_16": functools.partial(fa3, 16),
    "fa3_32": functools.partial(fa3, 32),
}
DEFAULT_ARMS = (
    *("jax_flash", "cudnn", "cudnn_paged", "xla"),
    *("pallas", "fa3_8", "fa3_32"),
)
"""Each library, FlashAttention-3 with two numbers of splits: an arm takes seconds of
compilation in each cell. `--arms` has the others."""
VARIANT_ARMS = ("jax_flash", "fa3_32")
"""The plain call is the other thing to compare with."""
SMOKE_ARMS = ("jax_flash_xla", "cudnn_paged", "xla", "pallas_4")

SETS: dict[str, tuple[tuple[Cell, ...], tuple[str, ...]]] = {
    "main": (CELLS, DEFAULT_ARMS),
    "variants": (VARIANTS, VARIANT_ARMS),
}


def chain(attention: Attention) -> Callable:
    """A program of one call for each cache, and the first call's result."""

    def run(query: Any, caches: Any, lengths: Any, table: Any) -> Any:
        first = None
        for k, v in caches:
            query = attention(query, k, v, lengths, table)
            first = query if first is None else first
        return query, first

    return run


def in_turn(
    program: Callable, query: Any, sets: list[Any], lengths: Any, table: Any
) -> Callable[[], Any]:
    """Runs the program on another set of caches each time."""
    turns = itertools.cycle(sets)
    return lambda: program(query, next(turns), lengths, table)


def run_cell(
    cell: Cell, arms: list[str], protocol: Protocol, longest: int, rotated: float
) -> tuple[dict[str, Samples], dict[str, str], int]:
    """Samples and reasons for not running, by arm, and the calls of a chain."""
    start = time.monotonic()
    count, chains = cell.chains(longest, rotated)
    query, caches, lengths, table = cell.inputs(count * chains)
    turned: list[Any] = []
    calls, why_not, firsts = {}, {}, {}
    for arm in arms:
        try:
            attention, own = ARMS[arm](cell), caches
            if arm.startswith("pallas"):
                own = turned = turned or heads_first(cell, caches)
            sets = [own[i : i + count] for i in range(0, len(own), count)]
            first = query, sets[0], lengths, table
            program = jax.jit(chain(attention)).lower(*first).compile()
            firsts[arm] = np.asarray(program(*first)[1], np.float32)
        except Exception as error:  # a peer may fail in any way
            why_not[arm] = short(error)
            continue
        calls[arm] = Call(
            run=in_turn(program, query, sets, lengths, table),
            wait=jax.block_until_ready,
            heads=lambda result: result[1][0, :, :2],
        )
    for arm, first in firsts.items():
        other = next(iter(firsts.values()))
        difference = float(np.abs(first - other).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(other).max())):
            why_not[arm] = f"differs from {next(iter(firsts))} by {difference:.3g}"
            del calls[arm]
    prepared = time.monotonic()
    samples = measure(calls, protocol)
    end = time.monotonic()
    print(f"{cell.name:32} {end - start:.1f} s, {prepared - start:.1f} to prepare")
    return samples, why_not, count


def compare(rows: list[dict[str, Any]], ours: str) -> dict[str, tuple[float, str]]:
    """The fastest peer's time over ours and its name, by cell; chains, as users see."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["name"], {})[row["arm"]] = row["chain_us"]
    found = {}
    for cell, by_arm in times.items():
        peers = [arm for arm in by_arm if not arm.startswith("jax_flash")]
        if ours in by_arm and peers:
            best = min(peers, key=lambda arm: by_arm[arm])
            found[cell] = by_arm[best] / by_arm[ours], best
    return found


def print_comparison(found: dict[str, tuple[float, str]], ours: str) -> None:
    """The geometric mean over the cells, and those that are slower than a peer."""
    if not found:
        print(f"nothing to compare {ours} with")
        return
    mean = statistics.geometric_mean([ratio for ratio, _ in found.values()])
    print(f"{ours} over the best peer, geometric mean {mean:.3f} of {len(found)} cells")
    for cell, (ratio, best) in found.items():
        if ratio < 1:
            print(f"  below 1: {cell}: {ratio:.3f} of {best}")


def variants(rows: list[dict[str, Any]], ours: str) -> dict[str, float]:
    """Time over the same cell's with one token and bfloat16 caches, by name.

    A cell with pages that is plain otherwise is compared with one without pages.
    """
    fields = [field.name for field in dataclasses.fields(Cell)]
    times = {
        Cell(**{name: row[name] for name in fields}): row["chain_us"]
        for row in rows
        if row["arm"] == ours
    }
    found = {}
    for cell, time_us in times.items():
        plain = dataclasses.replace(cell, tokens=1, cache="bfloat16")
        if plain == cell:
            plain = dataclasses.replace(cell, page=0)
        if plain != cell and plain in times:
            found[cell.name] = time_us / times[plain]
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints a table; 1 if the first arm failed somewhere, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="the first is ours")
    parser.add_argument("--set", choices=SETS, default="main", help="of cells")
    parser.add_argument(
        "--cells", default="", help="only cells with this in their name"
    )
    parser.add_argument("--seconds", type=float, default=0.02, help="of one turn")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--smoke", action="store_true", help="tiny cells, any machine")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    table, usual_arms = SETS[args.set]
    arms: list[str] = args.arms or [*(SMOKE_ARMS if args.smoke else usual_arms)]
    start = time.monotonic()
    protocol = Protocol(
        rounds=3, seconds=args.seconds, idle=0.02, most=100, kernel_rounds=1
    )
    longest, rotated = LONGEST_CHAIN, ROTATED
    if args.smoke:
        protocol = Protocol(rounds=1, seconds=0.0, idle=0.0)
        table, longest, rotated = SMOKE_CELLS, 1, 0.0
    device = jax.devices()[0].device_kind
    print(f"device: {device}")
    print(f"{'cell':32} {'arm':14} {'kernel us':>10} {'GB/s':>6} {'chain us':>9}")
    rows, skipped = [], []
    for cell in (cell for cell in table if args.cells in cell.name):
        about = dataclasses.asdict(cell) | {"name": cell.name}
        if time.monotonic() - start > args.budget:
            print(f"no time for {cell.name}")
            skipped += [about | {"arm": arm, "why": "no time"} for arm in arms]
            continue
        samples, why_not, count = run_cell(cell, arms, protocol, longest, rotated)
        for arm in arms:
            sample = samples.get(arm)
            errors = [why_not[arm]] if arm in why_not else []
            errors += sample.errors if sample is not None else []
            if errors or sample is None or not sample.wall_us:
                why = errors[0] if errors else "no samples"
                print(f"{cell.name:32} {arm:14} {why}", flush=True)
                skipped.append(about | {"arm": arm, "why": why})
                continue
            wall = Summary.of(sample.wall_us).median_us / count
            kernel = wall
            if sample.kernel_us:
                kernel = Summary.of(sample.kernel_us).median_us / count
            rate = cell.kv_bytes / kernel / 1e3
            print(
                f"{cell.name:32} {arm:14} {kernel:10.1f} {rate:6.0f} {wall:9.1f}",
                flush=True,
            )
            figures = {"kernel_us": kernel, "gb_s": rate, "chain_us": wall}
            rows.append(about | {"arm": arm} | figures)
        if args.json is not None:
            data = {"device": device, "rows": rows, "skipped": skipped}
            args.json.write_text(json.dumps(data, indent=1))
    print_comparison(compare(rows, arms[0]), arms[0])
    for name, ratio in variants(rows, arms[0]).items():
        print(f"  {name}: {ratio:.3f} of the plain cell's time")
    print(f"{time.monotonic() - start:.0f} s")
    failed = [one for one in skipped if one["arm"] == arms[0]]
    return int(any(one["why"] != "no time" for one in failed))


if __name__ == "__main__":
    sys.exit(main())
