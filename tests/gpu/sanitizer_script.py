"""Small kernel calls for `sanitizer_test`: every instantiation, each kind of mask.

python tests/gpu/sanitizer_script.py mha_fwd  # or another key of CALLS
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jax_flash import alibi, decode_mha, mha, rms_norm, rope_append_kv, sample, top_k
from jax_flash._src import plan

# Every instantiation of both families, then widths that only the other loads can read.
WIDTHS = {
    op: (
        *sorted({widths for family in families.values() for widths in family}),
        (33, 17),
        (6, 250),
        (100, 36),
        (31, 8),
        (72, 40),
    )
    for op, families in plan.HEAD_DIMS.items()
}
DTYPES = (jax.numpy.bfloat16, jax.numpy.float16)

Call = tuple[tuple[np.ndarray, ...], dict[str, Any]]


def arrays(
    dtype: Any, query: tuple[int, int, int], keys: tuple[int, int], *widths: int
) -> tuple[np.ndarray, ...]:
    """Query of batch, length, heads; key and value of length, heads."""
    rng = np.random.default_rng(0)
    batch, width, value_width = query[0], widths[0], widths[-1]
    shapes = ((*query, width), (batch, *keys, width), (batch, *keys, value_width))
    query_, key, value = (
        rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes
    )
    return query_, key, value


def forward_calls() -> Iterator[Call]:
    """Arrays and options."""
    lengths = np.array([131, 3], np.int32)
    for dtype in DTYPES:
        for widths in WIDTHS["mha_fwd"]:
            problem = arrays(dtype, (2, 150, 4), (170, 2), *widths)
            yield problem, {"is_causal": True, "key_value_seq_lengths": lengths}
            yield problem, {"window_size": (40, 20), "query_seq_lengths": lengths}
    dtype = jax.numpy.bfloat16
    for widths in ((64,), (128,), (192, 128), (256,)):
        # Few queries on many keys: packed heads, and keys split among thread blocks.
        problem = arrays(dtype, (1, 16, 8), (1024, 2), *widths)
        yield problem, {}
        yield (
            problem,
            {"is_causal": True, "key_value_seq_lengths": np.array([700], np.int32)},
        )
        problem = arrays(dtype, (3, 7, 16), (200, 2), *widths)
        yield problem, {"window_size": (90, 0)}
        # A key that outweighs all the others, among the last that are visited.
        query, key, value = arrays(dtype, (1, 100, 2), (400, 1), *widths)
        query[..., 0] = 16
        key[:, 1, :, 0] = 900
        yield (query, key, value), {}
        # More blocks than thread blocks.
        yield arrays(dtype, (9, 140, 16), (150, 4), *widths), {"is_causal": True}
    yield from float32_calls("mha_fwd")


def backward_calls() -> Iterator[Call]:
    """Arrays and options, half of them with `deterministic`."""
    lengths = np.array([131, 3], np.int32)
    for dtype in DTYPES:
        for i, widths in enumerate(WIDTHS["mha_bwd"]):
            problem = arrays(dtype, (2, 150, 4), (170, 2), *widths)
            options = {"is_causal": True, "key_value_seq_lengths": lengths}
            yield problem, options | {"deterministic": i % 2 == 0}
            options = {"window_size": (40, 20), "query_seq_lengths": lengths}
            yield problem, options | {"deterministic": i % 2 == 1}
    for widths in ((64,), (128,), (256,)):
        # Without a mask a ring up to width 128, and blocks that make dQ.
        yield arrays(jax.numpy.bfloat16, (1, 400, 4), (300, 4), *widths), {}
        problem = arrays(jax.numpy.bfloat16, (1, 300, 8), (400, 2), *widths)
        for deterministic in (False, True):
            yield problem, {"deterministic": deterministic}
            yield problem, {"is_causal": True, "deterministic": deterministic}
    yield from float32_calls("mha_bwd")


def float32_calls(op: str) -> Iterator[Call]:
    """Arrays and options, for all precisions; rows that start anywhere, too."""
    for widths in (*plan.F32_HEAD_DIMS[op], (33, 17)):
        problem = arrays(jax.numpy.float32, (2, 150, 4), (170, 2), *widths)
        for precision in (None, "highest", "tf32"):
            yield problem, {"is_causal": True, "precision": precision}


def interval_calls(op: str) -> Iterator[Call]:
    """Arrays and options: ids in any order, cap, biases, masks, dropout, padding."""
    rng = np.random.default_rng(1)
    runs = {
        "q_segment_ids": np.sort(rng.integers(-1, 4, (2, 150)), -1),
        "kv_segment_ids": np.sort(rng.integers(-1, 4, (1, 170)), -1),
    }
    mixed = {name: rng.permuted(ids, axis=-1) for name, ids in runs.items()}
    slopes = np.array([0.5, 0.1, 0, 0.2], np.float32)
    lengths = np.array([131, 3], np.int32)
    # Types by turns: every call compiles its mask anew, under a tool that is slow.
    kinds: list[tuple[Any, tuple[int, ...], str | None]] = [
        (DTYPES[i % 2], widths, None) for i, widths in enumerate(WIDTHS[op])
    ]
    for widths in (*plan.F32_HEAD_DIMS[op], (33, 17)):
        kinds += [(np.float32, widths, precision) for precision in (None, "highest")]
    for i, (dtype, widths, precision) in enumerate(kinds):
        problem = arrays(dtype, (2, 150, 4), (170, 2), *widths)
        deterministic = {"deterministic": i % 2 == 0, "precision": precision}
        yield problem, {**runs, "is_causal": True, **deterministic}
        rest = {"window_size": (90, 20), "softcap": 2.0, "precision": precision}
        yield problem, {**mixed, **rest}
        rest = {"bias": alibi(slopes), "key_value_seq_lengths": lengths}
        yield problem, rest | {"is_causal": True, **deterministic}
        problem = arrays(dtype, (1, 600, 4), (600, 2), *widths)
        ids = np.repeat(np.array([[0, 1]]), [250, 350], -1)
        bias = rng.standard_normal((1, 1, 600, 600), np.float32)
        mask = rng.random((4, 1, 600)) < 0.5
        yield problem, {"bias": bias, "mask": mask, "precision": precision}
        dropout = {"dropout_rate": 0.5, "dropout_key": np.array([1, 2], np.uint32)}
        dropout["precision"] = precision
        yield problem, {"q_segment_ids": ids, "kv_segment_ids": ids, **dropout}


def decode_calls() -> Iterator[Call]:
    """Query, caches and lengths; all kinds of tile, pages, and every option."""
    for dtype in (*DTYPES, np.float32):
        for width in (64, 128, 256, 72, 8):
            for tokens in (1, 9, 30):
                query, _, _ = arrays(dtype, (4, tokens, 8), (1, 2), width)
                _, k, v = arrays(dtype, (4, 1, 8), (300, 2), width)
                lengths = np.array([0, 1, 129, 300], np.int32)
                yield (query, k, v, lengths), {}
                k, v = (x.reshape(40, 30, 2, width) for x in (k, v))
                table = np.random.default_rng(0).permutation(40).astype(np.int32)
                table = table.reshape(4, 10)
                table[1, 1:] = 2**30
                options = {"window_size": (50, None), "softcap": 5.0}
                options |= {"page_table": table, "sinks": np.ones(8, np.float32)}
                options["bias"] = alibi(np.full(8, 0.1, np.float32))
                yield (query, k, v, lengths), options
    for width in (64, 128):  # by Hopper's forward kernel, in parts of the keys
        query, k, v = arrays(DTYPES[0], (1, 40, 16), (4096, 8), width)
        yield (query, k, v, np.array([4000], np.int32)), {}
    for cache in (jax.numpy.float8_e4m3fn, np.int8):
        for dtype, width in zip((*DTYPES, *DTYPES), (64, 128, 256, 80), strict=True):
            for tokens in (1, 9):
                query, _, _ = arrays(dtype, (4, tokens, 8), (1, 2), width)
                _, k, v = arrays(dtype, (4, 1, 8), (300, 2), width)
                k, v = k.astype(cache), v.astype(cache)
                lengths = np.array([0, 1, 129, 300], np.int32)
                scale = np.full(2, 0.5, np.float32)
                yield (query, k, v, lengths), {"k_scale": scale, "v_scale": scale}


def logits_calls() -> Iterator[Call]:
    """Logits and options of `sample`: every way through the kernel, ties among them."""
    rng = np.random.default_rng(0)
    for dtype in (*DTYPES, jax.numpy.float32):
        for size in (5, 1027, 12000):
            x = rng.standard_normal((4, size)).astype(dtype)
            x[1] = 0
            for options in (
                {"top_k": 50, "top_p": 0.9},
                {"top_k": 300, "top_p": 0.9},
                {"top_p": 0.5, "mask": rng.random((4, size)) < 0.5},
                {"min_p": 0.1},
            ):
                yield (x,), options


def top_k_calls() -> Iterator[Call]:
    """Logits and k."""
    for (x,), _ in list(logits_calls())[::4]:
        yield (x,), {"k": min(200, x.shape[1])}


def norm_calls() -> Iterator[Call]:
    """x, weight and residual, forward and backward."""
    rng = np.random.default_rng(0)
    for dtype in (*DTYPES, jax.numpy.float32):
        for rows, columns in ((6, 100), (9, 128), (450, 1000), (3, 6144)):
            x, residual = rng.standard_normal((2, rows, columns)).astype(dtype)
            weight = rng.standard_normal(columns).astype(dtype)
            yield (x, weight, residual), {}


def rope_calls() -> Iterator[Call]:
    """Queries, new tokens, caches and lengths; pages; of whole vectors, and not."""
    rng = np.random.default_rng(0)
    for dtype in (*DTYPES, jax.numpy.float32):
        for width, tokens in ((64, 1), (128, 3), (22, 2)):
            for interleaved in (False, True):
                new = rng.standard_normal((5, tokens, 10, width)).astype(dtype)
                k, v = rng.standard_normal((2, 5, 12, 2, width)).astype(dtype)
                lengths = np.array([0, 11, 12, -1, 5], np.int32)
                options = {"interleaved": interleaved}
                parts = new[:, :, :6], new[:, :, 6:8], new[:, :, 8:]
                yield (*parts, k, v, lengths), options
                table = rng.permutation(15).reshape(5, 3).astype(np.int32)
                table[1, 2], table[4, 1] = -1, 20
                k, v = (x.reshape(15, 4, 2, width) for x in (k, v))
                options = options | {"page_table": table, "rotary_dim": width // 4 * 2}
                yield (*parts, k, v, lengths), options


CALLS = {
    "mha_fwd": forward_calls,
    "mha_bwd": backward_calls,
    "mha_fwd_intervals": functools.partial(interval_calls, "mha_fwd_intervals"),
    "mha_bwd_intervals": functools.partial(interval_calls, "mha_bwd_intervals"),
    "intervals": lambda: itertools.islice(interval_calls("mha_bwd_intervals"), 4),
    "decode": decode_calls,
    "sample": logits_calls,
    "top_k": top_k_calls,
    "rms_norm": norm_calls,
    "rope_append": rope_calls,
}


def run_forward(problem: tuple[np.ndarray, ...], options: dict[str, Any]) -> Any:
    """Out and lse."""
    return mha(*problem, **options, implementation="cuda", return_lse=True)


def run_backward(problem: tuple[np.ndarray, ...], options: dict[str, Any]) -> Any:
    """Gradients through out and lse, of a bias that is an array, too."""
    bias = {k: x for k, x in options.items() if k == "bias" and hasattr(x, "shape")}

    def f(bias: dict[str, Any], *problem: Any) -> Any:
        return run_forward(problem, options | bias)

    results, vjp = jax.vjp(f, *jax.tree.map(jax.numpy.asarray, (bias, *problem)))
    return vjp(tuple(results))


def run_decode(problem: tuple[np.ndarray, ...], options: dict[str, Any]) -> Any:
    """Out and lse."""
    return decode_mha(*problem, **options, implementation="cuda", return_lse=True)


def run_norm(problem: tuple[np.ndarray, ...], options: dict[str, Any]) -> Any:
    """Results and gradients."""
    results, vjp = jax.vjp(
        lambda x, weight, residual: rms_norm(x, weight, residual=residual, **options),
        *map(jax.numpy.asarray, problem),
    )
    return results, vjp(results)


RUN = {
    "mha_fwd": run_forward,
    "mha_bwd": run_backward,
    "mha_fwd_intervals": run_forward,
    "mha_bwd_intervals": run_backward,
    "intervals": run_backward,
    "decode": run_decode,
    "sample": lambda problem, options: sample(problem[0], jax.random.key(0), **options),
    "top_k": lambda problem, options: top_k(*problem, **options),
    "rms_norm": run_norm,
    "rope_append": lambda problem, options: rope_append_kv(*problem, **options),
}


def main(op: str) -> None:
    """Runs the calls and prints how many there were."""
    count = 0
    for problem, options in CALLS[op]():
        jax.block_until_ready(RUN[op](problem, options))
        count += 1
    print("kernel calls:", count)


if __name__ == "__main__":
    main(sys.argv[1])
