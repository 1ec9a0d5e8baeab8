"""How `rope_append_kv` is lowered for CUDA, and the rules of its primitive."""

import re
from collections.abc import Callable
from typing import Any

import fake_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_helpers import joined, rope_append_in_jnp
from helpers import assert_close, call_of, count_primitive, cuda_text, kernel_calls
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import rope_append_kv, rope_append_qkvpacked
from jax_flash._src import registry

TARGET = registry.ROPE_APPEND_TARGET
NEW = ("query", "k_new", "v_new")
CACHES = ("k_cache", "v_cache")


def arrays(
    dtype: Any = "bfloat16", tokens: int | None = 2, page: int | None = None
) -> dict[str, Any]:
    """Four sequences of up to 16 tokens; one is without room, one is switched off."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    shape = (4,) if tokens is None else (4, tokens)
    lead = (4, 16) if page is None else (20, page)
    given = {
        "query": normal(*shape, 8, 16),
        "k_new": normal(*shape, 4, 16),
        "v_new": normal(*shape, 4, 8),
        "k_cache": normal(*lead, 4, 16),
        "v_cache": normal(*lead, 4, 8),
        "cache_seqlens": jnp.array([0, 7, 15, -1], jnp.int32),
    }
    if page is not None:
        table = rng.permutation(20)[:16].reshape(4, 4)
        table[1, -1], table[2, -1] = -1, 99
        given["page_table"] = jnp.asarray(table, jnp.int32)
    return given


def append_parts(*args: Any, **options: Any) -> tuple[jax.Array, ...]:
    """`rope_append_kv` of positional arguments, a page table last."""
    table = args[6] if len(args) > 6 else None
    return rope_append_kv(*args[:6], page_table=table, **options)


def append_packed(*args: Any, **options: Any) -> tuple[jax.Array, ...]:
    """The same by `rope_append_qkvpacked`, of the same arguments."""
    table = args[6] if len(args) > 6 else None
    qkv = joined(*args[:3])
    return rope_append_qkvpacked(qkv, *args[3:6], page_table=table, **options)


@pytest.fixture(params=[append_parts, append_packed], ids=["parts", "packed"])
def append(request: pytest.FixtureRequest) -> Callable:
    """Either function, as one of the arguments of `rope_append_kv`."""
    return request.param


@pytest.mark.parametrize(("dtype", "text"), [("bfloat16", "bf16"), ("float32", "f32")])
@pytest.mark.parametrize("tokens", [None, 2])
def test_call(kernels: None, dtype: str, text: str, tokens: int | None) -> None:
    given = arrays(dtype, tokens)
    line = call_of(TARGET, cuda_text(append_parts, *given.values()))
    t = tokens or 1
    for attribute in ("interleaved", "is_packed", "has_page_table"):
        assert f"{attribute} = false" in line
    expected = (
        f"(tensor<4x{t}x8x16x{text}>, tensor<4x16x4x16x{text}>, "
        f"tensor<4x16x4x8x{text}>, tensor<4xi32>, tensor<1x8xf32>, "
        f"tensor<4x{t}x4x16x{text}>, tensor<4x{t}x4x8x{text}>) -> "
        f"(tensor<4x{t}x8x16x{text}>, tensor<4x16x4x16x{text}>, "
        f"tensor<4x16x4x8x{text}>)"
    )
    assert expected in line
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", line)
    assert aliases == [("1", "1"), ("2", "2")]


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("tokens", [None, 2])
def test_call_of_one_projection(
    kernels: None, tokens: int | None, page: int | None
) -> None:
    """It is handed over as it is: nothing else computes."""
    query, key, value, *rest = arrays("bfloat16", tokens, page).values()

    def f(qkv: Any, *rest: Any) -> Any:
        table = rest[3] if page else None
        return rope_append_qkvpacked(qkv, *rest[:3], page_table=table)

    text = cuda_text(f, joined(query, key, value), *rest)
    line = call_of(TARGET, text)
    assert "is_packed = true" in line
    width = 8 * 16 + 4 * 16 + 4 * 8
    assert f"(tensor<4x{tokens or 1}x{width}xbf16>, tensor<" in line
    for operation in ("slice", "concatenate", "cosine", "multiply", "scatter"):
        assert f"stablehlo.{operation}" not in text


def test_pages_and_options(kernels: None) -> None:
    def f(*args: Any) -> Any:
        return append_parts(*args, interleaved=True, rotary_dim=6)

    given = arrays(page=4)
    text = cuda_text(f, *given.values())
    line = call_of(TARGET, text)
    assert "interleaved = true" in line
    assert "has_page_table = true" in line
    assert re.search(r"tensor<1x3xf32>, .*, tensor<4x4xi32>\) ->", line)
    # Nothing else computes.
    for operation in ("scatter", "cosine", "multiply", "concatenate"):
        assert f"stablehlo.{operation}" not in text


def changed(given: dict[str, Any], **dtypes: Any) -> dict[str, Any]:
    return {n: x.astype(dtypes.get(n, x.dtype)) for n, x in given.items()}


@pytest.mark.parametrize(
    "given",
    [
        changed(arrays(), k_cache="int8", v_cache="int8"),
        changed(arrays(), k_cache="float8_e4m3fn", v_cache="float8_e4m3fn"),
        changed(arrays("float32"), k_cache="bfloat16", v_cache="bfloat16"),
        changed(arrays(), k_new="float32"),
        changed(arrays(), v_new="float16"),
        {n: x[:, :0] if n[1:] in ("uery", "_new") else x for n, x in arrays().items()},
        {n: x[:, :0] if n in CACHES else x for n, x in arrays().items()},
        {n: x[:, :0] if n == "page_table" else x for n, x in arrays(page=4).items()},
    ],
    ids=[
        "int8",
        "float8",
        "f32 to bf16",
        "keys of f32",
        "values of f16",
        "no tokens",
        "no room",
        "no pages",
    ],
)
def test_what_jnp_runs(append: Callable, kernels: None, given: dict[str, Any]) -> None:
    if append is append_packed and len({given[n].dtype for n in NEW}) > 1:
        pytest.skip("one array has one type")
    assert kernel_calls(append, *given.values(), target=TARGET) == 0


def test_what_else_jnp_runs(append: Callable, kernels: None) -> None:
    with jax.enable_x64(True):
        given = arrays("float64")
        assert kernel_calls(append, *given.values(), target=TARGET) == 0
    wide = arrays()
    for name in ("query", "k_new", "k_cache"):
        wide[name] = jnp.zeros((*wide[name].shape[:-1], 8200), jnp.bfloat16)
    assert kernel_calls(append, *wide.values(), target=TARGET) == 0

    def part(*args: Any) -> Any:
        return append(*args, rotary_dim=8192)

    assert kernel_calls(part, *wide.values(), target=TARGET) == 1


def compiled_text(f: Callable, *args: Any, donate: tuple[int, ...] = (3, 4)) -> str:
    with fake_kernel.on_cpu():
        jitted = jax.jit(lambda *args: f(*args), donate_argnums=donate)
        return str(jitted.lower(*args).compile().as_text())


def copies(text: str, given: dict[str, Any]) -> list[str]:
    """Operations that make an array as large as a cache, and are no call of ours."""
    sizes = "|".join(",".join(map(str, given[n].shape)) for n in CACHES)
    made = rf"= \w+\[(?:\d+,)?(?:{sizes})\]\S* (?!parameter|bitcast|get-tuple)\w+"
    return re.findall(made, text)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("tokens", [None, 3])
def test_donated_caches_are_not_copied(tokens: int | None, page: int | None) -> None:
    """One call, whose results are its operands, and nothing else."""
    given = arrays("bfloat16", tokens, page)
    text = compiled_text(append_parts, *given.values())
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert "output_to_operand_aliasing={{1}: (1, {}), {2}: (2, {})}" in text
    alias = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert alias is not None
    for i in (1, 2):
        assert re.search(rf"\{{{i}\}}: \({i + 2}, ", alias.group(1))
    assert copies(text, given) == []
    # What somebody still has is copied first.
    kept = compiled_text(append_parts, *given.values(), donate=())
    assert len(copies(kept, given)) == 2


def test_vmap_over_donated_caches_copies_none(append: Callable) -> None:
    """Of layers, say; the axis leads, and the lengths are those of all."""
    given = {n: jnp.stack([x] * 3) for n, x in arrays().items()}
    given["cache_seqlens"] = given["cache_seqlens"][0]
    mapped = jax.vmap(append, (0,) * 5 + (None,))
    text = compiled_text(mapped, *given.values())
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert copies(text, given) == []


AXES = {
    "all": (0, 0, 0, 0, 0, 0, 0),
    "anywhere": (1, 2, 3, 1, 2, 0, 1),
    "queries": (2, None, None, None, None, None, None),
    "new tokens": (0, 0, 0, None, None, None, None),
    "lengths": (None, None, None, None, None, 0, None),
    "pages": (None, None, None, None, None, None, 0),
    "caches": (None, None, None, 0, 1, None, None),
}


@pytest.mark.parametrize("through_kernel", [False, True])
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("name", AXES)
def test_vmap(
    append: Callable, name: str, page: int | None, through_kernel: bool
) -> None:
    given = arrays("float32", page=page)
    axes = AXES[name][: len(given)]
    if set(axes) == {None}:
        pytest.skip("nothing is mapped")
    stacked = []
    for (key, x), axis in zip(given.items(), axes, strict=True):
        other = x + 1 if key == "cache_seqlens" else -x
        if key == "page_table":
            other = x[::-1]
        stacked.append(x if axis is None else jnp.stack([x, other], axis))
    want = jax.vmap(rope_append_in_jnp, axes)(*stacked)
    mapped = jax.vmap(append, axes)
    if through_kernel:
        with fake_kernel.emulated():
            got = mapped(*stacked)
    else:
        got = mapped(*stacked)
    assert count_primitive(mapped, "rope_append", *stacked) == 1
    assert_close(got, want, 1e-6)


def test_vmap_of_queries_alone_leaves_the_caches() -> None:
    given = arrays("float32")
    queries = jnp.stack([given["query"], -given["query"]])
    rest = list(given.values())[1:]
    mapped = jax.vmap(append_parts, (0, *(None,) * 5), (0, None, None))
    query, *caches = mapped(queries, *rest)
    want = rope_append_in_jnp(*given.values())
    assert_close([query[0], -query[1], *caches], [want[0], *want], 1e-6)


def test_vmap_of_frequencies(append: Callable) -> None:
    given = list(arrays("float32").values())
    frequencies = jnp.array([[1.0, 0.3], [0.1, 0.0]], jnp.float32)

    def of(f: Callable) -> Callable:
        return jax.vmap(lambda x: f(*given, inv_freq=x))

    assert count_primitive(of(append), "rope_append", frequencies) == 1
    assert_close(of(append)(frequencies), of(rope_append_in_jnp)(frequencies), 1e-6)
    # Twice, with sequences that have theirs already.
    both = jax.vmap(of(append))(frequencies[None])
    assert_close(both, jax.vmap(of(rope_append_in_jnp))(frequencies[None]), 1e-6)


@pytest.mark.parametrize("page", [None, 4])
def test_vmap_twice(append: Callable, page: int | None) -> None:
    """Of pools: each sequence writes to those of its own."""
    given = arrays("float32", page=page)
    axes = [(0, None, 0, 1, 0, None), (None, 0, 0, 0, 0, 0)]
    stacked = []
    for (name, x), outer, inner in zip(list(given.items())[:6], *axes, strict=True):
        other = x + 1 if name == "cache_seqlens" else -x
        x = x if inner is None else jnp.stack([x, other], inner)
        stacked.append(x if outer is None else jnp.stack([x, 2 * x, x], outer))
    table = list(given.values())[6:]
    nones = (None,) * len(table)
    got, want = (
        jax.vmap(jax.vmap(f, (*axes[1], *nones)), (*axes[0], *nones))(*stacked, *table)
        for f in (append, rope_append_in_jnp)
    )
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("page", [None, 4])
def test_derivatives(append: Callable, page: int | None) -> None:
    """Those of jnp, in both modes, by every array that has any."""
    given = arrays("float32", page=page)
    fixed = list(given.values())[5:]
    frequencies = jnp.array([1.0, 0.3, 0.1], jnp.float32)
    primals = [*list(given.values())[:5], frequencies]

    def of(f: Callable) -> Callable:
        def run(*xs: jax.Array) -> tuple[jax.Array, ...]:
            return f(*xs[:5], *fixed, inv_freq=xs[5])

        return run

    tangents = [jnp.cos(x) for x in primals]
    got, want = (
        jax.jvp(of(f), primals, tangents) for f in (append, rope_append_in_jnp)
    )
    assert_close(got, want, 1e-5)

    def loss(f: Callable) -> Callable:
        return lambda *xs: sum(jnp.sin(x).sum() for x in of(f)(*xs))

    every = tuple(range(6))
    got, want = (
        jax.jit(jax.grad(loss(f), every))(*primals)
        for f in (append, rope_append_in_jnp)
    )
    assert_close(got, want, 1e-5)
    # Of the queries alone, and twice.
    got, want = (
        jax.grad(lambda x, f=f: jax.grad(loss(f))(x, *primals[1:]).sum())(primals[0])
        for f in (append, rope_append_in_jnp)
    )
    assert_close(got, want, 1e-5)


def test_gradients_of_16_bits_keep_the_kernel(append: Callable, kernels: None) -> None:
    """The results are the kernel's; only what is linear runs in jnp."""
    given = arrays()

    def loss(query: Any, *rest: Any) -> jax.Array:
        results = append(query, *rest)
        return jnp.stack([(x.astype(jnp.float32) ** 2).sum() for x in results]).sum()

    assert kernel_calls(jax.grad(loss), *given.values(), target=TARGET) == 1


# --- several devices


def mesh_of(*names: str, axis_type: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices()[: 2 ** len(names)])
    return Mesh(devices.reshape([2] * len(names)), names, (axis_type,) * len(names))


# Of queries, new tokens, caches, lengths, page table.
SPECS = {
    "sequences and heads": (
        P("x", None, "y"), P("x", None, "y"), P("x", None, "y"), P("x"), P()
    ),
    "two axes of sequences": (P(("y", "x")),) * 3 + (P(("y", "x")), P()),
    "query heads on both axes": (
        P(None, None, ("x", "y")), P(None, None, "x"), P(None, None, "x"), P(), P()
    ),
    "places": (P(), P(), P(None, "x"), P(), P()),
    "places on two axes, heads": (
        P(None, None, "z"), P(), P(None, ("x", "y"), "z"), P(), P()
    ),
    "places, sequences": (P("y"), P("y"), P("y", "x"), P("y"), P()),
    "tokens": (P(None, "x"), P(None, "x"), P(), P(), P()),
    "widths": (P(None, None, None, "x"),) * 3 + (P(), P()),
    "caches whole": (P("x"), P("x"), P(), P("x"), P()),
}  # fmt: skip
PAGED_SPECS = {
    "heads": (P(None, None, "y"), P(None, None, "y"), P(None, None, "y"), P(), P()),
    "pages": (P(), P(), P("x"), P(), P()),
    "pages on two axes, heads": (
        P(None, None, "z"), P(), P(("y", "x"), None, "z"), P(), P()
    ),
    "sequences": (P("x"), P("x"), P(None, None, "y"), P("x"), P("x")),
    "tokens of a page": (P(), P(), P(None, "x"), P(), P()),
}  # fmt: skip


def placed(given: dict[str, Any], mesh: Mesh, specs: tuple[P, ...]) -> list[jax.Array]:
    query, new, cache, lengths, table = specs
    every = (query, new, new, cache, cache, lengths, table)
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(given.values(), every, strict=False)
    ]


@pytest.mark.parametrize(
    ("page", "name"),
    [(None, name) for name in SPECS] + [(4, name) for name in PAGED_SPECS],
)
def test_sharded(append: Callable, page: int | None, name: str) -> None:
    given = arrays("float32", page=page)
    specs = (SPECS if page is None else PAGED_SPECS)[name]
    want = rope_append_in_jnp(*given.values())
    args = placed(given, mesh_of("x", "y", "z"), specs)
    step = jax.jit(append, donate_argnums=(3, 4))
    compiled = step.lower(*args).compile()
    text = str(compiled.as_text())
    local = [f"f32[{','.join(map(str, x.shape))}]" for x in args[3:5]]
    stays = name not in ("widths", "tokens of a page", "caches whole")
    if stays:  # no device has more of a cache than its own
        split = any(axis is not None for axis in specs[2])
        assert not (split and any(whole in text for whole in local))
    sharding = args[3].sharding
    got = compiled(*args)
    assert_close(got, want, 1e-6)
    if stays:
        assert got[1].sharding.is_equivalent_to(sharding, 4)


@pytest.mark.parametrize("page", [None, 4])
def test_sharded_along_what_vmap_added(append: Callable, page: int | None) -> None:
    """Of replicas, each with its own caches: nothing is exchanged."""
    given = {n: jnp.stack([x, -x]) for n, x in arrays("float32", page=page).items()}
    given["cache_seqlens"] = abs(given["cache_seqlens"])
    if page is not None:
        given["page_table"] = abs(given["page_table"])
    mesh = mesh_of("x", "y")
    # Heads side by side with others are not sharded.
    spec = P("x", None, None, "y" if append is append_parts else None)
    args = placed(given, mesh, (spec, spec, spec, P("x"), P("x")))
    compiled = jax.jit(jax.vmap(append)).lower(*args).compile()
    for operation in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert operation not in str(compiled.as_text())
    got = compiled(*args)
    assert_close(got, jax.vmap(rope_append_in_jnp)(*given.values()), 1e-6)
    assert got[1].sharding.is_equivalent_to(args[3].sharding, 5)


@pytest.mark.parametrize("name", ["sequences and heads", "places"])
def test_lowered_for_cuda_on_many_devices(kernels: None, name: str) -> None:
    mesh = mesh_of("x", "y", "z")
    args = placed(arrays(), mesh, SPECS[name])
    text = (
        jax.jit(append_parts).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert "all_gather" not in text


@pytest.mark.parametrize("names", [("x", "y"), ("x",)])
def test_shard_map(append: Callable, names: tuple[str, ...]) -> None:
    """Over all axes of a mesh, and over some of them."""
    given = arrays("float32")
    mesh = mesh_of("x", "y")
    by_head = "y" if "y" in names else None
    spec = P("x", None, by_head)
    specs = (spec,) * 5 + (P("x"),)
    mapped = jax.shard_map(
        append,
        mesh=mesh,
        in_specs=specs,
        out_specs=(spec,) * 3,
        axis_names=set(names),
    )
    args = list(given.values())
    assert_close(jax.jit(mapped)(*args), rope_append_in_jnp(*args), 1e-6)

    def loss(f: Callable) -> Callable:
        return lambda x, *rest: sum(jnp.sin(y).sum() for y in f(x, *rest))

    got, want = (
        jax.jit(jax.grad(loss(f), (0, 1, 2, 3)))(*args)
        for f in (mapped, rope_append_in_jnp)
    )
    assert_close(got, want, 1e-5)


def test_shard_map_of_what_devices_share(kernels: None) -> None:
    """Queries that all devices have stay so, whatever is sharded of the caches."""
    given = arrays("float32")
    mesh = mesh_of("x")
    spec = P(None, None, "x")
    mapped = jax.shard_map(
        append_parts,
        mesh=mesh,
        in_specs=(P(), spec, spec, spec, spec, P()),
        out_specs=(P(), spec, spec),
    )
    args = list(given.values())
    assert_close(jax.jit(mapped)(*args), rope_append_in_jnp(*args), 1e-6)
    assert kernel_calls(mapped, *args, target=TARGET) == 1


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x"), P()])
@pytest.mark.parametrize("page", [None, 4])
def test_explicit_axes(append: Callable, page: int | None, spec: P) -> None:
    """Caches keep their shardings, whatever those of the other arguments."""
    given = arrays("float32", page=page)
    mesh = mesh_of("x", axis_type=AxisType.Explicit)
    wanted = rope_append_in_jnp(*given.values())
    with jax.set_mesh(mesh):
        # Of what is side by side there is one sharding.
        query = P() if append is append_parts else P("x")
        args = placed(given, mesh, (query, P("x"), spec, P("x"), P()))
        got, jitted = append(*args), jax.jit(append)(*args)

        def total(query: jax.Array, cache: jax.Array) -> jax.Array:
            query, k_cache, _ = append(query, *args[1:3], cache, *args[4:])
            return (k_cache**2).sum() + (query**2).sum()

        gradient = jax.grad(total, (0, 1))(args[0], args[3])
        for x in (*got[1:], *jitted[1:], gradient[1]):
            assert jax.typeof(x).sharding.spec[:3] == (*spec, None, None, None)[:3]
    assert_close(got, wanted, 1e-6)
    assert_close(jitted, wanted, 1e-6)
    assert_close(gradient[0], 2 * given["query"], 1e-5)


def test_in_a_loop_over_layers(append: Callable) -> None:
    """Caches carried through `scan` under jit and donated."""
    given = arrays("float32")
    layers = {n: jnp.stack([x, -x]) for n, x in given.items() if n != "cache_seqlens"}

    def step(caches: Any, layer: Any) -> Any:
        query, *caches = append(*layer, *caches, given["cache_seqlens"])
        return tuple(caches), query

    def run(caches: Any) -> Any:
        new = tuple(layers[n] for n in NEW)
        return jax.lax.scan(step, caches, new)

    caches, queries = jax.jit(run)(tuple(given[n] for n in CACHES))
    want = rope_append_in_jnp(
        *(layers[n][1] for n in NEW),
        *(given[n] for n in (*CACHES, "cache_seqlens")),
    )
    assert_close([queries[1], *caches], list(want), 1e-6)


@pytest.mark.parametrize("page", [None, 4])
def test_export_with_a_symbolic_batch(append: Callable, page: int | None) -> None:
    given = arrays("float32", page=page)
    (batch,) = export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct(
            x.shape if page and n in CACHES else (batch, *x.shape[1:]), x.dtype
        )
        for n, x in given.items()
    ]
    loaded = export.deserialize(export.export(jax.jit(append))(*shapes).serialize())
    got = loaded.call(*given.values())
    assert_close(list(got), list(rope_append_in_jnp(*given.values())), 1e-6)
