"""How decoding is lowered for CUDA: one call of the kernel, no copy before it."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import call_of, count_primitive, cuda_text, kernel_calls
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import alibi, decode_mha, explain
from jax_flash._src import decode_explain, registry
from jax_flash._src.decode_call import OPERANDS

TARGET = registry.DECODE_TARGET


def inputs(dtype="bfloat16", page=None, width=16, batch=3):
    query = jnp.zeros((batch, 2, 8, width), dtype)
    k = jnp.zeros((batch, 1024, 2, width), dtype)
    v = jnp.zeros((batch, 1024, 2, 8), dtype)
    lengths = jnp.zeros((batch,), jnp.int32)
    if page is None:
        return query, k, v, lengths
    k, v = (x.reshape(-1, page, *x.shape[2:]) for x in (k, v))
    return query, k, v, lengths, jnp.zeros((batch, 5), jnp.int32)


def quantised(args, dtype):
    query, k, v, *rest = args
    return query, k.astype(dtype), v.astype(dtype), *rest


def decode(query, k, v, lengths, table=None, **options):
    return decode_mha(query, k, v, lengths, page_table=table, **options)


def calls(f, *args):
    return kernel_calls(f, *args, target=TARGET)


def test_call(kernels: None) -> None:
    def f(*a):
        return decode(*a, scale=0.5, window_size=(7, None), softcap=3.0)

    line = call_of(TARGET, cuda_text(f, *inputs()))
    for attribute in (
        "scale = 5.000000e-01 : f32",
        "softcap = 3.000000e+00 : f32",
        "window_left = 7 : i64",
        "split_keys = 256 : i64",
        "splits = 2 : i64",
        "has_page_table = false",
        "has_sinks = false",
        "has_slopes = false",
    ):
        assert attribute in line, attribute
    expected = (
        "(tensor<3x2x8x16xbf16>, tensor<3x1024x2x16xbf16>, tensor<3x1024x2x8xbf16>, "
        "tensor<3xi32>) -> (tensor<3x2x8x8xbf16>, tensor<3x8x2xf32>, "
        "tensor<3x2x2x8x8xf32>, tensor<3x2x2x8x2xf32>)"
    )
    assert expected in line


def test_pages_sinks_and_slopes(kernels: None) -> None:
    def f(*a):
        given = {"sinks": jnp.zeros(8), "bias": alibi(jnp.ones((3, 8)))}
        return decode(*a, **given, window_size=(1 << 20, None))

    line = call_of(TARGET, cuda_text(f, *inputs(page=128)))
    assert "tensor<3x5xi32>, tensor<1x8xf32>, tensor<3x8xf32>) ->" in line
    assert "has_page_table = true" in line
    assert "has_sinks = true" in line
    assert "has_slopes = true" in line
    assert "window_left = -1 : i64" in line


@pytest.mark.parametrize(
    ("dtype", "text"), [("int8", "i8"), ("float8_e4m3fn", "f8E4M3FN")]
)
def test_quantised_caches(kernels: None, dtype: str, text: str) -> None:
    def f(query, k, v, lengths, k_scale):
        return decode_mha(query, k, k, lengths, k_scale=k_scale, implementation="cuda")

    args = quantised(inputs(width=32), dtype)
    line = call_of(TARGET, cuda_text(f, *args, jnp.ones(2)))
    operands = f"tensor<3x1024x2x32x{text}>, " * 2 + "tensor<3xi32>, tensor<1x2xf32>)"
    assert f"(tensor<3x2x8x32xbf16>, {operands} -> " in line
    assert "has_k_scale = true" in line
    assert "has_v_scale = false" in line


@pytest.mark.parametrize("page", [None, 128])
def test_float32(kernels: None, page: int | None) -> None:
    """Rows of whole 16 bytes, and splits for tiles of 8 rows."""

    def f(*a):
        return decode(*a, implementation="cuda")

    args = inputs("float32", page, width=12)
    named = dict(zip(("cache_seqlens", "page_table"), args[3:], strict=False))
    assert explain(*args[:3], **named).chosen["cuda"] == "cuda"
    line = call_of(TARGET, cuda_text(f, *args))
    cache = "24x128x2" if page else "3x1024x2"
    assert f"(tensor<3x2x8x12xf32>, tensor<{cache}x12xf32>, tensor<{cache}x8" in line
    assert "-> (tensor<3x2x8x8xf32>, tensor<3x8x2xf32>, " in line
    assert "forward_parts = 0 : i64" in line


@pytest.mark.parametrize(("dtype", "splits"), [("bfloat16", 32), ("float32", 16)])
def test_tiles_of_rows(kernels: None, dtype: str, splits: int) -> None:
    """16 rows of 8 heads are two tiles to float32: half as many splits."""
    query = jnp.zeros((1, 4, 32, 8), dtype)
    k = jnp.zeros((1, 32768, 8, 8), dtype)
    args = query, k, k, jnp.zeros(1, jnp.int32)
    assert f"splits = {splits} : i64" in call_of(TARGET, cuda_text(decode, *args))


def test_the_number_of_sequences_does_not_matter_to_splits(kernels: None) -> None:
    lines = [
        call_of(TARGET, cuda_text(decode, *inputs(batch=batch))) for batch in (1, 7)
    ]
    splits = [re.findall(r"split\w* = \d+", line) for line in lines]
    assert splits[0] == splits[1]
    assert len(splits[0]) == 2


@pytest.mark.parametrize("page", [None, 128])
def test_vmap_of_queries_copies_no_cache(kernels: None, page: int | None) -> None:
    args = inputs(page=page)
    queries = jnp.stack([args[0]] * 5)
    axes = (0, *(None,) * (len(args) - 1))
    text = cuda_text(jax.vmap(decode, axes), queries, *args[1:])
    line = call_of(TARGET, text)
    cache = "x".join(map(str, args[1].shape))
    assert f"(tensor<15x2x8x16xbf16>, tensor<{cache}xbf16>" in line
    assert "has_page_table = true" in line
    made = re.findall(r"-> tensor<([\dx]+)xbf16>", text)
    assert not [shape for shape in made if np.prod(eval_shape(shape)) > 10**5]


def eval_shape(text: str) -> list[int]:
    return [int(n) for n in text.split("x")]


def test_vmap_of_everything(kernels: None) -> None:
    args = [jnp.stack([x] * 5) for x in inputs()]
    line = call_of(TARGET, cuda_text(jax.vmap(decode), *args))
    assert "(tensor<15x2x8x16xbf16>, tensor<15x1024x2x16xbf16>" in line
    assert count_primitive(jax.vmap(decode), "flash_decode", *args) == 1


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (inputs("float32", width=18), {}),
        (inputs("float32", width=260), {}),
        (inputs(width=12), {}),
        (inputs(width=264), {}),
        (quantised(inputs("float32", width=32), "int8"), {}),
        (quantised(inputs(width=24), "int8"), {}),
        (quantised(inputs(width=32), "int8")[:2] + quantised(inputs(), "int8")[2:], {}),
        ((inputs()[0][:, :0], *inputs()[1:]), {}),
        (inputs(), {"implementation": "xla"}),
        (inputs(), {"implementation": ("xla", "cuda")}),
    ],
    ids=[
        "f32 18",
        "f32 260",
        "width 12",
        "width 264",
        "int8 f32",
        "int8 24",
        "int8 8",
        "empty",
        "xla",
        "xla first",
    ],
)
def test_what_jnp_runs(kernels: None, args, options) -> None:
    assert calls(lambda *a: decode(*a, **options), *args) == 0


def test_named_implementation(kernels: None) -> None:
    def f(*a):
        return decode(*a, implementation="cuda")

    assert calls(f, *inputs()) == 1
    assert calls(lambda *a: decode(*a, implementation=("cuda", "xla")), *inputs()) == 1
    int8 = quantised(inputs("float32", width=32), "int8")
    with pytest.raises(NotImplementedError, match="int8 with query of dtype float32"):
        f(*int8)
    with pytest.raises(NotImplementedError, match=r"k_cache of width 18.* 4 up to 256"):
        f(*inputs("float32", width=18))
    with pytest.raises(NotImplementedError, match="k_cache of width 12"):
        f(*inputs(width=12))
    with pytest.raises(NotImplementedError, match="runs on platform 'cuda' only"):
        jax.jit(f).lower(*inputs())


def test_explain(kernels: None) -> None:
    query, k, v, lengths, table = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(page=128)
    )
    given: dict[str, Any] = {"cache_seqlens": lengths, "page_table": table}
    given["softcap"] = 2.0
    explanation = explain(query, k, v, **given)
    assert explanation.chosen["cuda"] == "cuda"
    assert explanation.chosen["cpu"] == "xla"
    assert "up to 3 splits of 256 keys" in explanation.details["cuda"]
    assert "page_table int32[3,5], " in str(explanation)
    assert "softcap=2.0" in str(explanation)
    narrow_query, narrow_k = (
        jax.ShapeDtypeStruct((*x.shape[:3], 12), x.dtype) for x in (query, k)
    )
    explanation = explain(narrow_query, narrow_k, v, **given, implementation="cuda")
    assert set(explanation.chosen.values()) == {None}
    assert "k_cache of width 12" in str(explanation)
    with pytest.raises(TypeError, match="decode_mha has not: 'mask'"):
        explain(query, k, v, None, lengths, **given)
    with pytest.raises(NotImplementedError, match="bias must be jax_flash"):
        explain(query, k, v, lengths, **given)
    slopes = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert "alibi_slopes float32[1,8]" in str(
        explain(query, k, v, alibi(slopes), **given)
    )
    with pytest.raises(TypeError, match="decode_mha has not: 'is_causal'"):
        explain(query, k, v, is_causal=True, **given)
    given["softcap"] = -1.0
    with pytest.raises(ValueError, match="softcap must be positive"):
        explain(query, k, v, **given)


def test_explain_knows_every_argument_of_decode_mha() -> None:
    parameters = set(inspect.signature(decode_mha).parameters)
    known = {*OPERANDS, *decode_explain.OPTIONS, "implementation", "bias"}
    known.remove("alibi_slopes")  # which are given as a bias
    assert known == parameters


def test_many_rows_may_go_to_the_forward_kernel(kernels: None) -> None:
    """Many tokens on long caches in one piece, without options that it lacks."""

    def taken(*args: Any, **options: Any) -> bool:
        line = call_of(TARGET, cuda_text(lambda *a: decode(*a, **options), *args))
        return "forward_parts = 0 : i64" not in line

    def arrays(tokens: int, heads: int, room: int) -> list[jax.Array]:
        query = jnp.zeros((2, tokens, heads, 16), jnp.bfloat16)
        k, v = (jnp.zeros((2, room, 4, 16), jnp.bfloat16) for _ in range(2))
        return [query, k, v, jnp.zeros(2, jnp.int32)]

    args = arrays(64, 16, 4096)
    assert taken(*args)
    assert taken(*args, window_size=(4096, None))
    assert not taken(*args, window_size=(1000, None))
    assert not taken(*args, softcap=1.0)
    assert not taken(*args, sinks=jnp.zeros(16))
    assert not taken(*args, num_splits=2)
    query, k, v, lengths = args
    pools = [x.reshape(64, 128, 4, 16) for x in (k, v)]
    assert not taken(query, *pools, lengths, jnp.zeros((2, 32), jnp.int32))
    assert not taken(*quantised(args, "int8"))
    assert not taken(*(x.astype(jnp.float32) for x in args[:3]), lengths)
    assert not taken(*arrays(64, 16, 4032))
    assert not taken(*arrays(32, 16, 4096))
    assert not taken(*arrays(64, 12, 4096))
    explanation = explain(*args[:3], cache_seqlens=lengths)
    text = "on compute capability 9.0 the forward kernel, 4 parts of the keys"
    assert text in str(explanation)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "room", "width", "parts", "splits"),
    [
        (64, 32, 8, 65536, 128, 8, 8),
        (64, 32, 8, 8192, 128, 8, 8),
        (32, 32, 8, 65536, 128, 16, 16),
        (64, 32, 8, 8192, 256, 8, 8),
        (64, 24, 12, 65536, 128, 11, 11),
        (64, 128, 1, 65536, 128, 2, 2),
        (5, 2048, 64, 8192, 64, 2, 1),
    ],
)
def test_parts_of_the_keys(
    kernels: None,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    room: int,
    width: int,
    parts: int,
    splits: int,
) -> None:
    """As many as suit one sequence, and room for their results or those of splits."""
    query = jax.ShapeDtypeStruct((batch, tokens, heads, width), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((batch, room, kv_heads, width), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    line = call_of(TARGET, cuda_text(decode, query, cache, cache, lengths))
    assert f"forward_parts = {parts} : i64" in line
    assert f" splits = {splits} : i64" in line
    count = max(splits if splits > 1 else 0, (parts + 1) // 2)
    rows = tokens * heads // kv_heads
    assert f"tensor<{batch}x{kv_heads}x{count}x{rows}x{width}xf32>" in line


def test_num_splits(kernels: None) -> None:
    line = call_of(TARGET, cuda_text(lambda *a: decode(*a, num_splits=3), *inputs()))
    assert "split_keys = 384 : i64" in line
    assert "splits = 3 : i64" in line
    line = call_of(TARGET, cuda_text(lambda *a: decode(*a, num_splits=1), *inputs()))
    assert "tensor<3x2x0x8x8xf32>" in line


def test_lowered_for_cuda_on_many_devices(kernels: None) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    specs = [P("x", None, "y")] * 3 + [P("x")]
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(inputs(batch=4), specs, strict=True)
    ]
    text = jax.jit(decode).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "all_gather" not in text
