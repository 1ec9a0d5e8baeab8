"""`sample` and `top_k` through `jax.export`, with symbolic sizes."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_flash import sample, top_k
from jax_flash._src import registry

KEY = jax.random.key(7)
OPTIONS: dict[str, Any] = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
TARGETS = (registry.SAMPLE_TARGET, registry.TOP_K_TARGET)
CHECKS = [export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
LIMITS = ("v <= 1048576", "v >= 3")


def logits_of(rows: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    return (3 * rng.standard_normal((rows, size))).astype(np.float32)


def drawn(logits: Any, allowed: Any) -> tuple[jax.Array, ...]:
    tokens = sample(logits, KEY, mask=allowed, **OPTIONS)
    return tokens, sample(logits, KEY, mask=allowed[0]), *top_k(logits, 3)


def symbolic(shape: str, *constraints: str, dtype: Any = jnp.float32) -> Any:
    sizes = export.symbolic_shape(shape, constraints=constraints)
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
@pytest.mark.parametrize(
    ("shape", "constraints"), [("b, 40", ()), ("3, v", LIMITS), ("b, v", LIMITS)]
)
def test_symbolic_sizes(
    kernels: None, platforms: tuple[str, ...], shape: str, constraints: tuple[str, ...]
) -> None:
    given = symbolic(shape, *constraints)
    allowed = jax.ShapeDtypeStruct(given.shape, bool)
    exported = export.export(
        jax.jit(drawn), platforms=platforms, disabled_checks=CHECKS
    )(given, allowed)
    for target in TARGETS:
        assert (target in exported.mlir_module()) == ("cuda" in platforms)
    loaded = export.deserialize(exported.serialize())
    for rows in (1, 3) if "b" in shape else (3,):
        for size in (3, 40, 1000) if "v" in shape else (40,):
            logits = logits_of(rows, size)
            args = logits, logits_of(rows, size + 1)[:, 1:] > -3
            for got, want in zip(loaded.call(*args), drawn(*args), strict=True):
                np.testing.assert_array_equal(got, want)


def test_a_vocabulary_without_a_limit() -> None:
    """Sums of weights are exact up to 2^20 tokens, so that V must have that limit."""
    text = "more than 1048576 is not supported; symbolic, it needs the constraint"
    message = rf"logits of shape \(b, v\): .*{re.escape(text)} 'v <= 1048576'"
    with pytest.raises(NotImplementedError, match=message):
        export.export(jax.jit(lambda x: sample(x, KEY)))(symbolic("b, v"))
    with pytest.raises(NotImplementedError, match=message):
        export.export(jax.jit(lambda x: top_k(x, 3)))(symbolic("b, v"))
    exported = export.export(jax.jit(lambda x: sample(x, KEY)))(
        symbolic("b, v", LIMITS[0])
    )
    with pytest.raises(ValueError, match="v <= 1048576"):
        exported.call(np.zeros((1, (1 << 20) + 1), np.float32))


def test_k_of_a_symbolic_vocabulary() -> None:
    f = jax.jit(lambda x: top_k(x, 3))
    message = r"k=3 of logits of shape \(2, v\) .* needs the constraint 'v >= 3'"
    with pytest.raises(NotImplementedError, match=message):
        export.export(f)(symbolic("2, v", LIMITS[0]))
    with pytest.raises(ValueError, match="k must be from 0 to V=v, got 3"):
        export.export(f)(symbolic("2, v", "v <= 2"))
    with pytest.raises(ValueError, match="k must be from 0 to V=v, got -1"):
        export.export(jax.jit(lambda x: top_k(x, -1)))(symbolic("2, v", LIMITS[0]))
