"""The arms of a benchmark: this package and its peers behind one interface.

An arm says why it cannot run a cell, or prepares a call. Peers are imported only when
asked for; one that is missing is named with the reason, never left out in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from benchmarks import gradients
from benchmarks.timing import Call, short

Attention = Callable[..., jax.Array]
Arrays = tuple[jax.Array, ...]

# XLA materialises float32 scores; beyond this it is skipped rather than swapped.
XLA_SCORE_LIMIT = 10e9
# Tokens of a cell whose name leaves the batch out.
USUAL_TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attention problem: query [B, T, N, D], key [B, S, K, D], value [B, S, K, Dv].

    A cell is the forward, or the backward alone: gradients of query, key and value from
    a cotangent [B, T, N, Dv] and what the forward kept.

    Attributes:
      batch, query_length, key_length, heads, kv_heads, head_dim, value_dim: the sizes
        B, T, S, N, K, D, Dv; value_dim 0 stands for head_dim.
      is_causal: mask, with the last query at the last key.
      dtype: of query, key and value.
      window_size: keys before and after the aligned one, both inclusive; None: all.
      backward: whether the cell is the backward.
    """

    batch: int
    query_length: int
    key_length: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    dtype: str = "bfloat16"
    value_dim: int = 0
    window_size: tuple[int, int] | None = None
    backward: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """(D, Dv)."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def name(self) -> str:
        """For example "d128 n4096 causal"; 16k tokens are not spelled out."""
        width, value_width = self.widths
        parts = [f"d{width}" if width == value_width else f"d{width}v{value_width}"]
        if self.batch * self.query_length != USUAL_TOKENS:
            parts.insert(0, f"b{self.batch}")
        lengths = f"n{self.query_length}"
        if self.key_length != self.query_length:
            lengths += f"x{self.key_length}"
        parts.append(lengths)
        if self.heads != self.kv_heads:
            parts.append(f"h{self.heads}/{self.kv_heads}")
        if self.window_size is not None:
            parts.append("w{}/{}".format(*self.window_size))
        if self.is_causal:
            parts.append("causal")
        if self.dtype == "float16":
            parts.append("f16")
        if self.backward:
            parts.append("bwd")
        return " ".join(parts)

    @property
    def aligned(self) -> bool:
        """Whether there is a mask and it matters to which key it aligns a row."""
        masked = self.is_causal or self.window_size is not None
        return masked and self.query_length != self.key_length

    def visible(self) -> np.ndarray:
        """The keys each row sees: first and end, int [T, 2]."""
        last = np.arange(self.query_length) + self.key_length - self.query_length
        left, right = self.window_size or (self.key_length, self.key_length)
        end = last + 1 + (0 if self.is_causal else right)
        interval = np.stack([last - left, end], axis=1)
        if not self.is_causal and self.window_size is None:
            interval[:] = 0, self.key_length
        return np.clip(interval, 0, self.key_length)

    @property
    def flops(self) -> float:
        """Operations; a causal square counts as half, other masks exactly.

        The forward has a product of width D and one of width Dv for each pair of query
        and key, the backward three and two.
        """
        if self.is_causal and self.window_size is None and not self.aligned:
            pairs = 0.5 * self.query_length * self.key_length
        else:
            pairs = float(np.diff(self.visible()).sum())
        width, value_width = self.widths
        if self.backward:
            width, value_width = 3 * width, 2 * value_width
        return 2.0 * self.batch * self.heads * pairs * (width + value_width)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of query, key and value; for the backward also of the cotangent."""
        width, value_width = self.widths
        rows = (self.batch, self.query_length, self.heads)
        keys = (self.batch, self.key_length, self.kv_heads)
        shapes = [(*rows, width), (*keys, width), (*keys, value_width)]
        if self.backward:
            shapes.append((*rows, value_width))
        return tuple(
            jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for shape in shapes
        )

    def inputs(self, seed: int = 0) -> Arrays:
        """Random normal arrays of `shapes`: zeros would draw less power."""
        keys = jax.random.split(jax.random.key(seed), len(self.shapes))
        return tuple(
            jax.random.normal(one, shape.shape, shape.dtype)
            for one, shape in zip(keys, self.shapes, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to compute attention.

    Attributes:
      name: what tables and results call it.
      package: distribution whose version is recorded.
      why_not: reason why a cell cannot run, or None.
      compile: does what may be done ahead and in a thread; its result goes to `bind`.
      bind: compiled, cell, inputs -> call.
    """

    name: str
    package: str
    why_not: Callable[[Cell], str | None]
    compile: Callable[[Cell], Any]
    bind: Callable[[Any, Cell, Arrays], Call]

    def version(self) -> str | None:
        """Installed version, None if there is no such distribution."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def reference(cell: Cell, inputs: Arrays) -> Arrays:
    """What `Call.heads` gives of a result of this cell, in float32."""
    if cell.backward:
        visible = jnp.asarray(cell.visible())
        return gradients.reference(inputs, visible)
    query, key, value = (x[0].astype(jnp.float32) for x in inputs)
    group = cell.heads // cell.kv_heads
    pair = jnp.arange(2) // group
    scores = jnp.einsum(
        "tnd,snd->nts", query[:, :2], key[:, pair], precision="highest"
    ) * (cell.head_dim**-0.5)
    column, interval = jnp.arange(cell.key_length), jnp.asarray(cell.visible())
    visible = (column >= interval[:, :1]) & (column < interval[:, 1:])
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores)
    return (jnp.einsum("nts,snd->tnd", weights, value[:, pair], precision="highest"),)


# Arms in JAX


def on_gpu() -> bool:
    """Whether JAX computes on an NVIDIA GPU."""
    return jax.default_backend() == "gpu"


def jax_arm(
    name: str,
    package: str,
    attention: Callable[[Cell], Attention],
    *,
    module: str | None = None,
    why_not: Callable[[Cell], str | None] = lambda cell: None,
    gpu_only: bool = True,
) -> Arm:
    """An arm of a function of JAX arrays [B, T, N, D].

    Args:
      name: of the arm.
      package: distribution that it comes from.
      attention: cell -> function of query, key and value.
      module: to import first; the arm is unavailable if that fails.
      why_not: further limits.
      gpu_only: whether the arm needs a GPU.
    """

    def limits(cell: Cell) -> str | None:
        if gpu_only and not on_gpu():
            return "needs an NVIDIA GPU"
        if module is not None and (reason := import_error(module)):
            return reason
        return why_not(cell)

    def compile_ahead(cell: Cell) -> Any:
        if cell.backward:
            return gradients.compile_backward(attention(cell), cell.shapes)
        return jax.jit(attention(cell)).lower(*cell.shapes).compile()

    def bind(compiled: Any, cell: Cell, inputs: Arrays) -> Call:
        if cell.backward:
            return gradients.bind_backward(compiled, inputs)
        return Call(
            run=lambda: compiled(*inputs),
            wait=lambda result: jax.block_until_ready(result),
            heads=lambda result: (result[0, :, :2].astype(jnp.float32),),
        )

    return Arm(name, package, limits, compile_ahead, bind)


@functools.cache
def import_error(module: str) -> str | None:
    """Why a module cannot be imported, None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way
        return f"import {module}: {short(error)}"
    return None


def ours(implementation: str, **options: Any) -> Callable[[Cell], Attention]:
    """`jax_flash.mha` by one implementation, with further options."""
    return lambda cell: functools.partial(
        jax_flash.mha,
        is_causal=cell.is_causal,
        window_size=cell.window_size,
        implementation=implementation,
        **options,
    )


def forward_kernel(cell: Cell) -> Attention:
    """`jax_flash.mha` by the forward kernel, however few the queries.

    Lengths of queries, all of them full, are what the decode kernel does not take.
    """
    lengths = jnp.full(cell.batch, cell.query_length, jnp.int32)
    return functools.partial(ours("cuda")(cell), query_seq_lengths=lengths)


def decode_kernel(cell: Cell) -> Attention:
    """`jax_flash.decode_mha` on caches that are full."""
    lengths = jnp.full(cell.batch, cell.key_length, jnp.int32)
    return functools.partial(
        jax_flash.decode_mha,
        cache_seqlens=lengths,
        window_size=cell.window_size,
        implementation="cuda",
    )


def decode_limits(cell: Cell) -> str | None:
    """Limits of `jax_flash.decode_mha`."""
    if cell.backward:
        return "has no kernels for gradients"
    if cell.query_length > 64:
        return f"takes at most 64 queries, not {cell.query_length}"
    if cell.query_length > 1 and not cell.is_causal:
        return "several queries are causal among themselves"
    return None


def jax_nn(implementation: Literal["xla", "cudnn"]) -> Callable[[Cell], Attention]:
    """`jax.nn.dot_product_attention`; its masks are aligned at the top left."""
    return lambda cell: functools.partial(
        jax.nn.dot_product_attention,
        is_causal=cell.is_causal,
        local_window_size=cell.window_size,
        implementation=implementation,
    )


def peer(
    module: str, function: str, *, window: str, **options: Any
) -> Callable[[Cell], Attention]:
    """A function of another module, called with `is_causal`.

    Args:
      module: where it is.
      function: its name.
      window: the name of its argument for a window.
      **options: further arguments.
    """

    def attention(cell: Cell) -> Attention:
        windows = {} if cell.window_size is None else {window: cell.window_size}
        return functools.partial(
            getattr(importlib.import_module(module), function),
            is_causal=cell.is_causal,
            **windows,
            **options,
        )

    return attention


def top_left(cell: Cell) -> str | None:
    """Limit of arms that align masks at the top left."""
    if cell.aligned:
        return "aligns masks at the top left: see the cell without a mask"
    return None


def one_width(cell: Cell) -> str | None:
    """Limit of arms whose values are as wide as their keys."""
    width, value_width = cell.widths
    if width != value_width:
        return f"takes one width, not {width} and {value_width}"
    return None


def jax_nn_limits(cell: Cell) -> str | None:
    """Limits of `jax.nn.dot_product_attention`."""
    return one_width(cell) or top_left(cell)


def score_memory(cell: Cell) -> str | None:
    """Limits of jax.nn when it materialises the scores in float32."""
    size = 4.0 * cell.batch * cell.heads * cell.query_length * cell.key_length
    # The backward also holds the weights that the forward kept, and their gradients.
    size *= 3 if cell.backward else 1
    if size > XLA_SCORE_LIMIT:
        return f"would materialise {size / 1e9:.0f} GB of scores"
    return jax_nn_limits(cell)


def width_128(cell: Cell) -> str | None:
    """Limit of flash-attn3-jax."""
    if cell.head_dim != 128:
        return f"built for width 128 only, not {cell.head_dim}"
    return one_width(cell)


# torch


def torch_why_not(cell: Cell) -> str | None:
    """Limits of the torch arms."""
    if not on_gpu():
        return "needs an NVIDIA GPU"
    if reason := import_error("torch"):
        return reason
    if not importlib.import_module("torch").cuda.is_available():
        return "torch sees no GPU"
    if cell.heads != cell.kv_heads:
        return "grouped heads are not measured with torch"
    if cell.window_size is not None:
        return "takes no window"
    return one_width(cell) or top_left(cell)


def bind_torch(compiled: Any, cell: Cell, inputs: Arrays, *, packed: bool) -> Call:
    """The flash backend of torch (FlashAttention-2) on the memory of JAX's arrays.

    A backward keeps the forward's graph and runs torch's autograd through it.

    Args:
      compiled: unused, nothing is compiled ahead.
      cell: problem.
      inputs: arrays [B, T, N, D], of a backward also the cotangent.
      packed: copy to contiguous [B, N, T, D] first (not timed), else read in place.
    """
    del compiled
    torch = importlib.import_module("torch")
    attention = importlib.import_module("torch.nn.attention")
    functional = torch.nn.functional
    jax.block_until_ready(inputs)
    arrays = [torch.from_dlpack(x).transpose(1, 2) for x in inputs]
    if packed:
        arrays = [x.contiguous() for x in arrays]
    operands = [x.detach().requires_grad_(cell.backward) for x in arrays[:3]]

    def forward() -> Any:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(
                *operands, is_causal=cell.is_causal
            )

    def two_heads(x: Any) -> jax.Array:
        return jnp.asarray(x[0, :2].detach().transpose(0, 1).float().cpu().numpy())

    def wait(result: Any) -> None:
        del result
        torch.cuda.synchronize()

    if not cell.backward:
        return Call(forward, wait, lambda result: (two_heads(result),))
    out = forward()

    def backward() -> Any:
        return torch.autograd.grad(out, operands, arrays[3], retain_graph=True)

    return Call(backward, wait, lambda result: tuple(map(two_heads, result)))


def torch_arm(name: str, *, packed: bool) -> Arm:
    """An arm of torch's flash backend."""
    return Arm(
        name,
        "torch",
        torch_why_not,
        lambda cell: None,
        functools.partial(bind_torch, packed=packed),
    )


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        jax_arm("jax_flash", "jax_flash", ours("cuda")),
        jax_arm(
            "jax_flash_deterministic",
            "jax_flash",
            ours("cuda", deterministic=True),
        ),
        jax_arm("jax_flash_forward", "jax_flash", forward_kernel),
        jax_arm("jax_flash_decode", "jax_flash", decode_kernel, why_not=decode_limits),
        jax_arm("jax_flash_xla", "jax_flash", ours("xla"), gpu_only=False),
        jax_arm("xla", "jax", jax_nn("xla"), why_not=score_memory, gpu_only=False),
        jax_arm("cudnn", "jax", jax_nn("cudnn"), why_not=jax_nn_limits),
        jax_arm(
            "fa3_dew",
            "dew-flash-attn-cu13",
            peer("dew_flash_attn", "flash_mha", window="window_size"),
            module="dew_flash_attn",
            why_not=one_width,
        ),
        jax_arm(
            "fa3_jax",
            "flash-attn3-jax",
            peer("flash_attn3_jax", "flash_mha", window="window_size"),
            module="flash_attn3_jax",
            why_not=width_128,
        ),
        jax_arm(
            "tokamax",
            "tokamax",
            peer(
                "tokamax",
                "dot_product_attention",
                window="local_window_size",
                implementation="mosaic",
            ),
            module="tokamax",
            why_not=top_left,
        ),
        torch_arm("torch_fa2", packed=False),
        torch_arm("torch_fa2_packed", packed=True),
    )
}

DEFAULT_ARMS = (
    "jax_flash",
    "xla",
    "cudnn",
    "fa3_dew",
    "fa3_jax",
    "tokamax",
    "torch_fa2",
)
BACKWARD_ARMS = (
    "jax_flash",
    "jax_flash_deterministic",
    "cudnn",
    "fa3_dew",
    "fa3_jax",
    "tokamax",
    "torch_fa2",
)
SMOKE_ARMS = ("jax_flash_xla", "xla")
