"""What the tests of examples/llama share: small models, their files, an oracle."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import llama_weights
import numpy as np
import pytest
from flax import nnx
from llama_model import Config, Llama
from safetensors import flax as safetensors_flax
from tokenizers.pre_tokenizers import ByteLevel

TINY = Config(
    vocabulary=97,
    width=32,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    hidden=64,
    rope_theta=500.0,
)
CONTROL = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "12 3", "Ġ w", "Ã ¼"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_metadata(**changes: Any) -> dict[str, Any]:
    """Of a vocabulary of bytes and few merges; `changes` are of `tokenizer.ggml.*`."""
    tokens = [*CONTROL, *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<user>"]
    types = [gguf.TokenType.CONTROL] * len(CONTROL)
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(CONTROL) - 1)
    types += [gguf.TokenType.USER_DEFINED]
    entries = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [int(kind) for kind in types],
        "merges": MERGES,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **changes,
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in entries.items()}
    return named | {"tokenizer.chat_template": CHAT_TEMPLATE}


def smollm2() -> pathlib.Path:
    """The file of the default weights. In CI it must be there, else the test skips."""
    try:
        return llama_weights.default_weights()
    except RuntimeError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


def random_model(config: Config = TINY, seed: int = 0) -> Llama:
    """A model whose every parameter, norms included, is random."""
    model = Llama(config, nnx.Rngs(seed))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def drawn(x: jax.Array) -> jax.Array:
        mean, spread = (1.0, 0.3) if x.ndim == 1 else (0.0, x.shape[-1] ** -0.5)
        return jnp.asarray(rng.normal(mean, spread, x.shape), x.dtype)

    return nnx.merge(graph, jax.tree.map(drawn, state))


def tensors(model: Llama) -> dict[tuple[str, int | None], np.ndarray]:
    """By part and layer, as files have them: projections apart, each [out, in]."""
    config = model.config
    q_size, kv_size = (n * config.head_dim for n in (config.heads, config.kv_heads))
    found: dict[tuple[str, int | None], Any] = {
        ("embedding", None): model.embedding[...],
        ("norm", None): model.norm.weight[...],
    }
    if not config.tied:
        found["head", None] = model.head[...]
    for i, block in enumerate(model.blocks):
        qkv, gate_up = block.qkv.weight[...], block.gate_up.kernel[...].T
        query, key, value = jnp.split(qkv, (q_size, q_size + kv_size))
        gate, up = jnp.split(gate_up, 2)
        found |= {
            ("attention_norm", i): block.attention_norm.weight[...],
            ("query", i): query,
            ("key", i): key,
            ("value", i): value,
            ("out", i): block.out.weight[...],
            ("mlp_norm", i): block.mlp_norm.weight[...],
            ("gate", i): gate,
            ("up", i): up,
            ("down", i): block.down.kernel[...].T,
        }
    return {name: np.asarray(x) for name, x in found.items()}


def expected_logits(model: Llama, tokens: np.ndarray) -> np.ndarray:
    """Logits of one sequence, int [T] -> float64 [T, V], by the book."""
    config = model.config
    weights = {name: x.astype(np.float64) for name, x in tensors(model).items()}
    half, length = config.head_dim // 2, len(tokens)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    def turned(x: np.ndarray) -> np.ndarray:
        factors = np.ones(half)
        if config.rope_factors is not None:
            factors = np.array(config.rope_factors)
        frequencies = config.rope_theta ** (-np.arange(half) / half) / factors
        turns = np.exp(1j * np.arange(length)[:, None, None] * frequencies)
        pairs = (x[..., :half] + 1j * x[..., half:]) * turns
        return np.concatenate([pairs.real, pairs.imag], -1)

    def heads(x: np.ndarray, i: int, name: str) -> np.ndarray:
        return (x @ weights[name, i].T).reshape(length, -1, config.head_dim)

    x = weights["embedding", None][tokens]
    for i in range(config.layers):
        y = norm(x, weights["attention_norm", i])
        query = turned(heads(y, i, "query"))
        group = config.heads // config.kv_heads
        key = turned(heads(y, i, "key")).repeat(group, axis=1)
        value = heads(y, i, "value").repeat(group, axis=1)
        scores = np.einsum("tnh,snh->nts", query, key) / np.sqrt(config.head_dim)
        scores = np.where(np.tri(length), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        attended = np.einsum("nts,snh->tnh", shares, value).reshape(length, -1)
        x = x + attended @ weights["out", i].T
        y = norm(x, weights["mlp_norm", i])
        gate = y @ weights["gate", i].T
        gated = gate / (1 + np.exp(-gate)) * (y @ weights["up", i].T)
        x = x + gated @ weights["down", i].T
    head = weights["embedding" if config.tied else "head", None]
    return norm(x, weights["norm", None]) @ head.T


def write_gguf(
    path: pathlib.Path,
    model: Llama,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> None:
    """A GGUF file of a model.

    Args:
      path: where to.
      model: the model.
      metadata: entries to add or to replace.
      extra: tensors to add.
      kinds: how parts are quantised, by their names; float32 if not named.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    entries: dict[str, Any] = {
        "llama.block_count": config.layers,
        "llama.context_length": config.context,
        "llama.embedding_length": config.width,
        "llama.feed_forward_length": config.hidden,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        **(metadata or {}),
    }
    for name, value in entries.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_array(name, value)
    for (part, i), x in tensors(model).items():
        name = llama_weights.GGUF_NAMES[part].format(i)
        if part in ("query", "key"):
            x = llama_weights.as_pairs(x, config.head_dim)
        if kinds and part in kinds:
            data = gguf.quants.quantize(x, kinds[part])
            writer.add_tensor(name, data, raw_dtype=kinds[part])
        else:
            writer.add_tensor(name, np.ascontiguousarray(x, np.float32))
    for name, x in (extra or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors(
    path: pathlib.Path, model: Llama, entries: dict[str, Any] | None = None
) -> None:
    """A directory with config.json and two safetensors files, in the model's dtype."""
    config = model.config
    description = {
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        **(entries or {}),
    }
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(description))
    named = {
        llama_weights.HUGGING_FACE_NAMES[part].format(i): jnp.asarray(x)
        for (part, i), x in tensors(model).items()
    }
    names = sorted(named)
    for number, part in enumerate((names[::2], names[1::2])):
        file = path / f"model-{number}.safetensors"
        safetensors_flax.save_file({name: named[name] for name in part}, file)


def same(model: Llama, other: Llama) -> None:
    """Asserts that two models have equal configurations and parameters."""
    assert dataclasses.replace(other.config, rope_factors=None) == dataclasses.replace(
        model.config, rope_factors=None
    )
    parts, others = tensors(model), tensors(other)
    assert parts.keys() == others.keys()
    for name, x in parts.items():
        np.testing.assert_array_equal(others[name], x, err_msg=str(name))
