#!/usr/bin/env python3
"""Writes docs/features.md, what runs where, from the table in jax_flash/_src/plan.py.

`tools/feature_matrix.py` writes the page; a test holds it to the table.
"""

import pathlib

from jax_flash._src import plan

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "features.md"

HEADER = """# What runs where

Written by `tools/feature_matrix.py` from `plan.OPTIONS`; do not edit. A call with
an option that its kernel lacks runs in jnp, or raises `NotImplementedError` with
`implementation="cuda"`. jnp runs everything, on every platform.

It holds for bfloat16, float16 and, up to width 128, for float32, whose wider calls run
in jnp. The kernels take all values of an option but `precision` "highest" and "tf32" of
bfloat16 and float16, which run in jnp. cuDNN takes some: "bf16" and "f16", to which
float32 is rounded, and "bottom_right" where there are as many keys as queries.

| argument | sm90 kernels | sm80 kernels | cuDNN | decode kernels | jnp |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""

    def mark(yes: bool | None) -> str:
        return {True: "yes", False: "no", None: ""}[yes]

    rows = []
    for name, support in plan.OPTIONS.items():
        kernels = [mark(family in support.kernels) for family in plan.FAMILIES]
        cells = [f"`{name}`", *kernels, mark(support.cudnn), mark(support.decode)]
        rows.append(f"| {' | '.join([*cells, 'yes'])} |\n")
    return HEADER + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
