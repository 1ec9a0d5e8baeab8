"""The kernel table of `plan`, the instantiation files and the extension agree."""

import pathlib

import pytest
import specs

from jax_flash._src import plan, registry

INSTANTIATIONS = pathlib.Path(__file__).parent.parent / "csrc" / "sm80" / "inst"


def rows() -> set[tuple]:
    return {(k.op, k.family, k.dtype, k.head_dim, k.head_dim_v) for k in plan.KERNELS}


def test_no_duplicates() -> None:
    assert len(rows()) == len(plan.KERNELS)


def test_instantiation_files() -> None:
    files = {path.name for path in INSTANTIATIONS.glob("*.cu")}
    names = {f"fwd_{k.dtype}_{k.head_dim}x{k.head_dim_v}.cu" for k in plan.KERNELS}
    assert files == names


def test_extension() -> None:
    if registry.extension().missing is not None:
        pytest.skip("the extension was not built")
    from jax_flash import _kernels  # pyright: ignore[reportAttributeAccessIssue]

    assert set(_kernels.kernels()) == rows()


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((1, 1), (32, 32)),
        ((32, 32), (32, 32)),
        ((33, 16), (64, 64)),
        ((16, 33), (64, 64)),
        ((65, 65), (80, 80)),
        ((81, 10), (96, 96)),
        ((128, 128), (128, 128)),
        ((129, 128), (192, 128)),
        ((192, 128), (192, 128)),
        ((192, 129), (192, 192)),
        ((64, 200), (256, 256)),
        ((256, 256), (256, 256)),
        ((257, 8), None),
        ((8, 257), None),
    ],
)
def test_choice(widths: tuple[int, int], expected: tuple[int, int] | None) -> None:
    for dtype in plan.DTYPES:
        kernel = plan.forward_kernel(dtype, *widths)
        got = None if kernel is None else (kernel.head_dim, kernel.head_dim_v)
        assert got == expected
    assert plan.forward_kernel("float32", *widths) is None


def test_the_shape_table_reaches_every_kernel() -> None:
    reached = {plan.forward_kernel(s.dtype, *s.widths) for s in specs.GPU_TABLE}
    assert reached == set(plan.KERNELS)
