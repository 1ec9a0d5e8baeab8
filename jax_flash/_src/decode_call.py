"""One call of `decode_mha`: its static argument, its operands, and their checks.

Lives here: `DecodeConfig`, the canonical operands of decoding, and the checks that it
shares with `append_kv`. Every message names the argument and shows its value.

Canonical operands: query has its T, lengths and page table are int32, sinks, slopes and
scales are float32 with a batch dimension of B or 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._src import alibi, validate
from jax_flash._src.alibi import Alibi
from jax_flash._src.scores import accumulator

OPERANDS: tuple[str, ...] = (
    "query",  # [B, T, N, H]
    "k_cache",  # [B, S, K, H], or [pages, page, K, H] with a page table
    "v_cache",  # [B, S, K, Hv], or [pages, page, K, Hv]
    "cache_seqlens",  # [B] int32
    "page_table",  # [B, max_pages] int32
    "sinks",  # [B|1, N] float32, float64 for float64
    "alibi_slopes",  # [B|1, N] the same
    "k_scale",  # [B|1, K] float32
    "v_scale",  # [B|1, K] float32
)
"""Every operand in the order in which the primitive and the kernel take them."""

QUANTISED = ("float8_e4m3fn", "int8")
"""Cache dtypes that go with scales."""

CACHE_DTYPES = (*validate.FLOAT_DTYPES, *QUANTISED)

MOST_NEW_TOKENS = 64
IMPLEMENTATIONS = ("cuda", "xla")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Everything static about one call.

    Attributes:
      scale: factor of the logits.
      window_left: keys visible before a query's own position, -1 = unbounded.
      softcap: bound of `softcap * tanh(logits / softcap)`, None = no cap.
      num_splits: parts into which the kernel cuts the keys, None = its own choice.
      present: the operands there are, in the order of `OPERANDS`.
      implementations: which of "cuda" and "xla" may serve the call.
    """

    scale: float
    window_left: int = -1
    softcap: float | None = None
    num_splits: int | None = None
    present: tuple[str, ...] = OPERANDS[:4]
    implementations: tuple[str, ...] = ("xla",)


def check_integers(name: str, x: Any, rank: int, layout: str, batch: int) -> None:
    """Lengths [B] or a page table [B, max_pages]."""
    got = validate.shape_of(name, x)
    if not jnp.issubdtype(got.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got dtype {got.dtype}")
    if len(got.shape) != rank or got.shape[0] != batch:
        raise ValueError(
            f"{name} must be {layout} with B={batch}, got shape {got.shape}"
        )


def check_caches(k_cache: Any, v_cache: Any, paged: bool) -> None:
    """Two caches that belong together."""
    layouts = {
        "k_cache": "[pages,page,K,H]" if paged else "[B,S,K,H]",
        "v_cache": "[pages,page,K,Hv]" if paged else "[B,S,K,Hv]",
    }
    key, value = (
        validate.shape_of("k_cache", k_cache),
        validate.shape_of("v_cache", v_cache),
    )
    for name, x in (("k_cache", key), ("v_cache", value)):
        if len(x.shape) != 4:
            raise ValueError(
                f"{name} must be {layouts[name]}{' with a page_table' * paged}, got "
                f"shape {x.shape}"
            )
        if str(x.dtype) not in CACHE_DTYPES:
            raise NotImplementedError(f"{name} of dtype {x.dtype} is not supported")
    if value.shape[:3] != key.shape[:3] or value.dtype != key.dtype:
        raise ValueError(
            f"v_cache must have the dtype and all but the width of k_cache "
            f"{key.dtype}{list(key.shape)}, got {value.dtype}{list(value.shape)}"
        )
    if key.shape[2] < 1 or key.shape[3] < 1:
        raise ValueError(f"k_cache must have heads and a width, got {key.shape}")
    if paged and key.shape[1] < 1:
        raise ValueError(f"k_cache must have pages of at least 1 token: {key.shape}")


def check_append(
    k_cache: Any,
    v_cache: Any,
    k_new: Any,
    v_new: Any,
    cache_seqlens: Any,
    page_table: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Checks the arrays of `append_kv`; its lengths and page table as int32."""
    paged = page_table is not None
    check_caches(k_cache, v_cache, paged)
    new = {n: validate.shape_of(n, x) for n, x in (("k_new", k_new), ("v_new", v_new))}
    for (name, x), cache in zip(new.items(), (k_cache, v_cache), strict=True):
        layout = "[B,T,K,H]" if name == "k_new" else "[B,T,K,Hv]"
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got dtype {x.dtype}")
        if len(x.shape) not in (3, 4) or x.shape[-2:] != cache.shape[-2:]:
            raise ValueError(
                f"{name} must be {layout} with K={cache.shape[-2]} and width "
                f"{cache.shape[-1]}, T possibly left out, got shape {x.shape}"
            )
    if new["v_new"].shape[:-1] != new["k_new"].shape[:-1]:
        raise ValueError(
            f"v_new must have all but the width of k_new {new['k_new'].shape}, got "
            f"{new['v_new'].shape}"
        )
    batch = new["k_new"].shape[0]
    return check_places("k_new", batch, k_cache, cache_seqlens, page_table)


def check_places(
    name: str, batch: int, k_cache: Any, cache_seqlens: Any, page_table: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Checks where the new tokens `name` of `batch` sequences go; both as int32."""
    paged = page_table is not None
    if not paged and k_cache.shape[0] != batch:
        raise ValueError(
            f"{name} must have the batch B={k_cache.shape[0]} of k_cache, got {batch}; "
            "a cache of pages needs page_table"
        )
    check_integers("cache_seqlens", cache_seqlens, 1, "int32 [B]", batch)
    lengths = jnp.asarray(validate.as_int32(cache_seqlens))
    table = None
    if paged:
        layout = "int32 [B,max_pages]"
        check_integers("page_table", page_table, 2, layout, batch)
        table = jnp.asarray(validate.as_int32(page_table))
    return lengths, table


def canonical_scale(name: str, x: Any, cache: Any) -> jax.Array:
    """A scale for each head as float32 [1, K], from a number or [K]."""
    if str(cache.dtype) not in QUANTISED:
        raise ValueError(
            f"{name} is for caches of {' or '.join(QUANTISED)}, got one for "
            f"{cache.dtype}: {x!r}"
        )
    heads = cache.shape[2]
    if isinstance(x, int | float | np.number) and not isinstance(x, bool):
        x = validate.positive_number(name, x)
    wrong = ValueError(f"{name} must be a number or floating [K], got {x!r}")
    if isinstance(x, str):  # which NumPy may take for the name of a dtype
        raise wrong
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise wrong from None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got dtype {x.dtype}")
    if x.shape not in ((), (heads,)):
        raise ValueError(
            f"{name} must be a number or one for each of the K={heads} heads, got "
            f"shape {x.shape}"
        )
    return jnp.broadcast_to(x.astype(jnp.float32), (1, heads))


def slopes_of(bias: Any) -> Any:
    """The slopes of what `decode_mha` takes as a bias, or None."""
    if bias is None:
        return None
    if isinstance(bias, Alibi):
        return alibi.slopes_of(bias)
    if hasattr(bias, "shape"):
        raise NotImplementedError(
            "bias must be jax_flash.alibi(slopes), arrays of biases are not supported: "
            f"got shape {bias.shape}"
        )
    raise ValueError(
        f"bias must be None or jax_flash.alibi(slopes), got {type(bias).__name__}: "
        f"{bias!r}"
    )


def _canonical_by_head(
    name: str, x: Any, batch: int, heads: int, dtype: Any
) -> jax.Array:
    """One number for each query head as [B|1, N], from [N] or [B, N]."""
    got = validate.shape_of(name, x)
    if not jnp.issubdtype(got.dtype, jnp.floating):
        raise ValueError(
            f"{validate.shown(name)} must be floating, got dtype {got.dtype}"
        )
    if got.shape not in ((heads,), (1, heads), (batch, heads)):
        raise ValueError(
            f"{validate.shown(name)} must be [N] or [B,N] with B={batch} and "
            f"N={heads}, got shape {got.shape}"
        )
    return validate.as_array(name, x).astype(dtype).reshape(-1, heads)


def _check_query(query: Any, k_cache: Any, paged: bool) -> None:
    shape, dtype = query.shape, query.dtype
    if len(shape) not in (3, 4):
        raise ValueError(f"query must be [B,N,H] or [B,T,N,H], got shape {shape}")
    if str(dtype) not in validate.FLOAT_DTYPES:
        if jnp.issubdtype(dtype, jnp.floating):
            raise NotImplementedError(f"query of dtype {dtype} is not supported")
        raise ValueError(f"query must be floating, got dtype {dtype}")
    if str(k_cache.dtype) not in (*QUANTISED, str(dtype)):
        raise ValueError(
            f"k_cache must have the dtype of query, {dtype}, or be one of "
            f"{QUANTISED}, got {k_cache.dtype}"
        )
    if shape[-1] != k_cache.shape[-1]:
        raise ValueError(
            f"k_cache must have the width H={shape[-1]} of query, got "
            f"{k_cache.shape[-1]}"
        )
    heads, kv_heads = shape[-2], k_cache.shape[2]
    if heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query must have a multiple of the cache's heads, got N={heads} and "
            f"K={kv_heads}"
        )
    if not paged and k_cache.shape[0] != shape[0]:
        raise ValueError(
            f"k_cache must have the batch B={shape[0]} of query, got shape "
            f"{k_cache.shape}; a cache of pages needs page_table"
        )
    if len(shape) == 4 and shape[1] > MOST_NEW_TOKENS:
        raise NotImplementedError(
            f"query has T={shape[1]} tokens, at most {MOST_NEW_TOKENS} are supported; "
            "use mha with key_value_seq_lengths"
        )


def check_implementation(implementation: Any) -> tuple[str, ...]:
    """The implementations a call may use, in order."""
    if implementation is None:
        return IMPLEMENTATIONS
    wanted = (implementation,) if isinstance(implementation, str) else implementation
    known = isinstance(wanted, tuple | list) and all(
        name in IMPLEMENTATIONS for name in wanted
    )
    if not known or not wanted:
        raise ValueError(
            f"implementation must be None, one of {IMPLEMENTATIONS} or a tuple of "
            f"them, got {implementation!r}"
        )
    # "xla" runs everything, everywhere: what comes after it never does.
    first = wanted.index("xla") if "xla" in wanted else len(wanted)
    return tuple(wanted[: first + 1])


def check_call(
    arrays: dict[str, Any], options: dict[str, Any]
) -> tuple[DecodeConfig, dict[str, jax.Array]]:
    """Validates a call of `decode_mha`.

    Args:
      arrays: the array arguments by name, in the order of `OPERANDS`, None where not
        given.
      options: the other arguments by name.

    Returns:
      The config and the canonical operands.
    """
    for name in OPERANDS[:4]:
        if arrays[name] is None:
            raise ValueError(f"{name} must be an array, got None")
    paged = arrays["page_table"] is not None
    query, k_cache = (validate.shape_of(n, arrays[n]) for n in ("query", "k_cache"))
    check_caches(arrays["k_cache"], arrays["v_cache"], paged)
    _check_query(query, k_cache, paged)
    batch, heads = query.shape[0], query.shape[-2]
    check_integers("cache_seqlens", arrays["cache_seqlens"], 1, "int32 [B]", batch)
    if paged:
        layout = "int32 [B,max_pages]"
        check_integers("page_table", arrays["page_table"], 2, layout, batch)

    given = {n: validate.as_array(n, arrays[n]) for n in OPERANDS[:3]}
    if len(query.shape) == 3:
        given["query"] = given["query"][:, None]
    for name in ("cache_seqlens", "page_table"):
        if arrays[name] is not None:
            given[name] = jnp.asarray(validate.as_int32(arrays[name]))
    for name in ("sinks", "alibi_slopes"):
        if arrays[name] is not None:
            dtype = accumulator(query.dtype)
            given[name] = _canonical_by_head(name, arrays[name], batch, heads, dtype)
    for name in ("k_scale", "v_scale"):
        if arrays[name] is not None:
            given[name] = canonical_scale(name, arrays[name], k_cache)
    present = tuple(n for n in OPERANDS if n in given)
    return _config(options, query.shape[-1], present), given


def _config(
    options: dict[str, Any], width: int, present: tuple[str, ...]
) -> DecodeConfig:
    scale, softcap = options["scale"], options["softcap"]
    scale = width**-0.5 if scale is None else validate.number("scale", scale)
    if softcap is not None:
        softcap = validate.check_softcap(softcap)
    window = validate.check_window("window_size", options["window_size"])
    left = None if window is None else window[0]
    splits = options["num_splits"]
    if splits is not None:
        validate._static("num_splits", splits)
        if not validate.is_integer(splits) or splits < 1:
            raise ValueError(
                f"num_splits must be None or an integer of at least 1, got {splits!r}"
            )
        splits = int(splits)
    return DecodeConfig(
        scale=scale,
        window_left=-1 if left is None else left,
        softcap=softcap,
        num_splits=splits,
        present=present,
        implementations=check_implementation(options["implementation"]),
    )
