"""The registry of backends, the choice among them, and `explain`."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, cuda_text, dense, flash, kernel_calls, loss, qkv

import jax_flash
from jax_flash import backends, mha
from jax_flash._src import builtin, plan, registry

CUDNN_CALL = {"query": (2, 64, 4, 64), "key": (2, 64, 2, 64), "value": (2, 64, 2, 64)}


def shapes(dtype: Any = jnp.bfloat16, **changes: tuple[int, ...]) -> dict[str, Any]:
    return {
        n: jax.ShapeDtypeStruct(s, dtype) for n, s in (CUDNN_CALL | changes).items()
    }


@pytest.fixture
def restore() -> Iterator[None]:
    before = list(backends._backends)
    yield
    backends._backends[:] = before


def constant(call: backends.Call, operands: dict[str, jax.Array]):
    """A backend that returns the value 7, recognisable anywhere."""
    shape = (*call.batch, call.query_length, call.num_heads, call.value_dim)
    lse_shape = (*call.batch, call.num_heads, call.query_length)
    return jnp.full(shape, 7, call.dtype), jnp.full(lse_shape, 7, jnp.float32)


def seven(**changes: Any) -> backends.Backend:
    fields = {
        "name": "seven",
        "platforms": (),
        "supports": lambda call: None,
        "run": constant,
    }
    return backends.Backend(**(fields | changes))


def test_names() -> None:
    assert backends.names() == ("cuda", "cudnn", "xla")


@pytest.mark.usefixtures("restore")
def test_registered_backend_runs_by_name() -> None:
    backends.register(seven())
    assert backends.names()[-1] == "seven"
    assert (mha(*qkv(), implementation="seven") == 7).all()
    out, lse = mha(*qkv(), implementation=("seven", "xla"), return_lse=True)
    assert (out == 7).all()
    assert (lse == 7).all()
    assert (mha(*qkv()) != 7).any()
    backends.unregister("seven")
    with pytest.raises(ValueError, match="'seven'"):
        mha(*qkv(), implementation="seven")


@pytest.mark.usefixtures("restore")
def test_registered_backend_runs_in_order() -> None:
    backends.register(
        seven(supports=lambda call: None if call.is_causal else "is_causal=False"),
        before="cuda",
    )
    assert backends.names() == ("seven", "cuda", "cudnn", "xla")
    assert (mha(*qkv(), is_causal=True) == 7).all()
    assert_close(mha(*qkv()), dense(*qkv())[0])
    assert "seven no: is_causal=False" in str(jax_flash.explain(*qkv()))


@pytest.mark.usefixtures("restore")
def test_backend_of_one_platform(kernels: None) -> None:
    args = [x.astype(jnp.bfloat16) for x in qkv()]
    backends.register(seven(platforms=("cpu",)), before="xla")
    assert (mha(*args) == 7).all()
    assert (jax.jit(mha)(*args) == 7).all()
    assert (jax.vmap(mha)(*args) == 7).all()
    assert kernel_calls(mha, *args) == 1
    assert jax_flash.explain(*args).chosen == {
        "cuda": "cuda",
        "rocm": "xla",
        "tpu": "xla",
        "cpu": "seven",
    }


@pytest.mark.usefixtures("restore")
def test_backend_of_another_platform() -> None:
    backends.register(seven(platforms=("cuda",)), before="cuda")
    got = jax.jit(jax.grad(lambda *a: loss(flash)(*a), (0, 1, 2)))(*qkv())
    assert_close(got, jax.grad(loss(dense), (0, 1, 2))(*qkv()))
    assert "7.000000e+00" in cuda_text(mha, *qkv())
    with pytest.raises(NotImplementedError, match="cuda"):
        mha(*qkv(), implementation="seven")


@pytest.mark.usefixtures("restore")
def test_key_value_layout() -> None:
    def run(call: backends.Call, operands: dict[str, jax.Array]):
        key, value = (jnp.swapaxes(operands[n], -3, -2) for n in ("key", "value"))
        assert operands["key"].shape[1] == call.num_kv_heads
        return dense(operands["query"], key, value)

    backends.register(seven(run=run, kv_layout="BKSH"))
    assert_close(mha(*qkv(), implementation="seven"), dense(*qkv())[0])


@pytest.mark.usefixtures("restore")
def test_backend_without_lse() -> None:
    def run(call: backends.Call, operands: dict[str, jax.Array]):
        return constant(call, operands)[0], None

    backends.register(seven(run=run))
    assert (mha(*qkv(), implementation="seven") == 7).all()
    with pytest.raises(ValueError, match=r"'seven' supports .* returned no lse"):
        mha(*qkv(), implementation="seven", return_lse=True)


@pytest.mark.usefixtures("restore")
def test_backend_of_another_layout() -> None:
    def run(call: backends.Call, operands: dict[str, jax.Array]):
        out, lse = constant(call, operands)
        return jnp.swapaxes(out, -3, -2), lse

    backends.register(seven(run=run))
    query, key, value = qkv()
    *batch, rows, heads, width = (*query.shape[:-1], value.shape[-1])
    want, got = (*batch, rows, heads, width), (*batch, heads, rows, width)
    message = f"'seven' must return out of shape {want}, got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        mha(query, key, value, implementation="seven")


@pytest.mark.parametrize(
    ("backend", "before", "message"),
    [
        ("cuda", None, "backend must be a Backend, got 'cuda'"),
        (seven(name="xla"), None, "'xla' is taken"),
        (seven(), "eight", "before must be one of .* got 'eight'"),
        (seven(kv_layout="SBKH"), None, r"kv_layout must be one of .*'SBKH'"),
        (seven(platforms=("gpu",)), None, "platforms must be among .*'gpu'"),
    ],
)
def test_wrong_registration(backend, before, message) -> None:
    with pytest.raises(ValueError, match=message):
        backends.register(backend, before=before)


def test_built_in_backends_stay() -> None:
    with pytest.raises(ValueError, match="'xla'"):
        backends.unregister("xla")


CUDNN_REASONS = {
    "float32": (shapes(jnp.float32), "query of dtype float32"),
    "bias": (shapes() | {"bias": np.zeros((64, 64), np.float32)}, "bias"),
    "lengths": (shapes() | {"query_seq_lengths": 5}, "query_seq_lengths"),
    "lse": (shapes() | {"return_lse": True}, "return_lse=True"),
    "softcap": (shapes() | {"softcap": 3.0}, "softcap=3.0"),
    "precision": (shapes() | {"precision": "highest"}, "precision='highest'"),
    "deterministic": (shapes() | {"deterministic": True}, "deterministic=True"),
    "value width": (shapes(value=(2, 64, 2, 32)), "Hv=32"),
    "width": (
        shapes(query=(2, 64, 4, 20), key=(2, 64, 2, 20), value=(2, 64, 2, 20)),
        "H=20",
    ),
    "alignment": (
        shapes(query=(2, 32, 4, 64)) | {"is_causal": True},
        "causal_alignment='bottom_right' with T=32 and S=64",
    ),
    "window": (shapes() | {"window_size": (3, 3)}, r"window_size=(3, 3)"),
    "right window": (shapes() | {"window_size": (None, 0)}, r"window_size=(None, 0)"),
    "empty": (shapes(query=(2, 0, 4, 64)), "is empty"),
}


@pytest.mark.parametrize("case", CUDNN_REASONS)
def test_cudnn_reasons(case: str) -> None:
    arguments, reason = CUDNN_REASONS[case]
    explanation = jax_flash.explain(**arguments)
    assert reason in str(explanation.reasons["cudnn"])
    assert explanation.chosen["cuda"] != "cudnn"


def test_cudnn_needs_a_device() -> None:
    reason = jax_flash.explain(**shapes(), is_causal=True).reasons["cudnn"]
    assert reason == "there is no CUDA device in this process"


def test_cudnn_is_chosen_where_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(builtin, "_has_cuda_device", lambda: True)
    explanation = jax_flash.explain(**shapes(), is_causal=True)
    if explanation.reasons["cuda"] is None:
        pytest.skip("the kernels are there")
    assert explanation.chosen["cuda"] == "cudnn"
    assert explanation.chosen["cpu"] == "xla"
    args = [jnp.ones(s.shape, s.dtype) for s in shapes().values()]
    assert_close(mha(*args, is_causal=True), jnp.ones(args[0].shape), 1e-2)


def test_kernels_are_chosen_where_they_are(kernels: None) -> None:
    explanation = jax_flash.explain(**shapes(), is_causal=True)
    assert explanation.chosen == {
        "cuda": "cuda",
        "rocm": "xla",
        "tpu": "xla",
        "cpu": "xla",
    }
    text = str(explanation)
    for line in (
        "mha of query bfloat16[2,64,4,64], key bfloat16[2,64,2,64]",
        "is_causal=True",
        "  cuda  cuda",
        "  cpu   xla",
        "  cuda  can run it on cuda",
        "  xla   can run it on every platform",
    ):
        assert line in text


BOTH_64 = "sm90 64x64 on compute capability 9.0, sm80 64x64 on others"
EXPLAINED_KERNELS = {
    "both": (
        shapes(),
        f"{BOTH_64}; gradients by {BOTH_64}",
    ),
    "narrow": (
        shapes(query=(2, 64, 4, 32), key=(2, 64, 2, 32), value=(2, 64, 2, 32)),
        "sm90 64x64 on compute capability 9.0, sm80 32x32 on others; "
        f"gradients by {BOTH_64}",
    ),
    "odd width": (
        shapes(value=(2, 64, 2, 60)),
        "sm80 64x64; gradients by sm80 64x64",
    ),
    "batch": (
        shapes(
            query=(2, 3, 4, 64, 4, 64),
            key=(2, 3, 4, 64, 2, 64),
            value=(2, 3, 4, 64, 2, 64),
        )
        | {"query_seq_lengths": np.ones((1, 3, 1), np.int32)},
        "sm80 64x64; gradients by sm80 64x64",
    ),
}


@pytest.mark.parametrize("case", EXPLAINED_KERNELS)
def test_explain_names_the_kernels(case: str, kernels: None) -> None:
    arguments, details = EXPLAINED_KERNELS[case]
    explanation = jax_flash.explain(**arguments)
    assert explanation.details == {"cuda": details}
    assert f"  cuda  can run it on cuda: {details}\n" in str(explanation)


def test_explain_honours_force_sm80() -> None:
    with registry.assume_kernels(force_sm80=True):
        details = {"cuda": "sm80 64x64; gradients by sm80 64x64"}
        assert jax_flash.explain(**shapes()).details == details


def test_explain_says_why_no_kernel_runs_gradients() -> None:
    forward = [kernel for kernel in plan.KERNELS if kernel.op == "mha_fwd"]
    with registry.assume_kernels(forward):
        details = jax_flash.explain(**shapes()).details["cuda"]
    assert details == (
        f"{BOTH_64}; gradients by jnp: no kernel for H=64 and Hv=64 of query and "
        "value: sm90 64x64 is not among the kernels that were built"
    )


def test_explain_reports_what_mha_would_raise() -> None:
    explanation = jax_flash.explain(**shapes(jnp.float32), implementation="cudnn")
    assert set(explanation.chosen.values()) == {None}
    assert "cpu   nothing" in str(explanation)
    with pytest.raises(ValueError, match="window_size"):
        jax_flash.explain(**shapes(), window_size=3)
    with pytest.raises(TypeError, match="'is_casual'"):
        jax_flash.explain(**shapes(), is_casual=True)


def test_explain_knows_every_argument_of_mha() -> None:
    parameters = inspect.signature(mha).parameters
    arrays = {"query", "key", "value", "bias", "mask", *backends.ARRAYS}
    assert set(parameters) == arrays | set(backends.DEFAULTS) | {"implementation"}
    for name, default in backends.DEFAULTS.items():
        assert parameters[name].default == default
