"""The command line: `python -m jax_flash info`, `bench` and `demo`."""

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

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
    bench = commands.add_parser(
        "bench", help="time of a call, by each implementation that runs it here"
    )
    bench.add_argument("--seconds", type=float, default=0.5, help="of a measurement")
    for command, shape in ((info, None), (bench, "1,1024,1024,8,8,64")):
        _add_call(command, shape)
    commands.add_parser(
        "demo", help="every operation once, and how far it is from NumPy's float64"
    )
    return parser


def _add_call(command: argparse.ArgumentParser, shape: str | None) -> None:
    """The options that describe a call of `mha`."""
    command.add_argument(
        "--shape",
        default=shape,
        help="B,T,S,N,K,H or B,T,S,N,K,H,Hv: batch, query and key length, query and "
        "key/value heads, widths" + ("" if shape is None else f" (default: {shape})"),
    )
    command.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    command.add_argument("--causal", action="store_true")
    command.add_argument("--alignment", default="bottom_right", metavar="CORNER")
    command.add_argument(
        "--window", metavar="LEFT,RIGHT", help="window_size; 'none' = unbounded"
    )
    command.add_argument("--softcap", type=float)
    command.add_argument("--precision")
    command.add_argument("--lengths", action="store_true", help="with both seq_lengths")
    command.add_argument("--return-lse", action="store_true")
    command.add_argument("--implementation", metavar="NAME[,NAME]")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (6, 7) or min(sizes) < 0:
        raise ValueError(f"--shape must be B,T,S,N,K,H or B,T,S,N,K,H,Hv, got {text!r}")
    return sizes


def _window(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if p == "none" else int(p) for p in text.split(","))
    except ValueError:
        raise ValueError(f"--window must be LEFT,RIGHT, got {text!r}") from None


def _call(
    args: argparse.Namespace,
) -> tuple[list[jax.ShapeDtypeStruct], dict[str, Any]]:
    """Query, key and value, and the options, of the call that is described."""
    sizes = _sizes(args.shape)
    batch, rows, keys, heads, kv_heads, width = sizes[:6]
    value_width = sizes[6] if len(sizes) == 7 else width
    dtype = DTYPES[args.dtype]
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32) if args.lengths else None
    names = args.implementation and tuple(args.implementation.split(","))
    shapes = (
        (batch, rows, heads, width),
        (batch, keys, kv_heads, width),
        (batch, keys, kv_heads, value_width),
    )
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes], {
        "is_causal": args.causal,
        "causal_alignment": args.alignment,
        "window_size": args.window and _window(args.window),
        "softcap": args.softcap,
        "precision": args.precision,
        "query_seq_lengths": lengths,
        "key_value_seq_lengths": lengths,
        "return_lse": args.return_lse,
        "implementation": names,
    }


def _info(args: argparse.Namespace) -> Iterator[str]:
    lines = [*_versions(), *_devices()]
    if args.shape is None:
        defaults = vars(_parser().parse_args(["info"]))
        names = [name for name, x in vars(args).items() if x != defaults[name]]
        if names:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            raise ValueError(f"--shape must be given with {given}")
    else:
        shapes, options = _call(args)
        lines += ["", str(backends.explain(*shapes, **options))]
    yield from lines


def _milliseconds(fun: Callable, arrays: Sequence[jax.Array], seconds: float) -> float:
    """Time of a call among calls started back to back that take `seconds`."""
    jax.block_until_ready(fun(*arrays))
    count = 1
    while True:
        start = time.perf_counter()
        out = None
        for _ in range(count):
            out = fun(*arrays)
        jax.block_until_ready(out)
        took = time.perf_counter() - start
        if took >= seconds:
            return 1e3 * took / count
        count *= 2


def _bench(args: argparse.Namespace) -> Iterator[str]:
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    shapes, options = _call(args)
    explained = backends.explain(*shapes, **options)
    here = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    for name, x in zip(backends.LENGTHS, shapes, strict=False):
        if options[name] is not None:
            options[name] = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, shapes, strict=True)
    ]
    yield str(explained)
    if explained.chosen[here] is None:
        raise ValueError(
            f"--implementation {args.implementation} cannot run it on {here}"
        )
    yield f"\n{'ms a call':16}{'forward':>12}{'+ gradients':>14}"
    for name, reason in explained.reasons.items():
        if reason is not None or here not in (explained.platforms[name] or (here,)):
            continue

        def forward(*xs: jax.Array, by: str = name) -> Any:
            return jax_flash.mha(*xs, **{**options, "implementation": by})

        def total(*xs: jax.Array, run: Callable = forward) -> jax.Array:
            return sum(
                (x.astype(jnp.float32).sum() for x in jax.tree.leaves(run(*xs))),
                jnp.float32(0),
            )

        times = [
            _milliseconds(jax.jit(fun), arrays, args.seconds)
            for fun in (forward, jax.value_and_grad(total, (0, 1, 2)))
        ]
        yield f"{name:16}{times[0]:12.3f}{times[1]:14.3f}"


def _demo(args: argparse.Namespace) -> Iterator[str]:
    del args
    rng = np.random.default_rng(0)
    rows, heads, kv_heads, width = 24, 4, 2, 16
    query, key, value = (
        rng.normal(size=(rows, n, width)).astype(np.float32)
        for n in (heads, kv_heads, kv_heads)
    )

    def attend(first: int, end: int) -> np.ndarray:
        """Causal attention of the tokens first..end - 1, in float64."""
        q, k, v = (x[first:end].astype(np.float64) for x in (query, key, value))
        k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(width)
        weights = np.exp(scores) * np.tri(end - first)
        return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)

    def line(what: str, got: Any, want: Any) -> str:
        error = np.abs(np.asarray(got, np.float64) - want).max()
        return f"{what:58} off by {error:.1e}"

    yield str(jax_flash.explain(query, key, value, is_causal=True))
    yield ""
    whole = attend(0, rows)
    out = jax_flash.mha(query, key, value, is_causal=True)
    yield line("mha: causal, 4 heads on 2 of keys and values", out, whole)
    cut = np.array([0, 10, rows], np.int32)
    out = jax_flash.mha_varlen(query, key, value, cut, is_causal=True)
    parts = np.concatenate([attend(0, 10), attend(10, rows)])
    yield line("mha_varlen: two sequences, packed", out, parts)

    @jax.jit
    def decode(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        def step(cache: jax_flash.KVCache, x: Any) -> tuple[Any, jax.Array]:
            cache = cache.append(x[1][None], x[2][None])
            return cache, cache.attend(x[0][None])[0]

        cache = jax_flash.KVCache.create(1, rows, kv_heads, width, dtype=query.dtype)
        return jax.lax.scan(step, cache, (query, key, value))[1]

    out = decode(*map(jnp.asarray, (query, key, value)))
    yield line("KVCache, decode_mha: the same, a token at a time", out, whole)
    split = [
        jax_flash.mha(query, key[a:b], value[a:b], return_lse=True, mask=mask)
        for a, b in ((0, 8), (8, rows))
        for mask in [np.tri(rows, rows, dtype=bool)[:, a:b]]
    ]
    out = jax_flash.merge_partials(*zip(*split, strict=True))[0]
    yield line("merge_partials: the same, of two parts of the keys", out, whole)
    x = query.reshape(rows, -1)
    norm = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    yield line("rms_norm", jax_flash.rms_norm(x, jnp.ones(x.shape[-1])), x / norm)
    got = np.asarray(jax_flash.top_k(x, 5)[0])
    yield line("top_k", got, -np.sort(-x, -1)[:, :5])
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    drawn = jax_flash.sample(jnp.tile(logits, (4000, 1)), jax.random.key(0), top_k=2)
    share = np.bincount(np.asarray(drawn), minlength=3) / 4000
    yield line("sample: shares of 4000 draws, top_k=2", share, [0.625, 0.375, 0])


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


COMMANDS = {"info": _info, "bench": _bench, "demo": _demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        for line in COMMANDS[args.command](args):
            print(line, flush=True)
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
