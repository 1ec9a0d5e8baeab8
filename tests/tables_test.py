"""The kernel table of `plan`, the instantiation files and the extension agree."""

import collections
import dataclasses
import itertools
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import jax
import pytest
import specs

# The tools are no part of the package, so the repository must be on the path.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jax_flash._src import plan, registry
from tools import check_build

SOURCES = pathlib.Path(__file__).parent.parent / "csrc"

HOPPER = 90
OTHERS = (80, 86, 89, 100, 120)

TYPES = (
    ("bfloat16", None),
    ("float16", None),
    ("float32", None),
    ("float32", "highest"),
    ("float32", "tf32"),
)
"""(dtype, precision) of calls that kernels take."""


def rows() -> list[tuple]:
    return [(k.op, k.family, k.dtype, k.head_dim, k.head_dim_v) for k in plan.KERNELS]


def widths_of(kernel: plan.Kernel | None) -> tuple[int, int] | None:
    return None if kernel is None else (kernel.head_dim, kernel.head_dim_v)


@pytest.fixture
def built() -> Any:
    """The extension."""
    if registry.extension().missing is not None:
        pytest.skip("the extension was not built")
    from jax_flash import _kernels  # pyright: ignore[reportAttributeAccessIssue]

    return _kernels


def test_no_duplicates() -> None:
    assert len(set(rows())) == len(plan.KERNELS)


def test_instantiation_files() -> None:
    """Each kernel is in one file, named after its pass and (unless 16 bits) type."""
    want = collections.Counter()
    for k in plan.KERNELS:
        op = k.op.removeprefix("mha_")
        types = {"bf16": "", "f16": "", "f32": "_f32", "tf32": "_f32"}
        begin = f"{op}{types.get(k.dtype, '_' + k.dtype)}"
        kernel = f"{op}_{k.dtype}_{k.head_dim}x{k.head_dim_v}"
        want[f"{k.family} {begin} {kernel}"] += 1
    got = collections.Counter()
    for path in SOURCES.glob("*/inst/*.cu"):
        begin = re.sub(r"_(\d+x\d+|narrow|wide)$", "", path.stem)
        for kernel in check_build.instantiations(path):
            got[f"{path.parent.parent.name} {begin} {kernel}"] += 1
    assert got == want


def test_extension(built: Any) -> None:
    assert set(built.kernels()) == set(rows())
    assert len(built.kernels()) == len(rows())


@pytest.mark.parametrize("op", plan.HEAD_DIMS)
def test_extension_chooses_alike(op: str, built: Any) -> None:
    widths = (1, 8, 30, 32, 33, 64, 65, 72, 80, 96, 120, 128, 136, 192, 200, 256, 257)
    for (
        head_dim,
        head_dim_v,
        dtype,
        capability,
        batch_dims,
        forced,
    ) in itertools.product(
        widths, widths, TYPES, (75, HOPPER, *OTHERS), (1, 2, 3), (False, True)
    ):
        want = plan.choose(
            op,
            dtype[0],
            head_dim,
            head_dim_v,
            capability,
            precision=dtype[1],
            batch_dims=batch_dims,
            force_sm80=forced,
        )
        got = built.choose_kernel(
            op,
            plan.kernel_type(*dtype),
            head_dim,
            head_dim_v,
            key_length=1,
            batch_dims=batch_dims,
            alignment=2 if head_dim % 8 or head_dim_v % 8 else 16,
            compute_capability=capability,
            force_sm80=forced,
            may_split=plan.may_split(op, *dtype),
        )
        assert got == (None if want is None else dataclasses.astuple(want))


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({}, "sm90"),
        ({"alignment": 4}, "sm80"),
        ({"alignment": 2}, "sm80"),
        ({"key_length": 0}, "sm80"),
        ({"batch_dims": 2}, "sm90"),
        ({"batch_dims": 3}, "sm80"),
        ({"force_sm80": True}, "sm80"),
        ({"compute_capability": 89}, "sm80"),
        ({"compute_capability": 100}, "sm80"),
    ],
)
def test_extension_chooses(built: Any, change: dict[str, int], family: str) -> None:
    facts = {
        "key_length": 1,
        "batch_dims": 1,
        "alignment": 16,
        "compute_capability": HOPPER,
        "force_sm80": False,
        "may_split": False,
    }
    kernel = built.choose_kernel("mha_fwd", "bf16", 128, 128, **facts | change)
    assert kernel == ("mha_fwd", family, "bf16", 128, 128)
    kernel = built.choose_kernel("mha_bwd", "bf16", 128, 128, **facts | change)
    available = family if family in plan.HEAD_DIMS["mha_bwd"] else "sm80"
    assert kernel == ("mha_bwd", available, "bf16", 128, 128)


@pytest.mark.parametrize("op", ["mha_fwd_intervals", "mha_bwd_intervals"])
@pytest.mark.parametrize(
    ("widths", "hopper", "other"),
    [
        ((1, 1), 128, 128),
        ((8, 64), 64, 128),
        ((72, 8), 128, 128),
        ((128, 136), 256, 256),
        ((256, 256), 256, 256),
        ((264, 8), None, None),
    ],
)
def test_choice_with_intervals(
    op: str, widths: tuple[int, int], hopper: int | None, other: int | None
) -> None:
    for dtype in plan.DTYPES:
        for capability, width in ((HOPPER, hopper), (80, other), (120, other)):
            kernel = plan.choose(op, dtype, *widths, capability)
            assert widths_of(kernel) == (width and (width, width))
            assert kernel is None or kernel.op == op


def test_operation() -> None:
    assert plan.operation("mha_fwd", ()) == "mha_fwd"
    lengths = ("query_seq_lengths", "is_causal", "sinks", "dropout_seeds")
    assert plan.operation("mha_bwd", lengths) == "mha_bwd"
    for name in ("softcap", "alibi_slopes", "q_segment_ids", "cu_seqlens_q"):
        assert plan.operation("mha_bwd", (*lengths, name)) == "mha_bwd_intervals"


def test_extension_knows_its_operations(built: Any) -> None:
    """Every target is registered, and nothing is chosen for another name."""
    targets = {
        registry.FORWARD_TARGET,
        registry.BACKWARD_TARGET,
        registry.INTERVALS_TARGET,
        registry.DECODE_TARGET,
        registry.SAMPLE_TARGET,
        registry.TOP_K_TARGET,
        registry.RMS_NORM_TARGET,
        registry.RMS_NORM_BACKWARD_TARGET,
        registry.ROPE_APPEND_TARGET,
    }
    handlers = built.registrations()
    assert set(handlers) == targets
    stages = {"instantiate", "initialize", "execute"}
    assert set(handlers[registry.DECODE_TARGET]) == stages
    for state in built.types().values():
        assert set(state) == {"type_id", "type_info"}
    facts = {"key_length": 1, "batch_dims": 1, "alignment": 16}
    facts |= {"compute_capability": 80, "force_sm80": False, "may_split": False}
    assert built.choose_kernel("mha", "bf16", 64, 64, **facts) is None


def test_types_are_registered_before_their_handlers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """XLA refuses a handler that makes a state of a type it does not know."""
    calls = []
    for kind in ("type", "target"):
        monkeypatch.setattr(
            jax.ffi,
            f"register_ffi_{kind}",
            lambda name, what, platform, kind=kind: calls.append(
                (kind, name, what, platform)
            ),
        )
    extension = types.SimpleNamespace(
        types=lambda: {"state": {"type_id": 1, "type_info": 2}},
        registrations=lambda: {"one": 3, "two": {"execute": 4}},
        kernels=list,
        build_info=dict,
        force_sm80=lambda: False,
    )
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: extension)
    assert registry._load.__wrapped__().missing is None
    assert calls == [
        ("type", "state", {"type_id": 1, "type_info": 2}, "CUDA"),
        ("target", "one", 3, "CUDA"),
        ("target", "two", {"execute": 4}, "CUDA"),
    ]


@pytest.mark.parametrize(
    ("value", "forced"), [("1", True), ("0", False), ("", False), (None, False)]
)
@pytest.mark.usefixtures("built")
def test_environment(value: str | None, forced: bool) -> None:
    variable = "JAX_FLASH_FORCE_SM80"
    code = "from jax_flash import _kernels; print(_kernels.force_sm80())"
    env = {k: v for k, v in os.environ.items() if k != variable}
    if value is not None:
        env[variable] = value
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    assert done.stdout.split() == [str(forced)]


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
    for dtype, capability in itertools.product(plan.DTYPES, OTHERS):
        kernel = plan.forward_kernel(dtype, *widths, capability)
        assert widths_of(kernel) == expected
    assert plan.forward_kernel("float64", *widths, 80) is None
    assert plan.forward_kernel("bfloat16", *widths, 75) is None


@pytest.mark.parametrize("capability", [HOPPER, *OTHERS])
@pytest.mark.parametrize("op", plan.F32_HEAD_DIMS)
@pytest.mark.parametrize("precision", [None, "highest", "tf32"])
def test_choice_of_float32(precision: str | None, op: str, capability: int) -> None:
    """Products of TF32 are for who asks for them, and not with intervals."""
    rounds = precision == "tf32" and op in plan.TF32_HEAD_DIMS
    dtype = "tf32" if rounds else "f32"
    # Rows that TMA cannot read.
    for widths, width in (((1, 64), 64), ((65, 8), 128)):
        kernel = plan.choose(op, "float32", *widths, capability, precision=precision)
        assert kernel == plan.Kernel(op, "sm80", dtype, width, width)
        rest = [k for k in plan.KERNELS if k != kernel]
        for built, found in ((plan.KERNELS, True), (rest, False)):
            missing = plan.missing_kernel(op, "float32", *widths, built, precision)
            assert (missing is None) == found


@pytest.mark.parametrize("precision", [None, "tf32", "highest"])
@pytest.mark.parametrize("op", plan.SPLIT_HEAD_DIMS)
def test_split_float32_on_hopper(op: str, precision: str | None) -> None:
    """Where TMA reads operands and a call need not be as precise as float32."""
    splits = precision in plan.SPLIT_PRECISIONS[op]
    assert splits == (precision is None or (precision == "tf32" and op != "mha_bwd"))
    for widths, width in (((8, 64), 64), ((72, 8), 128), ((128, 128), 128)):
        for forced, dims in itertools.product((False, True), (1, 2, 3)):
            given = {"precision": precision, "force_sm80": forced, "batch_dims": dims}
            kernel = plan.choose(op, "float32", *widths, HOPPER, **given)
            other = plan.choose(op, "float32", *widths, 80, **given)
            if splits and not forced and dims < 3:
                other = plan.Kernel(op, "sm90", "split", width, width)
            assert kernel == other


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((64, 64), 2 * 64 * (3 * 5 * 4 + (1 + 3) * 7 * 2)),
        ((8, 72), 2 * 128 * (3 * 5 * 4 + (1 + 3) * 7 * 2)),
        ((64, 60), None),
        ((136, 128), None),
    ],
)
def test_room_for_split_operands(widths: tuple[int, int], expected: int | None) -> None:
    shapes = [(3, 5, 4, widths[0]), (1, 7, 2, widths[0]), (3, 7, 2, widths[1])]
    for op in ("mha_fwd", "mha_fwd_intervals"):
        assert plan.split_elements(op, shapes) == expected


def test_what_float32_lacks() -> None:
    missing = plan.missing_kernel("mha_bwd", "float32", 8, 129, plan.KERNELS, "tf32")
    assert missing == (
        "H=8 and Hv=129 of query and value: the kernels take widths of at most 128"
    )
    for precision in (None, "tf32"):
        given = ("float32", 136, 8, plan.KERNELS, precision)
        assert plan.missing_kernel("mha_fwd_intervals", *given) == (
            "H=136 and Hv=8 of query and value: the kernels take widths of at most 128"
        )


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((1, 1), (64, 64)),
        ((64, 64), (64, 64)),
        ((65, 8), (96, 96)),
        ((8, 65), (96, 96)),
        ((97, 97), (128, 128)),
        ((192, 128), (192, 192)),
        ((129, 192), (192, 192)),
        ((8, 193), (256, 256)),
        ((256, 256), (256, 256)),
        ((257, 8), None),
        ((8, 257), None),
    ],
)
def test_choice_of_the_backward(
    widths: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    for dtype, capability in itertools.product(plan.DTYPES, OTHERS):
        kernel = plan.backward_kernel(dtype, *widths, capability)
        assert widths_of(kernel) == expected
    assert plan.backward_kernel("float64", *widths, 80) is None
    assert plan.backward_kernel("bfloat16", *widths, 75) is None


@pytest.mark.parametrize("op", plan.HEAD_DIMS)
def test_missing_kernel(op: str) -> None:
    def missing(
        head_dim: int, head_dim_v: int, built: Any = plan.KERNELS
    ) -> str | None:
        return plan.missing_kernel(op, "bfloat16", head_dim, head_dim_v, built)

    for widths in itertools.product((1, 64, 72, 128, 200, 256), repeat=2):
        assert missing(*widths) is None
    assert missing(257, 8) == (
        "H=257 and Hv=8 of query and value: the kernels take widths of at most 256"
    )
    for kernel in plan.KERNELS:
        widths = kernel.head_dim, kernel.head_dim_v
        rest = [k for k in plan.KERNELS if k != kernel]
        needed = kernel in (plan.choose(op, "bfloat16", *widths, c) for c in (80, 90))
        assert (missing(*widths, built=rest) is not None) == needed
    # A kernel of the other operation is none.
    others = [k for k in plan.KERNELS if k.op != op]
    assert "is not among the kernels that were built" in str(
        missing(64, 64, built=others)
    )


def workspace_of(kernel: plan.Kernel, batch: int, heads: int, query_length: int) -> int:
    """What `csrc/host/params.h` lists: a sum, two rows and turns, padded; a queue."""
    tiles = max(-(-query_length // 80) * 80, -(-query_length // 128) * 128)
    rows = -(-tiles // 64) * 64
    sums = batch * heads * rows * (-(-kernel.head_dim // 64) * 64)
    return sums + 2 * batch * heads * rows + batch * heads * (rows // 16) + 4


@pytest.mark.parametrize("query_length", [1, 127, 128, 129, 4097])
@pytest.mark.parametrize(
    "widths", [(1, 1), (64, 64), (72, 40), (128, 36), (192, 8), (192, 250)]
)
@pytest.mark.parametrize("op", ["mha_bwd", "mha_bwd_intervals"])
def test_workspace_suffices_everywhere(
    query_length: int, widths: tuple[int, int], op: str
) -> None:
    sizes = [
        workspace_of(kernel, 3, 5, query_length)
        for capability, batch_dims, forced in itertools.product(
            (HOPPER, *OTHERS), (1, 3), (False, True)
        )
        if (
            kernel := plan.choose(
                op,
                "bfloat16",
                *widths,
                capability,
                batch_dims=batch_dims,
                force_sm80=forced,
            )
        )
    ]
    queue = 17 if op == "mha_bwd_intervals" else None
    got = plan.backward_workspace(3, 5, query_length, "bfloat16", *widths, queue)
    assert got == max(sizes) + (queue or 0)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "keys", "parts", "ordered"),
    [
        (1, 32, 8, 1024, 4, 4),
        (1, 64, 8, 1000, 8, 8),
        (1, 64, 8, 4096, 2, 8),  # room for as many blocks again
        (2, 32, 8, 4096, 0, 4),
        (1, 32, 8, 16384, 0, 2),
        (8, 64, 1, 65536, 0, 0),
        (1, 8, 8, 1024, 0, 0),
    ],
)
def test_room_for_parts_of_groups(
    batch: int, heads: int, kv_heads: int, keys: int, parts: int, ordered: int
) -> None:
    shape = batch, heads, kv_heads, keys, "bfloat16"
    padded = -(-keys // 64) * 64
    for widths, intervals, columns in (
        ((120, 64), False, 256),
        ((72, 88), False, 192),
        ((72, 88), True, 256),
    ):
        one = batch * kv_heads * padded * columns
        assert plan.backward_parts(*shape, *widths, intervals) == parts * one
        got = plan.backward_parts(*shape, *widths, intervals, deterministic=True)
        assert got == ordered * one


def test_no_room_for_parts_of_float32() -> None:
    assert plan.backward_parts(1, 32, 8, 1024, "float32", 128, 128) == 0


def test_workspace_of_a_wider_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with fewer widths pads to wider ones, which the size must allow for."""
    wide = plan.Kernel("mha_bwd", "sm90", "bf16", 128, 128)
    monkeypatch.setattr(plan, "KERNELS", (wide, *plan.KERNELS))
    got = plan.backward_workspace(2, 3, 100, "bfloat16", 32, 32)
    assert got == workspace_of(wide, 2, 3, 100)


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((8, 8), (64, 64)),
        ((64, 64), (64, 64)),
        ((72, 16), (96, 96)),
        ((16, 72), (96, 96)),
        ((128, 128), (128, 128)),
        ((136, 128), (192, 128)),
        ((136, 136), (192, 192)),
        ((64, 200), (256, 256)),
        ((256, 256), (256, 256)),
        ((264, 8), None),
    ],
)
def test_choice_on_hopper(
    widths: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    for dtype in plan.DTYPES:
        kernel = plan.forward_kernel(dtype, *widths, HOPPER)
        assert widths_of(kernel) == expected
        assert kernel is None or kernel.family == "sm90"
        backward = plan.backward_kernel(dtype, *widths, HOPPER)
        assert widths_of(backward) == expected
        assert backward is None or backward.family == "sm90"
        other = plan.forward_kernel(dtype, *widths, HOPPER, force_sm80=True)
        assert other == plan.forward_kernel(dtype, *widths, 80)


@pytest.mark.parametrize(
    ("widths", "batch_dims"), [((64, 60), 1), ((60, 64), 1), ((1, 1), 1), ((64, 64), 3)]
)
def test_what_hopper_leaves_to_sm80(widths: tuple[int, int], batch_dims: int) -> None:
    kernel = plan.forward_kernel("float16", *widths, HOPPER, batch_dims=batch_dims)
    assert kernel == plan.forward_kernel("float16", *widths, 80)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([(4,)], 1),
        ([(1,), (1,)], 1),
        ([(4, 5, 6), (4, 5, 6)], 1),
        ([(4, 5), (1, 5)], 2),
        ([(4, 5, 6), (4, 1, 6)], 3),
        ([(4, 5, 6), (1, 1, 6), (4, 5, 6)], 2),
        ([(4, 1, 6), (4, 1, 6)], 1),
        ([(4, 5), (4, 1), (1, 5)], 2),
    ],
)
def test_merged_batch_dims(batches: list[tuple[int, ...]], expected: int) -> None:
    assert plan.merged_batch_dims(batches) == expected


def test_the_shape_table_reaches_every_kernel() -> None:
    reached = {
        plan.choose(op, s.dtype, *s.widths, capability)
        for op in plan.HEAD_DIMS
        for s in specs.GPU_TABLE
        for capability in (80, HOPPER)
    }
    f32 = {k for k in plan.KERNELS if k.dtype in ("f32", "tf32", "split")}
    assert reached == set(plan.KERNELS) - f32  # f32_kernel_test has its own
