"""The table of what runs where, and the page made from it."""

import pathlib
import sys

from jax_flash._src import builtin, intervals, plan
from jax_flash._src.config import OPERANDS

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tools import feature_matrix

ARRAYS = ("alibi_slopes", "bias", "mask")


def test_page_is_current() -> None:
    assert feature_matrix.PAGE.read_text() == feature_matrix.page()


def test_table_knows_every_option() -> None:
    arrays = set(OPERANDS[3:]) - {"dropout_seeds"}
    assert set(plan.OPTIONS) == arrays | set(builtin.NUMBERS)


def test_kernels_take_what_their_calls_have() -> None:
    taken = {n for n in OPERANDS[3:] if n != "dropout_seeds" and plan.supported(n)}
    joined = {"sinks"}  # to what the kernels compute without them
    assert taken == {*intervals.OPERANDS, *ARRAYS} | joined
