"""Packed batches: `mha_varlen` sequence by sequence, and `mha_qkvpacked`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, kernel_calls, normal, qkv, shrink_blocks

import jax_flash
from jax_flash import mha, mha_qkvpacked, mha_varlen

# An empty sequence, one without keys, one without queries; rows outside on both sides.
QUERIES = np.array([1, 6, 6, 9, 9, 17], np.int32)
KEYS = np.array([0, 7, 9, 9, 12, 18], np.int32)
ROWS, COLUMNS = 19, 20
RANGES = [
    (slice(QUERIES[i], QUERIES[i + 1]), slice(KEYS[i], KEYS[i + 1])) for i in range(5)
]
OUTSIDE = (np.arange(ROWS) < 1) | (np.arange(ROWS) >= 17)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "top_left"},
    {
        "window_size": (2, 1),
        "softcap": 2.0,
        "sinks": np.array([0.3, -1, 0, 2], np.float32),
    },
    {
        "bias": jax_flash.alibi(np.array([0.5, 0.1, 1, 0.2], np.float32)),
        "is_causal": True,
    },
]


def packed() -> list[np.ndarray]:
    """Query [19, 4, 8], key [20, 2, 8], value [20, 2, 6]; NaN outside."""
    rng = np.random.default_rng(0)
    shapes = (ROWS, 4, 8), (COLUMNS, 2, 8), (COLUMNS, 2, 6)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    arrays[0][OUTSIDE] = np.nan
    for x in arrays[1:]:
        x[18:] = np.nan
    return arrays


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_against_float64(
    index: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, lse and gradients are those of each sequence alone, 0 outside."""
    if chunked:
        shrink_blocks(monkeypatch)
    options, arrays = OPTIONS[index], packed()
    dout, dlse = np.asarray(normal(ROWS, 4, 6)), np.asarray(normal(4, ROWS))

    @jax.jit
    def f(*args):
        options_and_offsets = {"cu_seqlens_q": QUERIES, "cu_seqlens_k": KEYS, **options}
        out, lse = mha_varlen(*args, **options_and_offsets, return_lse=True)
        finite = jnp.where(jnp.isinf(lse), 0, lse)
        return (out * dout).sum() + (finite * dlse).sum(), (out, lse)

    grads, (out, lse) = jax.grad(f, (0, 1, 2), has_aux=True)(*map(jnp.asarray, arrays))
    want_out, want_lse = np.zeros(out.shape), np.full(lse.shape, -np.inf)
    wanted = [np.zeros(x.shape) for x in arrays]
    for rows, keys in RANGES:
        if rows.stop == rows.start or keys.stop == keys.start:
            continue
        q, k, v = (
            x[part][None] for x, part in zip(arrays, (rows, keys, keys), strict=True)
        )
        one = oracle.attention(q, k, v, **options)
        want_out[rows], want_lse[:, rows] = one.out[0], one.lse[0]
        cts = dout[rows][None], dlse[:, rows][None]
        grad = oracle.gradients(q, k, v, *cts, **options)
        for x, name, part in zip(
            wanted, ("query", "key", "value"), (rows, keys, keys), strict=True
        ):
            x[part] = grad[name][0]
    assert_close((out, lse), (want_out, want_lse))
    assert_close(grads, tuple(wanted))


def test_defaults_bounds_and_other_operands() -> None:
    query, key, value = (normal(12, n, 8) for n in (4, 2, 2))
    offsets = np.array([0, 5, 12])
    run = functools.partial(mha_varlen, query, key, value)
    same = run(offsets, offsets, is_causal=True)
    assert_close(run(offsets, is_causal=True), same, 0)
    assert_close(run(offsets, is_causal=True, max_seqlen_q=7, max_seqlen_k=7), same, 0)
    assert_close(run(offsets, is_causal=True, max_seqlen_k=2**40), same, 0)
    # A bound that is too small cuts sequences.
    lengths = np.array([5, 5])
    cut = run(offsets, max_seqlen_q=5, max_seqlen_k=4)
    for i, rows in enumerate((slice(0, 5), slice(5, 10))):
        keys = slice(rows.start, rows.start + min(4, lengths[i]))
        alone = mha(query[rows], key[keys], value[keys])
        assert_close(cut[rows], alone)
    np.testing.assert_array_equal(cut[10:], 0)
    bias, mask = normal(4, 12, 12), np.random.default_rng(0).random((12, 12)) < 0.7
    ids = np.array([0, 0, 1, 1, 1, 0, 0, 0, -1, 1, 1, 1])
    options = {"bias": bias, "mask": mask, "q_segment_ids": ids, "kv_segment_ids": ids}
    got = run(offsets, **options)
    sequence = np.repeat([0, 1], [5, 7])
    options["mask"] = mask & (sequence[:, None] == sequence)
    assert_close(got, mha(query, key, value, **options))


@pytest.mark.parametrize("chunked", [False, True])
def test_dropout_by_place_in_the_arrays(
    chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `mha` drops of the same arrays; output, gradients and tangents."""
    if chunked:
        shrink_blocks(monkeypatch)
    arrays = normal(29, 4, 8), normal(33, 2, 8), normal(33, 2, 8)
    drop = {"dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    ids = {
        "q_segment_ids": np.repeat([-1, 0, 1, 2], [3, 9, 16, 1]),
        "kv_segment_ids": np.repeat([0, 1, 2], [14, 10, 9]),
    }
    offsets = np.array([3, 12, 28, 29]), np.array([0, 14, 24, 33])

    def packed(query, key, value):
        return mha_varlen(query, key, value, *offsets, **drop)

    def documents(query, key, value):
        return mha(query, key, value, **ids, **drop)

    def total(f, *arrays):
        return jnp.sin(f(*arrays)).sum()

    tangents = tuple(normal(*x.shape) for x in arrays)
    results = [
        (
            jax.jvp(f, arrays, tangents),
            jax.grad(functools.partial(total, f), (0, 1, 2))(*arrays),
        )
        for f in (packed, documents)
    ]
    assert_close(results[0], results[1])
    query, key, value = arrays
    plain = mha_varlen(query, key, value, *offsets)
    assert not np.allclose(results[0][0][0][3:], plain[3:], atol=0.1)


def test_transformations() -> None:
    """Offsets are operands: traced and mapped."""
    query, key, value = (normal(12, n, 8) for n in (4, 2, 2))
    offsets = jnp.array([[0, 5, 12], [0, 0, 7]], jnp.int32)
    run = jax.jit(functools.partial(mha_varlen, query, key, value))
    each = jnp.stack([run(x) for x in offsets])
    assert_close(jax.vmap(run)(offsets), each)
    tangents = tuple(normal(*x.shape) for x in (query, key, value))

    def joined(query, key, value):
        parts = [slice(0, 5), slice(5, 12)]
        return jnp.concatenate([mha(query[p], key[p], value[p]) for p in parts])

    def packed(*a):
        return mha_varlen(*a, cu_seqlens_q=offsets[0])

    primals = query, key, value
    assert_close(jax.jvp(packed, primals, tangents), jax.jvp(joined, primals, tangents))


def test_no_sequences() -> None:
    query, key, value = packed()
    out, lse = mha_varlen(query, key, value, np.zeros(1, np.int32), return_lse=True)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": np.zeros((2, 2), int)}, r"cu_seqlens_q must be .*\(2, 2\)"),
        ({"cu_seqlens_q": np.zeros(0, int)}, r"cu_seqlens_q must be .*\(0,\)"),
        ({"cu_seqlens_q": np.zeros(3)}, r"cu_seqlens_q must be integers, .*float"),
        ({"cu_seqlens_q": None}, r"cu_seqlens_q must be an array, got None"),
        ({"cu_seqlens_k": np.zeros(2, int)}, r"cu_seqlens_k must have .*\(2,\)"),
        ({"max_seqlen_q": -1}, r"max_seqlen_q must not be negative, got -1"),
        ({"max_seqlen_k": 2.5}, r"max_seqlen_k must be an int, got 2.5"),
        ({"query": np.zeros((1, 4, 2, 8))}, r"query must be \[Tq,N,H\], got shape"),
    ],
)
def test_wrong(change: dict[str, Any], message: str) -> None:
    x = np.zeros((4, 2, 8), np.float32)
    given = {"query": x, "key": x, "value": x, "cu_seqlens_q": np.array([0, 1, 4])}
    with pytest.raises(ValueError, match=message):
        mha_varlen(**(given | change))


def test_kernels_are_chosen(kernels: None) -> None:
    """With any option."""
    x, offsets = np.zeros((4, 2, 8), jnp.bfloat16), np.array([0, 4])
    assert kernel_calls(lambda x: mha_varlen(x, x, x, offsets), x) == 1
    explanation = jax_flash.explain(x, x, x, cu_seqlens_q=offsets, max_seqlen_q=4)
    assert explanation.chosen["cuda"] == "cuda"
    mask = np.ones((4, 4), bool)
    assert kernel_calls(lambda x: mha_varlen(x, x, x, offsets, mask=mask), x) == 1
    drop = {"dropout_rate": 0.5, "dropout_key": np.zeros(2, np.uint32)}
    assert kernel_calls(lambda x: mha_varlen(x, x, x, offsets, **drop), x) == 1


def test_qkvpacked() -> None:
    query, key, value = qkv()[0], qkv()[1], normal(4, 8, 2, 16)
    qkv_array = jnp.concatenate([query, key, value], -2).reshape(4, 8, 8 * 16)
    got = mha_qkvpacked(qkv_array, 4, 2, is_causal=True)
    assert_close(got, mha(query, key, value, is_causal=True), 0)
    assert_close(
        mha_qkvpacked(qkv_array[..., :96], 2),
        mha_qkvpacked(qkv_array[..., :96], 2, 2),
        0,
    )

    def f(x):
        return jnp.sin(mha_qkvpacked(x, 4, 2)).sum()

    grads = jax.grad(lambda *a: jnp.sin(mha(*a)).sum(), (0, 1, 2))(query, key, value)
    assert_close(jax.grad(f)(qkv_array).reshape(4, 8, 8, 16), jnp.concatenate(grads, 2))
    with pytest.raises(ValueError, match=r"qkv must have a width .*\(4, 8, 127\)"):
        mha_qkvpacked(qkv_array[..., :127], 4, 2)
    with pytest.raises(ValueError, match=r"num_heads must be a multiple .* 4 and 3"):
        mha_qkvpacked(qkv_array, 4, 3)
    wrong: Any = (4.0, 2)
    with pytest.raises(ValueError, match=r"num_heads must be an int, got 4.0"):
        mha_qkvpacked(qkv_array, *wrong)
    with pytest.raises(ValueError, match=r"qkv must be .*got None"):
        mha_qkvpacked(None, 4, 2)


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (4, {"max_seqlen_q": 3}, "max_seqlen_q is no argument of mha, got 3"),
        (4, {"cu_seqlens_q": True}, r"query must be \[Tq,N,H\], got shape"),
        (3, {"cu_seqlens_k": True}, "cu_seqlens_k is no argument of mha, got"),
        (
            3,
            {"cu_seqlens_q": True, "query_seq_lengths": 2},
            "query_seq_lengths is no argument of mha_varlen, got 2",
        ),
    ],
)
def test_explain_takes_the_arguments_of_one_function(
    rank: int, options: dict[str, Any], message: str
) -> None:
    x = jax.ShapeDtypeStruct((2, 3, 4, 8)[-rank:], jnp.float32)
    offsets = jax.ShapeDtypeStruct((3,), jnp.int32)
    given: dict[str, Any] = {n: offsets if v is True else v for n, v in options.items()}
    with pytest.raises(ValueError, match=message):
        jax_flash.explain(x, x, x, **given)
