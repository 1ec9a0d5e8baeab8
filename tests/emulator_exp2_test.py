"""Exponentials on the FMA pipe, of the sm_90 forward, as in emulator_test.py."""

import ctypes
import shutil

import emulator_test
import numpy as np
import oracle
import pytest

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulator_test.build("fwd_exp2", tmp_path_factory.mktemp("exp2"))


def exponentials(
    library: ctypes.CDLL, scores: np.ndarray, reference: float = 0, log2: float = 1
) -> np.ndarray:
    scores, results = scores.astype(np.float32), np.zeros(len(scores), np.float32)
    library.exp2_polynomial(
        scores.ctypes.data_as(ctypes.c_void_p),
        results.ctypes.data_as(ctypes.c_void_p),
        len(scores),
        ctypes.c_float(reference),
        ctypes.c_float(log2),
    )
    return results


def test_errors_of_the_polynomial(library: ctypes.CDLL) -> None:
    scores = np.linspace(-126, 127.99, 500_001, dtype=np.float32)
    exact = np.exp2(scores.astype(np.float64))
    error = exponentials(library, scores) / exact - 1
    off = 2**-16 + 2**-23 * np.abs(scores)
    assert (np.abs(error) <= 2.9e-6 + off * np.log(2)).all()
    # Of a row with large logits; its reference point itself is rounded.
    scores = np.linspace(-400, -150, 10_001, dtype=np.float32)
    exact = np.exp2((scores.astype(np.float64) + 160) * 0.25)
    error = exponentials(library, scores, -160, 0.25) / exact - 1
    assert np.abs(error).max() <= 2.5e-5


def test_limits_of_the_polynomial(library: ctypes.CDLL) -> None:
    """What `ex2` gives, but that NaN takes a row out of the range."""
    infinity = np.inf
    scores = np.array([-infinity, -3e38, -1e4, -127.01, 0, 128, 1e4, infinity, np.nan])
    expected = [0, 0, 0, 0, 1, infinity, infinity, infinity, infinity]
    results = exponentials(library, scores)
    np.testing.assert_allclose(results, expected, rtol=6e-6)
    # Of a row that has seen nothing but -inf.
    scores = np.array([-infinity, -3e38, 0, 5])
    expected = [0, infinity, infinity, infinity]
    results = exponentials(library, scores, -infinity, 0.1803)
    np.testing.assert_array_equal(results, expected)


CASES = {
    "causal": ((1, 500, 500, 2, 1), {"is_causal": True}),
    "packed heads": ((2, 30, 700, 4, 2), {}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_forward(library: ctypes.CDLL, case: str, dtype: str) -> None:
    shape, given = CASES[case]
    arrays = emulator_test.problem(shape, 64, 64, dtype)
    emulator_test.check_forward(library.mha_fwd_sm90_mixed, arrays, given, 2)


@pytest.mark.parametrize("jump", [5, 100])
def test_forward_of_growing_scores(library: ctypes.CDLL, jump: float) -> None:
    """Rows leave the range, and overflow, by exponentials of either kind."""
    arrays = emulator_test.problem((1, 170, 600, 1, 1), 64, 64, "bfloat16")
    arrays["query"][..., 0] = 32
    arrays["key"][..., 0] = emulator_test.growing(600, jump)[None, :, None] / 4
    emulator_test.check_forward(library.mha_fwd_sm90_mixed, arrays, {}, 1)


def test_a_row_does_not_depend_on_its_neighbours(library: ctypes.CDLL) -> None:
    """Not on one that overflows, either, whose lanes make this one's exponentials."""
    arrays = emulator_test.problem((1, 128, 600, 1, 1), 64, 64, "bfloat16")
    results = []
    for huge in (False, True):
        if huge:
            arrays["query"][0, ::16] *= 2**20
        out = emulator_test.aligned((1, 128, 1, 64), arrays["query"].dtype)
        lse = emulator_test.aligned((1, 1, 128), np.float32)
        outputs = {"out": out, "lse": lse}
        emulator_test.call(
            library.mha_fwd_sm90_mixed, {}, arrays, outputs, multiprocessors=1
        )
        results.append((out[0], lse[0, 0]))
    others = np.arange(128) % 16 != 0
    for before, after in zip(*results, strict=True):
        assert before[others].tobytes() == after[others].tobytes()
    expected = oracle.attention(*arrays.values())
    np.testing.assert_allclose(results[1][1], expected.lse[0, 0], rtol=1e-5)


def test_nan_reaches_the_output(library: ctypes.CDLL) -> None:
    """Of a key, wherever its exponentials are made."""
    arrays = emulator_test.problem((1, 70, 300, 1, 1), 64, 64, "bfloat16")
    for key in range(16):
        spoilt = dict(arrays, key=arrays["key"].copy())
        spoilt["key"][0, key, 0, 3] = np.nan
        out = emulator_test.aligned((1, 70, 1, 64), arrays["query"].dtype)
        lse = emulator_test.aligned((1, 1, 70), np.float32)
        outputs = {"out": out, "lse": lse}
        emulator_test.call(
            library.mha_fwd_sm90_mixed, {}, spoilt, outputs, multiprocessors=1
        )
        assert np.isnan(out.astype(np.float32)).all()
        assert np.isnan(lse).all()
