"""Options of attention beside the dense causal call of the same size.

    python -m benchmarks.options               # about 5 minutes
    python -m benchmarks.options --widths 128  # a third of it
    python -m benchmarks.options --rows 'bias|mask'  # beside the dense call alone
    python -m benchmarks.options --smoke       # tiny, on any machine

The time is that of all kernels of a call: those that look at segment ids or offsets
right before the main one are in it. Kernels that run beside each other count in full,
so "wall", the time of one of many calls started back to back, may be less. "work" are
the pairs of query and key that a call looks at over those of the dense one, "rate" is
the pairs per second over the dense call's, both by this package. Peers follow, each
with its time over that of this package's call which computes the same; one that does
not run, or whose result differs, is named with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from benchmarks import baselines, timing
from jax_flash._src import compat

DOCUMENTS = 16
WIDTHS = (64, 128, 256)
SEGMENTS = f"segments ({DOCUMENTS} documents)"
VARLEN = f"varlen ({DOCUMENTS} documents)"
# Of a peer's result from ours, in the Frobenius norm; each rounds to bfloat16.
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Problem:
    """A self-attention [1, length, heads, width], causal but for rows that say so.

    Attributes:
      length: of the sequence, in which the documents are packed.
      heads: of queries, keys and values alike.
      width: of all of them.
    """

    length: int
    heads: int
    width: int

    def inputs(self) -> tuple[jax.Array, ...]:
        """Query, key, value and a cotangent, random normal."""
        shape = (1, self.length, self.heads, self.width)
        keys = jax.random.split(jax.random.key(0), 4)
        return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where documents of random lengths begin, and the end."""
        rng = np.random.default_rng(0)
        cuts = rng.choice(np.arange(1, self.length), DOCUMENTS - 1, replace=False)
        return np.array([0, *np.sort(cuts), self.length], np.int32)


def same(x: jax.Array) -> jax.Array:
    """Its argument."""
    return x


@dataclasses.dataclass(frozen=True)
class Row:
    """A call.

    Attributes:
      attention: of query, key, value and the operands.
      operands: further arrays.
      pairs: of query and key that it looks at.
      like: of a peer, the name of the row that computes the same.
      why_not: reason why it cannot run here.
      layout: what becomes of query, key, value and cotangent before the call.
      back: what takes the output and the gradients back, not timed either.
    """

    attention: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]
    pairs: float
    like: str | None = None
    why_not: str | None = None
    layout: Callable[[jax.Array], jax.Array] = same
    back: Callable[[jax.Array], jax.Array] = same


def rows(problem: Problem, implementation: str) -> dict[str, Row]:
    """The calls by name; the first is the one that the others are measured by."""
    offsets = problem.offsets
    lengths = np.diff(offsets).astype(float)
    ids = jnp.asarray(np.repeat(np.arange(DOCUMENTS), lengths.astype(int))[None])
    ids = ids.astype(jnp.int32)
    dense = problem.length * (problem.length + 1) / 2
    packed = float((lengths * (lengths + 1) / 2).sum())
    # Windows cut long documents.
    window = problem.length // 16
    short = np.minimum(lengths, window)
    within = float((short * (short + 1) / 2 + (lengths - short) * (window + 1)).sum())
    powers = -8.0 * np.arange(1, problem.heads + 1) / problem.heads
    slopes = jnp.asarray(np.exp2(powers), jnp.float32)
    sinks = jnp.ones(problem.heads, jnp.float32)
    square = (1, 1, problem.length, problem.length)
    # As large as a part of the keys that kernels know to be hidden.
    size = max(1, problem.length // 64)
    count = -(-problem.length // size)
    drawn = np.random.default_rng(1).random((count, count)) < 1 / 4
    drawn |= np.eye(count, dtype=bool)
    blocks = jnp.asarray(drawn).repeat(size, 0).repeat(size, 1)
    blocks = blocks[None, None, : problem.length, : problem.length]
    in_blocks = float(
        np.tril(drawn, -1).sum() * size**2 + count * size * (size + 1) / 2
    )
    bias = jax.random.normal(jax.random.key(1), square, jnp.bfloat16)

    def mha(query: Any, key: Any, value: Any, **options: Any) -> jax.Array:
        options = {"is_causal": True, "implementation": implementation} | options
        return jax_flash.mha(query, key, value, **options)

    def dense_of_all(query: Any, key: Any, value: Any) -> jax.Array:
        return mha(query, key, value, is_causal=False)

    def segments(query: Any, key: Any, value: Any, ids: Any) -> jax.Array:
        return mha(query, key, value, q_segment_ids=ids, kv_segment_ids=ids)

    def varlen(query: Any, key: Any, value: Any, offsets: Any) -> jax.Array:
        options = {"is_causal": True, "implementation": implementation}
        tensors = query[0], key[0], value[0]
        return jax_flash.mha_varlen(*tensors, offsets, **options)[None]

    def softcap(query: Any, key: Any, value: Any) -> jax.Array:
        return mha(query, key, value, softcap=30.0)

    def alibi(query: Any, key: Any, value: Any, slopes: Any) -> jax.Array:
        return mha(query, key, value, bias=jax_flash.alibi(slopes))

    def dropout(query: Any, key: Any, value: Any, word: Any) -> jax.Array:
        return mha(query, key, value, dropout_rate=0.1, dropout_key=word)

    def biased(query: Any, key: Any, value: Any, bias: Any) -> jax.Array:
        return mha(query, key, value, bias=bias)

    def biased_of_all(query: Any, key: Any, value: Any, bias: Any) -> jax.Array:
        return mha(query, key, value, bias=bias, is_causal=False)

    def masked(query: Any, key: Any, value: Any, mask: Any) -> jax.Array:
        return mha(query, key, value, mask=mask)

    def all_of_them(query: Any, key: Any, value: Any, ids: Any, sinks: Any) -> Any:
        options = {"q_segment_ids": ids, "kv_segment_ids": ids, "sinks": sinks}
        options |= {"window_size": (window, 0), "softcap": 30.0}
        return mha(query, key, value, **options)

    return {
        "dense": Row(mha, (), dense),
        SEGMENTS: Row(segments, (ids,), packed),
        VARLEN: Row(varlen, (jnp.asarray(offsets),), packed),
        "softcap": Row(softcap, (), dense),
        "alibi": Row(alibi, (slopes,), dense),
        "dropout": Row(dropout, (jnp.asarray([1, 2], jnp.uint32),), dense),
        "bias, one for all heads": Row(biased, (bias,), dense),
        "dense, not causal": Row(dense_of_all, (), float(problem.length**2)),
        "bias, not causal": Row(biased_of_all, (bias,), float(problem.length**2)),
        "mask, one for all heads": Row(masked, (bias < 1,), dense),
        "mask of the documents": Row(
            masked, ((ids[:, :, None] == ids[:, None])[:, None],), packed
        ),
        "mask of a quarter of the blocks": Row(masked, (blocks,), in_blocks),
        "segments + window + sinks + softcap": Row(all_of_them, (ids, sinks), within),
    }


def unavailable(module: str | None = None) -> str | None:
    """Why a peer for GPUs, in another module, cannot run here; None if it can."""
    if not baselines.on_gpu():
        return "needs an NVIDIA GPU"
    return None if module is None else baselines.import_error(module)


def peers(problem: Problem, own: dict[str, Row], backward: bool) -> dict[str, Row]:
    """What other packages offer for some of the rows `own`, by name.

    Documents in `jax.nn` are sequences of a batch, padded to the longest (which is not
    timed), or a dense mask. JAX's private call of cuDNN takes them packed.
    """
    lengths = np.diff(problem.offsets)
    longest = int(lengths.max())
    offsets = jnp.asarray(problem.offsets)
    length, width = problem.length, problem.width

    def row(
        like: str,
        attention: Callable[..., jax.Array],
        *operands: jax.Array,
        why_not: str | None = None,
        **changes: Any,
    ) -> Row:
        changes |= {"pairs": own[like].pairs, "like": like, "why_not": why_not}
        return Row(attention, operands, **changes)

    def jax_nn(implementation: Literal["xla", "cudnn"]) -> Callable[..., jax.Array]:
        return functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation=implementation
        )

    def xla_segments(query: Any, key: Any, value: Any, ids: Any) -> jax.Array:
        mask = (ids[:, :, None] == ids[:, None])[:, None]
        return jax_nn("xla")(query, key, value, mask=mask)

    def cudnn_padded(query: Any, key: Any, value: Any, lengths: Any) -> jax.Array:
        options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        return jax_nn("cudnn")(query, key, value, **options)

    def cudnn_packed(query: Any, key: Any, value: Any, offsets: Any) -> jax.Array:
        module = compat.cudnn_attention()
        # One more offset than documents, which cuDNN does not read.
        starts = jnp.append(offsets[:-1], -1)[None]
        lengths = jnp.diff(offsets)[None]
        where = {"q_seqlen": lengths, "kv_seqlen": lengths}
        where |= {"q_offsets": starts, "kv_offsets": starts}
        mask = module.MaskType.PADDING_CAUSAL
        return module.dot_product_attention(
            query, key, value, **where, scale=width**-0.5, mask_type=mask
        )

    def dew_dense(query: Any, key: Any, value: Any) -> jax.Array:
        call = importlib.import_module("dew_flash_attn").flash_mha
        return call(query, key, value, is_causal=True)

    def dew_varlen(query: Any, key: Any, value: Any, offsets: Any) -> jax.Array:
        call = importlib.import_module("dew_flash_attn").flash_mha_varlen
        tensors = query[0], key[0], value[0]
        return call(*tensors, offsets, longest, is_causal=True)[None]

    def fa3_jax_varlen(query: Any, key: Any, value: Any, offsets: Any) -> jax.Array:
        call = importlib.import_module("flash_attn3_jax").flash_mha_varlen
        options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "is_causal": True}
        return call(query[0], key[0], value[0], offsets, **options)[None]

    # Of each slot of the padded documents its place in the sequence, and the reverse.
    inside = np.arange(longest) < lengths[:, None]
    places = np.where(inside, problem.offsets[:-1, None] + np.arange(longest), 0)
    slots = np.flatnonzero(inside)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.where(inside[:, :, None, None], x[0, places], 0)

    def unpad(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])[slots][None]

    gpu, dew = unavailable(), unavailable("dew_flash_attn")
    size = 4.0 * problem.heads * length**2 * (3 if backward else 1)
    scores = None
    if size > baselines.XLA_SCORE_LIMIT:
        scores = f"would materialise {size / 1e9:.0f} GB of scores"
    narrow = unavailable("flash_attn3_jax")
    if narrow is None and width != 128:
        narrow = f"built for width 128 only, not {width}"
    ids = own[SEGMENTS].operands
    padded: dict[str, Any] = {"why_not": gpu, "layout": pad, "back": unpad}
    counts = jnp.asarray(lengths)
    return {
        "dense by xla": row("dense", jax_nn("xla"), why_not=scores),
        "dense by cudnn": row("dense", jax_nn("cudnn"), why_not=gpu),
        "dense by fa3_dew": row("dense", dew_dense, why_not=dew),
        "segments by xla, a mask": row(SEGMENTS, xla_segments, *ids, why_not=scores),
        "segments by cudnn, padded": row(SEGMENTS, cudnn_padded, counts, **padded),
        "segments by cudnn, packed": row(SEGMENTS, cudnn_packed, offsets, why_not=gpu),
        "varlen by fa3_dew": row(VARLEN, dew_varlen, offsets, why_not=dew),
        "varlen by fa3_jax": row(VARLEN, fa3_jax_varlen, offsets, why_not=narrow),
    }


def call_of(row: Row, inputs: tuple[jax.Array, ...], backward: bool) -> timing.Call:
    """The forward, or forward and backward in one program, compiled."""

    def forward(tensors: Any, cotangent: Any, operands: Any) -> Any:
        del cotangent
        return row.attention(*tensors, *operands)

    def both(tensors: Any, cotangent: Any, operands: Any) -> Any:
        out, vjp = jax.vjp(lambda *a: row.attention(*a, *operands), *tensors)
        return out, *vjp(cotangent)

    inputs = jax.block_until_ready(tuple(map(row.layout, inputs)))
    arguments = inputs[:3], inputs[3], row.operands
    compiled = jax.jit(both if backward else forward).lower(*arguments).compile()

    def results(result: Any) -> list[jax.Array]:
        return [row.back(x) for x in jax.tree.leaves(result)]

    return timing.Call(lambda: compiled(*arguments), jax.block_until_ready, results)


def difference(ours: list[jax.Array], theirs: list[jax.Array]) -> str | None:
    """Why two results are not the same, None if they are."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=False):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        error = float(jnp.linalg.norm(x - y) / jnp.linalg.norm(x))
        if not error <= TOLERANCE:
            return f"{name} differs from ours by {error:.1e}"
    return None


def prepare(
    table: dict[str, Row], inputs: tuple[jax.Array, ...], backward: bool
) -> tuple[dict[str, timing.Call], dict[str, str]]:
    """Compiled calls, and the reasons of the rows that do not run, by name."""
    calls: dict[str, timing.Call] = {}
    skipped: dict[str, str] = {}
    for name, row in table.items():
        if row.why_not is not None:
            skipped[name] = row.why_not
            continue
        if row.like is not None and row.like not in calls:
            skipped[name] = f'nothing to compare with: "{row.like}" does not run'
            continue
        try:
            call = call_of(row, inputs, backward)
            theirs = call.heads(call.run())
            if row.like is not None:
                own = calls[row.like]
                if reason := difference(own.heads(own.run()), theirs):
                    skipped[name] = reason
                    continue
        except Exception as error:  # a peer may fail in any way
            skipped[name] = timing.short(error)
            continue
        calls[name] = call
    return calls, skipped


def measure(
    problem: Problem, protocol: timing.Protocol, implementation: str, names: str = ""
) -> bool:
    """Prints one line for each call, forward and with the backward.

    `names` is a regular expression on the names of rows; the dense one and those
    that the peers' are compared with are always there.

    Returns:
      Whether all of this package's calls ran.
    """
    complete = True
    inputs = jax.block_until_ready(problem.inputs())
    for backward in (False, True):
        own = rows(problem, implementation)
        first = next(iter(own))
        table = own | peers(problem, own, backward)
        asked = {name for name in table if re.search(names, name)} | {first}
        asked |= {table[name].like or name for name in asked}
        table = {name: row for name, row in table.items() if name in asked}
        calls, skipped = prepare(table, inputs, backward)
        samples = timing.measure(calls, protocol)
        skipped |= {name: one.errors[0] for name, one in samples.items() if one.errors}
        complete = complete and not own.keys() & skipped.keys()
        kind = "forward and backward" if backward else "forward"
        print(
            f"d{problem.width} n{problem.length} h{problem.heads} causal, {kind}",
            f"{'us':>10} {'wall':>8} {'work':>7} {'rate':>7} kernels, time over ours",
            flush=True,
        )
        times: dict[str, float] = {}
        for name, row in table.items():
            if name in skipped:
                print(f"  {name:38} {skipped[name]}")
                continue
            sample = samples[name]
            us = times[name] = sample.median_us()
            rate = f"{'-':>7}"
            if first in times:
                speed = table[first].pairs / times[first]
                rate = f"{row.pairs / us / speed:7.3f}"
            work = row.pairs / table[first].pairs
            wall = statistics.median(sample.wall_us)
            line = f"  {name:38} {us:10.1f} {wall:8.1f} {work:7.3f} {rate}"
            line += f" {len(sample.kernels) or '?':>7}"
            if row.like in times:
                line += f" {us / times[row.like]:7.3f}"
            print(line, flush=True)
    return complete


def main() -> int:
    """Runs the cells; 1 if a call of this package failed."""
    parser = argparse.ArgumentParser(description="options beside the dense call")
    parser.add_argument("--smoke", action="store_true", help="tiny, by plain JAX")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--rows", default="", help="regular expression on their names")
    arguments = parser.parse_args()
    print(jax.devices()[0].device_kind, "CUPTI" if timing.cupti() else "wall time")
    if arguments.smoke:
        protocol = timing.Protocol(rounds=1, seconds=0.0, idle=0.0)
        problem = Problem(96, 2, 16)
        return int(not measure(problem, protocol, "xla", arguments.rows))
    protocol, complete = timing.Protocol(rounds=2, seconds=0.04), True
    for width in arguments.widths:
        problem = Problem(arguments.length, 2048 // width, width)
        complete = measure(problem, protocol, "cuda", arguments.rows) and complete
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
