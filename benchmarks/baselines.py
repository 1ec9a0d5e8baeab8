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

import jax_flash
from benchmarks.timing import Call, short

Attention = Callable[..., jax.Array]
Arrays = tuple[jax.Array, jax.Array, jax.Array]

# XLA materialises float32 scores; beyond this it is skipped rather than swapped.
XLA_SCORE_LIMIT = 10e9


@dataclasses.dataclass(frozen=True)
class Cell:
    """One self-attention problem: query [B, T, N, D], key and value [B, S, K, D]."""

    batch: int
    query_length: int
    key_length: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """For example "d128 n4096 causal"."""
        lengths = f"n{self.query_length}"
        if self.key_length != self.query_length:
            lengths += f"x{self.key_length}"
        heads = "" if self.heads == self.kv_heads else f" h{self.heads}/{self.kv_heads}"
        causal = " causal" if self.is_causal else ""
        return f"d{self.head_dim} {lengths}{heads}{causal}"

    @property
    def flops(self) -> float:
        """Forward operations; a causal mask counts as half."""
        pairs = self.batch * self.heads * self.query_length * self.key_length
        return 4.0 * pairs * self.head_dim * (0.5 if self.is_causal else 1.0)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of query, key and value."""
        query = (self.batch, self.query_length, self.heads, self.head_dim)
        key = (self.batch, self.key_length, self.kv_heads, self.head_dim)
        return tuple(
            jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))
            for shape in (query, key, key)
        )

    def inputs(self, seed: int = 0) -> Arrays:
        """Random normal query, key and value: zeros would draw less power."""
        keys = jax.random.split(jax.random.key(seed), 3)
        query, key, value = (
            jax.random.normal(one, shape.shape, shape.dtype)
            for one, shape in zip(keys, self.shapes, strict=True)
        )
        return query, key, value


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


def reference(cell: Cell, inputs: Arrays) -> jax.Array:
    """The first two heads of the first batch entry in float32, [T, 2, D]."""
    query, key, value = (x[0].astype(jnp.float32) for x in inputs)
    group = cell.heads // cell.kv_heads
    pair = jnp.arange(2) // group
    scores = jnp.einsum(
        "tnd,snd->nts", query[:, :2], key[:, pair], precision="highest"
    ) * (cell.head_dim**-0.5)
    if cell.is_causal:
        last = jnp.arange(cell.query_length) + cell.key_length - cell.query_length
        visible = jnp.arange(cell.key_length) <= last[:, None]
        scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("nts,snd->tnd", weights, value[:, pair], precision="highest")


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
        return jax.jit(attention(cell)).lower(*cell.shapes).compile()

    def bind(compiled: Any, cell: Cell, inputs: Arrays) -> Call:
        del cell
        return Call(
            run=lambda: compiled(*inputs),
            wait=lambda result: jax.block_until_ready(result),
            heads=lambda result: result[0, :, :2].astype(jnp.float32),
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


def ours(implementation: str) -> Callable[[Cell], Attention]:
    """`jax_flash.mha` by one implementation."""
    return lambda cell: functools.partial(
        jax_flash.mha, is_causal=cell.is_causal, implementation=implementation
    )


def jax_nn(implementation: Literal["xla", "cudnn"]) -> Callable[[Cell], Attention]:
    """`jax.nn.dot_product_attention`; its causal mask is top-left aligned."""
    return lambda cell: functools.partial(
        jax.nn.dot_product_attention,
        is_causal=cell.is_causal,
        implementation=implementation,
    )


def peer(module: str, function: str, **options: Any) -> Callable[[Cell], Attention]:
    """A function of another module, called with `is_causal`."""
    return lambda cell: functools.partial(
        getattr(importlib.import_module(module), function),
        is_causal=cell.is_causal,
        **options,
    )


def equal_lengths(cell: Cell) -> str | None:
    """Limit of arms that align a causal mask at the top left."""
    if cell.is_causal and cell.query_length != cell.key_length:
        return "aligns the causal mask at the top left"
    return None


def score_memory(cell: Cell) -> str | None:
    """Limit of arms that materialise the scores in float32."""
    size = 4.0 * cell.batch * cell.heads * cell.query_length * cell.key_length
    if size > XLA_SCORE_LIMIT:
        return f"would materialise {size / 1e9:.0f} GB of scores"
    return equal_lengths(cell)


def width_128(cell: Cell) -> str | None:
    """Limit of flash-attn3-jax."""
    if cell.head_dim != 128:
        return f"built for width 128 only, not {cell.head_dim}"
    return None


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
    return equal_lengths(cell)


def bind_torch(compiled: Any, cell: Cell, inputs: Arrays, *, packed: bool) -> Call:
    """The flash backend of torch (FlashAttention-2) on the memory of JAX's arrays.

    Args:
      compiled: unused, nothing is compiled ahead.
      cell: problem.
      inputs: arrays [B, T, N, D].
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

    def run() -> Any:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(
                *arrays, is_causal=cell.is_causal
            )

    def heads(result: Any) -> Any:
        return jnp.asarray(result[0, :2].transpose(0, 1).float().cpu().numpy())

    return Call(run, lambda result: torch.cuda.synchronize(), heads)


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
        jax_arm("jax_flash_xla", "jax_flash", ours("xla"), gpu_only=False),
        jax_arm("xla", "jax", jax_nn("xla"), why_not=score_memory, gpu_only=False),
        jax_arm("cudnn", "jax", jax_nn("cudnn"), why_not=equal_lengths),
        jax_arm(
            "fa3_dew",
            "dew-flash-attn-cu13",
            peer("dew_flash_attn", "flash_mha"),
            module="dew_flash_attn",
        ),
        jax_arm(
            "fa3_jax",
            "flash-attn3-jax",
            peer("flash_attn3_jax", "flash_mha"),
            module="flash_attn3_jax",
            why_not=width_128,
        ),
        jax_arm(
            "tokamax",
            "tokamax",
            peer("tokamax", "dot_product_attention", implementation="mosaic"),
            module="tokamax",
            why_not=equal_lengths,
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
SMOKE_ARMS = ("jax_flash_xla", "xla")
