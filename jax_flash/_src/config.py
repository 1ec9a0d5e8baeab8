"""The one static argument of the package, and the canonical operands it describes.

Lives here: `AttentionConfig`, the names of the operands, how many trailing (non batch)
dimensions each has. Does not live here: checking of user arguments (`validate`).

Canonical operands: every array carries the same number of leading batch dimensions,
each of size 1 (shared along it) or full. `vmap` then only adds one leading dimension,
so an operand that is not mapped is never copied.
"""

import dataclasses

OPERANDS: tuple[str, ...] = (
    "query",  # [*B, T, N, H]
    "key",  # [*B, S, K, H]
    "value",  # [*B, S, K, Hv]
    "bias",  # [*B, N|1, T|1, S|1] floating
    "mask",  # [*B, N|1, T|1, S|1] bool, True = attend
    "sinks",  # [*B, N] floating
    "alibi_slopes",  # [*B, N] floating
    "dropout_seeds",  # [*B, N, 2] uint32
    "q_segment_ids",  # [*B, T] int32
    "kv_segment_ids",  # [*B, S] int32
    "query_seq_lengths",  # [*B] int32
    "key_value_seq_lengths",  # [*B] int32
    "cu_seqlens_q",  # [*B, sequences + 1] int32
    "cu_seqlens_k",  # [*B, sequences + 1] int32
)
"""Every operand in the order in which primitives and kernels take them."""

QKV = "qkv"
"""In place of query, key and value: [*B, T, (N + 2 K) H], see `packed`."""

RESIDUALS: tuple[str, ...] = ("out", "lse")
"""What the derivative needs besides the operands: [*B, T, N, Hv] and [*B, N, T]."""

TRAILING = {
    "query": 3,
    "key": 3,
    "value": 3,
    "qkv": 2,
    "bias": 3,
    "mask": 3,
    "sinks": 1,
    "alibi_slopes": 1,
    "dropout_seeds": 2,
    "q_segment_ids": 1,
    "kv_segment_ids": 1,
    "query_seq_lengths": 0,
    "key_value_seq_lengths": 0,
    "cu_seqlens_q": 1,
    "cu_seqlens_k": 1,
    "out": 3,
    "lse": 2,
    "dout": 3,
    "dlse": 2,
}
"""Number of dimensions after the batch dimensions."""

UNBOUNDED = -1
"""A window side that reaches to the end of the sequence."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Everything static about one attention call, from `mha` down to the lowering.

    Attributes:
      scale: factor of the logits.
      window_left: keys visible before the aligned position, -1 = unbounded.
      window_right: keys visible after it, -1 = unbounded; causal is folded in as 0.
      bottom_right: whether the last valid query is aligned with the last valid key.
      softcap: bound of `softcap * tanh(logits / softcap)`, None = no cap.
      dropout_rate: share of the probabilities that are dropped, see `dropout`.
      max_seqlen_q: bound of the queries of a packed sequence, None = all of T.
      max_seqlen_k: bound of its keys, None = all of S.
      precision: None, "highest" or "tf32".
      deterministic: whether gradients must be bitwise reproducible. The kernels sum in
        a fixed order then; the jnp path always does, as far as XLA's operations do.
      present: the operands there are, in the order of `OPERANDS`.
      qkv_heads: N and K where the operand `QKV` takes the place of the first three.
      orders: for query, key and value (or the one in their place) the physical order of
        the dimensions, major to minor. A hint from `vmap`: the kernel reads that
        layout, so no transpose is run.
      implementations: which of "cuda" and "xla" may serve the call when it is lowered.
    """

    scale: float
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    bottom_right: bool = True
    softcap: float | None = None
    dropout_rate: float = 0.0
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    precision: str | None = None
    deterministic: bool = False
    present: tuple[str, ...] = OPERANDS[:3]
    qkv_heads: tuple[int, int] | None = None
    orders: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),) * 3
    implementations: tuple[str, ...] = ("xla",)


@dataclasses.dataclass(frozen=True)
class Backward:
    """What one gradient computation returns.

    Attributes:
      perturbed: names of the operands whose gradients are wanted.
      shared: for each of them the batch dimensions to sum over, counted from the last
        batch dimension (-1), so that `vmap` may add leading ones.
      has_dlse: whether a cotangent of lse is among the operands.
    """

    perturbed: tuple[str, ...]
    shared: tuple[tuple[int, ...], ...]
    has_dlse: bool
