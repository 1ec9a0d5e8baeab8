"""Forwards whose blocks of rows begin with documents: long, short, and many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import specs
from gpu_helpers import assert_result, run_kernels
from gradient_helpers import problem_of

from jax_flash import alibi, mha, mha_varlen

Spec = specs.Spec

# Lengths of documents; negative: of padding between them.
DOCUMENTS = {
    "ragged": (3, 130, 9, 70, 1, 1, 100, 260, -31, 129, 20, 300, 450, 8),
    "a little longer than a block": (130,) * 11,
    "a little longer than half a block": (70, 66, 81) * 6,
    "tiny": (1, 2, 5, -3, 1, 1, 9) * 50,
    "long": (1100, -40, 129, 257),
}


def ids_of(lengths: tuple[int, ...]) -> np.ndarray:
    """Segment ids [1, T]."""
    ids = [-1 if n < 0 else i for i, n in enumerate(lengths)]
    return np.repeat(ids, np.abs(lengths))[None].astype(np.int32)


def test_documents() -> None:
    """Every width, with options and without, and a window."""
    kinds: list[dict[str, Any]] = [
        {},
        {"softcap": 2.0},
        {"bias": alibi(np.array([0.05, 0.4], np.float32))},
        {"dropout_rate": 0.3, "dropout_key": np.array([3, 4], np.uint32)},
    ]
    labels, calls = [], []
    for i, (name, lengths) in enumerate(DOCUMENTS.items()):
        ids = ids_of(lengths)
        length = ids.shape[1]
        for j, width in enumerate((64, 128, 256, 72)):
            mask: dict[str, Any] = {"is_causal": True}
            if (i + j) % 3 == 0:
                mask = {"window_size": (100, 0 if j % 2 else 20)}
            dtype = specs.DTYPES[(i + j) % 2]
            spec = Spec(2, length, length, 2, 1, width, dtype=dtype, **mask)
            given = {"q_segment_ids": ids, "kv_segment_ids": ids}
            given |= kinds[(i + 2 * j) % len(kinds)]
            problem = problem_of(spec, i, with_lse=False, **given).poisoned()
            calls.append((problem.arrays, problem.given))
            labels.append(f"{name} {spec} {list(given)}")
    for label, call, result in zip(labels, calls, run_kernels(calls), strict=True):
        try:
            assert_result(result, call)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error


def test_more_rows_than_a_piece_of_the_list() -> None:
    """Equal documents are a batch of them."""
    count, length, width = 140, 500, 64
    shape = (count, length, 2, width)
    keys = jax.random.split(jax.random.key(0), 3)
    tensors = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    flat = [x.reshape(count * length, 2, width) for x in tensors]
    offsets = jnp.arange(count + 1, dtype=jnp.int32) * length
    options: dict[str, Any] = {"is_causal": True, "implementation": "cuda"}
    got = jax.jit(lambda *a: mha_varlen(*a, **options))(*flat, offsets)
    expected = jax.jit(lambda *a: mha(*a, **options))(*tensors)
    # Both round sums of the same products.
    np.testing.assert_allclose(
        np.asarray(got, np.float32).reshape(shape),
        np.asarray(expected, np.float32),
        rtol=2.0**-7,
        atol=2.0**-7,
    )


def test_masks_are_there_before_they_are_read() -> None:
    """Offsets and ids are made right before the calls, whose kernels start early."""
    length, width, count = 3000, 64, 6
    keys = jax.random.split(jax.random.key(0), 3)
    tensors = [jax.random.normal(key, (length, 2, width)) for key in keys]
    query, key, value = (x.astype(jnp.bfloat16) for x in tensors)
    options: dict[str, Any] = {"is_causal": True, "implementation": "cuda"}

    def packed(query: Any, offsets: Any) -> jax.Array:
        return mha_varlen(query, key, value, offsets, **options)

    def segments(query: Any, offsets: Any) -> jax.Array:
        ids = (jnp.arange(length)[:, None] >= offsets[1:]).sum(-1, dtype=jnp.int32)
        given = {"q_segment_ids": ids[None], "kv_segment_ids": ids[None]}
        return mha(query[None], key[None], value[None], **given, **options)[0]

    def next_offsets(out: Any, i: int) -> jax.Array:
        # Long to make, and of what the call before has written.
        noise = jnp.abs(jnp.sin(out.astype(jnp.float32) * (i + 1))).sum((1, 2))
        cuts = jnp.argsort(noise)[: 7 + i].astype(jnp.int32)
        return jnp.sort(jnp.concatenate([cuts, jnp.array([0, length], jnp.int32)]))

    @jax.jit
    def chain(query: Any) -> list[tuple[jax.Array, jax.Array]]:
        found, out = [], query
        for i in range(count):
            offsets = next_offsets(out, i)
            out = (packed if i % 2 == 0 else segments)(query, offsets)
            found.append((offsets, out))
        return found

    alone = [jax.jit(f) for f in (packed, segments)]
    runs = [chain(query) for _ in range(20)]
    for i, (offsets, out) in enumerate(runs[0]):
        expected = alone[i % 2](query, jax.block_until_ready(offsets))
        for run in runs:
            np.testing.assert_array_equal(run[i][0], offsets)
            np.testing.assert_array_equal(
                np.asarray(run[i][1], np.float32), np.asarray(expected, np.float32)
            )
        assert np.isfinite(np.asarray(out, np.float32)).all()
