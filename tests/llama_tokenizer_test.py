"""The tokenizer of examples/llama, built from what GGUF files say about it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import llama_helpers
import numpy as np
import pytest
import tokenizers
from llama_helpers import CHAT_TEMPLATE, tokenizer_metadata
from llama_tokenizer import Tokenizer, from_metadata, load_tokenizer
from tokenizers import decoders, models


def pieces(text: str, **changes: Any) -> list[str]:
    tokens = tokenizer_metadata()["tokenizer.ggml.tokens"]
    return [
        tokens[i] for i in from_metadata(tokenizer_metadata(**changes)).encode(text)
    ]


def test_merges_and_digits() -> None:
    assert pieces("hello 123") == ["hello", "Ġ", "1", "2", "3"]
    assert pieces("hello 123", pre="gpt-2") == ["hello", "Ġ", "123"]
    assert pieces("hello 1234", pre="llama-bpe") == ["hello", "Ġ", "123", "4"]
    assert pieces("wü <user>w") == ["w", "Ã¼", "Ġ", "<user>", "w"]


def test_control_tokens() -> None:
    tokenizer = from_metadata(tokenizer_metadata())
    tokens = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert tokens.tolist()[::2] == [1, 2]
    assert tokenizer.decode(tokens) == "hello"
    assert tokenizer.decode(tokens, control=True) == "<|im_start|>hello<|im_end|>"
    assert tokenizer.ends == {2, 3}
    assert from_metadata(tokenizer_metadata(eot_token_id=1)).ends == {1, 2, 3}


def test_the_token_that_begins_a_text() -> None:
    tokenizer = from_metadata(tokenizer_metadata(add_bos_token=True))
    assert tokenizer.encode("hello").tolist()[0] == 0
    assert len(tokenizer.encode("hello")) == 2
    assert len(tokenizer.encode("hello", begin=False)) == 1


@pytest.mark.parametrize("text", ["naß 🚲 “x”\n\n\t 12", "", " ", "日本語"])
def test_round_trip_and_stream(text: str) -> None:
    tokenizer = from_metadata(tokenizer_metadata())
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.stream()
    parts = [stream(token) for token in tokens]
    assert "".join(parts) == text
    assert "�" not in "".join(parts)
    assert stream(None) == ""


def test_stream_of_incomplete_characters() -> None:
    """They are held back, as the next token may complete them, and not lost."""
    tokenizer = from_metadata(tokenizer_metadata())
    for text in ("日", "hé 🚲"):
        tokens = tokenizer.encode(text)[:-1]
        stream = tokenizer.stream()
        parts = [stream(token) for token in tokens]
        assert "".join(parts) == text[:-1]
        assert stream(None) == "�"
        assert stream(None) == ""
    size = len(tokenizer_metadata()["tokenizer.ggml.tokens"])
    for tokens in np.random.default_rng(0).integers(size, size=(100, 9)):
        stream = tokenizer.stream()
        parts = [stream(token) for token in (*tokens, None)]
        assert "".join(parts) == tokenizer.decode(tokens)


def test_stream_of_single_bytes() -> None:
    """Of tokenizer.json a byte may make characters that were shown incomplete."""
    words = ["<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁be", "é"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<s>"])
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    read = Tokenizer(tokenizer, [], None, {})

    def streamed(*tokens: str) -> list[str]:
        stream = read.stream()
        return [stream(x) for x in (*map(words.index, tokens), None)]

    assert streamed("▁be", "<0xC3>", "<0xA9>", "▁be") == ["be", "", "é", " be", ""]
    shown = streamed("<0xC3>", "<0xA9>", "<0x87>", "▁be", "<s>", "▁", "é")
    assert shown == ["", "é", "", "�� be", "", " ", "é", ""]
    assert streamed("▁be", "<0xE2>", "<0x87>") == ["be", "", "", "��"]


def test_chat() -> None:
    tokenizer = from_metadata(tokenizer_metadata(add_bos_token=True))
    user = {"role": "user", "content": "hello"}
    tokens = tokenizer.chat([user])
    text = tokenizer.decode(tokens, control=True)
    assert text == "<s><|im_start|>user\nhello<|im_end|><|im_start|>assistant\n"
    with pytest.raises(ValueError, match="no tools"):
        tokenizer.chat([{"role": "tool", "content": ""}])
    plain = {
        k: v for k, v in tokenizer_metadata().items() if k != "tokenizer.chat_template"
    }
    with pytest.raises(ValueError, match="no chat template"):
        from_metadata(plain).chat([user])


def test_kinds_that_are_not_supported() -> None:
    with pytest.raises(NotImplementedError, match="model 'llama' is not supported"):
        from_metadata(tokenizer_metadata(model="llama"))
    with pytest.raises(NotImplementedError, match="pre 'qwen2' is not supported"):
        from_metadata(tokenizer_metadata(pre="qwen2"))


def test_files(tmp_path: pathlib.Path) -> None:
    """A GGUF file, and a directory with the same tokenizer as tokenizer.json."""
    file = tmp_path / "tiny.gguf"
    llama_helpers.write_gguf(file, llama_helpers.random_model(), tokenizer_metadata())
    tokenizer = load_tokenizer(file)
    expected = from_metadata(tokenizer_metadata())
    text = "hello <|im_end|> 123 wü"
    assert tokenizer.encode(text).tolist() == expected.encode(text).tolist()
    user = [{"role": "user", "content": "hello"}]
    assert tokenizer.chat(user).tolist() == expected.chat(user).tolist()

    directory = tmp_path / "tiny"
    directory.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(directory)
    expected._tokenizer.save(str(directory / "tokenizer.json"))
    options = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}
    options["chat_template"] = "not this one"
    (directory / "tokenizer_config.json").write_text(json.dumps(options))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode(text).tolist() == expected.encode(text).tolist()
    assert tokenizer.chat(user).tolist() == expected.chat(user).tolist()
    assert tokenizer.ends == {1, 2, 3}
    with pytest.raises(FileNotFoundError, match="absent"):
        load_tokenizer(tmp_path / "absent")
