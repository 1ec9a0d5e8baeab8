"""Who can run an attention call, and why not.

A backend is a name, the platforms it runs on, and a function that says whether it
supports a call or why not. `mha(implementation=None)` takes the first backend that
supports the call on the platform the computation is lowered for; a name or a tuple of
names restricts the choice strictly. Built in, in this order: "cuda" (the kernels of
this package), "cudnn" (through `jax.nn.dot_product_attention`), "xla" (jnp).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash._src import builtin, decode_call, decode_explain, packed, validate
from jax_flash._src.call import Backend, Call
from jax_flash._src.config import OPERANDS, QKV

__all__ = [
    "Backend",
    "Call",
    "Explanation",
    "explain",
    "names",
    "register",
    "unregister",
]

KV_LAYOUTS = ("BSKH", "BKSH")
PLATFORMS = ("cuda", "rocm", "tpu", "cpu")

_BUILTIN = (builtin.CUDA, builtin.CUDNN, builtin.XLA)
_BUILTIN_PRIMITIVE = (builtin.CUDA, builtin.XLA)
_backends: list[Backend] = list(_BUILTIN)

Implementation = str | Sequence[str] | None


def names() -> tuple[str, ...]:
    """Names of the registered backends, in the order in which they are tried."""
    return tuple(backend.name for backend in _backends)


def register(backend: Backend, *, before: str | None = None) -> None:
    """Adds a backend.

    Args:
      backend: the backend; its name must be new.
      before: the name of the backend it is tried before. None puts it last: since "xla"
        supports every call, it then runs only where `implementation` names it.

    Raises:
      ValueError: not a `Backend`, the name is taken, `before` is unknown, a platform or
        the kv_layout is not one we know.
    """
    if not isinstance(backend, Backend):
        raise ValueError(f"backend must be a Backend, got {backend!r}")
    if backend.name in names():
        raise ValueError(f"backend name {backend.name!r} is taken: {names()}")
    if before is not None and before not in names():
        raise ValueError(f"before must be one of {names()}, got {before!r}")
    if backend.kv_layout not in KV_LAYOUTS:
        raise ValueError(
            f"kv_layout must be one of {KV_LAYOUTS}, got {backend.kv_layout!r}"
        )
    for platform in backend.platforms:
        if platform not in PLATFORMS:
            raise ValueError(f"platforms must be among {PLATFORMS}, got {platform!r}")
    position = len(_backends) if before is None else names().index(before)
    _backends.insert(position, backend)


def unregister(name: str) -> None:
    """Removes a backend that was added by `register`."""
    for backend in _backends:
        if backend.name == name and backend not in _BUILTIN:
            _backends.remove(backend)
            return
    raise ValueError(f"name must be a registered backend of yours, got {name!r}")


def _candidates(implementation: Implementation) -> list[Backend]:
    """The backends a call may use, in order."""
    if implementation is None:
        return list(_backends)
    wanted = (implementation,) if isinstance(implementation, str) else implementation
    known = {backend.name: backend for backend in _backends}
    if not isinstance(wanted, tuple | list) or not wanted:
        raise ValueError(
            f"implementation must be None, one of {names()} or a tuple of them, got "
            f"{implementation!r}"
        )
    for name in wanted:
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"implementation must be None, one of {names()} or a tuple of them, "
                f"got {implementation!r}"
            )
    return [known[name] for name in wanted]


def _runs_on(backend: Backend, platform: str) -> bool:
    return not backend.platforms or platform in backend.platforms


def _judge(
    call: Call, candidates: list[Backend]
) -> tuple[list[Backend], dict[str, str | None]]:
    """The candidates that support the call, and each one's reason, None if it does."""
    reasons = {backend.name: backend.supports(call) for backend in candidates}
    return [backend for backend in candidates if reasons[backend.name] is None], reasons


def _supported(call: Call, implementation: Implementation) -> list[Backend]:
    """The candidates that can run the call, up to the first that runs anywhere."""
    able, reasons = _judge(call, _candidates(implementation))
    if not able:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run this call: {listed}"
        )
    anywhere = [not backend.platforms for backend in able]
    return able[: anywhere.index(True) + 1] if True in anywhere else able


def primitives(call: Call, implementation: Implementation) -> tuple[str, ...]:
    """Names of those that can run a call as the primitive, for `AttentionConfig`.

    Raises:
      NotImplementedError: none of them can, or may.
    """
    able = _supported(call, implementation)
    chosen = tuple(b.name for b in able if b in _BUILTIN_PRIMITIVE)
    if not chosen:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run this call: it is for "
            f"{tuple(b.name for b in _BUILTIN_PRIMITIVE)}"
        )
    return chosen


def run(
    call: Call, operands: dict[str, jax.Array], implementation: Implementation
) -> tuple[jax.Array, jax.Array | None]:
    """Runs a call by the first backend that supports it on the lowering platform.

    Args:
      call: a validated call.
      operands: its canonical operands by name; one named "qkv" may stand for query, key
        and value.
      implementation: None, a name, or a tuple of names.

    Returns:
      `(out, lse)`; lse is None if the call does not want it.
    """
    able = _supported(call, implementation)
    if all(backend in _BUILTIN_PRIMITIVE for backend in able):
        chosen = tuple(backend.name for backend in able)
        return builtin.run_primitive(call, operands, chosen)
    branches = {
        platform: _branch(call, backend)
        for platform in PLATFORMS
        if (backend := _first(able, platform)) is not None and backend.platforms
    }
    default = None if able[-1].platforms else _branch(call, able[-1])
    if default is not None and not branches:
        out, lse = default(operands)
    else:
        out, lse = lax.platform_dependent(operands, default=default, **branches)
    return out, lse if call.return_lse else None


def _first(able: list[Backend], platform: str) -> Backend | None:
    return next((backend for backend in able if _runs_on(backend, platform)), None)


def _branch(call: Call, backend: Backend):
    """`run` of one backend as a function of the operands, lse 0 where not wanted."""

    def branch(operands: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if QKV in operands and backend not in _BUILTIN_PRIMITIVE:
            heads = call.num_heads, call.num_kv_heads
            operands = packed.split_named(heads, operands)
        if backend.kv_layout == "BKSH":
            moved = {n: jnp.swapaxes(operands[n], -3, -2) for n in ("key", "value")}
            operands = {**operands, **moved}
        out, lse = backend.run(call, operands)
        shape = (*call.query.shape[:-1], call.value_dim)
        if out.shape != shape:
            raise ValueError(
                f"backend {backend.name!r} must return out of shape {shape}, got "
                f"{out.shape}"
            )
        if not call.return_lse:
            return out, jnp.zeros((), jnp.float32)
        if lse is None:
            raise ValueError(
                f"backend {backend.name!r} supports a call with return_lse=True but "
                "its run returned no lse"
            )
        return out, lse

    return branch


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation runs a call on each platform, and why the others do not.

    Attributes:
      call: the call; of `decode_mha`, its canonical operands as types.
      chosen: platform -> name of the backend that runs there, None if none does.
      reasons: name of each candidate -> None if it supports the call, else why not.
      platforms: name of each candidate -> the platforms it runs on, empty = any.
      details: name of a candidate -> how it would run the call, if it says so.
    """

    call: Call | decode_explain.DecodeCall
    chosen: dict[str, str | None]
    reasons: dict[str, str | None]
    platforms: dict[str, tuple[str, ...]]
    details: dict[str, str]

    def __str__(self) -> str:
        lines = [str(self.call), "runs on"]
        if isinstance(self.call, Call):
            lines[0] = _describe(self.call)
        for platform, name in self.chosen.items():
            lines.append(f"  {platform:5s} {name or 'nothing'}")
        lines.append("because")
        for name, reason in self.reasons.items():
            where = " and ".join(self.platforms[name]) or "every platform"
            verdict = f"can run it on {where}" if reason is None else f"no: {reason}"
            details = f": {self.details[name]}" if name in self.details else ""
            lines.append(f"  {name:5s} {verdict}{details}")
        return "\n".join(lines)


def _describe(call: Call) -> str:
    arrays = (f"{n} {getattr(call, n).dtype}{_shape(call, n)}" for n in call.present)
    options = []
    for field in dataclasses.fields(call):
        value = getattr(call, field.name)
        if field.name not in OPERANDS and value != field.default:
            options.append(f"{field.name}={value!r}")
    return "mha of " + ", ".join([*arrays, *options])


def _shape(call: Call, name: str) -> str:
    return "[" + ",".join(map(str, getattr(call, name).shape)) + "]"


ARRAYS = (
    "sinks",
    "q_segment_ids",
    "kv_segment_ids",
    "query_seq_lengths",
    "key_value_seq_lengths",
)
"""The arrays that `mha` takes by name."""

LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")
"""What `mha_varlen` does not take."""

PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
"""What `mha_varlen` takes besides."""

DEFAULTS: dict[str, Any] = {
    "scale": None,
    "is_causal": False,
    "causal_alignment": "bottom_right",
    "window_size": None,
    "softcap": None,
    "dropout_rate": 0.0,
    "dropout_key": None,
    "deterministic": False,
    "precision": None,
    "return_lse": False,
}
"""The options of `mha` that are not arrays, with their defaults."""


def _explain_decode(
    query: Any, key: Any, value: Any, implementation: Any, options: dict[str, Any]
) -> Explanation:
    arrays = {"query": query, "k_cache": key, "v_cache": value}
    arrays["alibi_slopes"] = decode_call.slopes_of(options.pop("bias", None))
    for name in decode_call.OPERANDS[3:]:
        if name != "alibi_slopes":  # which is no argument
            arrays[name] = options.pop(name, None)
    for name in options:
        if name not in decode_explain.OPTIONS:
            raise TypeError(
                f"explain() got an argument that decode_mha has not: {name!r}"
            )
    call = decode_explain.call_of(arrays, options | {"implementation": implementation})
    reasons = decode_explain.reasons(call)
    able = [name for name, reason in reasons.items() if reason is None]
    platforms = {name: decode_explain.PLATFORMS[name] for name in reasons}
    details = decode_explain.details(call) if "cuda" in able else {}
    return Explanation(
        call=call,
        chosen={
            p: next((n for n in able if p in (platforms[n] or PLATFORMS)), None)
            for p in PLATFORMS
        },
        reasons=reasons,
        platforms=platforms,
        details=details,
    )


def _check_packed(given: dict[str, Any]) -> None:
    """That these are arguments of `mha` or of `mha_varlen`, which has the offsets."""
    is_packed = given["cu_seqlens_q"] is not None
    for name in LENGTHS if is_packed else PACKED[1:]:
        if given.get(name) is not None:
            function = "mha_varlen" if is_packed else "mha"
            raise ValueError(f"{name} is no argument of {function}, got {given[name]}")
    if is_packed:
        validate.check_varlen(given["query"], given["cu_seqlens_q"])


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    implementation: Implementation = None,
    **options: Any,
) -> Explanation:
    """Says which implementation would run a call of `mha`, and why not the others.

    With `cache_seqlens` it is a call of `decode_mha`, whose caches are key and value:
    `explain(query, k_cache, v_cache, cache_seqlens=lengths, page_table=table)`.

    Args:
      query: as for `mha`; every array may be a `jax.ShapeDtypeStruct`.
      key: as for `mha`.
      value: as for `mha`.
      bias: as for `mha`.
      mask: as for `mha`.
      implementation: as for `mha`, except that a name which cannot run the call is
        reported, not raised.
      **options: any other argument of `mha`, `mha_varlen` or `decode_mha`.

    Returns:
      An `Explanation`; print it.

    Raises:
      ValueError, NotImplementedError: as `mha` would, for arguments that no
        implementation accepts.
      TypeError: an argument that the function has not.
    """
    if "cache_seqlens" in options:
        options |= {n: x for n, x in (("bias", bias), ("mask", mask)) if x is not None}
        return _explain_decode(query, key, value, implementation, options)
    arrays = dict(zip(OPERANDS[:5], (query, key, value, bias, mask), strict=True))
    for name in (*ARRAYS, *PACKED[:2]):
        arrays[name] = options.pop(name, None)
    _check_packed(arrays | options)
    if arrays["cu_seqlens_k"] is None:
        arrays["cu_seqlens_k"] = arrays["cu_seqlens_q"]
    for name in options:
        if name not in (*DEFAULTS, *PACKED):
            raise TypeError(f"explain() got an argument that mha has not: {name!r}")
    call = validate.rounded(validate.check_call(arrays, {**DEFAULTS, **options}))
    candidates = _candidates(implementation)
    able, reasons = _judge(call, candidates)
    first = functools.partial(_first, able)
    return Explanation(
        call=call,
        chosen={p: getattr(first(p), "name", None) for p in PLATFORMS},
        reasons=reasons,
        platforms={backend.name: backend.platforms for backend in candidates},
        details={b.name: b.details(call) for b in able if b.details is not None},
    )
