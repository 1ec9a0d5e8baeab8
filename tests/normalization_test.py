"""`rms_norm`, `silu_mul`, `split_qkv`: numbers, transformations, errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, cuda_text, kernel_calls, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jax_flash import rms_norm, silu_mul, split_qkv
from jax_flash._src import registry

EPS = 1e-5


def plain(x: Any, weight: Any, residual: Any = None) -> Any:
    """What the docstring says, for JAX to differentiate."""
    total = x if residual is None else x + residual
    wide = total.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS)
    y = (wide * scale * weight.astype(jnp.float32)[None, :]).astype(x.dtype)
    return y if residual is None else (y, total)


def ours(x: Any, weight: Any, residual: Any = None) -> Any:
    return rms_norm(x, weight, residual=residual, eps=EPS)


def loss(f: Any, *arguments: Any) -> jax.Array:
    leaves = jax.tree.leaves(f(*arguments))
    parts = [jnp.sum(jnp.sin(y.astype(jnp.float32) * 1.3)) for y in leaves]
    return jnp.stack(parts).sum()


def inputs(residual: bool, rows: int = 6, width: int = 24) -> list[jax.Array]:
    arrays = [normal(rows, width), normal(width)]
    return [*arrays, normal(rows, width)] if residual else arrays


@pytest.mark.parametrize("residual", [False, True])
def test_values(residual: bool) -> None:
    arrays = inputs(residual)
    assert_close(ours(*arrays), plain(*arrays))
    x = arrays[0].reshape(2, 3, 24)
    rest = [a.reshape(2, 3, 24) for a in arrays[2:]]
    got = ours(x, arrays[1], *rest)
    assert_close(jax.tree.map(lambda y: y.reshape(6, 24), got), plain(*arrays))
    got = ours(arrays[0][0], arrays[1], *(a[0] for a in arrays[2:]))
    assert_close(got, jax.tree.map(lambda y: y[0], plain(*arrays)))


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_low_precision(weight_dtype: str) -> None:
    """One rounding of what float64 gives for the rounded sum."""
    x, weight, residual = (a.astype(jnp.bfloat16) for a in inputs(True, 50, 300))
    weight = weight.astype(weight_dtype)
    y, total = ours(x, weight, residual)
    assert y.dtype == total.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) + np.asarray(residual, np.float64)
    np.testing.assert_array_equal(total, exact.astype(jnp.bfloat16))
    exact = np.asarray(total, np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + EPS)
    exact *= np.asarray(weight, np.float64)
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert (error <= 2.0**-8 * np.abs(exact) * 1.001).all()


@pytest.mark.parametrize("residual", [False, True])
def test_gradients(residual: bool) -> None:
    arrays = inputs(residual)
    which = tuple(range(len(arrays)))
    got = jax.grad(functools.partial(loss, ours), which)(*arrays)
    assert_close(got, jax.grad(functools.partial(loss, plain), which)(*arrays))
    check_grads(ours, arrays, order=2, modes=("fwd", "rev"), rtol=2e-2, atol=2e-2)
    # One output alone, one operand alone.
    for i in range(2 if residual else 0):
        got, want = (
            jax.grad(lambda *a, f=f, i=i: loss(lambda *a: f(*a)[i], *a), which)(*arrays)
            for f in (ours, plain)
        )
        assert_close(got, want)
    for i in which:
        got = jax.grad(functools.partial(loss, ours), i)(*arrays)
        assert_close(got, jax.grad(functools.partial(loss, plain), i)(*arrays))


@pytest.mark.parametrize("residual", [False, True])
def test_higher_orders(residual: bool) -> None:
    arrays = inputs(residual, 2, 5)

    def hessian(f: Any, outer: Any) -> Any:
        g = jax.grad(functools.partial(loss, f), tuple(range(len(arrays))))
        return outer(g, tuple(range(len(arrays))))(*arrays)

    for outer in (jax.jacfwd, jax.jacrev):
        assert_close(hessian(ours, outer), hessian(plain, outer), 1e-4)


@pytest.mark.parametrize(
    "axes",
    [
        (0, None, 0),
        (1, 0, 1),
        (None, 0, None),
        (0, 0, 2),
        (0, None, None),
        (None, 0, 0),
    ],
)
def test_vmap(axes: tuple[int | None, ...]) -> None:
    n = 3
    x = normal(*((n,) if axes[0] is not None else ()), 6, 24)
    weight = normal(*((n,) if axes[1] is not None else ()), 24)
    residual = normal(*((n,) if axes[2] is not None else ()), 6, 24)
    arrays = [
        a if axis is None else jnp.moveaxis(a, 0, axis)
        for a, axis in zip((x, weight, residual), axes, strict=True)
    ]
    assert_close(jax.vmap(ours, axes)(*arrays), jax.vmap(plain, axes)(*arrays))

    def gradient(f: Any) -> Any:
        return jax.vmap(jax.grad(functools.partial(loss, f), (0, 1, 2)), axes)(*arrays)

    assert_close(gradient(ours), gradient(plain))

    def of_mapped(f: Any) -> Any:
        return jax.grad(lambda *a: loss(jax.vmap(f, axes), *a), (0, 1, 2))(*arrays)

    assert_close(of_mapped(ours), of_mapped(plain))


def test_one_kernel_each(kernels: None) -> None:
    arrays = [a.astype(jnp.bfloat16) for a in inputs(True)]
    assert kernel_calls(ours, *arrays, target=registry.RMS_NORM_TARGET) == 1
    gradient = jax.grad(functools.partial(loss, ours), (0, 1, 2))
    target = registry.RMS_NORM_BACKWARD_TARGET
    assert kernel_calls(gradient, *arrays, target=target) == 1
    text = cuda_text(
        jax.vmap(jax.grad(functools.partial(loss, ours), 1), (0, None)),
        jnp.zeros((5, 6, 24)),
        arrays[1].astype(jnp.float32),
    )
    line = next(t for t in text.splitlines() if target in t)
    # A gradient of the weight for each element, in parts by thread block.
    assert "tensor<5x6x24xf32>) -> (tensor<5x6x24xf32>, tensor<5x6x24xf32>)" in line
    # The kernel's rows have one dimension, whatever the batch has.
    text = cuda_text(ours, jnp.zeros((2, 3, 5, 24)), jnp.zeros(24))
    line = next(t for t in text.splitlines() if registry.RMS_NORM_TARGET in t)
    assert "(tensor<1x30x24xf32>, tensor<1x24xf32>) -> (tensor<1x30x24xf32>," in line


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ({}, 1),
        ({"width": 16384}, 1),
        ({"width": 16385}, 0),
        ({"dtype": "float16", "weight": "bfloat16"}, 0),
        ({"rows": 0}, 0),
    ],
)
def test_what_the_kernel_takes(kernels: None, change: Any, calls: int) -> None:
    given = {"rows": 2, "width": 24, "dtype": "float16", "weight": "float32"} | change
    x = jnp.zeros((given["rows"], given["width"]), given["dtype"])
    weight = jnp.zeros(given["width"], given["weight"])
    assert kernel_calls(ours, x, weight, target=registry.RMS_NORM_TARGET) == calls


@pytest.mark.parametrize(
    ("batch", "spec"),
    [((16,), P(("x", "y"))), ((8, 2), P("x", "y")), ((2, 8), P(None, ("x", "y")))],
)
def test_sharded_rows_need_no_communication(batch: tuple[int, ...], spec: P) -> None:
    """Whichever of their dimensions are sharded: sequences, tokens or both."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    flat = x, weight, residual = inputs(True, 16, 24)
    put = [
        jax.device_put(x.reshape(*batch, 24), NamedSharding(mesh, spec)),
        jax.device_put(weight, NamedSharding(mesh, P())),
        jax.device_put(residual.reshape(*batch, 24), NamedSharding(mesh, spec)),
    ]
    f = jax.jit(ours)
    gradient = jax.jit(jax.grad(functools.partial(loss, ours), (0, 1, 2)))
    moves = ("all-gather", "all-to-all", "collective-permute")
    # The gradient of the weight is a sum over devices.
    for g, names in ((f, (*moves, "all-reduce")), (gradient, moves)):
        compiled = g.lower(*put).compile().as_text()
        assert compiled is not None
        for name in names:
            assert f" {name}(" not in compiled

    def of_rows(results: Any) -> Any:
        return jax.tree.map(lambda y: y.reshape(-1, 24) if y.ndim > 1 else y, results)

    want = jax.grad(functools.partial(loss, plain), (0, 1, 2))(*flat)
    assert_close(of_rows(f(*put)), plain(*flat))
    assert_close(of_rows(gradient(*put)), want)
    columns = NamedSharding(mesh, P(*(None,) * len(batch), "y"))
    assert_close(of_rows(gradient(jax.device_put(put[0], columns), *put[1:])), want)


def test_shard_map() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x, weight, residual = inputs(True, 16, 24)

    def f(x: Any, weight: Any, residual: Any) -> Any:
        return jax.shard_map(
            ours, mesh=mesh, in_specs=(P("x"), P(), P("x")), out_specs=P("x")
        )(x, weight, residual)

    got = jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(x, weight, residual)
    want = jax.grad(functools.partial(loss, plain), (0, 1, 2))(x, weight, residual)
    assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, weight = jnp.zeros(shape), jnp.ones(5)
    assert ours(x, weight).shape == shape
    dx, dweight = jax.grad(functools.partial(loss, ours), (0, 1))(x, weight)
    assert dx.shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(5))


def test_zeros_are_zeros() -> None:
    """No NaN where a row has no length; with eps=0 the division is the caller's."""
    y, vjp = jax.vjp(ours, jnp.zeros((2, 8)), jnp.ones(8))
    np.testing.assert_array_equal(y, 0)
    assert all(np.isfinite(g).all() for g in vjp(jnp.ones((2, 8))))


def test_silu_mul() -> None:
    gate, up = normal(4, 6), normal(4, 6)
    assert_close(silu_mul(gate, up), jax.nn.silu(gate) * up)
    low = silu_mul(gate.astype(jnp.bfloat16), up.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    text = jax.jit(silu_mul).lower(gate, up).compile().as_text()
    assert text is not None
    entry = text[text.index("ENTRY") :]
    # Two parameters and what reads them: one kernel, whatever XLA calls it.
    assert sum(" = " in line for line in entry.splitlines()) == 3


def test_split_qkv() -> None:
    qkv = normal(2, 3, 20)
    query, key, value = split_qkv(qkv, 12, 4)
    np.testing.assert_array_equal(jnp.concatenate([query, key, value], -1), qkv)
    assert query.shape == (2, 3, 12)
    assert key.shape == value.shape == (2, 3, 4)


X, W = jnp.zeros((2, 5)), jnp.zeros(5)
WRONG = {
    "x": (lambda: rms_norm(3.0, W), r"x must be an array, got float: 3.0"),
    "integers": (lambda: rms_norm(X.astype(int), W), r"x must be floating, got dtype"),
    "scalar": (lambda: rms_norm(X[0, 0], W), r"x must be \[\*B,C\] .* got shape \(\)"),
    "weight": (
        lambda: rms_norm(X, X),
        r"weight must be \[C\] = \(5,\), got .*\(2, 5\)",
    ),
    "residual": (
        lambda: rms_norm(X, W, residual=W),
        r"residual must have the shape of x, \(2, 5\), got \(5,\)",
    ),
    "residual dtype": (
        lambda: rms_norm(X, W, residual=X.astype(jnp.bfloat16)),
        r"residual must have the dtype of x, float32, got bfloat16",
    ),
    "eps": (lambda: rms_norm(X, W, eps=-1.0), r"eps must not be negative, got -1.0"),
    "huge eps": (lambda: rms_norm(X, W, eps=10**400), r"eps must be a finite real"),
    "traced eps": (
        lambda: jax.jit(lambda e: rms_norm(X, W, eps=e))(0.1),
        r"eps must be static, got a traced value",
    ),
    "up": (
        lambda: silu_mul(X, W),
        r"up must have the shape and dtype of gate, .* got \(5,\) float32",
    ),
    "qkv": (
        lambda: split_qkv(X, 2, 2),
        r"qkv must be .* = \[\*B, 6\], got shape \(2, 5\)",
    ),
    "size": (lambda: split_qkv(X, -1, 3), r"q_size must not be negative, got -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_unsupported() -> None:
    with pytest.raises(NotImplementedError, match=r"x of dtype float8_e4m3fn is not"):
        rms_norm(X.astype(jnp.float8_e4m3fn), W)
