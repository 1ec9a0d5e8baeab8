"""What the CUDA kernels can run: pure functions of static facts.

Lives here: the table of kernel instantiations (the same as in `csrc/sm80/inst` and
`jax_flash._kernels.kernels()`; a test holds the three together) and the choice of one
for a call. Does not live here: whether kernels were built (`registry`).
"""

import dataclasses
from typing import Any

HEAD_DIMS = (
    (32, 32),
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (192, 128),
    (192, 192),
    (256, 256),
)
"""(query/key width, value width) of the instantiations, in the order they are tried."""

DTYPES = {"bfloat16": "bf16", "float16": "f16"}
"""NumPy name of a dtype the kernels take -> its name in the kernel table."""

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


KERNELS = tuple(
    Kernel("mha_fwd", "sm80", dtype, head_dim, head_dim_v)
    for dtype in DTYPES.values()
    for head_dim, head_dim_v in HEAD_DIMS
)


def forward_kernel(dtype: Any, head_dim: int, head_dim_v: int) -> Kernel | None:
    """The first instantiation at least as wide as the call, None if there is none."""
    name = DTYPES.get(str(dtype))
    for kernel in KERNELS:
        fits = kernel.head_dim >= head_dim and kernel.head_dim_v >= head_dim_v
        if kernel.dtype == name and fits:
            return kernel
    return None
