"""Batch and heads stay sharded, everything else is right however it is sharded."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    KEY_LENGTHS,
    QUERY_LENGTHS,
    SEGMENTS,
    assert_close,
    bias_and_sinks,
    dense,
    flash,
    loss,
    normal,
    qkv,
    shrink_blocks,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import mha

BATCH_AND_HEADS = P("x", None, "y")
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


def mesh_of(*shape: int, axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    names = ("x", "y")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def put(mesh: jax.sharding.Mesh, arrays, specs) -> list[jax.Array]:
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, specs, strict=True)
    ]


def communication(text: str | None) -> list[str]:
    assert text is not None
    return [c for c in COLLECTIVES if re.search(rf" {c}(-start)?\(", text)]


def gradient(f):
    return jax.grad(loss(f), (0, 1, 2))


def sum_sin(tree: Any) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(tree)]).sum()


@pytest.mark.parametrize("of", [lambda f: f, gradient], ids=["forward", "gradient"])
@pytest.mark.parametrize("shape", [(4, 2), (2, 2), (1, 2)])
def test_batch_and_heads_without_communication(of, shape: tuple[int, int]) -> None:
    mesh = mesh_of(*shape)
    args = put(mesh, qkv(), [BATCH_AND_HEADS] * 3)
    compiled = jax.jit(of(flash)).lower(*args).compile()
    text = compiled.as_text()
    # The loss's own sum over devices is not part of a gradient, nor of a forward.
    assert communication(text) == []
    assert_close(compiled(*args), of(dense)(*qkv()))


def test_every_operand_without_communication() -> None:
    mesh = mesh_of(4, 2)
    bias, sinks = normal(4, 4, 8, 8), bias_and_sinks()[1]
    args = (*qkv(), bias, sinks, QUERY_LENGTHS, KEY_LENGTHS, SEGMENTS, SEGMENTS)
    specs = [BATCH_AND_HEADS] * 3
    specs += [P("x", "y"), P("y"), P("x"), P("x"), P("x"), P("x")]

    def run(f, *a):
        names = ("query_seq_lengths", "key_value_seq_lengths")
        names += ("q_segment_ids", "kv_segment_ids")
        return f(*a[:5], **dict(zip(names, a[5:], strict=True)), is_causal=True)

    placed = put(mesh, args, specs)
    compiled = jax.jit(functools.partial(run, flash)).lower(*placed).compile()
    assert communication(compiled.as_text()) == []
    assert_close(compiled(*placed), run(dense, *args))


WIDE_IDS = (SEGMENTS[:, ::-1] + 1).astype(np.uint32) * np.uint32(2**31 - 1)
"""Ids that int32 cannot hold."""


@pytest.mark.parametrize("shared", [None, 0, 1], ids=["both", "queries", "keys"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_wide_segment_ids(axis_type: AxisType, shared: int | None) -> None:
    """Ids are numbered anew, without communication if each entry has its own."""
    mesh = mesh_of(4, 2, axis_type=axis_type)
    ids = [WIDE_IDS if i != shared else WIDE_IDS[0] for i in range(2)]
    specs = [P("x") if i != shared else P() for i in range(2)]
    attend = jax.jit(
        lambda q, *i: mha(q, q, q, q_segment_ids=i[0], kv_segment_ids=i[1])
    )
    query = qkv()[0]
    narrow = [np.searchsorted(np.unique(WIDE_IDS), x).astype(np.int32) for x in ids]
    with jax.set_mesh(mesh):
        args = put(mesh, (query, *map(jnp.asarray, ids)), [BATCH_AND_HEADS, *specs])
        got = attend(*args)
        text = attend.lower(*args).compile().as_text()
        # One of them may be on no mesh.
        one = attend(*args[:2], narrow[1]) if shared is None else None
    assert_close(np.asarray(got), np.asarray(attend(query, *narrow)))
    if shared is None:
        assert communication(text) == []
        rest = attend(query, jnp.asarray(ids[0]), narrow[1])
        assert_close(np.asarray(one), np.asarray(rest))


def test_wide_segment_ids_in_a_partly_manual_shard_map() -> None:
    attend = jax.shard_map(
        lambda q, i: mha(q, q, q, q_segment_ids=i, kv_segment_ids=i),
        mesh=mesh_of(4, 2),
        in_specs=P("x"),
        out_specs=P("x"),
        axis_names={"x"},
    )
    query = qkv()[0]
    ids = np.unique(WIDE_IDS, return_inverse=True)[1].reshape(WIDE_IDS.shape)
    expected = mha(query, query, query, q_segment_ids=ids, kv_segment_ids=ids)
    got = jax.jit(attend)(query, jnp.asarray(WIDE_IDS))
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("spec", "of"),
    [
        (P(None, "x", None, "y"), lambda f: jax.vmap(gradient(f))),
        (
            P("x", None, None, "y"),
            lambda f: jax.grad(lambda *a: jax.vmap(loss(f))(*a).sum(), (0, 1, 2)),
        ),
    ],
    ids=["vmap of grad", "grad of vmap"],
)
def test_vmap_without_communication(spec: P, of) -> None:
    mesh = mesh_of(4, 2)
    stacked = [jnp.stack([x, x[::-1], x, x]) for x in qkv()]
    args = put(mesh, stacked, [spec] * 3)
    compiled = jax.jit(of(flash)).lower(*args).compile()
    assert communication(compiled.as_text()) == []
    assert_close(compiled(*args), of(dense)(*stacked))


@pytest.mark.parametrize(
    "specs",
    [
        (P(None, "x"),) * 3,
        (P(None, None, None, "x"),) * 3,
        (P(), P(None, "x"), P(None, "x")),
        (P(None, None, "x"), P(None, "y"), P("x", None, "y")),
        (P(None, None, "y"), P(), P()),
    ],
    ids=str,
)
def test_any_dimension_is_correct(specs: tuple[P, ...]) -> None:
    """Sharded sequences and widths are gathered, never wrong."""
    mesh = mesh_of(4, 2)
    whole = (*qkv(), *bias_and_sinks())
    args = put(mesh, whole, (*specs, P(None, None, "x"), P("y")))

    def gradients(f):
        return jax.grad(loss(f), (0, 1, 2, 3, 4))

    assert_close(jax.jit(flash)(*args), dense(*whole))
    assert_close(jax.jit(gradients(flash))(*args), gradients(dense)(*whole))


def test_one_kv_head_with_query_heads_sharded() -> None:
    mesh = mesh_of(4, 2)
    query, key, value = qkv()
    whole = query, key[:, :, :1], value[:, :, :1]
    args = put(mesh, whole, (P("y", None, "x"), P("y"), P("y")))
    assert_close(jax.jit(flash)(*args), dense(*whole))
    assert_close(jax.jit(gradient(flash))(*args), gradient(dense)(*whole))


def test_gradient_of_an_operand_shared_by_the_batch() -> None:
    """A bias without batch: every device has a part of its gradient."""
    mesh = mesh_of(4, 2)
    whole = (*qkv(), normal(8, 8), bias_and_sinks()[1])
    args = put(mesh, whole, (*[BATCH_AND_HEADS] * 3, P(), P("y")))
    grad = lambda f: jax.grad(loss(f), (3, 4))  # noqa: E731
    assert_close(jax.jit(grad(flash))(*args), grad(dense)(*whole))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2)])
def test_heads_on_part_of_an_axis(heads: int, kv_heads: int) -> None:
    """Projections sharded over more devices than there are heads."""
    mesh = mesh_of(4, 2)
    query = qkv()[0]
    weights = normal(16, 32)
    placed = jax.device_put(weights, NamedSharding(mesh, P(None, "x")))

    def net(f):
        def total(w):
            h = query[..., 0, :] @ w
            width = 32 // heads
            kv = h[..., : kv_heads * width].reshape(4, 8, kv_heads, width)
            return f(h.reshape(4, 8, heads, width), kv, kv)[0].sum()

        return jax.grad(total)

    assert_close(jax.jit(net(flash))(placed), net(dense)(weights))


def test_forward_mode_and_second_order() -> None:
    mesh = mesh_of(4, 2)
    args = put(mesh, qkv(), [BATCH_AND_HEADS] * 3)
    jvp = jax.jit(lambda *a: jax.jvp(flash, a, a))
    assert_close(jvp(*args), jax.jvp(dense, qkv(), qkv()))

    def second(f):
        return jax.grad(lambda *a: sum_sin(gradient(f)(*a)), (0, 1, 2))

    assert_close(jax.jit(second(flash))(*args), second(dense)(*qkv()), 1e-4)


def test_shard_map() -> None:
    """check_vma is on; operands may vary over different axes."""
    mesh = mesh_of(4, 2)
    whole = (*qkv(), bias_and_sinks()[0])
    specs = (*[BATCH_AND_HEADS] * 3, P("y"))
    grad = lambda f: jax.grad(loss(f), (0, 1, 2, 3))  # noqa: E731
    mapped = jax.shard_map(
        flash, mesh=mesh, in_specs=specs, out_specs=(BATCH_AND_HEADS, P("x", "y"))
    )
    assert_close(jax.jit(mapped)(*whole), dense(*whole))
    # The bias does not vary over x, so its gradient is summed over it.
    local = jax.shard_map(grad(flash), mesh=mesh, in_specs=specs, out_specs=specs)
    assert_close(jax.jit(local)(*whole), grad(dense)(*whole))

    def outside(*a):
        def inside(*b):
            return jax.lax.psum(loss(flash)(*b), ("x", "y"))

        return jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=P())(*a)

    got = jax.jit(jax.grad(outside, (0, 1, 2, 3)))(*whole)
    assert_close(got, grad(dense)(*whole))


def test_shard_map_with_lengths_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch)
    mesh = mesh_of(4)
    whole = (*qkv(), QUERY_LENGTHS, KEY_LENGTHS)

    def run(f, *a):
        return f(
            *a[:3], query_seq_lengths=a[3], key_value_seq_lengths=a[4], is_causal=True
        )

    flash_run, dense_run = (functools.partial(run, f) for f in (flash, dense))
    specs = P("x")
    mapped = jax.shard_map(flash_run, mesh=mesh, in_specs=specs, out_specs=specs)
    assert_close(jax.jit(mapped)(*whole), dense_run(*whole))
    assert_close(jax.jit(gradient(mapped))(*whole), gradient(dense_run)(*whole))
    jvp = jax.jit(lambda *a: jax.jvp(lambda *b: mapped(*b, *a[3:]), a[:3], a[:3]))
    expected = jax.jvp(lambda *b: dense_run(*b, *whole[3:]), whole[:3], whole[:3])
    assert_close(jvp(*whole), expected)


def test_shard_map_forward_mode_and_second_order() -> None:
    mesh = mesh_of(4)
    query, key, value = qkv()
    primals = query, key[:1], value
    tangents = query * 0.3, key[:1], value

    def mapped(f):
        def local(q, k, v):
            return f(q, jnp.broadcast_to(k, (q.shape[0], *k.shape[1:])), v)

        specs = (P("x"), P(), P("x"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("x"))

    def whole(f):
        return lambda q, k, v: f(q, jnp.broadcast_to(k, (4, *k.shape[1:])), v)

    got = jax.jit(lambda p, t: jax.jvp(mapped(flash), p, t))(primals, tangents)
    assert_close(got, jax.jvp(whole(dense), primals, tangents))

    def second(f):
        return jax.grad(lambda *a: sum_sin(gradient(f)(*a)), (0, 1, 2))

    got = jax.jit(second(mapped(flash)))(*primals)
    assert_close(got, second(whole(dense))(*primals), 1e-4)


def test_partly_manual_shard_map() -> None:
    mesh = mesh_of(4, 2)
    mapped = jax.shard_map(
        flash, mesh=mesh, in_specs=(P("x"),) * 3, out_specs=P("x"), axis_names={"x"}
    )
    args = put(mesh, qkv(), [BATCH_AND_HEADS] * 3)
    assert_close(jax.jit(gradient(mapped))(*args), gradient(dense)(*qkv()))


def test_explicit_axes() -> None:
    mesh = mesh_of(4, 2, axis_type=AxisType.Explicit)
    # Made outside: an array created under the mesh belongs to it.
    whole = qkv()
    with jax.set_mesh(mesh):
        args = put(mesh, whole, [P("x", None, "y", None)] * 3)
        out, lse = jax.jit(flash)(*args)
        assert_close((out, lse), dense(*qkv()))
        assert tuple(jax.typeof(out).sharding.spec)[:3:2] == ("x", "y")
        assert tuple(jax.typeof(lse).sharding.spec)[:2] == ("x", "y")
        got = jax.jit(gradient(flash))(*args)
        tangents = jax.jit(lambda *a: jax.jvp(flash, a, a)[1])(*args)
        second = jax.jit(jax.grad(lambda *a: sum_sin(gradient(flash)(*a))))(*args)
    assert_close(got, gradient(dense)(*whole))
    assert_close(tangents, jax.jvp(dense, whole, whole)[1])
    expected = jax.grad(lambda *a: sum_sin(gradient(dense)(*a)))(*whole)
    assert_close(second, expected, 1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_operands_that_are_on_no_mesh(axis_type: AxisType) -> None:
    """Of an argument that is on one device JAX makes a program without a mesh."""
    query, key, value = whole = qkv()
    lengths = np.full(query.shape[0], 3, np.int32)
    calls = {
        "mha": (flash, whole),
        "gradient": (gradient(flash), whole),
        "decode_mha": (jax_flash.decode_mha, (query, key, value, lengths)),
        "rms_norm": (jax_flash.rms_norm, (query, np.ones(query.shape[-1], np.float32))),
        "sample": (lambda x: jax_flash.sample(x, jax.random.key(0)), (query,)),
    }
    expected = {name: f(*args) for name, (f, args) in calls.items()}
    with jax.set_mesh(mesh_of(4, 2, axis_type=axis_type)):
        for name, (f, args) in calls.items():
            numpy = jax.tree.map(np.asarray, args)
            for result in (f(*args), jax.jit(f)(*args), jax.jit(f)(*numpy)):
                assert_close(result, expected[name])


@pytest.mark.parametrize("of", [lambda f: f, gradient], ids=["forward", "gradient"])
def test_shardings_made_inside(of: Any) -> None:
    """As above, but sharded within the program; devices in another order."""
    devices = np.array(jax.devices()[:8])[::-1].reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("x", "y"))
    whole = qkv()

    def f(*args: jax.Array) -> Any:
        return of(flash)(
            *(jax.lax.with_sharding_constraint(x, BATCH_AND_HEADS) for x in args)
        )

    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(*whole).compile()
        assert communication(compiled.as_text()) == []
        assert_close(jax.jit(f)(*whole), of(dense)(*whole))


def test_explicit_axes_and_sums_over_devices() -> None:
    """Gradients of operands that devices share: a bias, and the weight of a norm."""
    mesh = mesh_of(4, 2, axis_type=AxisType.Explicit)
    whole = (*qkv(), *bias_and_sinks())
    rows, weight = normal(8, 16), normal(16)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jax_flash.rms_norm(x, weight)))

    with jax.set_mesh(mesh):
        args = put(mesh, whole, [*[P("x")] * 3, P(), P()])
        got = jax.jit(jax.grad(loss(flash), (3, 4)))(*args)
        placed = put(mesh, (rows, weight), [P("x"), P()])
        of_norm = jax.jit(jax.grad(norm, 1))(*placed)
    assert_close(got, jax.grad(loss(dense), (3, 4))(*whole))
    assert_close(of_norm, jax.grad(norm, 1)(rows, weight))


@pytest.mark.parametrize(
    "specs",
    [
        (P("x"), P(), P("x")),
        (P(), P("x"), P()),
        (P("x"), P(None, None, "y"), P("y")),
        (P(None, None, "x"), P("x"), P("x")),
    ],
    ids=str,
)
def test_explicit_axes_that_differ(specs: tuple[P, P, P]) -> None:
    """Gradients have the shardings of their operands, not those of the results."""
    mesh = mesh_of(4, 2, axis_type=AxisType.Explicit)
    whole = qkv()
    with jax.set_mesh(mesh):
        args = put(mesh, whole, specs)
        got = jax.jit(gradient(flash))(*args)
        mapped = jax.jit(jax.vmap(gradient(flash), (0, None, 0)))(
            jnp.stack([args[0], args[0]]), args[1], jnp.stack([args[2], args[2]])
        )
    assert_close(got, gradient(dense)(*whole))
    assert_close(tuple(x[1] for x in mapped), gradient(dense)(*whole))
    for x, arg in zip(got, args, strict=True):
        assert x.sharding.is_equivalent_to(arg.sharding, x.ndim)


def test_explicit_axes_of_a_norm_over_heads() -> None:
    """Rows are sharded in two dimensions that are not neighbours."""
    mesh = mesh_of(4, 2, axis_type=AxisType.Explicit)
    query, weight = qkv()[0], normal(16)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        y, total = jax_flash.rms_norm(x, weight, residual=x)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(total))

    with jax.set_mesh(mesh):
        args = put(mesh, (query, weight), [P("x", None, "y"), P()])
        got = jax.jit(jax.grad(norm, (0, 1)))(*args)
    assert_close(got, jax.grad(norm, (0, 1))(query, weight))


@pytest.mark.parametrize("spec", [BATCH_AND_HEADS, P("y"), P(None, "x")], ids=str)
def test_uneven_shards(spec: P) -> None:
    """Three sequences and one key/value head over more devices, as XLA allows."""
    mesh = mesh_of(2, 4)
    query, key, value = (x[:3] for x in qkv())
    whole = query, key[:, :7, :1], value[:, :7, :1]

    def constrained(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        sharding = NamedSharding(mesh, spec)
        return flash(
            *(jax.lax.with_sharding_constraint(x, sharding) for x in (q, k, v))
        )

    assert_close(jax.jit(constrained)(*whole), dense(*whole))
    assert_close(jax.jit(gradient(constrained))(*whole), gradient(dense)(*whole))


@pytest.mark.parametrize("spec", [P("y", "x", None), P(None, "x", None)])
def test_explicit_axes_of_rows(spec: P) -> None:
    """Norms and draws keep every dimension of the batch, whichever is sharded."""
    mesh = mesh_of(4, 2, axis_type=AxisType.Explicit)
    x, weight, key = normal(2, 4, 16), normal(16), jax.random.key(3)
    temperature = jnp.array([[0.0, 0.5, 1.0, 2.0]] * 2)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        y, total = jax_flash.rms_norm(x, weight, residual=x)
        return jnp.sum(jnp.sin(y + total))

    def draw(x: jax.Array, temperature: jax.Array) -> jax.Array:
        return jax_flash.sample(x, key, temperature=temperature, top_k=9)

    with jax.set_mesh(mesh):
        given = put(mesh, (x, weight), [spec, P()])
        got = jax.jit(jax.grad(norm, (0, 1)))(*given)
        y = jax.jit(jax_flash.rms_norm)(*given)
        tokens = jax.jit(draw)(*put(mesh, (x, temperature), [spec, P(*spec[:2])]))
        values, _ = jax.jit(lambda x: jax_flash.top_k(x, 5))(given[0])
        # A weight in parts, as fully sharded models keep it, and its gradient.
        parts = put(mesh, (x, weight), [P("y", None, "x"), P("x")])
        of_parts = jax.jit(jax.grad(norm, (0, 1)))(*parts)
        for z, part in zip(of_parts, parts, strict=True):
            assert jax.typeof(z).sharding == jax.typeof(part).sharding
        for z in (got[0], y, tokens, values):
            assert tuple(jax.typeof(z).sharding.spec)[:2] == tuple(spec)[:2]
    assert_close(got, jax.grad(norm, (0, 1))(x, weight))
    assert_close(of_parts, jax.grad(norm, (0, 1))(x, weight))
    assert_close(y, jax_flash.rms_norm(x, weight))
    np.testing.assert_array_equal(tokens, draw(x, temperature))
    np.testing.assert_array_equal(values, jax_flash.top_k(x, 5)[0])


@pytest.mark.parametrize("specs", [(P("x"), P(None, "x")), (P("x", "y"), P("y", "x"))])
def test_explicit_axes_of_rows_that_differ(specs: tuple[P, P]) -> None:
    """An axis splits one dimension of the results, wherever it splits operands."""
    mesh = mesh_of(4, 2, axis_type=AxisType.Explicit)
    x, residual, weight = normal(4, 4, 16), normal(4, 4, 16), normal(16)

    def norm(x: jax.Array, residual: jax.Array) -> jax.Array:
        y, total = jax_flash.rms_norm(x, weight, residual=residual)
        return jnp.sum(jnp.sin(y) * total)

    with jax.set_mesh(mesh):
        given = put(mesh, (x, residual), list(specs))
        got = jax.jit(jax.grad(norm, (0, 1)))(*given)
    for z, operand in zip(got, given, strict=True):
        assert jax.typeof(z).sharding == jax.typeof(operand).sharding
    assert_close(got, jax.grad(norm, (0, 1))(x, residual))


def test_shard_map_with_vmap() -> None:
    """Vmap inside and around, and in what shard_map's older checks allow."""
    mesh = mesh_of(4, 2)
    stacked = [jnp.stack([x, 2 * x]) for x in qkv()]
    inside = jax.shard_map(
        jax.vmap(flash),
        mesh=mesh,
        in_specs=P(None, "x", None, "y"),
        out_specs=(P(None, "x", None, "y"), P(None, "x", "y")),
    )
    mapped = jax.shard_map(
        flash,
        mesh=mesh,
        in_specs=BATCH_AND_HEADS,
        out_specs=(BATCH_AND_HEADS, P("x", "y")),
        check_vma=False,
    )
    for f in (inside, jax.vmap(mapped)):
        assert_close(jax.jit(f)(*stacked), jax.vmap(dense)(*stacked))


def test_lowered_for_cuda_on_many_devices(kernels: None) -> None:
    mesh = mesh_of(4, 2)
    shapes = [
        jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16, sharding=NamedSharding(mesh, BATCH_AND_HEADS)
        )
        for x in qkv()
    ]
    run = jax.jit(lambda *a: mha(*a, is_causal=True))
    text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "all_gather" not in text
