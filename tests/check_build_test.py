"""The build gate: what `tools/check_build.py` objects to."""

import pathlib
import sys
from typing import Any

import pytest

# The tools are no part of the package, so the repository must be on the path.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jax_flash._src import plan
from tools import check_build

SM80 = "csrc/sm80/inst/bwd_64x64.cu"
LOG = """\
[1/33] Building CUDA object CMakeFiles/jax_flash_sm80.dir/{source}.o
ptxas info    : 0 bytes gmem
{line}
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    {spills} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 86.132 ms
"""
INSTRUCTIONS = """\
		Function : {name}
        /*00b0*/    HGMMA.64x{keys}x16.F32{suffix} R24, gdesc[UR4], RZ, !UPT ;
        /*00c0*/    HGMMA.64x{keys}x16.F32{suffix} R24, gdesc[UR8], R24, gsb0 ;
        /*00d0*/    FADD R4, R4, R5 ;
        /*00f0*/    HGMMA.64x{values}x16.F32{suffix} R88, R4, gdesc[UR4].tnspB, R88 ;
"""


def judge_log(line: str = "", spills: int = 0) -> list[str]:
    report = check_build.read_log(LOG.format(source=SM80, line=line, spills=spills))
    (function,) = report.functions
    assert function.source == SM80
    assert (function.architecture, function.name) == ("sm_80", "_Z1kv")
    assert (function.registers, function.smem) == (168, 1024)
    return check_build.judge(report, {}, None, 0.0, 0.0, partial=True)


def test_clean_log() -> None:
    assert judge_log() == []


def test_spills() -> None:
    assert judge_log(spills=16) == [f"{SM80} (sm_80): 32 bytes of register spills"]


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; "
        "unable to determine register count at entry.",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async "
        "instructions are serialized due to the presence of Extern calls",
        "  ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async "
        "instructions are serialized due to insufficient register resources",
        "ptxas info    : (C7517) warpgroup.wait is injected in around line 107 by "
        "compiler to allow use of registers defined by GMMA in function '_Z1kv'",
        "ptxas info    : (C7519) warpgroup.arrive is injected in around line 109 by "
        "compiler to allow use of registers in GMMA in function '_Z1kv'",
        "ptxas info : (C7520) Potential Performance Loss: something new",
        "ptxas warning : (C7508) something graver",
        "kernel.cuh(12): warning #177-D: variable was declared but never referenced",
    ],
)
def test_complaints_of_compilers(line: str) -> None:
    assert judge_log(line) == [f"{SM80}: {line.strip()}"]


def test_missing_files() -> None:
    faults = check_build.judge(check_build.Report(), {}, None, 0.0, 0.0, partial=False)
    assert any(f.startswith(f"{SM80}: no kernel of it in the log") for f in faults)


def name(
    dtype: int,
    head_dim: int,
    head_dim_v: int,
    keys: int,
    warpgroups: int = 2,
    dense: bool = False,
    *,
    intervals: bool = False,
) -> str:
    """The kernel with these template arguments, as the compiler mangles it."""
    return (
        "_ZN9jax_flash4sm9014mha_fwd_kernelINS0_9FwdConfigILNS_11ElementTypeE"
        f"{dtype}ELi{head_dim}ELi{head_dim_v}EXtlNS0_8FwdTilesELi{warpgroups}ELi{keys}"
        f"ELi1ELi2ELi4EEELb{intervals or dense:d}ELb0ELb{dense:d}"
        "EEEEEvNS_12MhaFwdParamsENS0_7FwdPlanE"
    )


def judge_kernel(
    dtype: int, head_dim: int, head_dim_v: int, keys: int, changes: Any = ()
) -> list[str]:
    """Faults of one kernel, apart from those that others are missing."""
    fields = {
        "name": name(dtype, head_dim, head_dim_v, keys),
        "keys": keys,
        "values": head_dim_v,
        "suffix": (".BF16", "")[dtype],
    }
    sass = INSTRUCTIONS.format(**fields | dict(changes))
    faults = check_build.judge_hgmma(check_build.read_sass(sass.splitlines()))
    return [fault for fault in faults if not fault.endswith("no sm_90a code of it")]


@pytest.mark.parametrize(
    "kernel",
    [(0, 128, 128, 128), (0, 192, 128, 112), (1, 256, 256, 80), (1, 64, 64, 64)],
)
def test_matrix_instructions(kernel: tuple[int, int, int, int]) -> None:
    assert judge_kernel(*kernel) == []


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"keys": 64}, "HGMMA.64x64x16.F32.BF16"),
        ({"values": 64}, "HGMMA.64x64x16.F32.BF16"),
        ({"keys": 192}, "HGMMA.64x192x16.F32.BF16"),
        ({"suffix": ""}, "HGMMA.64x112x16.F32'"),
    ],
)
def test_wrong_matrix_instructions(change: dict[str, Any], got: str) -> None:
    (fault,) = judge_kernel(0, 192, 128, 112, change)
    assert fault.startswith("fwd_bf16_192x128: ")
    assert got in fault.partition("expected")[0]
    assert fault.endswith("['HGMMA.64x112x16.F32.BF16', 'HGMMA.64x128x16.F32.BF16']")


@pytest.mark.parametrize(
    ("config", "kernel", "widths"),
    [
        ("9BwdConfigILNS_11ElementTypeE1ELi128ELi80ELb0E", "128x128", (80, 128)),
        (
            "13BwdWideConfigILNS_11ElementTypeE1ELi192ELi128ELb1ELb0ENS_7RowMaskE",
            "192x128",
            (64, 128, 192),
        ),
        (
            "9BwdConfigILNS_11ElementTypeE1ELi64ELi64ELb0ENS_12IntervalMaskE",
            "intervals 64x64",
            (32, 64),
        ),
        (
            "13BwdWideConfigILNS_11ElementTypeE1ELi256ELi256ELb0ELb0ENS_12IntervalMaskE",
            "intervals 256x256",
            (64, 256),
        ),
    ],
)
def test_matrix_instructions_of_the_backward(
    config: str, kernel: str, widths: tuple[int, ...]
) -> None:
    name = (
        f"_ZN9jax_flash4sm9014mha_bwd_kernelINS0_{config}"
        "EEEvNS_12MhaBwdParamsENS0_7BwdPlanE"
    )
    right = {f"HGMMA.64x{width}x16.F32" for width in widths}
    kind, _, size = kernel.rpartition(" ")
    stem = f"bwd_{kind}_f16_{size}" if kind else f"bwd_f16_{size}"
    faults = check_build.judge_hgmma({name: right})
    assert all(f.endswith(": no sm_90a code of it") for f in faults)
    assert f"{stem}: no sm_90a code of it" not in faults
    fault = check_build.judge_hgmma({name: right | {"HGMMA.64x24x16.F32"}})[0]
    assert fault.startswith(f"{stem}: ['HGMMA.64x")


def test_missing_matrix_instructions() -> None:
    faults = check_build.judge_hgmma({name(0, 64, 64, 128): set()})
    assert "fwd_bf16_64x64: [], expected" in faults[0]


def test_kernels_with_intervals_have_files_of_their_own() -> None:
    wrong = name(0, 64, 64, 128, intervals=True)
    faults = check_build.judge_hgmma({wrong: set()})
    assert faults[0].startswith("fwd_intervals_bf16_64x64: [], expected")
    (fault,) = check_build.judge_collectives({wrong: check_build.Counter()})
    assert fault.startswith("fwd_intervals_bf16_64x64: {}, expected")


def test_narrow_tiles() -> None:
    assert judge_kernel(1, 128, 128, 48) == [
        "fwd_f16_128x128: tiles of 48 keys, fewer than 64"
    ]


def test_kernel_with_unknown_tiles() -> None:
    (fault,) = judge_kernel(0, 64, 64, 64, {"name": "_Z5otherv"})
    assert fault.endswith("in a kernel with unknown tiles")
    without = check_build.judge_hgmma({"_Z5otherv": set()})
    assert without == check_build.judge_hgmma({})


# Head widths, keys of a tile, warpgroups, more; products, fences, waits in the source.
COLLECTIVES = [
    ((64, 64, 128, 3), (32, 5, 3)),
    ((128, 128, 128, 2), (40, 5, 5)),
    ((128, 128, 128, 2, "dense"), (40, 5, 5)),
    ((64, 64, 128, 2, "intervals"), (44, 7, 7)),
    ((128, 128, 128, 2, "intervals"), (56, 7, 7)),
    ((256, 256, 64, 2, "intervals"), (24, 3, 3)),
    ((192, 192, 112, 2), (45, 5, 5)),
    ((256, 256, 64, 2), (24, 3, 3)),
]


def judge_counts(
    kernel: tuple[Any, ...], products: int, fences: int, waits: int, predicate: str = ""
) -> list[str]:
    """Faults of a kernel with that many instructions of each kind."""
    kind = dict.fromkeys(kernel[4:], True)
    lines = [f"\t\tFunction : {name(0, *kernel[:4], **kind)}"]
    lines += ["  /*0a10*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;"] * products
    lines += ["  /*0b20*/  WARPGROUP.ARRIVE ;"] * fences
    lines += ["  /*0c30*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"] * (waits - 1)
    lines += [f"  /*0d40*/ {predicate} WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"]
    return check_build.judge_collectives(check_build.count_collectives(lines))


@pytest.mark.parametrize(("kernel", "counts"), COLLECTIVES)
def test_collective_instructions(
    kernel: tuple[Any, ...], counts: tuple[int, int, int]
) -> None:
    assert judge_counts(kernel, *counts) == []
    for i in range(3):
        products, fences, waits = (n + (i == j) for j, n in enumerate(counts))
        (fault,) = judge_counts(kernel, products, fences, waits)
        kind = "fwd_intervals" if kernel[4:] else "fwd"
        assert fault.startswith(f"{kind}_bf16_{kernel[0]}x{kernel[1]}: ")
    (fault,) = judge_counts(kernel, *counts, predicate="@!P0")
    assert "'conditional': 1" in fault


def test_every_kernel_must_be_in_the_code() -> None:
    faults = check_build.judge_hgmma({})
    names = {"warpgroup_bf16", "warpgroup_f16"}
    for kernel in plan.KERNELS:
        if kernel.family == "sm90":
            op = kernel.op.removeprefix("mha_")
            names.add(f"{op}_{kernel.dtype}_{kernel.head_dim}x{kernel.head_dim_v}")
    assert set(faults) == {f"{name}: no sm_90a code of it" for name in names}


@pytest.mark.parametrize("width", [64, 128])
def test_instructions_of_decoding(width: int) -> None:
    name = (
        "_ZN9jax_flash6decode19decode_split_kernelINS0_12DecodeConfigILNS0_9CacheType"
        f"E1ELi{width}ELNS0_4RowsE3EEEEEvNS0_12DecodeParamsE"
    )
    right = {"HGMMA.64x64x16.F32", "HGMMA.64x128x16.F32"}
    assert not any(
        fault.startswith("warpgroup_f16")
        for fault in check_build.judge_hgmma({name: right})
    )
    (fault, *_) = check_build.judge_hgmma({name: right | {"HGMMA.64x32x16.F32"}})
    assert fault.startswith(f"warpgroup_f16, width {width}: ")
    counts = {"HGMMA": 12, "WARPGROUP.ARRIVE": 2, "WARPGROUP.DEPBAR": 2}
    judge_collectives = check_build.judge_collectives
    assert not judge_collectives({name: check_build.Counter(counts)})
    for kind in (*counts, "conditional"):
        wrong = check_build.Counter(counts) + check_build.Counter({kind: 1})
        (fault,) = judge_collectives({name: wrong})
        assert fault.startswith("warpgroup_f16: ")


@pytest.mark.parametrize(("bit", "kind"), [("0", "bwd"), ("1", "bwd_intervals")])
def test_a_backward_of_split_operands_has_products_of_warps(
    bit: str, kind: str
) -> None:
    name = (
        "_ZN9jax_flash4sm8014mha_bwd_kernelINS0_9BwdConfigILNS_11ElementTypeE4ELi64E"
        f"Li64ELb1EXtlNS0_8BwdTilesELi64ELb0ELNS0_5ChipsE0EEE"
        f"Lb{bit}ELb{bit}EEEEEvNS_12MhaBwdParamsE"
        "NS0_7BwdPlanE"
    )
    fault = f"{kind}_split_64x64: no sm_90a code of it"
    assert fault in check_build.judge_hgmma({})
    assert fault not in check_build.judge_hgmma({name: set()})
    assert any(name in x for x in check_build.judge_hgmma({name: {"HGMMA.64x64x16"}}))


def test_without_cuobjdump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_build.shutil, "which", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="nvidia-cuda-cuobjdump"):
        check_build.sass_of(pathlib.Path("x.whl"))
