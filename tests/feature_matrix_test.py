"""The table of what runs where, and the page made from it."""

import inspect
import pathlib
import sys
from typing import Any

import jax

import jax_flash
from jax_flash import backends
from jax_flash._src import builtin, intervals, plan, registry
from jax_flash._src.config import OPERANDS

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tools import feature_matrix

ARRAYS = ("alibi_slopes", "bias", "mask")


def test_page_is_current() -> None:
    assert feature_matrix.PAGE.read_text() == feature_matrix.page()


def test_table_knows_every_option() -> None:
    arrays = set(OPERANDS[3:]) - {"dropout_seeds"}
    numbers = set(backends.DEFAULTS) - {"dropout_key"}  # which dropout_rate needs
    assert set(plan.OPTIONS) == arrays | numbers
    assert numbers >= set(builtin.NUMBERS)


def test_decode_column_has_the_arguments_of_decode_mha() -> None:
    taken = {*inspect.signature(jax_flash.decode_mha).parameters, "alibi_slopes"}
    for name, support in plan.OPTIONS.items():
        # Of `bias` it takes `alibi` alone.
        assert (support.decode is not None) == (name in taken - {"bias"}), name


def test_values_that_the_page_names() -> None:
    """Calls that cuDNN takes may lack a device, at which it looks last."""

    def why_not(dtype: str, keys: int = 128, **options: Any) -> tuple[Any, Any]:
        query, key = (
            jax.ShapeDtypeStruct((2, length, 4, 64), dtype) for length in (128, keys)
        )
        found = jax_flash.explain(query, key, key, **options).reasons
        no_device = found["cudnn"] == "there is no CUDA device in this process"
        return found["cuda"], None if no_device else found["cudnn"]

    with registry.assume_kernels():
        for dtype in ("bfloat16", "float16"):
            for precision in ("highest", "tf32"):
                assert None not in why_not(dtype, precision=precision)
        for precision in ("highest", "tf32", None):
            cuda, cudnn = why_not("float32", precision=precision)
            assert cuda is None
            assert "cuDNN takes bfloat16 and float16" in cudnn
        for precision in ("bf16", "f16"):
            assert why_not("float32", precision=precision) == (None, None)
        for alignment in ("bottom_right", "top_left"):
            options = {"is_causal": True, "causal_alignment": alignment}
            assert why_not("bfloat16", **options) == (None, None)
            cuda, cudnn = why_not("bfloat16", keys=256, **options)
            assert cuda is None
            assert (cudnn is None) == (alignment == "top_left")


def test_kernels_take_what_their_calls_have() -> None:
    taken = {n for n in OPERANDS[3:] if n != "dropout_seeds" and plan.supported(n)}
    joined = {"sinks"}  # to what the kernels compute without them
    assert taken == {*intervals.OPERANDS, *ARRAYS} | joined
