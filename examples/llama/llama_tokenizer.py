"""Text to tokens and back, from the metadata of a GGUF file or from tokenizer.json.

Lives here: `Tokenizer`, and how a byte-level BPE is built for `tokenizers` from what a
GGUF file says about it.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gguf
import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_model import Llama
from llama_weights import errors_naming, load_model
from tokenizers import decoders, models, pre_tokenizers, processors

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""Control tokens that end a text or a turn, beside the one that a file names."""

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The words within which Llama 3 merges bytes."""


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits_apart() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level(True)])


def _llama3() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
    return pre_tokenizers.Sequence([words, _byte_level(False)])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _byte_level(True),
    "smollm": _digits_apart,
    "llama-bpe": _llama3,
}
"""By the names in `tokenizer.ggml.pre`."""


class Tokenizer:
    """What a model reads and writes, as text.

    Attributes:
      ends: tokens that end an answer.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        ends: Iterable[int | None],
        template: str | None,
        names: dict[str, str],
    ) -> None:
        self._tokenizer = tokenizer
        self.ends = frozenset(end for end in ends if end is not None)
        self._names = names
        self._template = None if template is None else _compiled(template)

    def encode(self, text: str, *, begin: bool = True) -> np.ndarray:
        """Tokens of a text, int32 [tokens]; names of control tokens become those.

        Args:
          text: any text.
          begin: whether to put the token that begins a text first, if there is one.

        Raises:
          ValueError: it is no text, but has surrogates: bytes that were not UTF-8.
        """
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"text must be UTF-8, got {text!r}")
        encoded = self._tokenizer.encode(text, add_special_tokens=begin)
        return np.array(encoded.ids, np.int32)

    def decode(self, tokens: Iterable[int], *, control: bool = False) -> str:
        """Text of tokens, with the names of control tokens if asked for."""
        ids = [int(token) for token in tokens]
        return self._tokenizer.decode(ids, skip_special_tokens=not control)

    def stream(self) -> Callable[[int | None], str]:
        """A function from each token of a text in turn to the text it completes.

        None ends the text: what is left of it are incomplete characters, each of which
        becomes U+FFFD as in `decode`.
        """
        # Their text, and what follows it, are those of the last tokens shown.
        window: list[int] = []
        shown = 0

        def step(token: int | None) -> str:
            nonlocal shown
            before = self.decode(window[:shown])
            if token is not None:
                window.append(int(token))
            text = self.decode(window)
            if len(text) <= len(before) or (
                token is not None and text.endswith("\ufffd")
            ):
                return ""
            del window[:shown]
            shown = len(window)
            return text[len(before) :]

        return step

    def chat(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Tokens of a conversation, up to where the model answers: int32 [tokens].

        Args:
          messages: each with a role ("system", "user" or "assistant") and its content.

        Raises:
          ValueError: the model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise ValueError("the model has no chat template")
        text = self._template.render(
            messages=list(messages), add_generation_prompt=True, **self._names
        )
        # The template names the token that begins a text where the model wants it.
        return self.encode(text, begin=False)

    def question(self, system: str | None, prompt: str) -> np.ndarray:
        """`chat` of a system prompt, if there is one, and one message of the user."""
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self.chat(messages)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a GGUF file, or of a directory with tokenizer.json.

    Raises:
      FileNotFoundError: nothing is there.
      NotImplementedError: it is of a kind that is not supported.
      ValueError: something is missing, or the files are damaged.
    """
    path = pathlib.Path(path)
    with errors_naming(path):
        if path.is_dir():
            return _from_directory(path)
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file {path}")
        fields = gguf.GGUFReader(path).fields
        prefix = "tokenizer."
        return from_metadata(
            {n: f.contents() for n, f in fields.items() if n.startswith(prefix)}
        )


def load_or_exit(path: str | os.PathLike, dtype: str) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer for a command line, which ends with what cannot be read."""
    try:
        return load_model(path, dtype=dtype), load_tokenizer(path)
    except (OSError, ValueError, NotImplementedError) as error:
        sys.exit(str(error))


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the entries `tokenizer.*` of a GGUF file describe."""

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, pre = get("model"), get("pre", "gpt-2")
    if kind != "gpt2":
        raise NotImplementedError(
            f"tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' (byte pairs)"
        )
    if pre not in PRE_TOKENIZERS:
        raise NotImplementedError(
            f"tokenizer.ggml.pre {pre!r} is not supported, only"
            f" {', '.join(PRE_TOKENIZERS)}"
        )
    tokens, types = get("tokens"), get("token_type")
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in get("merges")],
        ignore_merges=pre == "llama-bpe",
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    control = _of_type(tokens, types, gguf.TokenType.CONTROL)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in control]
    )
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(t, normalized=False)
            for t in _of_type(tokens, types, gguf.TokenType.USER_DEFINED)
        ]
    )
    begin, end = get("bos_token_id"), get("eos_token_id")
    if get("add_bos_token", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
        )
    ends = [tokenizer.token_to_id(name) for name in END_NAMES if name in control]
    ends += [get("eot_token_id"), end]
    named = {"bos_token": begin, "eos_token": end}
    names = {name: tokens[i] for name, i in named.items() if i is not None}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(tokenizer, ends, template, names)


def _of_type(tokens: list[str], types: list[int], kind: int) -> list[str]:
    return [token for token, own in zip(tokens, types, strict=True) if own == kind]


def _from_directory(path: pathlib.Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {path}")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def entries(name: str) -> dict[str, Any]:
        found = path / name
        return json.loads(found.read_text()) if found.is_file() else {}

    options = entries("tokenizer_config.json")
    names = {}
    for name in ("bos_token", "eos_token"):
        token = options.get(name)
        if token is not None:
            names[name] = token["content"] if isinstance(token, dict) else token
    named = [*END_NAMES, names.get("eos_token", END_NAMES[0])]
    ends = [tokenizer.token_to_id(name) for name in named]
    given = entries("generation_config.json").get("eos_token_id")
    ends += given if isinstance(given, list) else [given]
    template = options.get("chat_template")
    apart = path / "chat_template.jinja"
    if apart.is_file():
        template = apart.read_text()
    return Tokenizer(tokenizer, ends, template, names)


def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise ValueError(f"the chat template refuses the messages: {message}")

    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)
