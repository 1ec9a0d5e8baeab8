"""The command line: `python -m jax_flash info`."""

import argparse
import platform
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxlib.version

import jax_flash
from jax_flash import backends
from jax_flash._src import registry

DTYPES = {
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f32": jnp.float32,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_flash", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="versions, GPUs, kernels, and what would run a given call"
    )
    info.add_argument(
        "--shape",
        help="B,T,S,N,K,H or B,T,S,N,K,H,Hv: batch, query and key length, query and "
        "key/value heads, widths",
    )
    info.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    info.add_argument("--causal", action="store_true")
    info.add_argument("--alignment", default="bottom_right", metavar="CORNER")
    info.add_argument(
        "--window", metavar="LEFT,RIGHT", help="window_size; 'none' = unbounded"
    )
    info.add_argument("--softcap", type=float)
    info.add_argument("--precision")
    info.add_argument("--lengths", action="store_true", help="with both seq_lengths")
    info.add_argument("--return-lse", action="store_true")
    info.add_argument("--implementation", metavar="NAME[,NAME]")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (6, 7):
        raise ValueError(f"--shape must be B,T,S,N,K,H or B,T,S,N,K,H,Hv, got {text!r}")
    return sizes


def _window(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if p == "none" else int(p) for p in text.split(","))
    except ValueError:
        raise ValueError(f"--window must be LEFT,RIGHT, got {text!r}") from None


def _explanation(args: argparse.Namespace) -> backends.Explanation:
    sizes = _sizes(args.shape)
    batch, rows, keys, heads, kv_heads, width = sizes[:6]
    value_width = sizes[6] if len(sizes) == 7 else width
    dtype = DTYPES[args.dtype]
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32) if args.lengths else None
    names = args.implementation and tuple(args.implementation.split(","))
    return backends.explain(
        jax.ShapeDtypeStruct((batch, rows, heads, width), dtype),
        jax.ShapeDtypeStruct((batch, keys, kv_heads, width), dtype),
        jax.ShapeDtypeStruct((batch, keys, kv_heads, value_width), dtype),
        is_causal=args.causal,
        causal_alignment=args.alignment,
        window_size=args.window and _window(args.window),
        softcap=args.softcap,
        precision=args.precision,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        return_lse=args.return_lse,
        implementation=names,
    )


def _versions() -> list[str]:
    extension = registry.extension()
    lines = [
        f"jax_flash  {jax_flash.__version__}",
        f"jax        {jax.__version__}",
        f"jaxlib     {jaxlib.version.__version__}",
        f"python     {platform.python_version()} on {platform.machine()}",
    ]
    if extension.missing is not None:
        return [*lines, f"kernels    none: {extension.missing}"]
    lines += [f"{name:10s} {value}" for name, value in extension.build_info]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for kernel in extension.kernels:
        key = (kernel.op, kernel.family, kernel.dtype)
        groups.setdefault(key, []).append(f"{kernel.head_dim}x{kernel.head_dim_v}")
    for key, widths in groups.items():
        lines.append(f"kernels    {' '.join(key)}: widths {' '.join(widths)}")
    if extension.force_sm80:
        lines.append("kernels    JAX_FLASH_FORCE_SM80=1: sm90 is not used")
    return lines


def _devices() -> list[str]:
    lines = []
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        suffix = f", compute capability {capability}" if capability else ""
        lines.append(f"device     {device.id}: {device.device_kind}{suffix}")
        if capability and float(capability) < 8:
            lines.append("           the kernels need compute capability 8.0 or later")
    if all(device.platform != "gpu" for device in jax.devices()):
        lines.append("device     there is no GPU in this process")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        lines = [*_versions(), *_devices()]
        if args.shape:
            lines += ["", str(_explanation(args))]
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
