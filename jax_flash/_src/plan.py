"""What the CUDA kernels can run: pure functions of static facts.

Lives here: the table of kernel instantiations (the same as in `csrc/*/inst` and
`jax_flash._kernels.kernels()`), the choice of one for a call (the same as
`jax_flash._kernels.choose_kernel`, which decides at run time), and the size of the
backward's workspace; a test holds them together. Does not live here: whether kernels
were built (`registry`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterable
from typing import Any

from jax import core

HEAD_DIMS = {
    "mha_fwd": {
        "sm90": (
            (64, 64),
            (96, 96),
            (128, 128),
            (192, 128),
            (192, 192),
            (256, 256),
        ),
        "sm80": (
            (32, 32),
            (64, 64),
            (80, 80),
            (96, 96),
            (128, 128),
            (192, 128),
            (192, 192),
            (256, 256),
        ),
    },
    "mha_bwd": {
        "sm90": (
            (64, 64),
            (96, 96),
            (128, 128),
            (192, 128),
            (192, 192),
            (256, 256),
        ),
        "sm80": (
            (64, 64),
            (96, 96),
            (128, 128),
            (192, 192),
            (256, 256),
        ),
    },
    "mha_fwd_intervals": {
        "sm90": ((64, 64), (128, 128), (256, 256)),
        "sm80": ((128, 128), (256, 256)),
    },
    "mha_bwd_intervals": {
        "sm90": ((64, 64), (128, 128), (256, 256)),
        "sm80": ((128, 128), (256, 256)),
    },
}
"""Operation -> kernel family -> (query/key width, value width) of its instantiations.

Families and widths are in the order in which they are tried.
"""

F32_HEAD_DIMS = dict.fromkeys(HEAD_DIMS, ((64, 64), (128, 128)))
"""The same of kernels "f32" of the family "sm80", as precise as float32."""

TF32_HEAD_DIMS = {op: F32_HEAD_DIMS[op] for op in ("mha_fwd", "mha_bwd")}
"""The same of kernels "tf32", whose products have factors rounded to TF32.

Where there is none, those of `F32_HEAD_DIMS` run such calls.
"""

SPLIT_HEAD_DIMS = F32_HEAD_DIMS
"""The same of kernels "split" of the family "sm90".

They take float32 as sums of two bfloat16, to 2^-16 or better, and come before those of
`F32_HEAD_DIMS` where precision is one of `SPLIT_PRECISIONS`.
"""

SPLIT_PRECISIONS = {
    "mha_fwd": (None, "tf32"),
    "mha_bwd": (None,),
    "mha_fwd_intervals": (None, "tf32"),
    "mha_bwd_intervals": (None, "tf32"),
}
"""Operation -> precisions with which operands may be split.

The backward has less work with one product of TF32 than with three of bfloat16, the
forward with warpgroup instructions does not. With intervals no product is of TF32.
"""

DTYPES = {"bfloat16": "bf16", "float16": "f16"}
"""NumPy name of a dtype of 16 bits -> its name in the kernel table."""


def kernel_type(dtype: Any, precision: str | None) -> str | None:
    """What the kernel table calls operands of a dtype; None if no kernel takes it.

    Those of float32 may be split where `may_split` says so, and where there is no
    kernel "tf32", one of "f32" will do.
    """
    if str(dtype) == "float32":
        return "tf32" if precision == "tf32" else "f32"
    return DTYPES.get(str(dtype))


def may_split(op: str, dtype: Any, precision: str | None) -> bool:
    """Whether kernels "split" may run a call; see `SPLIT_HEAD_DIMS`."""
    return str(dtype) == "float32" and precision in SPLIT_PRECISIONS.get(op, ())


@dataclasses.dataclass(frozen=True)
class Support:
    """Who runs an option of attention; jnp ("xla") runs all of them, everywhere.

    Attributes:
      kernels: the families whose kernels take it, forward and backward alike, or whose
        calls it is joined to outside of them (`sinks`).
      cudnn: whether `jax.nn`'s cuDNN attention takes it with our semantics, at least
        for some values.
      decode: whether the decode kernels take it, None where `decode_mha` has no such
        argument.
      intervals: whether it takes the kernels with intervals, see `intervals`.
    """

    kernels: tuple[str, ...] = ()
    cudnn: bool = False
    decode: bool | None = None
    intervals: bool = False


FAMILIES = ("sm90", "sm80")

OPTIONS = {
    "scale": Support(FAMILIES, cudnn=True, decode=True),
    "is_causal": Support(FAMILIES, cudnn=True),
    "causal_alignment": Support(FAMILIES, cudnn=True),
    "window_size": Support(FAMILIES, cudnn=True, decode=True),
    "query_seq_lengths": Support(FAMILIES),
    "key_value_seq_lengths": Support(FAMILIES),
    "return_lse": Support(FAMILIES, decode=True),
    "precision": Support(FAMILIES, cudnn=True),
    "deterministic": Support(FAMILIES),
    "softcap": Support(FAMILIES, decode=True, intervals=True),
    "sinks": Support(FAMILIES, decode=True),
    "bias": Support(FAMILIES, intervals=True),
    "alibi_slopes": Support(FAMILIES, decode=True, intervals=True),
    "mask": Support(FAMILIES, intervals=True),
    "q_segment_ids": Support(FAMILIES, intervals=True),
    "kv_segment_ids": Support(FAMILIES, intervals=True),
    "dropout_rate": Support(FAMILIES, intervals=True),
    "cu_seqlens_q": Support(FAMILIES, intervals=True),
    "cu_seqlens_k": Support(FAMILIES, intervals=True),
}
"""Every option of attention, by argument: the one table of what runs where."""


def supported(option: str) -> bool:
    """Whether all kernels take an option, which decides if "cuda" may run a call."""
    return OPTIONS[option].kernels == FAMILIES


def needs_intervals(options: Iterable[str]) -> bool:
    """Whether a call takes the kernels with intervals.

    `options` are the names of what it has beyond query, key and value.
    """
    return any(OPTIONS[name].intervals for name in options if name in OPTIONS)


SLOPE_PARTS = 4
"""Numbers for each head and key that the gradient of a slope is the sum of."""

BIAS_GRADIENT = 1 << 28
"""Scores of which the backward writes all gradients, for sums in an order."""


def no_bias_gradient(deterministic: bool, shared: bool, scores: Any) -> str | None:
    """Why no kernel has the gradient of a bias, as what it lacks; None if one does.

    The backward adds up what heads, rows or batch entries share (`shared`) in no order.
    With `deterministic` it writes the gradients of all `scores`, and XLA adds them up.
    """
    if not (deterministic and shared):
        return None
    if isinstance(scores, int) and scores <= BIAS_GRADIENT:
        return None
    text = "the gradient of a broadcast bias with deterministic=True"
    return f"{text} and {scores} scores, more than {BIAS_GRADIENT}"


def operation(op: str, options: Iterable[str]) -> str:
    """The kernels that run a call, in `HEAD_DIMS`: `op`, or `op` with intervals."""
    return f"{op}_intervals" if needs_intervals(options) else op


MAX_BATCH_DIMS = 8
"""Leading batch dimensions one kernel call can address."""


@dataclasses.dataclass(frozen=True, order=True)
class Kernel:
    """One instantiation; `tuple` of it is a row of `jax_flash._kernels.kernels()`."""

    op: str
    family: str
    dtype: str
    head_dim: int
    head_dim_v: int

    def __str__(self) -> str:
        kind = " with intervals" if self.op.endswith("_intervals") else ""
        kind += " of split bfloat16" if self.dtype == "split" else ""
        return f"{self.family} {self.head_dim}x{self.head_dim_v}{kind}"


KERNELS = (
    *(
        Kernel(op, family, dtype, head_dim, head_dim_v)
        for op, families in HEAD_DIMS.items()
        for family, widths in families.items()
        for dtype in DTYPES.values()
        for head_dim, head_dim_v in widths
    ),
    *(
        Kernel(op, "sm90", "split", head_dim, head_dim_v)
        for op, widths in SPLIT_HEAD_DIMS.items()
        for head_dim, head_dim_v in widths
    ),
    *(
        Kernel(op, "sm80", dtype, head_dim, head_dim_v)
        for dtype, table in (("tf32", TF32_HEAD_DIMS), ("f32", F32_HEAD_DIMS))
        for op, widths in table.items()
        for head_dim, head_dim_v in widths
    ),
)

# Compute capabilities that choose differently; 80 stands for all but 90.
HOPPER, OTHER = 90, 80

ROW_TILES = (80, 128)
"""Queries of a sequence are padded to whole tiles of either size in the workspace."""

ROW_GROUP = 64
"""Rows of queries that a thread block before and after the main kernel works on."""

SUM_COLUMNS = 64
"""The width of the sum of the gradient of query is a multiple of this."""

QUEUE_HEADER, QUEUE_ROWS = 4, 64
"""Numbers before the order of blocks of work, and rows or keys of the smallest one."""

ROW_LIST_CHUNK = 1024
"""Rows after which a forward with intervals begins a block, whatever came before."""

TURN_ROWS = 16
"""Rows of queries for which the workspace counts who has added to their gradient."""

QUEUE_ENTRIES = 4
"""Numbers after those counts: how much work has been taken, and padding."""


KEY_CHUNK = 64
"""`kBwdKeyChunk` of csrc/sm90/bwd_block.cuh."""

PART_KEYS = 131072
"""Bounds what `backward_parts` takes; a GPU of 132 multiprocessors needs no more."""

ORDERED_PART_KEYS = 4 * PART_KEYS
"""The same where sums have an order, in which the longest blocks of work come last."""


def _suitable_types(op: str, dtype: Any, precision: str | None) -> set[str | None]:
    """Which kernels may run a call, as the table calls them; the first one does."""
    names = {kernel_type(dtype, precision)}
    if "tf32" in names:
        names.add("f32")
    if may_split(op, dtype, precision):
        names.add("split")
    return names


def choose(
    op: str,
    dtype: Any,
    head_dim: int,
    head_dim_v: int,
    capability: int,
    *,
    precision: str | None = None,
    batch_dims: int = 1,
    force_sm80: bool = False,
) -> Kernel | None:
    """The first instantiation that can run a call, None if there is none.

    Args:
      op: a key of `HEAD_DIMS`.
      dtype: of query, key and value.
      head_dim: width of query and key.
      head_dim_v: width of value.
      capability: compute capability of the device, 90 for 9.0.
      precision: of the products, as `mha` takes it.
      batch_dims: batch dimensions that stay apart, see `merged_batch_dims`.
      force_sm80: leave the family "sm90" out.
    """
    # TMA reads rows that start at multiples of 16 bytes. XLA's arrays do.
    readable = head_dim % 8 == 0 and head_dim_v % 8 == 0 and batch_dims <= 2
    runs = {
        "sm90": capability == HOPPER and not force_sm80 and readable,
        "sm80": capability >= 80,
    }
    names = _suitable_types(op, dtype, precision)
    for kernel in KERNELS:
        fits = kernel.head_dim >= head_dim and kernel.head_dim_v >= head_dim_v
        if kernel.op == op and runs[kernel.family] and kernel.dtype in names and fits:
            return kernel
    return None


forward_kernel = functools.partial(choose, "mha_fwd")
backward_kernel = functools.partial(choose, "mha_bwd")


def missing_kernel(
    op: str,
    dtype: Any,
    head_dim: int,
    head_dim_v: int,
    built: Collection[Kernel],
    precision: str | None = None,
) -> str | None:
    """Why the kernels in `built` leave calls of these widths without one on some GPU.

    None if they do not: every other property of a call has "sm80" to fall back on.
    """
    widths = f"H={head_dim} and Hv={head_dim_v} of query and value"
    for capability in (HOPPER, OTHER):
        kernel = choose(
            op, dtype, head_dim, head_dim_v, capability, precision=precision
        )
        if kernel is None:
            names = _suitable_types(op, dtype, precision)
            limit = max(k.head_dim for k in KERNELS if k.op == op and k.dtype in names)
            return f"{widths}: the kernels take widths of at most {limit}"
        if kernel not in built:
            return f"{widths}: {kernel} is not among the kernels that were built"
    return None


def split_elements(op: str, shapes: Iterable[tuple[int, ...]]) -> int | None:
    """bfloat16 of workspace for a forward whose operands may be split.

    Args:
      op: of the forward, a key of `HEAD_DIMS`.
      shapes: of query, key and value, `[*B, length, heads, width]`, batch dimensions of
        size 1 where an operand is shared along them.

    Returns:
      The size: two for each number, rows padded to the width of the kernel. None if
      there is no such kernel.
    """
    query, key, value = shapes
    kernel = choose(op, "float32", query[-1], value[-1], HOPPER)
    if kernel is None or kernel.dtype != "split":
        return None
    padded = (kernel.head_dim, kernel.head_dim, kernel.head_dim_v)
    rows = (math.prod(shape[:-1]) for shape in (query, key, value))
    return 2 * sum(n * width for n, width in zip(rows, padded, strict=True))


def padded_rows(query_length: int) -> int:
    """Rows that the workspace has for a sequence: a multiple of `ROW_GROUP`."""
    tiles = (-(-query_length // tile) * tile for tile in ROW_TILES)
    rows = functools.reduce(core.max_dim, tiles)  # lengths may be symbols
    return -(-rows // ROW_GROUP) * ROW_GROUP


def backward_parts(
    batch: int,
    heads: int,
    kv_heads: int,
    key_length: int,
    dtype: Any,
    head_dim: int,
    head_dim_v: int,
    has_intervals: bool = False,
    deterministic: bool = False,
) -> int:
    """Floats for the gradients of key and value of parts of a group of heads.

    As Hopper's kernel has them: keys in whole `KEY_CHUNK`, of its own widths.
    With few keys there are too few blocks of work for a GPU unless the query heads of
    a key head are split. The kernel chooses into how many parts, among those for which
    there is room: for half of `PART_KEYS` (`ORDERED_PART_KEYS`) keys of all heads and
    sequences none, for fewer more, at most one for each query head.
    """
    op = "mha_bwd_intervals" if has_intervals else "mha_bwd"
    kernel = choose(op, dtype, head_dim, head_dim_v, HOPPER)
    if heads == kv_heads or kernel is None or kernel.family != "sm90":
        return 0
    if kernel.dtype == "split":  # which has no parts of groups
        return 0
    length = -(-key_length // KEY_CHUNK) * KEY_CHUNK
    keys = batch * kv_heads * length
    most = ORDERED_PART_KEYS if deterministic else PART_KEYS
    room = core.max_dim(most - 2 * keys, 0)
    parts = core.min_dim(batch * heads * length, room)
    return parts * (kernel.head_dim + kernel.head_dim_v)


def backward_workspace(
    batch: int,
    heads: int,
    query_length: int,
    dtype: Any,
    head_dim: int,
    head_dim_v: int,
    queue: int | None = None,
) -> int:
    """Floats of workspace with which any kernel that may be chosen can run a backward.

    `queue` is the `queue_size` of a call with intervals, None for others.

    For each head of each sequence and each padded row: the sum of the gradient of
    query, as wide as the kernel in whole `SUM_COLUMNS`, and two numbers; and a count
    for every `TURN_ROWS` rows. Then `QUEUE_ENTRIES`. The device is unknown when a
    program is lowered, so the widest kernel counts.
    """
    rows = padded_rows(query_length)
    op = "mha_bwd" if queue is None else "mha_bwd_intervals"
    kernels = (
        choose(op, dtype, head_dim, head_dim_v, capability, force_sm80=forced)
        for capability in (HOPPER, OTHER)
        for forced in (False, True)
    )
    width = max(kernel.head_dim for kernel in kernels if kernel is not None)
    width = -(-width // SUM_COLUMNS) * SUM_COLUMNS
    turns = rows // TURN_ROWS
    sums = batch * heads * (rows * (width + 2) + turns)
    return sums + QUEUE_ENTRIES + (queue or 0)


def row_list_size(batch: int, length: int) -> int:
    """int32 of the list of blocks of rows of a forward with intervals."""
    entries = 1 + -(-length // QUEUE_ROWS) + -(-length // ROW_LIST_CHUNK)
    return QUEUE_HEADER + (batch * entries + 1) // 2 * 4


def queue_size(batch: int, length: int) -> int:
    """int32 of the order in which a backward with intervals takes its blocks of keys.

    `length` is the number of keys.
    """
    size = QUEUE_HEADER + batch * -(-length // QUEUE_ROWS)
    return -(-size // 4) * 4  # what follows is aligned


def merged_batch_dims(batches: Iterable[tuple[int, ...]]) -> int:
    """How many batch dimensions a kernel steps through, after merging neighbours.

    Neighbours merge where each operand has both in full or is shared along both.

    Args:
      batches: the batch dimensions of each operand, of size 1 where it is shared along
        them; the operands are row-major.
    """
    dims = [tuple(size == 1 for size in sizes) for sizes in zip(*batches, strict=True)]
    shared = [dim for dim in dims if not all(dim)]
    return 1 + sum(a != b for a, b in itertools.pairwise(shared))
