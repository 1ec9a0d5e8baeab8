"""Segments, packed sequences, soft cap and ALiBi on the kernels, seen from the CPU.

What is lowered for CUDA, and what becomes of it where the call is emulated: jnp
operations that know only operands and attributes of the call.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import fake_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    call_of,
    cuda_text,
    flash,
    kernel_calls,
    loss,
)
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash import mha, mha_qkvpacked, mha_varlen
from jax_flash._src import plan, registry

BATCH, ROWS, KEYS, HEADS = 2, 70, 130, 4
SHAPES = ((BATCH, ROWS, 4, 16), (BATCH, KEYS, 2, 16), (BATCH, KEYS, 2, 8))
ROUNDING = 2e-2
"""Of gradients by an emulated kernel, which rounds its results to bfloat16."""

TARGETS = (
    registry.INTERVALS_TARGET,
    registry.FORWARD_TARGET,
    registry.BACKWARD_TARGET,
)

SLOPES = jnp.asarray([0.5, 0.1, 0.0, 0.2], jnp.float32)
Q_IDS = np.repeat([[0, 3, 7, -1]], [20, 30, 12, 8], -1).astype(np.int32)
KV_IDS = np.repeat([[0, 3, 5, -2]], [20, 60, 30, 20], -1).astype(np.int32)
DOCUMENTS: dict[str, Any] = {"q_segment_ids": Q_IDS, "kv_segment_ids": KV_IDS}
DROPOUT: dict[str, Any] = {
    "dropout_rate": 0.25,
    "dropout_key": np.array([3, 4], np.uint32),
}
LENGTHS = {
    "query_seq_lengths": np.array([70, 33], np.int32),
    "key_value_seq_lengths": np.array([90, 0], np.int32),
}


def tensors(*lead: int) -> list[jax.Array]:
    """Query, key and value in bfloat16."""
    rng = np.random.default_rng(4)
    return [
        jnp.asarray(rng.standard_normal((*lead, *shape), np.float32), jnp.bfloat16)
        for shape in SHAPES
    ]


def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """`(out, lse)`, out in float32: losses of it are sums of float32."""
    slopes = options.pop("slopes", None)
    bias = None if slopes is None else jax_flash.alibi(slopes)
    out, lse = flash(query, key, value, bias, **options)
    return out.astype(jnp.float32), lse


def gradient(argnums: Any = (0, 1, 2), **options: Any) -> Callable:
    return jax.grad(loss(lambda *a: attend(*a, **options)), argnums)


def both(f: Callable, *args: Any) -> tuple[Any, Any]:
    """The results of f(implementation, *args) by emulated kernels, and by jnp."""
    with fake_kernel.emulated():
        got = jax.jit(lambda *a: f("cuda", *a))(*args)
    return got, jax.jit(lambda *a: f("xla", *a))(*args)


def operand_types(target: str, text: str) -> list[str]:
    line = call_of(target, text)
    return re.findall(r"tensor<(.*?)>", line[line.rindex(" : (") :].split(" -> ")[0])


TENSORS = ["2x70x4x16xbf16", "2x130x2x16xbf16", "2x130x2x8xbf16"]


def intervals_of(batch: int) -> list[str]:
    trailing = ("128x4", "2x8", "192", "3x8")
    return [f"{batch}x{dims}xi32" for dims in trailing]


LOWERED: dict[str, tuple[dict[str, Any], list[str], float]] = {
    "softcap": ({"softcap": 3.0}, intervals_of(1), 3.0),
    "slopes": ({"slopes": SLOPES}, [*intervals_of(1), "1x4xf32"], 0.0),
    "slopes of each": (
        {"slopes": jnp.ones((BATCH, 4), jnp.bfloat16), "is_causal": True},
        [*intervals_of(1), "2x4xf32"],
        0.0,
    ),
    "shared ids": (DOCUMENTS | {"window_size": (9, 3)}, intervals_of(1), 0.0),
    "ids": (
        {name: np.repeat(x, BATCH, 0) for name, x in DOCUMENTS.items()},
        intervals_of(2),
        0.0,
    ),
    "dropout": (DROPOUT, [*intervals_of(1), "2x4x2xui32"], 0.0),
    "all": (
        {
            **DOCUMENTS,
            **LENGTHS,
            **DROPOUT,
            "slopes": SLOPES,
            "softcap": 2.0,
            "is_causal": True,
        },
        [*intervals_of(2), "1x4xf32", "2x4x2xui32"],
        2.0,
    ),
}


@pytest.mark.parametrize("case", LOWERED)
@pytest.mark.usefixtures("kernels")
def test_operands_and_attributes(case: str) -> None:
    options, expected, softcap = LOWERED[case]
    text = cuda_text(lambda *a: attend(*a, **options), *tensors())
    assert operand_types(registry.FORWARD_TARGET, text) == [*TENSORS, *expected]
    backward = cuda_text(gradient(**options), *tensors())
    residuals = ["2x70x4x8xbf16", "2x4x70xf32"]
    assert operand_types(registry.BACKWARD_TARGET, backward) == [
        *TENSORS,
        *residuals * 2,
        *expected,
    ]
    for target, program in (
        (registry.FORWARD_TARGET, text),
        (registry.BACKWARD_TARGET, backward),
    ):
        line = call_of(target, program)
        for attribute in (
            "has_intervals = true",
            f"has_slopes = {str('slopes' in options).lower()}",
            f"softcap = {softcap:.6e} : f32",
            f"dropout = {64 if 'dropout_rate' in options else 0} : i64",
            "window_left = -1 : i64",
            "window_right = -1 : i64",
            "bottom_right = true",
            "has_query_lengths = false",
            "has_kv_lengths = false",
        ):
            assert attribute in line, attribute
        assert "dot_general" not in program
    # 128 rows of each of 8 heads: 128 wide, two numbers, and eight counts in all; four
    # numbers of a counter; a queue of three tiles of keys of two sequences in whole
    # fours, in the forward a list of four entries of each; gradients of 192 keys, 64
    # wide, for each query head.
    workspace = 8 * (128 * (128 + 2) + 8) + 4 + 12 + 8 * 192 * (64 + 64)
    assert "tensor<20xi32>" in call_of(registry.FORWARD_TARGET, text)
    assert f"tensor<{workspace}xf32>" in call_of(registry.BACKWARD_TARGET, backward)


@pytest.mark.usefixtures("kernels")
def test_other_calls_have_no_intervals() -> None:
    line = call_of(
        registry.FORWARD_TARGET,
        cuda_text(lambda *a: attend(*a, **LENGTHS, is_causal=True), *tensors()),
    )
    for attribute in ("has_intervals", "has_slopes"):
        assert f"{attribute} = false" in line
    assert "softcap = 0.000000e+00 : f32" in line
    assert "dropout = 0 : i64" in line
    assert "window_right = 0 : i64" in line


@pytest.mark.usefixtures("kernels")
def test_one_function_computes_the_mask_of_all_layers() -> None:
    """Intervals of equal calls are one function of the program."""

    def layers(query: Any, key: Any, value: Any) -> Any:
        for _ in range(3):
            query = mha(query, key, value, **DOCUMENTS)
            query = jnp.concatenate([query, query], -1)
        return query

    text = cuda_text(
        jax.grad(lambda *a: layers(*a).astype(jnp.float32).sum()), *tensors()
    )
    assert text.count(f"@{registry.INTERVALS_TARGET}(") == 1
    f = jax.grad(lambda *a: layers(*a).astype(jnp.float32).sum())
    assert kernel_calls(f, *tensors()) == 3


GRADIENTS_OF_SLOPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "causal": ({"is_causal": True, **LENGTHS}, BATCH, 1),
    "documents": ({**DOCUMENTS, "deterministic": True, "sinks": SLOPES}, 1, 1),
    "soft cap": ({"softcap": 2.0, "window_size": (90, 20), **DROPOUT}, 1, 2),
}
"""Options, sequences with slopes, and how many calls of the backward they take."""


@pytest.mark.parametrize("case", GRADIENTS_OF_SLOPES)
def test_gradients_of_slopes(case: str) -> None:
    """By head, or of each sequence; a soft cap takes a call for this alone."""
    options, batch, count = GRADIENTS_OF_SLOPES[case]
    slopes = jnp.stack([SLOPES, -SLOPES / 3][:batch])

    def f(implementation: str, *args: Any, argnums: Any = (0, 1, 2, 3)) -> Any:
        def one(query: Any, key: Any, value: Any, slopes: Any) -> Any:
            given = {**options, "slopes": slopes, "implementation": implementation}
            return attend(query, key, value, **given)

        return jax.grad(loss(one), argnums)(*args)

    def calls(argnums: Any) -> int:
        g = functools.partial(f, "cuda", argnums=argnums)
        return kernel_calls(g, *tensors(), slopes, target=registry.BACKWARD_TARGET)

    with registry.assume_kernels():
        assert [calls(x) for x in ((0, 1, 2), 3, (0, 3))] == [1, 1, count]
    got, expected = both(f, *tensors(), slopes)
    assert_close(got[:3], expected[:3], ROUNDING)
    assert_close(got[3], expected[3], 1e-3 * np.abs(expected[3]).max())


@pytest.mark.usefixtures("kernels")
def test_explain() -> None:
    query, key, value = tensors()
    explanation = jax_flash.explain(query, key, value, **DOCUMENTS)
    assert explanation.chosen["cuda"] == "cuda"
    kernels = (
        "sm90 64x64 with intervals on compute capability 9.0, "
        "sm80 128x128 with intervals on others"
    )
    assert explanation.details["cuda"] == f"{kernels}; gradients by {kernels}"
    bias = jax_flash.alibi(SLOPES)
    details = jax_flash.explain(query, key, value, bias).details["cuda"]
    assert details == explanation.details["cuda"]
    # Three batch dimensions, of which the mask has the middle one.
    wide = [jnp.stack([jnp.stack([x] * 3)] * 2) for x in (query, key, value)]
    ids = {name: np.zeros((3, 1, x.shape[1]), int) for name, x in DOCUMENTS.items()}
    details = jax_flash.explain(*wide, **ids).details["cuda"]
    assert details.startswith("sm80 128x128 with intervals; ")


@pytest.mark.usefixtures("kernels")
def test_missing_kernels() -> None:
    built = [k for k in plan.KERNELS if k.op != "mha_bwd_intervals"]
    with registry.assume_kernels(built):
        f = gradient(**DOCUMENTS)
        assert kernel_calls(f, *tensors()) == 1
        assert kernel_calls(f, *tensors(), target=registry.BACKWARD_TARGET) == 0
    built = [k for k in plan.KERNELS if k.op != "mha_fwd_intervals"]
    with (
        registry.assume_kernels(built),
        pytest.raises(NotImplementedError, match="sm90 64x64 with intervals is not"),
    ):
        attend(*tensors(), **DOCUMENTS, implementation="cuda")


rng = np.random.default_rng(1)
VALUES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5, "scale": -0.7},
    "slopes": {"slopes": SLOPES, "is_causal": True, **LENGTHS},
    "documents": {**DOCUMENTS, "is_causal": True, "causal_alignment": "top_left"},
    "ids in any order": {
        "q_segment_ids": rng.integers(-2, 3, (BATCH, ROWS)),
        "kv_segment_ids": rng.integers(-2, 3, (BATCH, KEYS)),
        "window_size": (60, 20),
    },
    "dropout": DROPOUT,
    "all": {
        **DOCUMENTS,
        **DROPOUT,
        **LENGTHS,
        "slopes": jnp.stack([SLOPES, -SLOPES]),
        "softcap": 2.0,
        "sinks": SLOPES,
        "window_size": (100, 5),
    },
}


def spoiled(options: dict[str, Any]) -> list[jax.Array]:
    """Query, key and value with NaN where ids or lengths say padding."""
    query, key, value = tensors()
    q_dead = np.broadcast_to(options.get("q_segment_ids", 0), (BATCH, ROWS)) < 0
    kv_dead = np.broadcast_to(options.get("kv_segment_ids", 0), (BATCH, KEYS)) < 0
    if "query_seq_lengths" in options:
        lengths = [x[:, None] for x in LENGTHS.values()]
        q_dead = q_dead | (np.arange(ROWS) >= lengths[0])
        kv_dead = kv_dead | (np.arange(KEYS) >= lengths[1])
    nan = jnp.bfloat16(jnp.nan)
    query = jnp.where(q_dead[..., None, None], nan, query)
    key, value = (jnp.where(kv_dead[..., None, None], nan, x) for x in (key, value))
    return [query, key, value]


@pytest.mark.parametrize("case", VALUES)
def test_values_and_gradients(case: str) -> None:
    options = VALUES[case]

    def f(implementation: str, *args: Any) -> Any:
        given = {**options, "implementation": implementation}
        return attend(*args, **given), gradient(**given)(*args)

    got, expected = both(f, *spoiled(options))
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1], expected[1], ROUNDING)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got[1])


OPERANDS = ("query", "key", "value", "q_segment_ids", "kv_segment_ids", "slopes")


@pytest.mark.parametrize(
    "mapped",
    [
        ("query",),
        ("key", "value", "kv_segment_ids"),
        ("q_segment_ids", "slopes"),
        OPERANDS,
    ],
    ids="+".join,
)
def test_vmap(mapped: tuple[str, ...]) -> None:
    """Over any operands, gradients inside and around."""
    plain = dict(zip(OPERANDS, (*tensors(), Q_IDS, KV_IDS, SLOPES), strict=True))
    plain = {name: jnp.asarray(x) for name, x in plain.items()}
    shifted = {
        n: jnp.stack([x, jnp.roll(x, 5, 1 % x.ndim)], 1) for n, x in plain.items()
    }
    args = [shifted[n] if n in mapped else plain[n] for n in OPERANDS]
    axes = tuple(1 if n in mapped else None for n in OPERANDS)

    def f(implementation: str, *args: Any) -> Any:
        def one(*args: Any) -> Any:
            options = dict(zip(OPERANDS[3:], args[3:], strict=True))
            return attend(*args[:3], **options, implementation=implementation)

        def total(*args: Any) -> Any:
            return jnp.sum(jax.vmap(loss(one), axes)(*args))

        inside = jax.vmap(jax.grad(loss(one), (0, 2)), axes)(*args)
        return jax.vmap(one, axes)(*args), inside, jax.grad(total, (0, 1, 2))(*args)

    got, expected = both(f, *args)
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1:], expected[1:], ROUNDING)


@pytest.mark.usefixtures("kernels")
def test_mapped_ids_leave_the_rest_shared() -> None:
    ids = jnp.asarray(np.stack([Q_IDS, Q_IDS + 1, Q_IDS]))

    def f(q_ids: Any, *args: Any) -> Any:
        return attend(*args, q_segment_ids=q_ids, kv_segment_ids=KV_IDS)

    text = cuda_text(jax.vmap(f, (0, None, None, None)), ids, *tensors())
    got = operand_types(registry.FORWARD_TARGET, text)
    assert got == [f"1x{x}" for x in TENSORS] + [f"3x{x}" for x in intervals_of(1)]


OFFSETS = (
    np.array([3, 20, 20, 61, 66], np.int32),
    np.array([0, 50, 60, 60, 125], np.int32),
)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"window_size": (9, 9), "softcap": 2.0, "max_seqlen_k": 40},
        {"is_causal": True, **DROPOUT},
    ],
    ids=["causal", "bounds", "dropout"],
)
def test_varlen(options: dict[str, Any]) -> None:
    """Packed sequences, one of them empty, one without keys; NaN outside."""
    query, key, value = (x[0] for x in tensors())
    outside = [
        (np.arange(n) < offsets[0]) | (np.arange(n) >= offsets[-1])
        for n, offsets in zip((ROWS, KEYS), OFFSETS, strict=True)
    ]
    nan = jnp.bfloat16(jnp.nan)
    query = jnp.where(outside[0][:, None, None], nan, query)
    key, value = (jnp.where(outside[1][:, None, None], nan, x) for x in (key, value))
    more = jnp.stack([jnp.asarray(OFFSETS), jnp.minimum(jnp.asarray(OFFSETS), 55)])

    def f(implementation: str, *args: Any) -> Any:
        def one(offsets: Any, *args: Any) -> Any:
            out, lse = mha_varlen(
                *args,
                *offsets,
                **options,
                return_lse=True,
                implementation=implementation,
            )
            return out.astype(jnp.float32), lse

        offsets, *rest = args
        single = jax.grad(loss(one), (1, 2, 3))(offsets[0], *rest)
        return jax.vmap(one, (0, None, None, None))(offsets, *rest), single

    got, expected = both(f, more, query, key, value)
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1], expected[1], ROUNDING)


def test_qkvpacked() -> None:
    """The kernels with intervals read the three parts in place, too."""
    query, key, _ = tensors()
    qkv = jnp.concatenate(
        [x[:, :ROWS].reshape(BATCH, ROWS, -1) for x in (query, key, key)], -1
    )
    ids = {"q_segment_ids": Q_IDS, "kv_segment_ids": Q_IDS}

    def f(implementation: str, qkv: Any, slopes: Any) -> Any:
        def one(qkv: Any, slopes: Any) -> Any:
            out, lse = mha_qkvpacked(
                qkv,
                HEADS,
                2,
                bias=jax_flash.alibi(slopes),
                is_causal=True,
                **ids,
                return_lse=True,
                implementation=implementation,
            )
            return out.astype(jnp.float32), lse

        return one(qkv, slopes), jax.grad(loss(one))(qkv, slopes)

    got, expected = both(f, qkv, SLOPES)
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1], expected[1], ROUNDING)
    with registry.assume_kernels():
        text = cuda_text(lambda x: f("cuda", x, SLOPES)[1], qkv)
    line = call_of(registry.BACKWARD_TARGET, text)
    assert "packed_heads = 4 : i64" in line
    assert "has_intervals = true" in line


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


SPECS = (P("x", None, "y"),) * 3 + (P("x"), P("x"), P("y"))


def sharded_run(implementation: str, *args: Any) -> Any:
    def one(*args: Any) -> Any:
        options = dict(zip(OPERANDS[3:], args[3:], strict=True)) | DROPOUT
        return attend(*args[:3], **options, implementation=implementation)

    return one(*args), jax.grad(loss(one), (0, 1, 2))(*args)


def sharded_arguments() -> list[jax.Array]:
    ids = (jnp.asarray(np.repeat(x, BATCH, 0)) for x in (Q_IDS, KV_IDS))
    return [*tensors(), *ids, SLOPES]


def test_named_sharding() -> None:
    """Each device makes the intervals of its sequences, and nothing is sent."""
    args = [
        jax.device_put(x, NamedSharding(mesh(), spec))
        for x, spec in zip(sharded_arguments(), SPECS, strict=True)
    ]
    expected = jax.jit(lambda *a: sharded_run("xla", *a))(*args)
    with fake_kernel.emulated():
        run = jax.jit(lambda *a: sharded_run("cuda", *a)).lower(*args).compile()
        text = str(run.as_text())
        got = run(*args)
    assert_close(got, expected, ROUNDING)
    for operation in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert not re.search(rf" {operation}(-start)?\(", text), operation


@pytest.mark.parametrize("partly", [False, True])
def test_shard_map(partly: bool) -> None:
    """check_vma is on: intervals made of shapes alone vary as the operands do."""
    specs = SPECS[:3]
    names: dict[str, Any] = {"axis_names": {"x"}} if partly else {}
    specs = (P("x"),) * 3 if partly else specs
    lse = P("x") if partly else P("x", "y")

    def f(implementation: str, *args: Any) -> Any:
        def local(*args: Any) -> Any:
            given = {"softcap": 2.0, "implementation": implementation}
            return attend(*args, **given), gradient(**given)(*args)

        out_specs = ((specs[0], lse), specs)
        mapped = jax.shard_map(
            local, mesh=mesh(), in_specs=specs, out_specs=out_specs, **names
        )
        return mapped(*args)

    got, expected = both(f, *tensors())
    assert_close(got[0], expected[0], 2.0**-7)
    assert_close(got[1], expected[1], ROUNDING)


@pytest.mark.usefixtures("kernels")
def test_symbolic_lengths_for_cuda() -> None:
    """Shapes of intervals and the workspace are symbols, too."""
    batch, rows, keys = export.symbolic_shape("b, t, s")
    shapes = [
        jax.ShapeDtypeStruct((batch, n, *shape[2:]), jnp.bfloat16)
        for n, shape in zip((rows, keys, keys), SHAPES, strict=True)
    ]
    ids = [jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (rows, keys)]

    def f(query: Any, key: Any, value: Any, q_ids: Any, kv_ids: Any) -> Any:
        options = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids, "softcap": 2.0}
        return gradient(**options, is_causal=True)(query, key, value)

    checks = [export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    exported = export.export(
        jax.jit(f), platforms=("cpu", "cuda"), disabled_checks=checks
    )(*shapes, *ids)
    for target in TARGETS[1:]:
        line = call_of(target, exported.mlir_module())
        assert "has_intervals = true" in line
        assert "tensor<?x?x4xi32>" in line  # rows
