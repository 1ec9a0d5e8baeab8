"""`ring_mha` and `ulysses_mha` on sharded sequences are `mha` on whole ones."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    SEQUENCE_SPECS,
    apart,
    assert_close,
    cuda_text,
    loss,
    mesh_of,
    normal,
    sharded,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import alibi, mha, ring_mha, ulysses_mha
from jax_flash.parallel import zigzag_order

LENGTH = 32
RUNS = np.repeat(np.array([0, 1, 2, -1], np.int32), (5, 12, 11, 4))
IDS = np.stack([RUNS, RUNS[::-1] % 3])
MASK = np.random.default_rng(7).random((2, 1, LENGTH, LENGTH)) < 0.6
ROW_MASK = MASK[:1, :, :1]

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "window to the left": {"window_size": (5, None)},
    "window to the right": {"window_size": (None, 9)},
    "narrow window": {"window_size": (2, 3)},
    "own key alone": {"window_size": (0, 0)},
    "causal window": {"is_causal": True, "window_size": (13, None)},
    "window beyond all": {"window_size": (100, 100)},
    "soft cap, scale": {"softcap": 2.0, "scale": 0.7, "is_causal": True},
    "sinks": {"sinks": np.linspace(-1, 2, 4, dtype=np.float32)},
    "segments": {"q_segment_ids": IDS, "kv_segment_ids": IDS},
    "causal segments": {
        "q_segment_ids": IDS,
        "kv_segment_ids": IDS,
        "is_causal": True,
        "sinks": np.zeros(4, np.float32),
    },
    "lengths": {
        "query_seq_lengths": np.array([32, 11], np.int32),
        "key_value_seq_lengths": np.array([0, 19], np.int32),
    },
    "causal lengths": {
        "key_value_seq_lengths": np.array([7, 30], np.int32),
        "is_causal": True,
        "causal_alignment": "top_left",
    },
    "highest": {"precision": "highest", "deterministic": True},
}


def operands(batch: int = 2, kv_heads: int = 2) -> tuple[jax.Array, ...]:
    return (
        normal(batch, LENGTH, 4, 16),
        normal(batch, LENGTH, kv_heads, 16),
        normal(batch, LENGTH, kv_heads, 8),
    )


def assert_is_mha(parallel: Callable, *tensors: jax.Array, **options: Any) -> None:
    """Results, and gradients through both of them."""

    def both(f: Callable) -> Any:
        def scalar(*tensors: jax.Array) -> tuple[jax.Array, Any]:
            results = f(*tensors)
            return loss(lambda: results)(), results

        return jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(*tensors)

    whole = functools.partial(mha, return_lse=True, **options)
    assert_close(both(parallel), both(whole))


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, f: Callable) -> None:
    arrays, rest = apart(OPTIONS[name])
    assert_is_mha(sharded(f, 4, arrays, **rest), *operands(), **OPTIONS[name])


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
@pytest.mark.parametrize("name", ["causal", "sinks", "causal segments", "lengths"])
def test_gradients_of_outputs_alone(name: str, f: Callable) -> None:
    """Without the logsumexp, which has cotangents in the other tests."""
    arrays, rest = apart(OPTIONS[name])
    parallel = sharded(f, 4, arrays, return_lse=False, **rest)
    whole = functools.partial(mha, **OPTIONS[name])
    tensors = operands()

    def gradients(f: Callable) -> Any:
        def squares(*tensors: jax.Array) -> jax.Array:
            return (f(*tensors) ** 2).sum()

        return jax.jit(jax.grad(squares, (0, 1, 2)))(*tensors)

    assert_close(gradients(parallel), gradients(whole))


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
@pytest.mark.parametrize("size", [1, 2])
def test_other_numbers_of_devices(size: int, f: Callable) -> None:
    each: list[dict[str, Any]] = [{"is_causal": True}, {"window_size": (9, 4)}]
    for options in each:
        assert_is_mha(sharded(f, size, **options), *operands(), **options)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_without_account_of_varying_axes(f: Callable) -> None:
    arrays, rest = apart(OPTIONS["causal segments"])
    parallel = sharded(f, 4, arrays, check_vma=False, **rest)
    assert_is_mha(parallel, *operands(), **OPTIONS["causal segments"])


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_gradient_of_what_all_devices_share(f: Callable) -> None:
    tensors, sinks = operands(), normal(4)

    def of(f: Callable) -> Any:
        return jax.grad(loss(lambda s: f(s)))(sinks)

    def parallel(s: jax.Array) -> Any:
        return sharded(f, 4, {"sinks": s}, is_causal=True)(*tensors)

    whole = functools.partial(mha, *tensors, is_causal=True, return_lse=True)
    assert_close(of(parallel), of(lambda s: whole(sinks=s)))


@pytest.mark.parametrize("mask", [MASK, ROW_MASK], ids=["rows", "shared rows"])
@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_mask(f: Callable, mask: np.ndarray) -> None:
    spec = P(None, None, "x") if mask.shape[-2] > 1 else P()
    parallel = sharded(f, 4, {"mask": mask}, {"mask": spec}, is_causal=True)
    assert_is_mha(parallel, *operands(), mask=mask, is_causal=True)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_one_row_for_each_device(f: Callable) -> None:
    """Of a mask it is the device's own, if the mask has more than one."""
    tensors = tuple(x[:, :4] for x in operands())
    for mask in (MASK[..., :4, :4], ROW_MASK[..., :4]):
        spec = P(None, None, "x") if mask.shape[-2] > 1 else P()
        parallel = sharded(f, 4, {"mask": mask}, {"mask": spec})
        assert_is_mha(parallel, *tensors, mask=mask)


@pytest.mark.parametrize("rows", [1, 4])
def test_bias_of_one_row_for_each_device(rows: int) -> None:
    bias, tensors = normal(4, rows, 4), tuple(x[:, :4] for x in operands())
    spec = P(None, "x") if rows > 1 else P()

    def parallel(bias: jax.Array) -> Any:
        return sharded(ulysses_mha, 4, {"bias": bias}, {"bias": spec})(*tensors)

    whole = functools.partial(mha, *tensors, return_lse=True)
    assert_close(parallel(bias), whole(bias))
    assert_close(jax.grad(loss(parallel))(bias), jax.grad(loss(whole))(bias))


@pytest.mark.parametrize(
    "shape", [(2, 4, 32, 32), (1, 32, 32), (4, 1, 32), (1, 1, 32), (4, 32, 1)], ids=str
)
def test_bias_of_ulysses(shape: tuple[int, ...]) -> None:
    bias, tensors = normal(*shape), operands()
    spec = P(*[None] * (len(shape) - 2), "x") if shape[-2] > 1 else P()

    def parallel(bias: jax.Array) -> Any:
        return sharded(ulysses_mha, 4, {"bias": bias}, {"bias": spec})(*tensors)

    whole = functools.partial(mha, *tensors, return_lse=True)
    assert_close(parallel(bias), whole(bias))
    assert_close(jax.grad(loss(parallel))(bias), jax.grad(loss(whole))(bias))


def test_alibi_of_ulysses() -> None:
    tensors, slopes = operands(), normal(4)

    def parallel(slopes: jax.Array) -> Any:
        def f(*args: Any, slopes: jax.Array, **options: Any) -> Any:
            return ulysses_mha(*args, bias=alibi(slopes), **options)

        return sharded(f, 4, {"slopes": slopes}, is_causal=True)(*tensors)

    def whole(slopes: jax.Array) -> Any:
        return mha(*tensors, bias=alibi(slopes), is_causal=True, return_lse=True)

    assert_close(parallel(slopes), whole(slopes))
    assert_close(jax.grad(loss(parallel))(slopes), jax.grad(loss(whole))(slopes))


def test_dropout_of_ulysses_is_that_of_the_whole() -> None:
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(3)}
    assert_is_mha(sharded(ulysses_mha, 4, **options), *operands(), **options)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_dropout_of_ring(layout: str) -> None:
    query, key, value = operands()
    options = {"layout": layout, "is_causal": True}
    dropped = sharded(
        ring_mha, 4, dropout_rate=0.5, dropout_key=jax.random.key(3), **options
    )
    cotangent, direction = normal(2, LENGTH, 4, 8), normal(*query.shape)

    @jax.jit
    def backward(query: jax.Array, value: jax.Array) -> Any:
        results, pullback = jax.vjp(lambda *a: dropped(a[0], key, a[1]), query, value)
        return results, pullback((cotangent, jnp.zeros_like(results[1])))

    (out, lse), (dquery, dvalue) = backward(query, value)
    plain, plain_lse = sharded(ring_mha, 4, **options)(query, key, value)
    assert_close(lse, plain_lse)
    assert jnp.abs(out - plain).max() > 0.1
    # Linear in the values, so the gradient is the same map the other way round.
    assert_close((dvalue * value).sum(), (cotangent * out).sum(), 1e-4)
    # In the queries, by differences along a direction.
    step = 1e-2
    ends = [dropped(query + t * direction, key, value)[0] for t in (step, -step)]
    slope = (cotangent * (ends[0] - ends[1])).sum() / (2 * step)
    assert_close((dquery * direction).sum(), slope, 1e-2)


def test_blocks_of_a_ring_draw_apart() -> None:
    size, rows = 4, LENGTH // 4
    query, key = jnp.zeros((1, LENGTH, 4, 16)), jnp.zeros((1, LENGTH, 4, 16))
    value = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (1, LENGTH, 4, LENGTH))
    parts = []
    for seed in (0, 1):
        random = jax.random.key(seed)
        drawn = sharded(ring_mha, size, dropout_rate=0.5, dropout_key=random)
        weights = np.asarray(drawn(query, key, value)[0]) * LENGTH / 2
        kept = np.round(weights)
        np.testing.assert_allclose(weights, kept, atol=1e-5)
        assert set(np.unique(kept)) == {0, 1}
        assert abs(kept.mean() - 0.5) < 0.03
        blocks = kept.reshape(size, rows, 4, size, rows).transpose(0, 3, 2, 1, 4)
        parts.append(blocks.reshape(size * size * 4, rows * rows))
    each = np.concatenate(parts)
    assert len(np.unique(each, axis=0)) == len(each)


def zigzag(size: int, options: dict[str, Any]) -> Callable:
    """`ring_mha` of whole sequences, put in order and back."""
    order = zigzag_order(LENGTH, size)
    arrays, rest = apart(options)
    for name in SEQUENCE_SPECS:
        if name in arrays:
            arrays[name] = arrays[name][:, order]
    f = sharded(ring_mha, size, arrays, layout="zigzag", is_causal=True, **rest)

    def in_order(*tensors: jax.Array) -> Any:
        out, lse = f(*(x[:, order] for x in tensors))
        back = np.argsort(order)
        return out[:, back], lse[..., back]

    return in_order


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (1, "none"),
        (2, "none"),
        (4, "none"),
        (4, "sinks"),
        (4, "segments"),
        (4, "causal lengths"),
        (4, "soft cap, scale"),
    ],
)
def test_zigzag(size: int, name: str) -> None:
    options = {n: x for n, x in OPTIONS[name].items() if n != "is_causal"}
    assert_is_mha(zigzag(size, options), *operands(), **options, is_causal=True)


def test_zigzag_mask() -> None:
    """A mask has rows and keys in the order in which the devices have them."""
    order = zigzag_order(LENGTH, 4)
    back = np.argsort(order)
    mask = MASK[:, :, order][..., order]
    spec = {"mask": P(None, None, "x")}
    options = {"layout": "zigzag", "is_causal": True}
    f = sharded(ring_mha, 4, {"mask": mask}, spec, **options)
    tensors = operands()
    out, lse = f(*(x[:, order] for x in tensors))
    whole = mha(*tensors, mask=MASK, is_causal=True, return_lse=True)
    assert_close((out[:, back], lse[..., back]), whole)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_one_kv_head(f: Callable) -> None:
    assert_is_mha(sharded(f, 4, is_causal=True), *operands(kv_heads=1), is_causal=True)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_more_keys_than_queries(f: Callable) -> None:
    query, key, value = operands()
    assert_is_mha(sharded(f, 4), query[:, :12], key, value)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types(f: Callable, dtype: Any) -> None:
    tensors = operands()
    exact = mha(*tensors, is_causal=True)
    rounded = [x.astype(dtype) for x in tensors]

    def error(out: jax.Array) -> float:
        return float(jnp.abs(out.astype(jnp.float32) - exact).max())

    out, lse = sharded(f, 4, is_causal=True)(*rounded)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    assert error(out) <= 2 * error(mha(*rounded, is_causal=True))
    grads = jax.grad(lambda *a: sharded(f, 4)(*a)[0].sum(dtype=jnp.float32), (0, 1, 2))
    assert [x.dtype for x in grads(*rounded)] == [dtype] * 3


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_rounded_inputs(precision: str) -> None:
    tensors = operands()
    out, _ = sharded(ring_mha, 4, precision=precision)(*tensors)
    assert out.dtype == jnp.float32
    assert_close(out, mha(*tensors, precision=precision), 0.02)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_transforms(f: Callable) -> None:
    """vmap, checkpoint and scan around it, inside the shard_map; no batch dimension."""
    query, key, value = (x[..., :8] for x in operands(batch=3, kv_heads=4))

    def layers(attend: Callable, query: Any, key: Any, value: Any) -> Any:
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + jax.vmap(attend)(x, key, value), None

        return jax.lax.scan(layer, query, None, length=2)[0]

    policy = jax.checkpoint_policies.save_only_these_names(
        "jax_flash_out", "jax_flash_lse"
    )
    parallel = jax.shard_map(
        functools.partial(layers, functools.partial(f, axis_name="x", is_causal=True)),
        mesh=mesh_of(4),
        in_specs=(P(None, "x"),) * 3,
        out_specs=P(None, "x"),
    )
    whole = functools.partial(layers, functools.partial(mha, is_causal=True))

    def gradient(f: Callable) -> Callable:
        return jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2))

    assert_close(parallel(query, key, value), whole(query, key, value))
    both = (jax.jit(gradient(g))(query, key, value) for g in (parallel, whole))
    assert_close(*both)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_second_order(f: Callable) -> None:
    query, key, value = operands()
    direction = normal(*query.shape)

    def product(f: Callable) -> Any:
        def slope(q: jax.Array) -> jax.Array:
            grads = jax.grad(lambda q: jnp.sin(f(q, key, value)[0]).sum())(q)
            return (grads * direction).sum()

        return jax.grad(slope)(query)

    parallel = sharded(f, 2, is_causal=True)
    whole = functools.partial(mha, is_causal=True, return_lse=True)
    got, want = (jax.jit(lambda f=f: product(f))() for f in (parallel, whole))
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_beside_other_axes(f: Callable) -> None:
    """Batch sharded along another axis; sequence along two axes."""
    tensors = operands()
    whole = mha(*tensors, is_causal=True)
    mesh = jax.make_mesh((2, 4), ("d", "x"), axis_types=(AxisType.Auto,) * 2)
    for axis, spec in (("x", P("d", "x")), (("d", "x"), P(None, ("d", "x")))):
        parallel = jax.jit(
            jax.shard_map(
                functools.partial(f, axis_name=axis, is_causal=True),
                mesh=mesh,
                in_specs=(spec,) * 3,
                out_specs=spec,
            )
        )
        if f is ring_mha or axis == "x":
            assert_close(parallel(*tensors), whole)


@pytest.mark.parametrize(
    ("options", "rotations"),
    [
        ({}, 7),
        ({"is_causal": True}, 7),
        ({"is_causal": True, "window_size": (3, None)}, 1),
        ({"is_causal": True, "window_size": (4, None)}, 1),
        ({"is_causal": True, "window_size": (5, None)}, 2),
        ({"window_size": (1, 2)}, 2),
        ({"window_size": (0, 0)}, 0),
    ],
)
def test_keys_go_no_further_than_they_are_seen(
    options: dict[str, Any], rotations: int
) -> None:
    f = sharded(ring_mha, 8, **options)
    text = jax.jit(f).lower(*operands()).as_text()
    assert len(re.findall("collective_permute", text)) == 2 * rotations  # keys, values
    assert "all_gather" not in text
    gradient = jax.grad(loss(f), (0, 1, 2))
    text = jax.jit(gradient).lower(*operands()).as_text()
    # Once more, and sums of both, which go home.
    home = 2 if rotations else 0
    assert len(re.findall("collective_permute", text)) == 2 * 3 * rotations + home


def test_no_device_holds_all_keys() -> None:
    """Temporary memory of a device falls with its share of the sequence."""

    def bytes_of(size: int) -> int:
        x = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
        f = sharded(ring_mha, size)
        gradient = jax.grad(lambda *a: f(*a)[0].sum(), (0, 1, 2))
        analysis = jax.jit(gradient).lower(x, x, x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert bytes_of(8) < bytes_of(2) / 2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("options", "calls"),
    [
        # The own block, and those of later steps, from before.
        ({"is_causal": True}, 4),
        # The own block, and those from before and from behind.
        ({"is_causal": True, "layout": "zigzag"}, 1 + 2 * 3),
        ({}, 4),
        ({"is_causal": True, "window_size": (3, None)}, 2),
    ],
)
def test_kernels(options: dict[str, Any], calls: int) -> None:
    """On CUDA every part is a kernel, forward and backward, and nothing branches."""
    tensors = [x.astype(jnp.bfloat16) for x in operands()]
    f = sharded(ring_mha, 4, **options)
    text = cuda_text(f, *tensors)
    assert text.count("@jax_flash_mha_fwd(") == calls
    grad = jax.grad(lambda *a: f(*a)[0].sum(dtype=jnp.float32), (0, 1, 2))
    text += cuda_text(grad, *tensors)
    assert text.count("@jax_flash_mha_bwd(") == calls
    assert not re.search(r"stablehlo\.(case|if|while)", text)


@pytest.mark.usefixtures("kernels")
def test_kernels_of_ulysses() -> None:
    tensors = [x.astype(jnp.bfloat16) for x in operands()]
    text = cuda_text(sharded(ulysses_mha, 4, is_causal=True), *tensors)
    assert text.count("@jax_flash_mha_fwd(") == 1


ERRORS: list[tuple[Callable, dict[str, Any], type[Exception], str]] = [
    (ring_mha, {"layout": "striped"}, ValueError, "layout must be .*'striped'"),
    (ring_mha, {"bias": np.zeros((1, 1))}, NotImplementedError, "bias=ndarray"),
    (
        ring_mha,
        {"layout": "zigzag"},
        NotImplementedError,
        "layout='zigzag' is for is_causal=True .*, got is_causal=False",
    ),
    (
        ring_mha,
        {"layout": "zigzag", "is_causal": True, "window_size": (4, None)},
        NotImplementedError,
        r"window_size=\(4, None\)",
    ),
    (
        ring_mha,
        {"query_seq_lengths": 3, "is_causal": True},
        NotImplementedError,
        "causal_alignment='bottom_right'",
    ),
    (ring_mha, {"implementation": "cudnn"}, NotImplementedError, "cudnn"),
    (
        ring_mha,
        {"window_size": (-1, 0)},
        ValueError,
        "window_size must not be negative",
    ),
    (ulysses_mha, {"softcap": -1.0}, ValueError, "softcap must be positive, got -1.0"),
    (
        ulysses_mha,
        {"mask": np.ones((8, 8), bool)},
        ValueError,
        r"mask must broadcast to .* got shape \(8, 8\)",
    ),
]


@pytest.mark.parametrize(("f", "options", "error", "message"), ERRORS)
def test_errors(
    f: Callable, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sharded(f, 4, **options)(*operands())


def test_errors_of_shapes() -> None:
    query, key, value = operands()
    with pytest.raises(NotImplementedError, match="with T=3 queries and S=8 keys"):
        sharded(ring_mha, 4, is_causal=True)(query[:, :12], key, value)
    with pytest.raises(ValueError, match=r"two chunks of rows on a device, got T=3"):
        sharded(ring_mha, 4, is_causal=True, layout="zigzag")(
            *(x[:, :12] for x in (query, key, value))
        )
    with pytest.raises(ValueError, match="query must have heads that divide among"):
        sharded(ulysses_mha, 8)(query, key, value)
    three = (x[:, :, [0, 1, 0]] for x in (key, value))
    with pytest.raises(ValueError, match=r"whose number divides theirs, got K=3"):
        sharded(ulysses_mha, 2)(query[:, :, [0, 1, 2, 3, 0, 1]], *three)
    with pytest.raises(ValueError, match="key must have the width H of query"):
        sharded(ring_mha, 2)(query, key[..., :4], value)
    with pytest.raises(ValueError, match="value must be an array, got None"):
        jax.shard_map(
            lambda q, k: ring_mha(q, k, None, axis_name="x"),
            mesh=mesh_of(2),
            in_specs=P(None, "x"),
            out_specs=P(None, "x"),
        )(query, key)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_errors_of_axis_name(f: Callable) -> None:
    with pytest.raises(ValueError, match=r"axis_name must be an axis .* got 'x'"):
        f(*operands(), axis_name="x")
    with pytest.raises(ValueError, match=r"axis_name must be the name .* got 3"):
        f(*operands(), axis_name=3)


@pytest.mark.parametrize("f", [ring_mha, ulysses_mha])
def test_ids_beyond_int32(f: Callable) -> None:
    ids = np.zeros((2, LENGTH), np.uint32)
    arrays = {"q_segment_ids": ids, "kv_segment_ids": ids}
    with pytest.raises(NotImplementedError, match="q_segment_ids of dtype uint32"):
        sharded(f, 4, arrays)(*operands())


def test_explained_as_public() -> None:
    assert jax_flash.ring_mha is ring_mha
    assert {"ring_mha", "ulysses_mha"} <= set(jax_flash.__all__)
