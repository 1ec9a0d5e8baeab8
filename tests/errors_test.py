"""Bad arguments: the error has the right type and names the argument and its value."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash import mha

SHAPES = {"query": (2, 6, 4, 8), "key": (2, 5, 2, 8), "value": (2, 5, 2, 7)}


def call(**changes: Any) -> Any:
    """`mha` of good arguments but for the changes; a tuple is the shape of an array."""
    arguments: dict[str, Any] = dict(SHAPES)
    arguments.update(changes)
    for name in SHAPES:
        if isinstance(arguments[name], tuple):
            arguments[name] = jnp.zeros(arguments[name])
    return mha(**arguments)


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


class Foreign:
    """An array of another framework."""

    shape, dtype = (4,), "other.float32"


WRONG = {
    "query is None": ({"query": None}, "query must be an array, got None"),
    "query is a list": (
        {"query": [1.0] * 9},
        r"query must be an array, got list: .*1\.0, \.\.\.\]$",
    ),
    "query is a type": (
        {"query": jax.ShapeDtypeStruct(SHAPES["query"], jnp.float32)},
        r"query must be an array, got ShapeDtypeStruct\(",
    ),
    "sinks of another framework": (
        {"sinks": Foreign()},
        r"sinks must be an array of JAX or NumPy, got Foreign of dtype other.float32",
    ),
    "rank 2": ({"query": (6, 8)}, r"query must have at least 3 .*\(6, 8\)"),
    "rank of key": (
        {"key": (5, 2, 8)},
        r"key must have the rank of query; .*\(5, 2, 8\)",
    ),
    "batch of key": ({"key": (3, 5, 2, 8)}, r"key must have the batch .*\(3,\)"),
    "batch of value": ({"value": (1, 5, 2, 7)}, r"value must have the batch .*\(1,\)"),
    "length of value": ({"value": (2, 4, 2, 7)}, r"value must have the length S"),
    "heads of value": ({"value": (2, 5, 4, 7)}, r"value must have the number of heads"),
    "width of key": ({"key": (2, 5, 2, 9)}, r"key must have the width H .*2, 5, 2, 9"),
    "N % K": (
        {"key": (2, 5, 3, 8), "value": (2, 5, 3, 7)},
        r"multiple of key's heads, got N=4 and K=3",
    ),
    "K > N": (
        {"key": (2, 5, 8, 8), "value": (2, 5, 8, 7)},
        r"multiple of key's heads, got N=4 and K=8",
    ),
    "no heads": ({"query": (2, 6, 0, 8)}, r"got N=0 and K=2"),
    "no width": ({"query": (2, 6, 4, 0), "key": (2, 5, 2, 0)}, r"width H .* got 0"),
    "dtype mix": (
        {"key": zeros(2, 5, 2, 8, dtype=jnp.bfloat16)},
        r"key must have the dtype of query, float32, got bfloat16",
    ),
    "integer query": (
        {"query": zeros(2, 6, 4, 8, dtype=np.int32)},
        r"query must be floating, got dtype int32",
    ),
    "complex query": (
        {"query": zeros(2, 6, 4, 8, dtype=np.complex64)},
        r"query must be floating, got dtype complex64",
    ),
    "bool value": (
        {"value": zeros(2, 5, 2, 7, dtype=bool)},
        r"value must be floating, got dtype bool",
    ),
    "bias shape": ({"bias": zeros(3, 6, 5)}, r"bias must broadcast to .*\(3, 6, 5\)"),
    "bias rank": ({"bias": zeros(1, 1, 1, 6, 5)}, r"bias must broadcast .*1, 1, 1, 6"),
    "bias is bool": (
        {"bias": zeros(6, 5, dtype=bool)},
        r"bias must be floating.*`mask`",
    ),
    "slopes shape": (
        {"bias": jax_flash.alibi(zeros(3))},
        r"bias=alibi\(slopes\) must broadcast to \[\*B,N\] = \(2, 4\), got .*\(3,\)",
    ),
    "one slope": (
        {"bias": jax_flash.alibi(zeros(1))},
        r"bias=alibi\(slopes\) must have one slope .* N=4 .*\(1,\)",
    ),
    "integer slopes": (
        {"bias": jax_flash.alibi(zeros(4, dtype=int))},
        r"bias=alibi\(slopes\) must be floating, got dtype int",
    ),
    "mask shape": (
        {"mask": zeros(7, 5, dtype=bool)},
        r"mask must broadcast .*\(7, 5\)",
    ),
    "mask is float": ({"mask": zeros(6, 5)}, r"mask must be bool .*float32.*`bias`"),
    "sinks shape": ({"sinks": zeros(3)}, r"sinks must broadcast .*\(3,\)"),
    "one sink": ({"sinks": zeros(1)}, r"sinks must have one logit .* N=4 .*\(1,\)"),
    "integer sinks": ({"sinks": zeros(4, dtype=int)}, r"sinks must be floating"),
    "q ids alone": (
        {"q_segment_ids": zeros(2, 6, dtype=int)},
        r"must be given together, got kv_segment_ids=None",
    ),
    "kv ids alone": (
        {"kv_segment_ids": zeros(2, 5, dtype=int)},
        r"must be given together, got q_segment_ids=None",
    ),
    "ids shape": (
        {
            "q_segment_ids": zeros(2, 5, dtype=int),
            "kv_segment_ids": zeros(2, 5, dtype=int),
        },
        r"q_segment_ids must broadcast to .*\(2, 5\)",
    ),
    "float ids": (
        {"q_segment_ids": zeros(2, 6), "kv_segment_ids": zeros(2, 5, dtype=int)},
        r"q_segment_ids must be integers, got dtype float32",
    ),
    "lengths shape": (
        {"query_seq_lengths": zeros(3, dtype=int)},
        r"query_seq_lengths must broadcast to \[\*B\] = \(2,\), got shape \(3,\)",
    ),
    "lengths rank": (
        {"key_value_seq_lengths": zeros(2, 1, dtype=int)},
        r"key_value_seq_lengths must broadcast .*\(2, 1\)",
    ),
    "float lengths": (
        {"key_value_seq_lengths": zeros(2)},
        r"key_value_seq_lengths must be integers, got dtype float32",
    ),
    "lengths is a float": (
        {"query_seq_lengths": 3.5},
        r"query_seq_lengths must be an int or an array, got float: 3.5",
    ),
    "negative window": ({"window_size": (-1, 0)}, r"window_size must not .*\(-1, 0\)"),
    "window is int": ({"window_size": 4}, r"window_size must be None or .*got 4"),
    "window of three": ({"window_size": (1, 2, 3)}, r"window_size .*\(1, 2, 3\)"),
    "window of floats": ({"window_size": (1.0, 2)}, r"window_size .*\(1\.0, 2\)"),
    "window of bools": ({"window_size": (True, 2)}, r"window_size .*\(True, 2\)"),
    "scale is nan": ({"scale": float("nan")}, r"scale must be a finite .*nan"),
    "scale is text": ({"scale": "1"}, r"scale must be a number, got '1'"),
    "scale is an array": ({"scale": zeros(2)}, r"scale must be a number"),
    "scale is an array of text": ({"scale": np.array("a")}, r"scale must be a .*'a'"),
    "scale is an array of None": ({"scale": np.array(None)}, r"scale must be a .*None"),
    "scale is a bool in an array": ({"scale": np.array(True)}, r"scale must .*True"),
    "scale is a key": ({"scale": jax.random.key(0)}, r"scale must be a number"),
    "scale beyond float32": ({"scale": 1e300}, r"scale must be .*float32, got 1e\+300"),
    "scale beyond float64": ({"scale": 10**400}, r"scale must be .*float32, got 1000"),
    "softcap is a time": (
        {"softcap": np.timedelta64(3, "s")},
        r"softcap must be a number, got .*timedelta64\(3,",
    ),
    "scale is a time": (
        {"scale": np.array(3, "m8[s]")},
        r"scale must be a number, got .*3",
    ),
    "a window of times": (
        {"window_size": (np.timedelta64(3, "s"), None)},
        r"window_size must hold ints or None, got .*timedelta64\(3,",
    ),
    "softcap is 0": ({"softcap": 0.0}, r"softcap must be positive, got 0.0"),
    "softcap is 0 in float32": ({"softcap": 1e-40}, r"softcap must be .*got 1e-40"),
    "softcap above any logit": (
        {"softcap": 1e37},
        r"softcap must be at most 1e\+30, got 1e\+37",
    ),
    "softcap beyond float32": ({"softcap": 1e39}, r"softcap must be .*got 1e\+39"),
    "causal is an int": ({"is_causal": 1}, r"is_causal must be True or False, got 1"),
    "alignment": (
        {"causal_alignment": "top"},
        r"causal_alignment must be one of .*got 'top'",
    ),
    "alignments": (
        {"causal_alignment": np.array([1, 2])},
        r"causal_alignment must be one of .*got array\(\[1, 2\]\)",
    ),
    "precision": ({"precision": "high"}, r"precision must be one of .*got 'high'"),
    "precision in an array": (
        {"precision": np.array("tf32")},
        r"precision must be one of .*got array\('tf32'",
    ),
    "dropout of 1": ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1"),
    "dropout without key": (
        {"dropout_rate": 0.1},
        r"dropout_key must be given with dropout_rate=0.1, got None",
    ),
    "dropout key of no dropout": (
        {"dropout_key": "junk"},
        r"dropout_key must be a key of jax.random, .* got 'junk'",
    ),
    "dropout by a number": (
        {"dropout_rate": 0.1, "dropout_key": 3},
        r"dropout_key must be a key of jax.random, .* got 3",
    ),
    "dropout by many keys": (
        {"dropout_rate": 0.1, "dropout_key": jax.random.split(jax.random.key(0))},
        r"dropout_key must be one key, got an array of keys of shape \(2,\)",
    ),
    "dropout by the type of a key": (
        {"dropout_rate": 0.1, "dropout_key": jax.eval_shape(lambda: jax.random.key(0))},
        r"dropout_key must be an array, got ShapeDtypeStruct\(",
    ),
    "bias in an order of bytes that JAX has not": (
        {"bias": zeros(5, dtype=">f4")},
        r"bias must be an array that JAX takes, got ndarray of dtype >f4",
    ),
    "masked mask": (
        {"mask": np.ma.ones((6, 5), bool)},
        r"mask must be an array that JAX takes, got MaskedArray of dtype bool",
    ),
    "slopes in a list": (
        {"bias": jax_flash.alibi([1.0, 2.0, 3.0, 4.0])},
        r"bias=alibi\(slopes\) must be an array, got list: \[1.0, 2.0",
    ),
    "implementation": (
        {"implementation": "triton"},
        r"implementation must be None, one of .*'cuda'.* got 'triton'",
    ),
    "implementations": (
        {"implementation": ("xla", "triton")},
        r"implementation must be None, .*\('xla', 'triton'\)",
    ),
    "no implementation": ({"implementation": ()}, r"implementation must be .*got \(\)"),
    "no name": ({"implementation": [["xla"]]}, r"implementation must be .*'xla'\]\]"),
    "deterministic": ({"deterministic": None}, r"deterministic must be True or False"),
    "return_lse": ({"return_lse": "yes"}, r"return_lse must be True .*'yes'"),
}

UNSUPPORTED = {
    "float8": (
        {name: zeros(*SHAPES[name], dtype=jnp.float8_e4m3fn) for name in SHAPES},
        r"query of dtype float8_e4m3fn is not supported",
    ),
    "cudnn in float32": (
        {"implementation": "cudnn"},
        r"implementation='cudnn' cannot run this call: .*query of dtype float32",
    ),
    "two that cannot": (
        {
            "implementation": ("cuda", "cudnn"),
            "query": (2, 6, 4, 129),
            "key": (2, 5, 2, 129),
        },
        r"implementation=\('cuda', 'cudnn'\) cannot run this call: cuda: .*; cudnn: ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(case: str) -> None:
    changes, message = UNSUPPORTED[case]
    with pytest.raises(NotImplementedError, match=message):
        call(**changes)


KERNEL_LIMITS = {
    "wide float32": (
        {"query": zeros(2, 6, 4, 129), "key": zeros(2, 5, 2, 129)},
        r"the kernels take widths of at most 128",
    ),
    "wide float32 with a soft cap": (
        {
            "query": zeros(2, 6, 4, 129),
            "key": zeros(2, 5, 2, 129),
            "softcap": 2.0,
            "precision": "tf32",
        },
        r"the kernels take widths of at most 128",
    ),
    "precision": ({"precision": "highest"}, r"precision='highest'"),
    "width": (
        {"query": zeros(2, 6, 4, 257), "key": zeros(2, 5, 2, 257)},
        r"H=257 and Hv=7",
    ),
    "batch dimensions": (
        {name: zeros(*([1] * 9), 4, 2, 8) for name in SHAPES},
        r"query has 9 batch dimensions",
    ),
}


@pytest.mark.parametrize("case", KERNEL_LIMITS)
def test_kernel_limits(kernels: None, case: str) -> None:
    changes, message = KERNEL_LIMITS[case]
    dtype = jnp.float32 if "float32" in case else jnp.bfloat16
    arrays = {name: zeros(*shape) for name, shape in SHAPES.items()} | changes
    arrays |= {name: arrays[name].astype(dtype) for name in SHAPES}
    with pytest.raises(NotImplementedError, match=f"cannot run this call.*{message}"):
        mha(**arrays, implementation="cuda")
    mha(**arrays)


def test_no_slopes() -> None:
    with pytest.raises(ValueError, match="slopes must be an array, got None"):
        jax_flash.alibi(None)


def test_slopes_that_became_none() -> None:
    """In a tree, of which a part was taken: not the same as no bias."""
    bias = jax.tree.map(lambda _: None, jax_flash.alibi(jnp.ones(4)))
    x, cache = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 6, 2, 8))
    lengths = jnp.ones(2, jnp.int32)
    for run in (
        lambda: call(bias=bias),
        lambda: jax_flash.explain(x, x, x, bias),
        lambda: jax_flash.mha_qkvpacked(jnp.ones((2, 5, 64)), 4, 2, bias=bias),
        lambda: jax_flash.decode_mha(x, cache, cache, lengths, bias=bias),
    ):
        with pytest.raises(ValueError, match=r"bias=alibi\(slopes\) .*got None"):
            run()


def test_cuda_without_extension_says_so() -> None:
    from jax_flash._src import registry

    if registry.extension().missing is None:
        pytest.skip("the extension is there")
    with pytest.raises(NotImplementedError, match="without its CUDA extension"):
        call(implementation="cuda")


def test_cuda_on_another_platform(kernels: None) -> None:
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in SHAPES.values()]
    with pytest.raises(NotImplementedError, match=r"implementation='cuda' .*cpu"):
        mha(*arrays, implementation="cuda")
    with pytest.raises(NotImplementedError, match=r"implementation='cuda' .*cpu"):
        jax.jit(functools.partial(mha, implementation="cuda"))(*arrays)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", 0.5),
        ("is_causal", True),
        ("window_size", (1, 2)),
        ("softcap", 2.0),
        ("dropout_rate", 0.0),
        ("deterministic", True),
        ("return_lse", True),
    ],
)
def test_traced_statics(name: str, value: Any) -> None:
    @jax.jit
    def f(traced):
        return call(**{name: traced})

    with pytest.raises(ValueError, match=f"{name} must be static, got a traced value"):
        f(value)


def test_dot_product_attention() -> None:
    query, key = jnp.zeros((2, 6, 4, 8)), jnp.zeros((2, 5, 2, 8))
    f: Any = jax_flash.dot_product_attention
    with pytest.raises(ValueError, match=r"value must have the shape of key"):
        f(query, key, jnp.zeros((2, 5, 2, 7)))
    with pytest.raises(ValueError, match=r"query must be \[B,T,N,H\] or \[T,N,H\]"):
        f(query[None], key[None], key[None])
    with pytest.raises(ValueError, match=r"local_window_size must .*\(-1, 2\)"):
        f(query, key, key, local_window_size=(-1, 2))
    with pytest.raises(ValueError, match=r"implementation must be .*'triton'"):
        f(query, key, key, implementation="triton")
    with pytest.raises(ValueError, match=r"return_residual must be .*got 1"):
        f(query, key, key, return_residual=1)
    with pytest.raises(ValueError, match=r"value must be an array, got None"):
        f(query, key, None)
    with pytest.raises(ValueError, match=r"bias must be an array, got str: 'x'"):
        f(query, key, key, "x")


def test_numpy_and_python_values_are_accepted() -> None:
    expected = call(scale=0.5, query_seq_lengths=jnp.array([3, 3]), window_size=(2, 2))
    got = call(
        scale=np.float32(0.5),
        query_seq_lengths=3,
        window_size=[np.int64(2), 2],
        is_causal=np.bool_(False),
    )
    np.testing.assert_array_equal(got, expected)


def test_lengths_beyond_int32() -> None:
    got = call(query_seq_lengths=10**30, key_value_seq_lengths=-(10**30))
    np.testing.assert_array_equal(got, call(key_value_seq_lengths=0))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64])
def test_lengths_of_any_integer_dtype(dtype: Any) -> None:
    lengths = np.array([3, 100], dtype)
    got = call(query_seq_lengths=lengths)
    np.testing.assert_array_equal(got, call(query_seq_lengths=jnp.array([3, 6])))
    got = jax.jit(lambda n: call(query_seq_lengths=n))(lengths)
    np.testing.assert_array_equal(got, call(query_seq_lengths=jnp.array([3, 6])))


def test_numpy_integers_of_4_bits() -> None:
    cache, query = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 4, 8))

    def run(dtype: Any) -> tuple[Any, Any]:
        ids = np.array([-1, 0, 1, 1, 2, 2], dtype)
        attended = call(
            key=(2, 6, 2, 8),
            value=jnp.arange(168.0).reshape(2, 6, 2, 7),
            q_segment_ids=ids,
            kv_segment_ids=ids[::-1],
            query_seq_lengths=np.array([5, 6], dtype),
        )
        lengths = np.array([0, 5], dtype)
        return attended, jax_flash.decode_mha(query, cache, cache, lengths)

    jax.tree.map(np.testing.assert_array_equal, run(jnp.int4), run(np.int32))


IMPORT = """
import sys
sys.modules[{blocked!r}] = None
import jax_flash, jax.numpy as jnp
x = jnp.ones((1, 2, 1, 4))
assert jax_flash.mha(x, x, x).shape == x.shape
others = {{"flax", "chex", "pytest", "matplotlib"}} - {{{blocked!r}}}
assert not others & set(sys.modules), others & set(sys.modules)
"""


@pytest.mark.parametrize("blocked", ["flax", "jax_flash._kernels"])
def test_import_without(blocked: str) -> None:
    """Neither Flax nor the extension is needed to import and run."""
    program = IMPORT.format(blocked=blocked)
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_type_is_no_array() -> None:
    """Of all that look at arrays, with the name of the argument."""
    kind = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    x, cache = jnp.ones((2, 4, 8)), jnp.ones((2, 6, 4, 8))
    lengths = jnp.zeros(2, jnp.int32)
    for name, run in {
        "query": lambda: jax_flash.decode_mha(kind, cache, cache, lengths),
        "k_new": lambda: jax_flash.append_kv(cache, cache, kind, x, lengths),
        "x": lambda: jax_flash.rope(kind, 3),
        "weight": lambda: jax_flash.rms_norm(x, jax.ShapeDtypeStruct((8,), x.dtype)),
        "logits": lambda: jax_flash.sample(kind, jax.random.key(0)),
        "qkv": lambda: jax_flash.mha_qkvpacked(kind, 2, 1),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be an array, got .*Shape"):
            run()
