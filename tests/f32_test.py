"""Calls of float32: which kernels are chosen for them, and what they are told."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import call_of, cuda_text, normal

import jax_flash
from jax_flash._src import plan, registry


def inputs(dtype: str = "float32") -> list[jax.Array]:
    shapes = ((2, 64, 4, 16), (2, 48, 2, 16), (2, 48, 2, 8))
    return [normal(*shape).astype(dtype) for shape in shapes]


def attend(*arrays: Any, **options: Any) -> Any:
    return jax_flash.mha(*arrays, **options)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", [None, "highest", "tf32"])
def test_one_custom_call(precision: str | None) -> None:
    text = cuda_text(lambda *a: attend(*a, precision=precision), *inputs())
    assert text.count("stablehlo.custom_call") == 1
    line = call_of(registry.FORWARD_TARGET, text)
    assert f"tf32 = {str(precision == 'tf32').lower()}" in line
    types_ = line[line.rindex(" : (") :]
    # Two bfloat16 for each number, of rows as wide as the kernel.
    parts = 2 * 64 * (2 * 64 * 4 + 2 * (2 * 48 * 2))
    room = "" if precision == "highest" else f", tensor<{parts}xbf16>"
    assert f"-> (tensor<2x64x4x8xf32>, tensor<2x4x64xf32>{room})" in types_


@pytest.mark.usefixtures("kernels")
def test_what_the_kernels_lack() -> None:
    arrays = inputs()
    with jax.enable_x64(True):
        doubles = [x.astype("float64") for x in arrays]
        with pytest.raises(NotImplementedError, match="query of dtype float64: the"):
            attend(*doubles, implementation="cuda")
    with pytest.raises(NotImplementedError, match="precision='tf32': the kernels rou"):
        attend(*inputs("bfloat16"), precision="tf32", implementation="cuda")


@pytest.mark.usefixtures("kernels")
def test_explain() -> None:
    for precision in (None, "tf32", "highest"):
        details = jax_flash.explain(*inputs(), precision=precision).details["cuda"]
        other = "sm80 64x64"
        hopper = "sm90 64x64 of split bfloat16 on compute capability 9.0"
        forward = other if precision == "highest" else f"{hopper}, {other} on others"
        split = precision is None
        backward = f"{hopper}, {other} on others" if split else other
        assert details == f"{forward}; gradients by {backward}"
    wide = [jnp.concatenate([x] * 9, -1) for x in inputs()]
    reason = jax_flash.explain(*wide).reasons["cuda"]
    assert str(reason).endswith("the kernels take widths of at most 128")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", [None, "tf32", "highest"])
def test_gradients(precision: str | None) -> None:
    def loss(*arrays: Any, **options: Any) -> Any:
        return attend(*arrays, precision=precision, **options).sum()

    grad = jax.grad(loss, (0, 1, 2))
    text = cuda_text(grad, *inputs())
    assert text.count("stablehlo.custom_call") == 2
    line = call_of(registry.BACKWARD_TARGET, text)
    assert f"tf32 = {str(precision == 'tf32').lower()}" in line
    assert f"may_split = {str(precision is None).lower()}" in line
    results = line[line.rindex("-> (") :]
    assert results.startswith(
        "-> (tensor<2x64x4x16xf32>, tensor<2x48x2x16xf32>, tensor<2x48x2x8xf32>"
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", [None, "tf32", "highest"])
def test_with_an_option(precision: str | None) -> None:
    """Kernels with intervals: a queue stands before the parts, none rounds to TF32."""

    def loss(*arrays: Any) -> Any:
        return attend(*arrays, softcap=5.0, precision=precision).sum()

    text = cuda_text(jax.grad(loss, (0, 1, 2)), *inputs())
    line = call_of(registry.FORWARD_TARGET, text)
    queue = plan.row_list_size(2, 64)
    parts = 2 * 64 * (2 * 64 * 4 + 2 * (2 * 48 * 2))
    room = "" if precision == "highest" else f", tensor<{parts}xbf16>"
    assert f"tensor<2x4x64xf32>, tensor<{queue}xi32>{room})" in line
    line = call_of(registry.BACKWARD_TARGET, text)
    assert f"may_split = {str(precision != 'highest').lower()}" in line
    explanation = jax_flash.explain(*inputs(), softcap=5.0, precision=precision)
    other = "sm80 64x64 with intervals"
    hopper = "sm90 64x64 with intervals of split bfloat16 on compute capability 9.0"
    kernels = other if precision == "highest" else f"{hopper}, {other} on others"
    assert explanation.details["cuda"] == f"{kernels}; gradients by {kernels}"


@pytest.mark.usefixtures("kernels")
def test_gradients_under_vmap_with_lengths() -> None:
    """Keys are shared: their gradients have the full batch, XLA adds them up."""
    queries, keys, values = inputs()
    lengths = jnp.array([64, 30])

    def loss(query: Any, key: Any, value: Any) -> Any:
        out, lse = attend(
            query,
            key,
            value,
            is_causal=True,
            query_seq_lengths=lengths,
            return_lse=True,
        )
        return out.sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    def total(*arrays: Any) -> Any:
        return jax.vmap(loss, (0, None, None))(*arrays).sum()

    stacked = jnp.stack([queries] * 3)
    text = cuda_text(jax.grad(total, (0, 1, 2)), stacked, keys, values)
    assert text.count("stablehlo.custom_call") == 2
    line = call_of(registry.BACKWARD_TARGET, text)
    for attribute in (
        "may_split = true",
        "has_dlse = true",
        "has_query_lengths = true",
    ):
        assert attribute in line
    results = line[line.rindex("-> (") :]
    assert results.startswith(
        "-> (tensor<3x2x64x4x16xf32>, tensor<3x2x48x2x16xf32>, tensor<3x2x48x2x8xf32>"
    )


@pytest.mark.usefixtures("kernels")
def test_only_float32_may_be_split() -> None:
    text = cuda_text(jax.grad(lambda *a: attend(*a).sum()), *inputs("bfloat16"))
    assert "may_split = false" in call_of(registry.BACKWARD_TARGET, text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", [None, "highest", "tf32"])
def test_products_of_jnp(precision: str | None, dtype: str) -> None:
    """TF32 on GPUs is what XLA makes of HIGH; 16-bit queries and keys are exact."""
    options = {"precision": precision, "implementation": "xla"}
    text = cuda_text(lambda *a: attend(*a, **options), *inputs(dtype))
    expected = {None: "HIGHEST", "highest": "HIGHEST", "tf32": "HIGH"}[precision]
    if dtype == "bfloat16" and precision != "highest":
        expected = "DEFAULT"
    assert set(re.findall(r"precision = \[(\w+),", text)) == {expected}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_16_bit_precision(precision: str) -> None:
    """The call of rounded inputs, its results and gradients in float32."""
    dtype = {"bf16": "bfloat16", "f16": "float16"}[precision]
    arrays = inputs()
    options = {"softcap": 3.0, "is_causal": True, "return_lse": True}

    def run(q: jax.Array, k: jax.Array, v: jax.Array, **kw: Any) -> Any:
        out, lse = attend(q, k, v, **options, **kw)
        assert out.dtype == q.dtype
        return (out.astype("float32") ** 2).sum() + jnp.sin(lse).sum(), (out, lse)

    gradients = jax.grad(run, (0, 1, 2), has_aux=True)
    got = gradients(*arrays, precision=precision)
    want = gradients(*(x.astype(dtype) for x in arrays))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, y.astype("float32"))

    text = cuda_text(lambda *a: attend(*a, **options, precision=precision), *arrays)
    line = call_of(registry.FORWARD_TARGET, text)
    assert f"(tensor<2x64x4x16x{precision}>, tensor<2x48x2x16x{precision}>" in line
    explained = jax_flash.explain(*arrays, softcap=3.0, precision=precision)
    assert explained.chosen["cuda"] == "cuda"
    assert f"query {dtype}[2,64,4,16]" in str(explained)

    # A projection of all three is rounded as one array.
    qkv = normal(2, 8, 4 * 16)
    packed = jax_flash.mha_qkvpacked(qkv, 2, 1, precision=precision)
    np.testing.assert_array_equal(
        packed, jax_flash.mha_qkvpacked(qkv.astype(dtype), 2, 1).astype("float32")
    )
    # Nothing else is rounded to it.
    for other in ("bfloat16", "float16"):
        few = [x.astype(other) for x in arrays]
        same = attend(*few, precision=precision)
        np.testing.assert_array_equal(same, attend(*few))
