"""`dot_product_attention` against `jax.nn.dot_product_attention`."""

import inspect
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import jax_flash

HEADS, KV_HEADS, WIDTH = 4, 2, 16
# jax.nn cannot be compiled for float16 on CPUs.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def inputs(rows: int, keys: int, dtype: str = "float32") -> list[jax.Array]:
    shapes = (rows, HEADS), (keys, KV_HEADS), (keys, KV_HEADS)
    return [normal(2, *shape, WIDTH).astype(dtype) for shape in shapes]


def lengths(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def options(rows: int, keys: int) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(3)
    mask = jnp.asarray(rng.random((2, HEADS, rows, keys)) > 0.7)
    return {
        "none": {},
        "scale": {"scale": 0.3},
        "causal": {"is_causal": True},
        "window": {"local_window_size": 2},
        "window and causal": {"local_window_size": (1, 3), "is_causal": True},
        "left window": {"local_window_size": (3, 0)},
        "key lengths": {"key_value_seq_lengths": lengths(0, 2)},
        "query lengths": {"query_seq_lengths": lengths(3, 0), "is_causal": True},
        "both lengths": {
            "query_seq_lengths": lengths(3, rows),
            "key_value_seq_lengths": lengths(keys, 0),
            "local_window_size": (1, 1),
        },
        "mask": {"mask": mask},
        "shared mask": {"mask": mask[:1, :1], "query_seq_lengths": lengths(2, 4)},
        "bias": {"bias": normal(1, HEADS, rows, keys)},
        "bias and mask": {"bias": normal(2, 1, 1, keys), "mask": mask[:, :1, :1]},
    }


CASES = tuple(options(7, 9))


def run(f, args, given, residual: bool) -> Any:
    # jax.nn itself adds a float32 bias to 16-bit inputs' logits implicitly.
    with jax.numpy_dtype_promotion("standard"):
        static = {n: x for n, x in given.items() if not isinstance(x, jax.Array)}
        arrays = {n: x for n, x in given.items() if n not in static}

        def call(args, arrays):
            return f(*args, **arrays, **static, return_residual=residual)

        return jax.jit(call)(args, arrays)


@pytest.mark.parametrize("sizes", [(7, 9), (9, 3)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case: str, dtype: str, sizes: tuple[int, int]) -> None:
    args, given = inputs(*sizes, dtype), options(*sizes)[case]
    out, lse = run(jax_flash.dot_product_attention, args, given, residual=True)
    expected, expected_lse = run(jax.nn.dot_product_attention, args, given, True)
    chex.assert_trees_all_equal_shapes_and_dtypes((out, lse), (expected, expected_lse))
    tolerance = TOLERANCE[dtype]
    as_float = [np.asarray(x, np.float32) for x in (out, expected)]
    np.testing.assert_allclose(*as_float, rtol=tolerance, atol=tolerance)
    as_float = [np.asarray(x, np.float32) for x in (lse, expected_lse)]
    np.testing.assert_allclose(*as_float, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["none", "mask", "key_value_seq_lengths", "is_causal"])
def test_no_keys(name: str) -> None:
    args = inputs(7, 0)
    given: dict[str, Any] = {
        "none": {},
        "mask": {"mask": jnp.ones((1, 1, 7, 0), bool)},
        "key_value_seq_lengths": {name: jnp.zeros(args[0].shape[0], jnp.int32)},
        "is_causal": {name: True},
    }[name]
    got = run(jax_flash.dot_product_attention, args, given, residual=True)
    expected = run(jax.nn.dot_product_attention, args, given, residual=True)
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_same_gradients(case: str) -> None:
    sizes = 9, 3
    args, given = inputs(*sizes), dict(options(*sizes)[case])
    bias = given.pop("bias", None)

    def grads(f):
        def total(query, key, value, bias):
            out, lse = f(query, key, value, bias, **given, return_residual=True)
            # The residual has no gradient.
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse < -1e30, 0, lse))

        wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        return jax.grad(total, wanted)(*args, bias)

    got, expected = jax.jit(
        lambda: (
            grads(jax_flash.dot_product_attention),
            grads(jax.nn.dot_product_attention),
        )
    )()
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_residual_does_not_change_the_output() -> None:
    args, given = inputs(7, 9), options(7, 9)["mask"]
    out, _ = run(jax_flash.dot_product_attention, args, given, residual=True)
    alone = run(jax_flash.dot_product_attention, args, given, residual=False)
    np.testing.assert_array_equal(alone, out)


WITHOUT_BATCH = {
    "causal": {"is_causal": True},
    "mask of rank 4": {"mask": options(7, 9)["mask"]["mask"][:1]},
    "bias of rank 4": {"bias": jnp.arange(9.0).reshape(1, 1, 1, 9)},
    "lengths": {"query_seq_lengths": lengths(3), "key_value_seq_lengths": lengths(0)},
}


@pytest.mark.parametrize("case", WITHOUT_BATCH)
def test_without_batch(case: str) -> None:
    args, given = [x[0] for x in inputs(7, 9)], WITHOUT_BATCH[case]
    got = run(jax_flash.dot_product_attention, args, given, residual=True)
    expected = run(jax.nn.dot_product_attention, args, given, residual=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=2e-6)


def test_a_batch_of_one_beside_none() -> None:
    query, key, value = (x[:1] for x in inputs(7, 9))
    f = jax_flash.dot_product_attention
    for args in (
        (query[0], key, value),
        (query, key[0], value),
        (query, key, value[0]),
    ):
        got, expected = f(*args), jax.nn.dot_product_attention(*args)
        chex.assert_equal_shape([got, expected])
        chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "given",
    [
        {"bias": 2.5, "mask": True},
        {"bias": np.arange(9), "mask": [[True] * 4 + [False] * 5]},
        {"bias": np.arange(9) % 2 == 0, "key_value_seq_lengths": [3, 9]},
    ],
    ids=["numbers", "integers", "bools"],
)
def test_what_becomes_an_array(given: dict[str, Any]) -> None:
    """`jax.nn` takes all that `jnp.asarray` takes, and adds any bias."""
    args = inputs(7, 9)
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.nn.dot_product_attention(*args, **given)
    got = jax_flash.dot_product_attention(*args, **given)
    chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=2e-6)


def test_signature() -> None:
    ours = inspect.signature(jax_flash.dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_implementations(implementation: str | None) -> None:
    args = inputs(5, 5)
    given = {"is_causal": True, "implementation": implementation}
    got = run(jax_flash.dot_product_attention, args, given, residual=False)
    given["implementation"] = "xla"
    expected = run(jax.nn.dot_product_attention, args, given, residual=False)
    chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=2e-6)


def test_transformations() -> None:
    args = [jnp.stack([x, 2 * x]) for x in inputs(7, 9)]
    for transformed in itertools.permutations((jax.jit, jax.vmap)):

        def apply(f, transformed=transformed):
            for t in transformed:
                f = t(f)
            return f(*args)

        got = apply(jax_flash.dot_product_attention)
        expected = apply(jax.nn.dot_product_attention)
        chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=2e-6)


def test_a_row_of_infinite_biases_is_zero_beside_any_mask() -> None:
    """The mean of the values is for rows without keys alone."""
    query, key, value = inputs(4, 6)
    bias = jnp.zeros((4, 6)).at[1].set(-jnp.inf)
    plain = jax_flash.dot_product_attention(query, key, value, bias)
    assert (plain[:, 1] == 0).all()
    ways: list[dict[str, Any]] = [
        {"mask": jnp.ones((4, 6), bool)},
        {"key_value_seq_lengths": jnp.array([6, 6])},
        {"local_window_size": (6, 6), "mask": jnp.ones((1, 1, 1, 6), bool)},
    ]
    for options in ways:
        out = jax_flash.dot_product_attention(query, key, value, bias, **options)
        np.testing.assert_allclose(out, plain, atol=1e-6)
    mask = jnp.ones((4, 6), bool).at[2].set(False)
    for is_causal in (False, True):
        out = jax_flash.dot_product_attention(
            query, key, value, bias, mask, is_causal=is_causal
        )
        assert (out[:, 1] == 0).all()
        expected = jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=is_causal
        )
        np.testing.assert_allclose(out[:, 2], expected[:, 2], atol=2e-6)
