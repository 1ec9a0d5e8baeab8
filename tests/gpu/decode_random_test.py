"""The decode kernels on 2,000 random problems against float64.

Programs take longer to compile than to run: few kinds of calls, each with many caches,
lengths and page tables.
"""

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_helpers import paged, quantised
from decode_kernel_test import check

from jax_flash import alibi, decode_mha

KINDS, PROBLEMS = 40, 50


def random_lengths(pick: random.Random, batch: int, page: int, room: int) -> np.ndarray:
    """Around pages and the ends, or anything: int32 [batch]."""
    edges = (0, 1, page - 1, page, page + 1, room - 1, room)
    lengths = [
        min(pick.choice((*edges, pick.randint(0, room), pick.randint(0, room))), room)
        for _ in range(batch)
    ]
    return np.array(lengths, np.int32)


@pytest.mark.parametrize("kind", range(KINDS))
def test_random_problems(kind: int) -> None:
    pick, rng = random.Random(f"decode {kind}"), np.random.default_rng(kind)
    batch, kv_heads = pick.randint(1, 4), pick.randint(1, 3)
    heads = kv_heads * pick.choice((1, 2, 3, 4, 8, 16))
    tokens = pick.choice((1, 1, 1, 2, 4, 7, 16))
    page = pick.choice((1, 2, 8, 16, 48, 64, 256))
    room = page * pick.randint(1, max(1, 700 // page))
    dtype = pick.choice(("bfloat16", "float16", "float32"))
    cache = dtype
    if dtype != "float32":
        cache = pick.choice((dtype, dtype, "float8_e4m3fn", "int8"))
    multiple = 16 // jnp.dtype(cache).itemsize
    widths = [
        pick.choice((64, 128, 256, multiple * pick.randint(1, 256 // multiple)))
        for _ in range(2)
    ]
    static: dict[str, Any] = {"num_splits": pick.choice((None, None, 1, 3, 100))}
    if pick.random() < 0.3:
        static["window_size"] = (pick.randint(0, room), None)
    if pick.random() < 0.2:
        static["softcap"] = 5.0
    has_pages, has_sinks = pick.random() < 0.6, pick.random() < 0.3
    has_slopes = pick.random() < 0.2
    fill = 127 if cache == "int8" else np.nan

    @jax.jit
    def call(arrays: Any, operands: Any) -> Any:
        return decode_mha(
            *arrays, **operands, **static, return_lse=True, implementation="cuda"
        )

    for _ in range(PROBLEMS):
        lengths = random_lengths(pick, batch, page, room)
        query, k, v = (
            rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
            for shape in (
                (batch, tokens, heads, widths[0]),
                (batch, room, kv_heads, widths[0]),
                (batch, room, kv_heads, widths[1]),
            )
        )
        operands, wanted = {}, (k, v)
        if cache != dtype:
            for name in ("k_scale", "v_scale"):
                operands[name] = rng.uniform(0.01, 0.05, kv_heads).astype(np.float32)
            k, k_want = quantised(cache, k, operands["k_scale"][None])
            v, v_want = quantised(cache, v, operands["v_scale"][None])
            wanted = k_want, v_want
        for b, length in enumerate(lengths):
            k[b, length:] = v[b, length:] = fill
        options = dict(static)
        if has_sinks:
            sinks = rng.standard_normal((batch, heads)).astype(np.float32)
            operands["sinks"] = options["sinks"] = sinks
        if has_slopes:
            slopes = 0.1 * rng.standard_normal((batch, heads), np.float32)
            operands["bias"] = options["bias"] = alibi(slopes)
        if has_pages:
            k, v, operands["page_table"] = paged(rng, (k, v), lengths, page, fill)
        out, lse = call((query, k, v, lengths), operands)
        got = np.asarray(out), np.asarray(lse)
        check(got, query, *wanted, lengths, **options)
