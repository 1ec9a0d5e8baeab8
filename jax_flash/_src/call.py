"""`Call`, one attention call without its data, and `Backend`, who may run it.

Lives here: the two descriptions. Which backends there are is in `builtin` and
`jax_flash.backends`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jax_flash._src.config import OPERANDS

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Call:
    """A validated call of `mha`; arrays as `jax.ShapeDtypeStruct`, None if absent.

    Arrays have their canonical ranks: at least one batch dimension, each of size 1
    where the array is shared along it (see `OPERANDS` in `config`).
    """

    query: Shape
    key: Shape
    value: Shape
    bias: Shape | None = None
    mask: Shape | None = None
    sinks: Shape | None = None
    alibi_slopes: Shape | None = None
    dropout_seeds: Shape | None = None
    q_segment_ids: Shape | None = None
    kv_segment_ids: Shape | None = None
    query_seq_lengths: Shape | None = None
    key_value_seq_lengths: Shape | None = None
    cu_seqlens_q: Shape | None = None
    cu_seqlens_k: Shape | None = None
    scale: float = 1.0
    is_causal: bool = False
    causal_alignment: str = "bottom_right"
    window_size: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    dropout_rate: float = 0.0
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    deterministic: bool = False
    precision: str | None = None
    return_lse: bool = False

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the arrays given, in canonical order."""
        return tuple(n for n in OPERANDS if getattr(self, n) is not None)

    @property
    def dtype(self) -> Any:
        """The dtype of query, key and value."""
        return self.query.dtype

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.query.shape[:-3])

    @property
    def query_length(self) -> int:
        return self.query.shape[-3]

    @property
    def key_length(self) -> int:
        return self.key.shape[-3]

    @property
    def num_heads(self) -> int:
        return self.query.shape[-2]

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1]

    @property
    def value_dim(self) -> int:
        return self.value.shape[-1]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    Attributes:
      name: what `implementation=` calls it.
      platforms: the platforms it runs on ("cuda", "rocm", "tpu", "cpu"); empty = any.
      supports: `supports(call)` is None if it can run the call, else the reason, which
        names the argument and its value.
      run: `run(call, operands) -> (out, lse)` on canonical operands, a dict of arrays
        with the shapes in `call`; lse may be None if `call.return_lse` is False. It
        must be traceable, and differentiable where gradients are wanted.
      kv_layout: the layout in which `run` takes key and value, "BSKH" or "BKSH".
      details: `details(call)` says how `run` would go about a call that it supports;
        `explain` shows it.
    """

    name: str
    platforms: tuple[str, ...]
    supports: Callable[[Call], str | None]
    run: Callable[[Call, dict[str, jax.Array]], tuple[jax.Array, jax.Array | None]]
    kv_layout: str = "BSKH"
    details: Callable[[Call], str] | None = None
