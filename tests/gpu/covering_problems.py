"""Problems of the cases in `covering`: operands, how they are run, what is right.

Every case is a `Problem` for the oracle and arguments for one of the three public
functions. A packed sequence of `mha_varlen` is for the oracle a segment, with a mask of
what each row sees by position.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import baseline
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from covering import Case
from gpu_helpers import F32_ERRORS, assert_near, assert_result
from gradient_helpers import NAMES, Problem, assert_gradients

from jax_flash import alibi, explain, mha, mha_qkvpacked, mha_varlen
from jax_flash._src import plan

BATCH = 2
DROPOUT_WORDS = 7, 11
F32_HIGHEST = 2.0**-19
"""What gradients with precision "highest" may differ by beyond plain float32."""
F32_PRODUCTS = {None: 2.0**-16, "highest": 2.0**-21, "tf32": 2.0**-10}
"""Relative errors of products of float32 by precision: see docs/numerics.md."""
LUCK_OF_ONE_QUERY = 3.0
"""Instead of 2, where sums are over one query: plain jnp may have been lucky in it."""

PLACES: dict[str, dict[str, Any]] = {
    "anywhere": {},
    "causal": {"is_causal": True},
    "causal top left": {"is_causal": True, "causal_alignment": "top_left"},
    "window": {"window_size": (30, 20)},
    "window causal": {"window_size": (25, None), "is_causal": True},
    "window top left": {"window_size": (40, 9), "causal_alignment": "top_left"},
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One case.

    Attributes:
      case: what it covers.
      problem: for the oracle, all sequences of `mha_varlen` as one.
      static: arguments that are no arrays.
      operands: arrays without gradients, by argument.
      wanted: arrays beyond query, key and value whose gradients are compared.
      distance: of keys from those that rows are aligned with [1 or B, 1, T, S].
    """

    case: Case
    problem: Problem
    static: dict[str, Any]
    operands: dict[str, Any]
    wanted: dict[str, Any]
    distance: np.ndarray

    @property
    def by_kernels(self) -> bool:
        """Whether kernels take the call."""
        names = {*self.static, *self.operands, *self.wanted}
        if not all(plan.supported(n) for n in names if n in plan.OPTIONS):
            return False
        return self.case["dtype"] != "float32" or max(self.case["widths"]) <= 128


def _lengths(case: Case, rows: int, keys: int) -> dict[str, np.ndarray]:
    full = {
        "query_seq_lengths": np.array([rows // 2, rows + 3], np.int32),
        "key_value_seq_lengths": np.array([keys, keys // 3], np.int32),
    }
    kind = case["lengths"]
    return {n: x for n, x in full.items() if kind == "both" or n.startswith(kind)}


def _segments(
    case: Case, rng: np.random.Generator, batch: int, sizes: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Ids with padding, [batch, length]."""
    if case["segments"] == "none":
        return {}
    ids = [rng.integers(-1, 3, (batch, n)).astype(np.int32) for n in sizes]
    if case["segments"] == "sorted":
        ids = [np.sort(x, -1) for x in ids]
    return dict(zip(("q_segment_ids", "kv_segment_ids"), ids, strict=True))


def _offsets(rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Of four sequences: one empty, one without keys; rows and keys outside of all."""
    ends = (rows // 9, rows // 3, rows // 3, rows // 2, rows - rows // 8)
    starts = (keys // 8, keys // 2, 2 * keys // 3, 2 * keys // 3, keys - keys // 9)
    return np.array(ends, np.int32), np.array(starts, np.int32)


def _packed_sequences(
    shape: tuple[int, int], place: str, offsets: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """What packed sequences are for the oracle.

    Args:
      shape: rows and keys of all sequences.
      place: which keys a row sees by position, in its sequence.
      offsets: of queries and keys.

    Returns:
      "q_ids" and "kv_ids", the sequence or -1; "seen" [T, S], by position; of each row
      the key it is "aligned" with.
    """
    q_ids, kv_ids = (np.full(length, -1) for length in shape)
    seen, aligned = np.zeros(shape, bool), np.zeros(shape[0], int)
    each = zip(*(itertools.pairwise(x) for x in offsets), strict=True)
    for i, (own_rows, own_keys) in enumerate(each):
        rows, keys = slice(*own_rows), slice(*own_keys)
        q_ids[rows], kv_ids[keys] = i, i
        size = rows.stop - rows.start, keys.stop - keys.start
        seen[rows, keys] = oracle.visible(*size, *size, **PLACES[place])
        shift = 0 if "top left" in place else size[1] - size[0]
        aligned[rows] = keys.start + np.arange(size[0]) + shift
    return {"q_ids": q_ids, "kv_ids": kv_ids, "seen": seen, "aligned": aligned}


def call_of(number: int, case: Case) -> Call:
    """The problem of a case; `number` seeds what is random."""
    rng = np.random.default_rng([number, 23])
    varlen, (rows, keys) = case["form"] == "varlen", case["sizes"]
    batch = 1 if varlen else BATCH
    heads, kv_heads = case["heads"]
    width, value_width = case["widths"]
    dtype = jnp.dtype(case["dtype"])

    def normal(*shape: int, like: Any = np.float32) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(like)

    arrays = (
        normal(batch, rows, heads, width, like=dtype),
        normal(batch, keys, kv_heads, width, like=dtype),
        normal(batch, keys, kv_heads, value_width, like=dtype),
    )
    dout = normal(batch, rows, heads, value_width, like=dtype)
    dlse = normal(batch, heads, rows) if case["dlse"] else None
    static = {**PLACES[case["place"]], "deterministic": case["deterministic"]}
    for name in ("softcap", "scale", "precision"):
        if case[name] is not None:
            static[name] = case[name]
    operands: dict[str, Any] = _lengths(case, rows, keys)
    operands |= _segments(case, rng, batch, (rows, keys))
    wanted: dict[str, Any] = {}
    if case["sinks"] != "none":
        shape = (heads,) if case["sinks"] == "heads" else (batch, heads)
        wanted["sinks"] = normal(*shape)
    lead = () if varlen else (batch,)
    if case["bias"].startswith("slopes"):
        shape = (batch, heads) if case["bias"].endswith("batch") else (heads,)
        which = wanted if case["bias"].endswith("gradient") else operands
        which["slopes"] = 0.1 * normal(*shape)
    elif case["bias"] != "none":
        shapes = {"keys": (keys,), "rows": (heads, rows, 1)}
        wanted["bias"] = normal(*shapes.get(case["bias"], (*lead, heads, rows, keys)))
    if case.get("mask", "none") != "none":
        shape = (rows, 1) if case["mask"] == "rows" else (*lead, 1, rows, keys)
        operands["mask"] = rng.random(shape) < 0.7

    given = {**static, **operands, **wanted}
    distance = oracle.distances((batch, heads, rows, keys), given)
    if varlen:
        offsets = _offsets(rows, keys)
        operands |= {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1]}
        where = _packed_sequences((rows, keys), case["place"], offsets)
        for name in PLACES["causal top left"].keys() | {"window_size"}:
            given.pop(name, None)
        for name, ids in (("q", where["q_ids"]), ("kv", where["kv_ids"])):
            own = given.get(f"{name}_segment_ids", np.zeros(1, np.int32))
            both = np.where((own < 0) | (ids < 0), -1, 8 * ids + own)
            given[f"{name}_segment_ids"] = np.broadcast_to(both, (1, len(ids)))
        given["mask"] = where["seen"] & np.asarray(given.get("mask", True))
        distance = np.abs(where["aligned"][:, None] - np.arange(keys))[None, None]
        for name in ("q_segment_ids", "kv_segment_ids"):
            if name in operands:
                operands[name] = operands[name][0]
    if "slopes" in given:
        given["bias"] = -given.pop("slopes")[..., None, None] * distance
    if case.get("dropout"):
        static["dropout_rate"] = case["dropout"]
        operands["dropout_key"] = np.array(DROPOUT_WORDS, np.uint32)
        given |= {"dropout_rate": case["dropout"], "dropout_key": DROPOUT_WORDS}
    problem = Problem(arrays, given, dout, dlse)
    return Call(case, problem.poisoned(), static, operands, wanted, distance)


def arguments(call: Call) -> Any:
    """What `computed` takes."""
    problem = call.problem
    tensors = (*problem.arrays, problem.dout)
    if call.case["form"] == "varlen":
        tensors = tuple(x[0] for x in tensors)
    dlse = problem.dlse
    if dlse is not None and call.case["form"] == "varlen":
        dlse = dlse[0]
    return tensors, dlse, call.operands, call.wanted


def _given(
    call: Call, query: Any, key: Any, value: Any, operands: Any, wanted: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Function, positional and other arguments, traced or not."""
    given = {**call.static, **operands, **wanted}
    if "slopes" in given:
        given["bias"] = alibi(given.pop("slopes"))
    match call.case["form"]:
        case "packed":
            parts = [x.reshape(*x.shape[:-2], -1) for x in (query, key, value)]
            heads = query.shape[-2], key.shape[-2]
            return mha_qkvpacked, (jnp.concatenate(parts, -1), *heads), given
        case "varlen":
            return mha_varlen, (query, key, value), given
        case _:
            return mha, (query, key, value), given


def computed(call: Call, arguments: Any) -> list[jax.Array]:
    """Out, lse, and gradients of query, key, value and what is wanted, traced."""
    (query, key, value, dout), dlse, operands, wanted = arguments
    names = sorted(wanted)

    def f(*args: Any) -> Any:
        others = dict(zip(names, args[3:], strict=True))
        query, key, value = args[:3]
        function, given, options = _given(call, query, key, value, operands, others)
        return function(*given, **options, return_lse=True)

    given = (query, key, value, *(wanted[name] for name in names))
    if dlse is None:
        out, vjp, lse = jax.vjp(f, *given, has_aux=True)
        return [out, lse, *vjp(dout)]
    results, vjp = jax.vjp(f, *given)
    return [*results, *vjp((dout, dlse))]


def assert_choice(call: Call) -> None:
    """Kernels run what they take, jnp the rest."""
    given = {**call.static, **call.operands, **call.wanted}
    if "slopes" in given:
        given["bias"] = alibi(given.pop("slopes"))
    query, key, value, _ = arguments(call)[0]
    chosen = explain(query, key, value, **given).chosen["cuda"]
    assert chosen == ("cuda" if call.by_kernels else "xla"), chosen


def assert_right(call: Call, results: list[np.ndarray]) -> None:
    """Every result of a case against float64; zeros where nothing is attended."""
    if call.case["form"] == "varlen":
        results = [x[None] for x in results[:5]] + results[5:]
    out, lse, *gradients = results
    problem = call.problem
    tensors, others = tuple(gradients[:3]), gradients[3:]
    clean = problem.clean()
    query, key, value = clean.arrays
    operands = query, key, value, clean.dout, clean.dlse
    expected = oracle.gradients(*operands, **clean.given)
    is_f32 = call.case["dtype"] == "float32"
    near = F32_ERRORS.get(call.case["precision"]) if is_f32 else None
    if near is not None:
        exact = oracle.attention(query, key, value, **clean.given)
        assert_near(out, exact.out, near)
        assert_near(lse, exact.lse, near)
        for name, x in zip(NAMES, tensors, strict=True):
            assert_near(x, expected[name], 2 * near)
        empty = problem.empty_rows()
        for x in (out, tensors[0]):
            assert not np.moveaxis(x, 1, 2)[empty].any()
    else:
        assert_result((out, lse), (problem.arrays, problem.given))
        factor = LUCK_OF_ONE_QUERY if query.shape[1] == 1 else baseline.FACTOR
        spared = {} if is_f32 else _spared(clean)
        assert_gradients(
            tensors, problem, F32_HIGHEST if is_f32 else 0.0, factor, spared
        )
    if not call.wanted:
        return
    plain = baseline.gradients(*operands, **clean.given)
    for name, got in zip(sorted(call.wanted), others, strict=True):
        shape = call.wanted[name].shape
        exact, usual = (
            oracle.reduced_to(
                _of_slopes(x, call) if name == "slopes" else x[name], shape
            ).reshape(shape)
            for x in (expected, plain)
        )
        extra = _luck(clean, name, call)
        if near is not None:
            extra += 2 * near * max(1.0, float(np.abs(exact).max()), _delta(clean))
        baseline.assert_within(got, usual, exact, extra=extra)
        if call.case["bias"] == "full" and name == "bias":
            heads, rows, keys = (out.shape[2], out.shape[1], shape[-1])
            seen = oracle.allowed((len(out), heads, rows, keys), clean.given)
            assert not got.reshape(seen.shape)[~seen].any()


def _of_slopes(gradients: dict[str, np.ndarray], call: Call) -> np.ndarray:
    """The gradient of slopes [B, N], by that of the bias that stands for them."""
    return -(gradients["bias"] * call.distance).sum((2, 3))


def _delta(clean: Problem) -> float:
    """The largest `dout * out` of a row: score gradients are differences to those."""
    out = oracle.attention(*clean.arrays, **clean.given).out
    return float(np.abs((clean.dout * out).sum(-1)).max(initial=0.0))


def _luck(clean: Problem, name: str, call: Call) -> float:
    """Error that a plain computation of the gradient may be spared.

    Sums over rows, and over what a bias is shared by, of errors of random signs: each
    as large as one rounding of `dout @ value^T` or of out makes it, or, of float32, the
    error of a product.
    """
    query, key, value = (x.astype(np.float64) for x in clean.arrays)
    dout, given = clean.dout.astype(np.float64), clean.given
    batch, rows, heads, _ = query.shape
    by_score = name != "sinks"
    squares = np.zeros((batch, heads, rows, key.shape[1] if by_score else 1))
    sinks = np.broadcast_to(given.get("sinks", -np.inf), (batch, heads))
    for block in oracle._blocks(query, key, given):
        b, n, part = block.by_head
        v, do = value[block.pair], dout[block.index]
        out = (block.weights * block.kept) @ v
        by_row = np.square(out * do).sum(-1, keepdims=True)
        if by_score:
            by_key = np.square((do @ v.T) * block.kept)
            squares[b, n, part] = np.square(block.weights) * (by_key + by_row)
        else:
            live = np.isfinite(block.lse)
            share = np.exp(sinks[b, n] - np.where(live, block.lse, np.inf))
            squares[b, n, part] = np.square(share)[:, None] * by_row
    shape = call.wanted[name].shape
    if name == "slopes":
        squares *= np.square(call.distance)
    summed = squares if name == "bias" else squares.sum((2, 3))
    eps = float(jnp.finfo(clean.dout.dtype).eps)
    if call.case["dtype"] == "float32":
        eps = F32_PRODUCTS[call.case["precision"]]
    return eps * float(np.sqrt(oracle.reduced_to(summed, shape).max()))


def _spared(clean: Problem) -> dict[str, float]:
    """Error of the gradients of query and key that comes from a rounded `out`.

    `delta` is the sum of `dout * out`. A plain computation has weights in its place, so
    it is spared that error, which is of random sign: one for each row, times weights.
    Roundings are a quarter of a step in size, and of all sums over rows the largest
    error is twice the usual one.
    """
    query, key, value = (x.astype(np.float64) for x in clean.arrays)
    dout, given = clean.dout.astype(np.float64), clean.given
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    of_query, of_key = 0.0, np.zeros_like(key)
    for block in oracle._blocks(query, key, given):
        out = (block.weights * block.kept) @ value[block.pair]
        error = np.square(out * dout[block.index]).sum(-1, keepdims=True)
        weights = block.weights * block.slope * scale
        shift = np.abs(weights @ key[block.pair]) * np.sqrt(error)
        of_query = max(of_query, float(shift.max(initial=0)))
        of_key[block.pair] += (np.square(weights) * error).T @ np.square(
            query[block.index]
        )
    size = float(jnp.finfo(clean.dout.dtype).eps) / 4
    return {
        "query": size * of_query,
        "key": 2 * size * float(np.sqrt(of_key.max(initial=0))),
    }


def changes(
    rng: np.random.Generator, batch: int, length: int, heads: int
) -> list[dict[str, Any]]:
    """Arguments of `mha` each of which changes the output of a plain call."""
    normal = rng.standard_normal
    ids = np.sort(rng.integers(0, 4, (batch, length)), -1).astype(np.int32)
    return [
        {"bias": 3 * normal((length, length), np.float32)},
        {"bias": alibi(np.full(heads, 0.5, np.float32))},
        {"mask": rng.random((length, length)) < 0.3},
        {"scale": 0.5},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "top_left"},
        {"window_size": (2, 2)},
        {"window_size": (2, None)},
        {"window_size": (None, 2)},
        {"softcap": 0.5},
        {"sinks": np.full(heads, 5.0, np.float32)},
        {"q_segment_ids": ids, "kv_segment_ids": ids},
        {"dropout_rate": 0.5, "dropout_key": np.array(DROPOUT_WORDS, np.uint32)},
        {"query_seq_lengths": np.array([length - 1, 5], np.int32)},
        {"key_value_seq_lengths": np.array([length, 5], np.int32)},
    ]
