"""What several test modules need: inputs, dense and sharded attention, call counts."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flash import alibi, mha
from jax_flash._src import blocks

BATCH, ROWS, KEYS, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 8, 8, 4, 2, 16, 8
SEGMENTS = np.array([[0] * 4 + [1] * 3 + [-1]] * 4, np.int32)
QUERY_LENGTHS = np.array([8, 5, 0, 8], np.int32)
KEY_LENGTHS = np.array([8, 6, 3, 1], np.int32)

_rng = np.random.default_rng(0)


def reseed() -> None:
    """Begins `normal` anew, before each test: what it gets depends on no other test."""
    global _rng
    _rng = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    """Standard normal float32; another draw at every call."""
    return jnp.asarray(_rng.standard_normal(shape), jnp.float32)


@functools.cache
def qkv() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    shapes = (
        (ROWS, HEADS, WIDTH),
        (KEYS, KV_HEADS, WIDTH),
        (KEYS, KV_HEADS, VALUE_WIDTH),
    )
    query, key, value = (
        jnp.asarray(rng.standard_normal((BATCH, *shape)), jnp.float32)
        for shape in shapes
    )
    return query, key, value


@functools.cache
def bias_and_sinks() -> tuple[jax.Array, jax.Array]:
    """Shared by the batch and the rows; shared by the batch."""
    return normal(HEADS, 1, KEYS), normal(HEADS)


def flash(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    sinks: Any = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`mha` with lse, the differentiable operands positional."""
    return mha(query, key, value, bias, sinks=sinks, return_lse=True, **options)


def dense(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    sinks: Any = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """The same in plain jnp operations, which JAX itself transforms."""
    rows, heads, width = query.shape[-3:]
    keys, kv_heads = key.shape[-3:-1]
    key = jnp.repeat(key, heads // kv_heads, -2)
    value = jnp.repeat(value, heads // kv_heads, -2)
    s = jnp.einsum("...tnh,...snh->...nts", query, key, precision="highest")
    s = s * width**-0.5
    if bias is not None:
        s = s + bias
    ok = jnp.ones(s.shape[-2:], bool)
    query_length = options.get("query_seq_lengths", np.int32(rows))
    key_length = options.get("key_value_seq_lengths", np.int32(keys))
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    column = jnp.arange(keys, dtype=jnp.int32)
    query_length = jnp.asarray(query_length)[..., None, None, None]
    key_length = jnp.asarray(key_length)[..., None, None, None]
    ok = ok & (row < query_length) & (column < key_length)
    if options.get("is_causal"):
        ok = ok & (column <= row + key_length - query_length)
    if "q_segment_ids" in options:
        q_ids = jnp.asarray(options["q_segment_ids"])[..., None, :, None]
        kv_ids = jnp.asarray(options["kv_segment_ids"])[..., None, None, :]
        ok = ok & (q_ids == kv_ids) & (q_ids >= 0)
    ok = jnp.broadcast_to(ok, s.shape)
    some = ok.any(-1)
    top = jnp.max(jnp.where(ok, s, -1e30), -1)
    if sinks is not None:
        top = jnp.maximum(top, sinks[..., None])
    top = jax.lax.stop_gradient(top)
    e = jnp.where(ok, jnp.exp(jnp.where(ok, s - top[..., None], 0)), 0)
    total = e.sum(-1)
    if sinks is not None:
        total = total + jnp.exp(sinks[..., None] - top)
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    p = e / total[..., None]
    return jnp.einsum("...nts,...snh->...tnh", p, value, precision="highest"), lse


def loss(f: Callable) -> Callable:
    """A scalar of out and of the finite lse."""

    def of(*args: Any, **options: Any) -> jax.Array:
        out, lse = f(*args, **options)
        finite = jnp.where(jnp.isinf(lse), 0, lse)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(finite))

    return of


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal trees: shapes, infinities, and values relative to the largest."""
    chex.assert_trees_all_equal_shapes(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        infinite, expected_infinite = (np.where(np.isinf(z), z, 0) for z in (x, y))
        np.testing.assert_array_equal(infinite, expected_infinite)
        x, y = np.where(np.isinf(x), 0, x), np.where(np.isinf(y), 0, y)
        largest = max(1.0, np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


def cuda_text(f: Callable, *args: Any) -> str:
    """The StableHLO of f lowered for CUDA, from any machine."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def call_of(target: str, text: str) -> str:
    """The one line of StableHLO that calls an FFI target."""
    (line,) = (line for line in text.splitlines() if f"@{target}(" in line)
    return line


def kernel_calls(f: Callable, *args: Any, target: str = "jax_flash_mha_fwd") -> int:
    """How often a kernel is called when f, lowered for CUDA, runs.

    Equal calls share one private function of the module, so calls are counted along the
    call graph from main.
    """
    functions = {}
    for text in re.split(r"(?=func\.func )", cuda_text(f, *args))[1:]:
        match = re.match(r"func\.func (?:public |private )?@([\w.]+)", text)
        assert match is not None
        functions[match.group(1)] = text

    def count(name: str) -> int:
        text = functions[name]
        called = re.findall(r"(?<!custom_)call @([\w.]+)", text)
        return text.count(f"@{target}(") + sum(map(count, called))

    return count("main")


def moved_data(text: str | None) -> list[str]:
    """Lines of compiled HLO that move data: copies, and transposes that are no bitcast.

    A transpose is a bitcast if the elements lie in the same order before and after,
    which the layouts (dimensions minor to major, in braces) tell.
    """
    assert text is not None
    shape = r"%([\w.-]+) = \w+\[[\d,]*\]\{([\d,]*)\}"
    layouts = {
        name: [int(n) for n in layout.split(",") if n]
        for name, layout in re.findall(shape, text)
    }
    moved = [line for line in text.splitlines() if re.search(r" copy(-start)?\(", line)]
    pattern = rf"{shape} transpose\(%([\w.-]+)\), dimensions=\{{([\d,]*)\}}"
    for match in re.finditer(pattern, text):
        name, _, source, dimensions = match.groups()
        dims = [int(n) for n in dimensions.split(",")]
        if [dims[n] for n in layouts[name]] != layouts[source]:
            moved.append(match.group(0))
    return moved


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for x in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda y: hasattr(y, "eqns") or hasattr(y, "jaxpr"),
        ):
            if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns"):
                yield from equations(x)


def count_primitive(f: Callable, name: str, *args: Any) -> int:
    """How many equations of the jaxpr of f are the primitive `name`."""
    return sum(e.primitive.name == name for e in equations(jax.make_jaxpr(f)(*args)))


SEQUENCE_SPECS = {"q_segment_ids": P(None, "x"), "kv_segment_ids": P(None, "x")}
"""How array options of `sharded` are sharded that are not whole on every device."""


def mesh_of(size: int) -> jax.sharding.Mesh:
    return jax.make_mesh((size,), ("x",), axis_types=(AxisType.Auto,))


def sharded(
    f: Callable,
    size: int,
    arrays: dict[str, Any] | None = None,
    specs: dict[str, P] | None = None,
    check_vma: bool = True,
    **options: Any,
) -> Callable:
    """`f` of query, key and value on shards of the sequence: `(out, lse)`, or `out`.

    `arrays` are sharded by `specs` (whole on every device if they have none there).
    """
    arrays = arrays or {}
    specs = {n: (specs or SEQUENCE_SPECS).get(n, P()) for n in arrays}
    options.setdefault("return_lse", True)
    result_specs = (P(None, "x"), P(None, None, "x"))

    def on_shards(*args: Any) -> Any:
        more = dict(zip(arrays, args[3:], strict=True))
        return f(*args[:3], axis_name="x", **more, **options)

    mapped = jax.shard_map(
        on_shards,
        mesh=mesh_of(size),
        in_specs=(P(None, "x"),) * 3 + tuple(specs.values()),
        out_specs=result_specs if options["return_lse"] else result_specs[0],
        check_vma=check_vma,
    )
    return jax.jit(lambda *tensors: mapped(*tensors, *arrays.values()))


def apart(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays, and the rest."""
    arrays = {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    return arrays, {n: x for n, x in options.items() if n not in arrays}


def shrink_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the jnp path into tiny blocks, so that small problems have many."""
    monkeypatch.setattr(blocks, "MATERIALISE", 1)
    monkeypatch.setattr(blocks, "SMALLEST_ROW_BLOCK", 4)
    monkeypatch.setattr(blocks, "KEY_BLOCK", 5)
    # What was traced with other blocks must not be reused.
    jax.clear_caches()


def options_of_every_kind(
    batch: int, rows: int, keys: int, heads: int
) -> list[dict[str, Any]]:
    """Options of `mha` beyond those of the kernels, in combinations."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    segments = {
        "q_segment_ids": rng.integers(-1, 3, (batch, rows)),
        "kv_segment_ids": rng.integers(-1, 3, (batch, keys)),
    }
    return [
        {"bias": normal(batch, heads, rows, keys)},
        {"bias": normal(keys), "is_causal": True},
        {"bias": normal(heads, 1, 1), "softcap": 2.0},
        {"mask": rng.random((batch, 1, rows, keys)) < 0.5},
        {"mask": rng.random((rows, 1)) < 0.5, "bias": normal(1, heads, 1, keys)},
        {"softcap": 1.5, "window_size": (3, 2)},
        {"sinks": normal(heads), "is_causal": True},
        {"sinks": normal(batch, heads), "mask": np.zeros((rows, keys), bool)},
        segments,
        {**segments, "is_causal": True, "softcap": 3.0, "sinks": normal(heads)},
        {"bias": alibi(normal(heads))},
        {
            "bias": alibi(normal(batch, heads)),
            "is_causal": True,
            "softcap": 3.0,
            "causal_alignment": "top_left",
            "key_value_seq_lengths": np.array([3, 9][:batch], np.int32),
        },
        {"scale": 0.0},
        {"scale": -0.7, "key_value_seq_lengths": np.array([3, 0][:batch], np.int32)},
    ]


OPTION_COUNT = len(options_of_every_kind(2, 11, 13, 4))
