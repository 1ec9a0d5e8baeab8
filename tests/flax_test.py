"""The Flax adapters: equal to Flax's own attention, and nothing Flax passes is lost."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jax_flash
import jax_flash.linen
import jax_flash.nnx
from jax_flash._src.flax_adapter import mha_precision

jax_flash_nnx = jax_flash.nnx
jax_flash_linen = jax_flash.linen

BATCH, LENGTH, FEATURES, HEADS = 2, 17, 24, 4


def inputs(
    seed: int = 0, shape: tuple[int, ...] = (BATCH, LENGTH, FEATURES)
) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def nnx_attention(attention_fn: Any = None, **options: Any) -> nnx.MultiHeadAttention:
    if attention_fn is not None:
        options["attention_fn"] = attention_fn
    return nnx.MultiHeadAttention(
        HEADS, FEATURES, qkv_features=32, decode=False, rngs=nnx.Rngs(0), **options
    )


def close(actual: Any, expected: Any, dtype: Any = jnp.float32) -> None:
    tolerance = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2}[dtype]
    chex.assert_trees_all_close(actual, expected, atol=tolerance, rtol=tolerance)


# flax.nnx.MultiHeadAttention


@pytest.mark.parametrize("num_kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nnx_equals_flax(num_kv_heads: int, is_causal: bool, dtype: Any) -> None:
    options = {"num_kv_heads": num_kv_heads, "dtype": dtype}
    ours = nnx_attention(jax_flash_nnx.attention_fn, **options)
    theirs = nnx_attention(**options)
    actual = ours(inputs(), is_causal=is_causal)
    expected = theirs(inputs(), is_causal=is_causal)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    close(actual, expected, dtype)


def test_nnx_cross_attention_is_causal_as_in_flax() -> None:
    keys = inputs(1, (BATCH, LENGTH + 6, FEATURES))
    actual = nnx_attention(jax_flash_nnx.attention_fn)(inputs(), keys, is_causal=True)
    close(actual, nnx_attention()(inputs(), keys, is_causal=True))


def test_nnx_bottom_right_when_asked() -> None:
    keys = inputs(1, (BATCH, LENGTH + 6, FEATURES))
    fn = jax_flash_nnx.AttentionFn(causal_alignment="bottom_right")
    actual = nnx_attention(fn)(inputs(), keys, is_causal=True)
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH + 6), bool), 6)
    mask = jnp.broadcast_to(mask, (BATCH, HEADS, *mask.shape))
    close(actual, nnx_attention()(inputs(), keys, mask=mask))


@pytest.mark.parametrize("mask_dtype", [jnp.float32, bool])
def test_nnx_mask(mask_dtype: Any) -> None:
    tokens = jnp.ones((BATCH, LENGTH))
    mask = nnx.combine_masks(
        nnx.make_causal_mask(tokens, dtype=mask_dtype),
        nnx.make_attention_mask(
            tokens, jnp.arange(LENGTH) < jnp.array([[LENGTH], [LENGTH - 4]])
        ),
        dtype=mask_dtype,
    )
    actual = nnx_attention(jax_flash_nnx.attention_fn)(inputs(), mask=mask)
    close(actual, nnx_attention()(inputs(), mask=mask))


def test_nnx_window_is_the_banded_mask() -> None:
    fn = jax_flash_nnx.AttentionFn(window_size=(3, 0))
    rows = jnp.arange(LENGTH)
    distance = rows[:, None] - rows
    mask = jnp.broadcast_to(
        (distance >= 0) & (distance <= 3), (BATCH, HEADS, LENGTH, LENGTH)
    )
    close(nnx_attention(fn)(inputs()), nnx_attention()(inputs(), mask=mask))


def test_nnx_options_survive_a_call_that_does_not_name_them() -> None:
    fn = jax_flash_nnx.AttentionFn(is_causal=True)
    close(nnx_attention(fn)(inputs()), nnx_attention()(inputs(), is_causal=True))


@pytest.mark.parametrize("rank", [2, 4])
def test_nnx_any_number_of_batch_axes(rank: int) -> None:
    x = inputs(0, (2, 3, LENGTH, FEATURES)[4 - rank :])
    close(nnx_attention(jax_flash_nnx.attention_fn)(x), nnx_attention()(x))


def test_nnx_gradients_under_jit() -> None:
    @nnx.jit
    def gradients(layer: nnx.MultiHeadAttention, x: jax.Array) -> Any:
        def loss(layer: nnx.MultiHeadAttention, x: jax.Array) -> jax.Array:
            return jnp.sum(layer(x, is_causal=True) ** 2)

        return nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1))(layer, x)

    actual = gradients(nnx_attention(jax_flash_nnx.attention_fn), inputs())
    expected = gradients(nnx_attention(), inputs())
    chex.assert_trees_all_close(
        jax.tree.leaves(actual), jax.tree.leaves(expected), atol=1e-3, rtol=1e-3
    )


def test_nnx_twins_share_a_trace() -> None:
    traces = []

    @nnx.jit
    def step(layer: nnx.MultiHeadAttention, x: jax.Array) -> jax.Array:
        traces.append(None)
        return layer(x)

    for _ in range(2):
        step(nnx_attention(jax_flash_nnx.AttentionFn(window_size=(3, 0))), inputs())
    assert len(traces) == 1


def test_nnx_inactive_dropout_is_no_error() -> None:
    layer = nnx_attention(jax_flash_nnx.attention_fn, dropout_rate=0.5)
    close(layer(inputs(), deterministic=True), nnx_attention()(inputs()))


@pytest.mark.parametrize("module", [jax_flash_nnx, jax_flash_linen])
def test_a_negative_dropout_rate_raises(module: Any) -> None:
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\), got -0.5"):
        module.attention_fn(x, x, x, dropout_rate=-0.5)


def test_nnx_dropout() -> None:
    """Of the module's own stream, the same for the same key; none if deterministic."""
    rngs = nnx.Rngs(0, dropout=7)
    options = {"dropout_rate": 0.5, "broadcast_dropout": False}
    layer = nnx_attention(jax_flash_nnx.attention_fn, **options, keep_rngs=False)
    plain = nnx_attention()(inputs())
    close(layer(inputs(), deterministic=True), plain)
    first, second = (layer(inputs(), deterministic=False, rngs=rngs) for _ in "12")
    again = layer(inputs(), deterministic=False, rngs=nnx.Rngs(0, dropout=7))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second, atol=0.01)
    assert not np.allclose(first, plain, atol=0.01)

    query = jnp.ones((1, 64, 2, 8))
    key = jax.random.key(3)
    fn = functools.partial(jax_flash_nnx.attention_fn, broadcast_dropout=False)
    got = fn(query, query, query, dropout_rate=0.25, dropout_rng=key)
    want = jax_flash.mha(query, query, query, dropout_rate=0.25, dropout_key=key)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r"dropout_rng must be .*=0\.25, got None"):
        fn(query, query, query, dropout_rate=0.25)


def test_nnx_broadcast_dropout_raises() -> None:
    layer = nnx_attention(jax_flash_nnx.attention_fn, dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match=r"broadcast_dropout=True .*=0\.5"):
        layer(inputs(), deterministic=False)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx_decodes_with_flax_caches(is_causal: bool) -> None:
    """Steps equal the whole sequence at once, however causality was asked for."""
    attention_fn = jax_flash_nnx.AttentionFn(is_causal=is_causal)
    layer = nnx_attention(attention_fn)
    x = inputs(0, (BATCH, 4, FEATURES))
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    steps = [step(layer, x[:, i : i + 1]) for i in range(x.shape[1])]
    close(jnp.concatenate(steps, 1), layer(x, is_causal=True))


def test_nnx_window_with_flax_caches_raises() -> None:
    layer = nnx_attention(jax_flash_nnx.AttentionFn(window_size=(2, 0)))
    layer.init_cache((BATCH, 4, FEATURES))
    with pytest.raises(NotImplementedError, match=r"window_size=\(2, 0\) for one .* 4"):
        layer(inputs(0, (BATCH, 1, FEATURES)), decode=True)


def test_options_given_as_lists() -> None:
    lists: dict[str, Any] = {"window_size": [2, 0], "implementation": ["xla"]}
    as_lists = jax_flash_nnx.AttentionFn(**lists)
    as_tuples = jax_flash_nnx.AttentionFn(window_size=(2, 0), implementation=("xla",))
    assert as_lists == as_tuples
    assert hash(as_lists) == hash(as_tuples)


@pytest.mark.parametrize(
    "module", [jax_flash_nnx, jax_flash_linen], ids=["nnx", "linen"]
)
def test_is_causal_must_be_a_flag(module: Any) -> None:
    x = jnp.ones((1, 3, 2, 8))
    with pytest.raises(ValueError, match="is_causal must be True or False, got 3"):
        module.AttentionFn(is_causal=3)(x, x, x)


def test_nnx_sow_weights_raises() -> None:
    layer = nnx_attention(jax_flash_nnx.attention_fn)
    with pytest.raises(NotImplementedError, match=r"sow_weights=True .*Multi"):
        layer(inputs(), sow_weights=True)


def test_nnx_input_positions_raise() -> None:
    x = jnp.ones((1, 3, 2, 8))
    with pytest.raises(NotImplementedError, match="input_positions="):
        jax_flash_nnx.attention_fn(x, x, x, input_positions=jnp.arange(3))


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (None, None),
        ("default", None),
        (jax.lax.Precision.HIGH, None),
        ("highest", "highest"),
        (("highest", "highest"), "highest"),
    ],
)
def test_precision(precision: Any, expected: str | None) -> None:
    assert mha_precision(precision) == expected
    layer = nnx_attention(jax_flash_nnx.attention_fn, precision=precision)
    close(layer(inputs()), nnx_attention(precision=precision)(inputs()))


@pytest.mark.parametrize("precision", [("highest", None), "TF32_TF32_F32", 3])
def test_unknown_precision_raises(precision: Any) -> None:
    x = jnp.ones((1, 3, 2, 8))
    for fn in (jax_flash_nnx.attention_fn, jax_flash_linen.attention_fn):
        with pytest.raises(NotImplementedError, match="precision="):
            fn(x, x, x, precision=precision)


def test_nnx_promote_dtype_is_called() -> None:
    def to_bfloat16(arrays: tuple[jax.Array, ...], *, dtype: Any) -> Any:
        assert dtype == jnp.float32
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    x = jnp.ones((1, 3, 2, 8))
    out = jax_flash_nnx.attention_fn(
        x, x, x, dtype=jnp.float32, promote_dtype=to_bfloat16
    )
    chex.assert_type(out, jnp.bfloat16)


# flax.linen.MultiHeadDotProductAttention


def linen_attention(attention_fn: Any = None, **options: Any) -> Any:
    if attention_fn is not None:
        options["attention_fn"] = attention_fn
    return linen.MultiHeadDotProductAttention(
        num_heads=HEADS, qkv_features=32, **options
    )


def linen_pair(x: jax.Array, fn: Any, *, ours: Any = None, theirs: Any = None) -> None:
    """Same parameters through both; `ours` and `theirs` are keyword arguments."""
    reference = linen_attention()
    variables = reference.init(jax.random.key(0), x)
    actual = linen_attention(fn).apply(variables, x, **(ours or {}))
    close(actual, reference.apply(variables, x, **(theirs or {})))


def test_linen_equals_flax() -> None:
    linen_pair(inputs(), jax_flash_linen.attention_fn)


def test_linen_mask_array() -> None:
    mask = {"mask": linen.make_causal_mask(jnp.ones((BATCH, LENGTH)))}
    linen_pair(inputs(), jax_flash_linen.attention_fn, ours=mask, theirs=mask)


def test_linen_causal_without_an_array() -> None:
    mask = {"mask": linen.make_causal_mask(jnp.ones((BATCH, LENGTH)))}
    linen_pair(inputs(), jax_flash_linen.AttentionFn(is_causal=True), theirs=mask)


def test_linen_gradients_under_jit() -> None:
    mask = linen.make_causal_mask(jnp.ones((BATCH, LENGTH)))
    reference = linen_attention()
    variables = reference.init(jax.random.key(0), inputs())

    def gradient(layer: Any, **options: Any) -> Any:
        def loss(variables: Any) -> jax.Array:
            return jnp.sum(layer.apply(variables, inputs(), **options) ** 2)

        return jax.jit(jax.grad(loss))(variables)

    actual = gradient(linen_attention(jax_flash_linen.AttentionFn(is_causal=True)))
    chex.assert_trees_all_close(
        actual, gradient(reference, mask=mask), atol=1e-3, rtol=1e-3
    )


def test_linen_softmax_is_always_float32() -> None:
    layer = linen_attention(
        jax_flash_linen.attention_fn, dtype=jnp.bfloat16, force_fp32_for_softmax=True
    )
    out, _ = layer.init_with_output(jax.random.key(0), inputs())
    chex.assert_type(out, jnp.bfloat16)


def test_linen_signature_takes_all_that_linen_passes() -> None:
    # Linen silently drops what a signature lacks.
    ours = inspect.signature(jax_flash_linen.attention_fn).parameters
    assert set(inspect.signature(linen.dot_product_attention).parameters) <= set(ours)


def test_nnx_signature_takes_all_that_nnx_passes() -> None:
    ours = inspect.signature(jax_flash_nnx.attention_fn).parameters
    assert set(inspect.signature(nnx.dot_product_attention).parameters) <= set(ours)


def test_linen_dropout() -> None:
    options = {"dropout_rate": 0.25}
    fn = jax_flash_linen.attention_fn
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    layer = linen_attention(fn, **options)
    with pytest.raises(NotImplementedError, match=r"broadcast_dropout=True .*=0\.25"):
        layer.init(rngs, inputs(), deterministic=False)
    plain, variables = layer.init_with_output(rngs, inputs(), deterministic=True)
    layer = linen_attention(fn, **options, broadcast_dropout=False)

    def run(seed: int) -> jax.Array:
        key = jax.random.key(seed)
        return layer.apply(variables, inputs(), dropout_rng=key, deterministic=False)

    assert not np.allclose(run(1), plain, atol=0.01)
    assert not np.allclose(run(1), run(2), atol=0.01)
    np.testing.assert_array_equal(run(1), run(1))


def test_linen_decodes_with_flax_caches() -> None:
    attention_fn = jax_flash_linen.AttentionFn(is_causal=True)
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    x = inputs(0, (BATCH, 4, FEATURES))
    decoder = layer.clone(decode=True)
    variables = decoder.init(jax.random.key(0), x)
    cache = {"cache": variables["cache"]}
    apply = jax.jit(functools.partial(decoder.apply, mutable=["cache"]))
    steps = []
    for i in range(x.shape[1]):
        out, cache = apply({"params": variables["params"], **cache}, x[:, i : i + 1])
        steps.append(out)
    whole = layer.apply({"params": variables["params"]}, x)
    close(jnp.concatenate(steps, 1), whole)


def test_linen_sow_weights_raises() -> None:
    with pytest.raises(NotImplementedError, match=r"sow_weights=True .*Multi"):
        linen_attention(jax_flash_linen.attention_fn).init(
            jax.random.key(0), inputs(), sow_weights=True
        )


@pytest.mark.parametrize(
    "name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"]
)
def test_linen_einsum_classes_raise(name: str) -> None:
    layer = linen_attention(
        jax_flash_linen.attention_fn, **{f"{name}_cls": lambda: jnp.einsum}
    )
    with pytest.raises(NotImplementedError, match=f"{name}="):
        layer.init(jax.random.key(0), inputs())


def test_linen_einsum_dot_general_raises() -> None:
    x = jnp.ones((1, 3, 2, 8))
    with pytest.raises(NotImplementedError, match="einsum_dot_general="):
        jax_flash_linen.attention_fn(x, x, x, einsum_dot_general=jax.lax.dot_general)


# GroupedQueryAttention


def nnx_gqa(**options: Any) -> Any:
    options = {"is_causal": True, "rope_theta": 1e4, **options}
    return jax_flash_nnx.GroupedQueryAttention(
        FEATURES, HEADS, 2, 8, rngs=nnx.Rngs(0), **options
    )


def linen_gqa(**options: Any) -> Any:
    options = {"is_causal": True, "rope_theta": 1e4, **options}
    return jax_flash_linen.GroupedQueryAttention(
        num_heads=HEADS, num_kv_heads=2, head_dim=8, **options
    )


def test_gqa_shapes_and_both_flavours_agree() -> None:
    layer = nnx_gqa(out_features=40)
    chex.assert_shape(layer.query.kernel[...], (FEATURES, HEADS, 8))
    chex.assert_shape(layer.key.kernel[...], (FEATURES, 2, 8))
    chex.assert_shape(layer.value.kernel[...], (FEATURES, 2, 8))
    chex.assert_shape(layer.out.kernel[...], (HEADS, 8, 40))
    params = {
        name: {"kernel": getattr(layer, name).kernel[...]}
        for name in ("query", "key", "value", "out")
    }
    lengths = jnp.array([LENGTH, 5], jnp.int32)
    expected = linen_gqa(out_features=40).apply(
        {"params": params}, inputs(), seq_lengths=lengths
    )
    actual = layer(inputs(), seq_lengths=lengths)
    chex.assert_shape(actual, (BATCH, LENGTH, 40))
    close(actual, expected)


@pytest.mark.parametrize("num_kv_heads", [3, 0])
def test_gqa_head_counts(num_kv_heads: int) -> None:
    match = f"num_kv_heads={num_kv_heads}"
    with pytest.raises(ValueError, match=match):
        jax_flash_nnx.GroupedQueryAttention(
            FEATURES, HEADS, num_kv_heads, 8, rngs=nnx.Rngs(0)
        )
    layer = jax_flash_linen.GroupedQueryAttention(HEADS, num_kv_heads, 8)
    with pytest.raises(ValueError, match=match):
        layer.init(jax.random.key(0), inputs())


def test_gqa_positions_without_rotary_raise() -> None:
    with pytest.raises(ValueError, match="rope_theta=None"):
        nnx_gqa(rope_theta=None)(inputs(), positions=jnp.arange(LENGTH))
    with pytest.raises(ValueError, match="rope_theta=None"):
        linen_gqa(rope_theta=None).init(
            jax.random.key(0), inputs(), positions=jnp.arange(LENGTH)
        )


def test_gqa_rows_beyond_the_length_do_not_matter() -> None:
    layer = nnx_gqa()
    lengths = jnp.array([LENGTH, 5], jnp.int32)
    actual = layer(inputs(), seq_lengths=lengths)
    close(actual[1:, :5], layer(inputs()[1:, :5]))
    chex.assert_trees_all_equal(actual[1, 5:], jnp.zeros_like(actual[1, 5:]))


def test_gqa_window() -> None:
    wide = nnx_gqa(window_size=(LENGTH, 0))(inputs())
    close(wide, nnx_gqa()(inputs()))
    narrow = nnx_gqa(window_size=(2, 0))
    close(narrow(inputs())[:, -1:], narrow(inputs()[:, -3:])[:, -1:])


def test_gqa_dtypes() -> None:
    layer = nnx_gqa(dtype=jnp.bfloat16, param_dtype=jnp.float32, use_bias=True)
    chex.assert_type(layer.query.kernel[...], jnp.float32)
    chex.assert_shape(layer.key.bias[...], (2, 8))
    chex.assert_type(layer(inputs()), jnp.bfloat16)


def test_gqa_sharding_annotations() -> None:
    kernel_init = linen.initializers.lecun_normal()
    layer = linen_gqa(
        kernel_init=linen.with_partitioning(kernel_init, (None, "heads", None)),
        out_kernel_init=linen.with_partitioning(kernel_init, ("heads", None, None)),
    )
    spec = linen.get_partition_spec(layer.init(jax.random.key(0), inputs()))["params"]
    assert spec["key"]["kernel"] == jax.sharding.PartitionSpec(None, "heads", None)
    assert spec["out"]["kernel"] == jax.sharding.PartitionSpec("heads", None, None)


# Rotary embedding


def test_rotary_scores_depend_on_distance_only() -> None:
    query, key = inputs(0, (1, 1, 1, 16)), inputs(1, (1, 1, 1, 16))

    def score(position: int, distance: int) -> jax.Array:
        rotated = jax_flash_nnx.apply_rotary(query, jnp.array([[position + distance]]))
        return jnp.sum(rotated * jax_flash_nnx.apply_rotary(key, jnp.array([position])))

    close(score(0, 5), score(100, 5))
    assert abs(score(0, 5) - score(0, 6)) > 1e-3


def test_rotary_default_positions_and_norm() -> None:
    x = inputs(0, (BATCH, LENGTH, HEADS, 8))
    rotated = jax_flash_nnx.apply_rotary(x)
    close(rotated, jax_flash_nnx.apply_rotary(x, jnp.arange(LENGTH)))
    close(rotated[:, 0], x[:, 0])
    close(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1))
    angle = np.float32(3.0)
    expected = x[0, 3, 0, 0] * np.cos(angle) - x[0, 3, 0, 4] * np.sin(angle)
    close(rotated[0, 3, 0, 0], expected)


def test_rotary_errors() -> None:
    with pytest.raises(ValueError, match="got 7"):
        jax_flash_nnx.apply_rotary(jnp.ones((1, 3, 2, 7)))
    with pytest.raises(ValueError, match=r"\(5,\)"):
        jax_flash_nnx.apply_rotary(jnp.ones((1, 3, 2, 8)), jnp.arange(5))
    with pytest.raises(ValueError, match="positions must be integers, got dtype f"):
        jax_flash_nnx.apply_rotary(jnp.ones((1, 3, 2, 8)), jnp.arange(3.0))
    for theta in (0.0, -1.0, 1e-45):
        with pytest.raises(ValueError, match=f"theta must be positive, got {theta}"):
            jax_flash_nnx.apply_rotary(jnp.ones((1, 3, 2, 8)), theta=theta)


# Lowering for CUDA


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("flavour", ["nnx", "linen", "gqa"])
def test_lowers_to_one_custom_call(flavour: str) -> None:
    def forward(x: jax.Array) -> jax.Array:
        if flavour == "nnx":
            fn = jax_flash_nnx.attention_fn
            return nnx_attention(fn, dtype=jnp.bfloat16)(x, is_causal=True)
        if flavour == "gqa":
            return nnx_gqa(dtype=jnp.bfloat16)(x)
        fn = jax_flash_linen.AttentionFn(is_causal=True)
        layer = linen_attention(fn, dtype=jnp.bfloat16)
        return layer.init_with_output(jax.random.key(0), x)[0]

    traced = jax.jit(forward).trace(inputs())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @jax_flash_mha_fwd") == 1, text


# Imports


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_flax_is_imported_lazily_and_named_when_missing() -> None:
    program = """
import sys
sys.modules["flax"] = None  # what a missing package looks like to an import
import jax_flash
for name in ("nnx", "linen"):
    try:
        __import__(f"jax_flash.{name}")
    except ImportError as error:
        assert f"jax_flash.{name}" in str(error) and "[flax]" in str(error), error
    else:
        raise AssertionError(name)
print("ok")
"""
    assert run_python(program).strip() == "ok"


def test_adapters_are_modules() -> None:
    assert isinstance(jax_flash_nnx, types.ModuleType)
    assert isinstance(jax_flash_linen, types.ModuleType)
