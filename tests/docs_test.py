"""The Python blocks of docs/: signatures are those of the code, examples run."""

import ast
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import pytest

import jax_flash

DOCS = pathlib.Path(__file__).parent.parent / "docs"
NAMES = {
    "api.md": lambda: {
        "functools": __import__("functools"),
        "jax": jax,
        "jnp": jnp,
        "jax_flash": jax_flash,
        "backends": jax_flash.backends,
        "layer": jax_flash.mha,
        "logits": jnp.ones((2, 50)),
        "key": jax.random.key(0),
        "q": jnp.ones((1, 16, 4, 16)),
        "pieces": [(jnp.ones((1, 8, 2, 16)),) * 2] * 2,
        "outs": [jnp.ones((1, 8, 4, 16))] * 2,
        "lses": [jnp.ones((1, 4, 8))] * 2,
        "cache": jax_flash.PagedKVCache.create(1024, 64, 1, 8, batch=2, max_pages=64),
    },
    "flax.md": lambda: {
        "nnx": flax.nnx,
        "jnp": jnp,
        "jax_flash": jax_flash,
        "x": jnp.ones((1, 8, 512)),
        "lengths": jnp.array([5]),
    },
}
"""What the examples of a page take for granted."""


def blocks(page: str, *, signatures: bool) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    found = [block for block in found if not block.startswith(">>>")]
    return [
        block for block in found if ("*, " in block or "*,\n" in block) == signatures
    ]


@pytest.fixture
def _backends() -> Iterator[None]:
    """Removes what an example registers."""
    before = jax_flash.backends.names()
    yield
    for name in set(jax_flash.backends.names()) - set(before):
        jax_flash.backends.unregister(name)


@pytest.mark.usefixtures("_backends")
@pytest.mark.parametrize("page", NAMES)
def test_examples(page: str) -> None:
    examples = blocks(page, signatures=False)
    assert examples
    for example in examples:
        exec(compile(example, page, "exec"), NAMES[page]())


def signatures() -> dict[str, str]:
    """The signatures in api.md by name, without those that refer to another one."""
    text = re.sub(r"#.*", "", "\n".join(blocks("api.md", signatures=True)))
    found = re.findall(r"^(\w+)(\([^()]*(?:\(\)[^()]*)*\))", text, re.MULTILINE)
    return {name: text for name, text in found if "<" not in text}


@pytest.mark.parametrize("name", signatures())
def test_signature(name: str) -> None:
    definition: Any = ast.parse(f"def f{signatures()[name]}: ...").body[0]
    scope: dict[str, Any] = {}
    exec(ast.unparse(definition), scope)

    def parameters(fun: Any) -> list[tuple[str, Any, Any]]:
        each = inspect.signature(fun).parameters.values()
        return [(x.name, x.kind, x.default) for x in each]

    assert parameters(scope["f"]) == parameters(getattr(jax_flash, name))


def test_signatures_are_found() -> None:
    known = {
        "mha",
        "ring_mha",
        "ulysses_mha",
        "rope",
        "rope_append_kv",
        "rope_append_qkvpacked",
        "sample",
        "top_k",
        "rms_norm",
    }
    assert known <= set(signatures())
