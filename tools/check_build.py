"""Judges a full build of the kernels by what the compilers said.

    python tools/check_build.py LOG [--ninja-log BUILD/.ninja_log] [--wheel W]

Fails on register spills, on ptxas notes that it gave up an optimisation
(serialised wgmma, ignored setmaxnreg), on compiler warnings, on an instantiation
file that was not compiled, on a build or a wheel over its limit, on matrix
instructions in the wheel's sm_90a code that are not those of a kernel's tiles, and
on copies of instructions that all warps of a warpgroup must meet at one place.
Prints one line for each kernel and architecture: registers, static shared memory,
spilled bytes.

Looking into a wheel needs cuobjdump: that of the Python packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or one on PATH.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OBJECT = re.compile(r"\[\d+/\d+\] Building (?:CUDA|CXX) object (\S+)\.o\b")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\w+)")
SPILLS = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
NOTE = re.compile(r"ptxas info\s*: \(C\d+\)|Potential Performance Loss")
WARNING = re.compile(r"\bwarning\b\s*(?:#[\w-]+)?\s*:", re.ASCII)

# launch_mha_fwd_intervals<ElementType::kBf16, 64, 64> and, where the type is not said,
# launch_mha_bwd_split<64, 64, true>, true with intervals.
INSTANTIATION = re.compile(
    r"launch_mha_(?P<op>fwd|bwd)(?P<intervals>_intervals)?(?:_split)?"
    r"<(?:ElementType::k(?P<type>\w+), )?(?P<head_dim>\d+), (?P<head_dim_v>\d+)"
    r"(?:, (?P<flag>true|false))?>"
)
SASS_FUNCTION = re.compile(r"Function : (\w+)")
HGMMA = re.compile(r"\bHGMMA\.\S+")
# Instructions of a whole warpgroup, and whether they depend on a predicate.
COLLECTIVE = re.compile(r"(@!?U?P\w+\s+)?\b(HGMMA|WARPGROUP\.(?:ARRIVE|DEPBAR))\b")
# As the compiler writes sm90::mha_fwd_kernel<FwdConfig<type, head_dim, head_dim_v,
# FwdTiles{warpgroups, keys, ...}, intervals, options, dense>>.
SM90_FORWARD = re.compile(
    r"4sm90\d+mha_fwd_kernelI.*?ElementTypeE(?P<type>\d)ELi(?P<head_dim>\d+)E"
    r"Li(?P<head_dim_v>\d+)E.*?FwdTilesELi(?P<warpgroups>\d+)ELi(?P<keys>\d+)E"
    r"(?:(?:Li\d+E)+EELb(?P<intervals>[01])ELb[01]ELb(?P<dense>[01])E)?"
)
# sm90::mha_bwd_kernel<BwdConfig<type, head_dim, rows, deterministic, mask>> and, over
# width 128, <BwdWideConfig<type, head_dim, head_dim_v, deterministic, mask>>.
SM90_BACKWARD = re.compile(
    r"4sm90\d+mha_bwd_kernelI.*?Bwd(?P<wide>Wide)?ConfigILNS_11ElementTypeE"
    r"(?P<type>\d)ELi(?P<head_dim>\d+)ELi(?P<second>\d+)E(?:Lb[01]E)+"
    r"(?P<intervals>NS_12IntervalMaskE)?"
)
# decode::decode_split_kernel<DecodeConfig<type, width, Rows::kWarpgroup>>.
SM90_DECODE = re.compile(
    r"6decode\d+decode_split_kernelI.*?CacheTypeE(?P<type>\d)ELi(?P<width>\d+)E"
    r"LNS0_4RowsE3E"
)
DECODE_KEYS = {64: 128, 128: 64}
"""Keys of a tile by width, kWarpgroupTiles of csrc/decode/config.cuh."""
WIDE_BACKWARD_TILE = 64
"""Queries, and keys, of a tile of the backward over width 128."""
TYPES = ("bf16", "f16", "f32", "tf32", "split")
"""Names of the values of ElementType."""
SPLIT_BACKWARD = re.compile(
    r"4sm80\d+mha_bwd_kernelI.*?BwdConfigILNS_11ElementTypeE4ELi(?P<head_dim>\d+)E"
    r"Li(?P<head_dim_v>\d+)ELb1E.*?BwdTilesE"
    r"(?:L(?:[ib]|NS0_5ChipsE)\d+E)+EELb(?P<intervals>[01])E"
)
"""Whose matrix instructions are those of warps."""
SPLIT_PRODUCTS = 3
"""Products of bfloat16 for one of "split"."""
MINIMUM_KEYS = 64
"""Narrower products leave the tensor cores waiting for shared memory."""


@dataclasses.dataclass
class Function:
    """One device function as ptxas reported it; sizes in bytes."""

    source: str
    architecture: str
    name: str
    registers: int = 0
    smem: int = 0
    stack: int = 0
    spills: int = 0


@dataclasses.dataclass
class Report:
    """Everything the log says about a build."""

    functions: list[Function] = dataclasses.field(default_factory=list)
    sources: list[str] = dataclasses.field(default_factory=list)
    complaints: list[str] = dataclasses.field(default_factory=list)


def read_log(text: str) -> Report:
    """Collects device functions, compiled sources and complaints from a log.

    Ninja prints the output of one command in one piece, so lines of different
    objects never mix.
    """
    report = Report()
    source = architecture = "?"
    for line in text.splitlines():
        if match := OBJECT.search(line):
            source = match[1].split(".dir/")[-1]
            report.sources.append(source)
        elif match := ENTRY.search(line):
            architecture = match[2]
        elif match := FUNCTION.search(line):
            report.functions.append(Function(source, architecture, match[1]))
        elif (match := SPILLS.search(line)) and report.functions:
            function = report.functions[-1]
            function.stack = int(match[1])
            function.spills = int(match[2]) + int(match[3])
        elif (match := USED.search(line)) and report.functions:
            report.functions[-1].registers = int(match[1])
            report.functions[-1].smem = int(match[2] or 0)
        if NOTE.search(line) or WARNING.search(line):
            report.complaints.append(f"{source}: {line.strip()}")
    return report


def demangle(names: list[str]) -> list[str]:
    """Readable names, or the names as they are where binutils are missing."""
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True
    )
    return done.stdout.splitlines() if done.returncode == 0 else names


def read_ninja_log(path: Path) -> dict[str, tuple[float, float]]:
    """Start and end, in seconds, of each compiled source of the last build."""
    times = {}
    for line in path.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) == 5 and fields[3].endswith(".o"):
            source = fields[3].removesuffix(".o").split(".dir/")[-1]
            times[source] = (int(fields[0]) / 1000, int(fields[1]) / 1000)
    return times


def print_table(report: Report, times: dict[str, tuple[float, float]]) -> None:
    """Prints one line for each device function and one for the whole."""
    print(
        f"{'file':24} {'arch':6} {'regs':>4} {'smem':>6} {'spill':>6} {'s':>6}  kernel"
    )
    names = demangle([f.name for f in report.functions])
    for function, name in zip(report.functions, names, strict=True):
        start, end = times.get(function.source, (0.0, 0.0))
        short = re.sub(r"(\(anonymous namespace\)|\b\w+)::", "", name)
        short = short if len(short) <= 60 else short[:57] + "..."
        print(
            f"{Path(function.source).name:24} {function.architecture:6} "
            f"{function.registers:4} {function.smem:6} {function.spills:6} "
            f"{end - start:6.1f}  {short}"
        )


def sass_of(wheel: Path) -> str:
    """The sm_90a machine code of the extension in a wheel, disassembled."""
    folders = [f"{folder}/nvidia/cu13/bin" for folder in sys.path]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None:
        raise FileNotFoundError(
            "no cuobjdump to look into the wheel with: pip install "
            "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if Path(n).match("_kernels*.so")]
        extension = archive.extract(names[0], folder)
        command = [cuobjdump, "-sass", "-arch", "sm_90a", extension]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout


def read_sass(lines: Iterable[str]) -> dict[str, set[str]]:
    """The warpgroup matrix instructions of each function, as HGMMA.64x128x16.F32."""
    instructions: dict[str, set[str]] = {}
    name = "?"
    for line in lines:
        if match := SASS_FUNCTION.search(line):
            name = match[1]
            instructions[name] = set()
        elif match := HGMMA.search(line):
            instructions.setdefault(name, set()).add(match[0])
    return instructions


def differences(kernel: str, dtype: str, got: set[str], widths: set[int]) -> list[str]:
    """The fault of a kernel whose instructions are not of these widths, or none."""
    suffix = "" if dtype == "f16" else ".BF16"
    want = {f"HGMMA.64x{width}x16.F32{suffix}" for width in widths}
    return [] if got == want else [f"{kernel}: {sorted(got)}, expected {sorted(want)}"]


def forward_kind(match: re.Match[str]) -> str:
    """How the name of a forward kernel begins."""
    return "fwd_intervals" if match["intervals"] == "1" else "fwd"


def judge_hgmma(instructions: dict[str, set[str]]) -> list[str]:
    """Kernels whose matrix instructions are not those their tiles ask for.

    Scores take instructions as wide as a tile of keys, outputs as wide as the values;
    decoding's, too; the backward's as wide as a tile of queries, and as the heads; with
    intervals each of two warpgroups has half of the gradient of queries. Anything else
    means a tile that was cut up.
    """
    faults = []
    seen = set()
    for name, got in instructions.items():
        if match := SM90_BACKWARD.search(name):
            dtype, widths = TYPES[int(match["type"])], {int(match["head_dim"])}
            if match["wide"]:
                head_dim_v, rows = int(match["second"]), WIDE_BACKWARD_TILE
                widths.add(head_dim_v)
            else:
                head_dim_v, rows = int(match["head_dim"]), int(match["second"])
                if match["intervals"]:
                    widths.add(head_dim_v // 2)
            kind = "bwd_intervals" if match["intervals"] else "bwd"
            kernel = f"{kind}_{dtype}_{match['head_dim']}x{head_dim_v}"
            seen.add(kernel)
            faults += differences(kernel, dtype, got, widths | {rows})
            continue
        if match := SM90_DECODE.search(name):
            dtype, width = TYPES[int(match["type"])], int(match["width"])
            seen.add(f"warpgroup_{dtype}")
            kernel = f"warpgroup_{dtype}, width {width}"
            faults += differences(kernel, dtype, got, {width, DECODE_KEYS[width]})
            continue
        match = SM90_FORWARD.search(name)
        if match is None:
            if split := SPLIT_BACKWARD.search(name):
                kind = "bwd_intervals" if split["intervals"] == "1" else "bwd"
                seen.add(f"{kind}_split_{split['head_dim']}x{split['head_dim_v']}")
            if got:
                faults.append(f"{name}: {sorted(got)} in a kernel with unknown tiles")
            continue
        dtype, keys = TYPES[int(match["type"])], int(match["keys"])
        kernel = (
            f"{forward_kind(match)}_{dtype}_{match['head_dim']}x{match['head_dim_v']}"
        )
        seen.add(kernel)
        faults += differences(kernel, dtype, got, {keys, int(match["head_dim_v"])})
        if keys < MINIMUM_KEYS:
            faults.append(f"{kernel}: tiles of {keys} keys, fewer than {MINIMUM_KEYS}")
    faults += [
        f"{kernel}: no sm_90a code of it" for kernel in sorted(hopper_kernels() - seen)
    ]
    return faults


def instantiations(path: Path) -> list[str]:
    """The kernels of an instantiation file, as fwd_intervals_bf16_64x64."""
    names = []
    for match in INSTANTIATION.finditer(path.read_text()):
        dtype = (match["type"] or "split").lower()
        intervals = match["intervals"] or match["flag"] == "true"
        kind = f"{match['op']}_intervals" if intervals else match["op"]
        names.append(f"{kind}_{dtype}_{match['head_dim']}x{match['head_dim_v']}")
    return names


def hopper_kernels() -> set[str]:
    """The kernels with warpgroup matrix instructions, and those that replace some."""
    files = ROOT.glob("csrc/sm90/inst/*.cu")
    decode = (ROOT / "csrc" / "decode" / "warpgroup.cu").read_text()
    types = re.findall(r"launch_warpgroup<CacheType::k(\w+)", decode)
    kernels = {f"warpgroup_{dtype.lower()}" for dtype in types}
    return kernels.union(*map(instantiations, files))


def count_collectives(lines: Iterable[str]) -> dict[str, Counter[str]]:
    """How often each function has HGMMA, WARPGROUP.ARRIVE and WARPGROUP.DEPBAR.

    Those that only run where a predicate holds are counted as "conditional".
    """
    counts: dict[str, Counter[str]] = {}
    name = "?"
    for line in lines:
        if match := SASS_FUNCTION.search(line):
            name = match[1]
            counts[name] = Counter()
        elif match := COLLECTIVE.search(line):
            counts.setdefault(name, Counter())[match[2]] += 1
            if match[1]:
                counts[name]["conditional"] += 1
    return counts


def judge_collectives(counts: dict[str, Counter[str]]) -> list[str]:
    """Forward and decode kernels with other collective instructions than in the source.

    All four warps of a warpgroup must meet such an instruction at the same address.
    Where the compiler copies one into the paths of a branch, warps that take
    different paths (rows that left the range of exponentials) do not.
    """
    faults = []
    for name, got in counts.items():
        if match := SM90_DECODE.search(name):
            steps = (int(match["width"]) + DECODE_KEYS[int(match["width"])]) // 16
            want = Counter(
                {"HGMMA": steps, "WARPGROUP.ARRIVE": 2, "WARPGROUP.DEPBAR": 2}
            )
            if got != want:
                kernel = f"warpgroup_{TYPES[int(match['type'])]}"
                faults.append(f"{kernel}: {dict(got)}, expected {dict(want)}")
            continue
        if (match := SM90_FORWARD.search(name)) is None:
            continue
        head_dim, head_dim_v = int(match["head_dim"]), int(match["head_dim_v"])
        # FwdConfig::kOneBody, kOverlaps and kQuickStart; after the steps comes the last
        # product.
        dtype = TYPES[int(match["type"])]
        plain = match["dense"] == "0" and dtype != "split"
        begins = match["intervals"] == "1" and plain
        bodies = 1 if head_dim_v > 192 else 3 if begins else 2
        waits = 2 if match["warpgroups"] == "2" else 1
        steps = bodies * head_dim // 16 + (bodies + 1) * int(match["keys"]) // 16
        want = Counter(
            {
                "HGMMA": steps * (SPLIT_PRODUCTS if dtype == "split" else 1),
                "WARPGROUP.ARRIVE": 2 * bodies + 1,
                "WARPGROUP.DEPBAR": waits * bodies + 1,
            }
        )
        if got != want:
            kernel = f"{forward_kind(match)}_{dtype}_{head_dim}x{head_dim_v}"
            faults.append(f"{kernel}: {dict(got)}, expected {dict(want)}")
    return faults


def judge(
    report: Report,
    times: dict[str, tuple[float, float]],
    wheel: Path | None,
    max_seconds: float,
    max_megabytes: float,
    partial: bool,
) -> list[str]:
    """Every reason why the build is not acceptable; empty if it is."""
    faults = list(report.complaints)
    faults += [
        f"{f.source} ({f.architecture}): {f.spills} bytes of register spills"
        for f in report.functions
        if f.spills
    ]
    compiled = {f.source for f in report.functions}
    for path in sorted(ROOT.glob("csrc/*/inst/*.cu")):
        name = path.relative_to(ROOT).as_posix()
        if name not in compiled and not partial:
            faults.append(f"{name}: no kernel of it in the log; is it a full build?")
    if times:
        seconds = max(t[1] for t in times.values()) - min(t[0] for t in times.values())
        print(f"compiled {len(times)} objects in {seconds:.0f} s")
        if seconds > max_seconds:
            faults.append(
                f"compiling took {seconds:.0f} s, the limit is {max_seconds:.0f}"
            )
    if wheel is not None:
        megabytes = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {megabytes:.1f} MB")
        if megabytes > max_megabytes:
            faults.append(f"{wheel.name} is over {max_megabytes:.0f} MB")
        sass = sass_of(wheel).splitlines()
        faults += judge_hgmma(read_sass(sass))
        faults += judge_collectives(count_collectives(sass))
    return faults


def main() -> int:
    """Prints the table and the faults; 1 if there is any fault, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--ninja-log", type=Path)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument(
        "--partial", action="store_true", help="the log need not cover every file"
    )
    parser.add_argument("--max-seconds", type=float, default=600.0)
    parser.add_argument("--max-megabytes", type=float, default=40.0)
    args = parser.parse_args()

    report = read_log(args.log.read_text(errors="replace"))
    times = read_ninja_log(args.ninja_log) if args.ninja_log else {}
    print_table(report, times)
    faults = judge(
        report, times, args.wheel, args.max_seconds, args.max_megabytes, args.partial
    )
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    print("check_build:", f"{len(faults)} faults" if faults else "no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
