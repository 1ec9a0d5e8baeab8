"""Who runs a call of `decode_mha`, for `explain`.

Lives here: the call as it is explained, without arrays, and what there is to say of it.
"""

import dataclasses
from typing import Any

import jax

from jax_flash._src import decode_call, decode_kernel, validate

PLATFORMS = {"cuda": ("cuda",), "xla": ()}
"""Where each implementation runs, () = everywhere."""

OPTIONS: dict[str, Any] = {
    "scale": None,
    "window_size": None,
    "softcap": None,
    "num_splits": None,
    "return_lse": False,
}
"""The options of `decode_mha` that are not arrays, with their defaults."""


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """One call of `decode_mha`.

    Attributes:
      config: what is static about it.
      operands: shapes and dtypes of the canonical operands by name.
    """

    config: decode_call.DecodeConfig
    operands: dict[str, jax.ShapeDtypeStruct]

    def __str__(self) -> str:
        arrays = (
            f"{name} {x.dtype}[{','.join(map(str, x.shape))}]"
            for name, x in self.operands.items()
        )
        config = self.config
        options = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(config)
            if field.name not in ("present", "implementations")
            and (value := getattr(config, field.name)) != field.default
        ]
        return "decode_mha of " + ", ".join([*arrays, *options])


def call_of(arrays: dict[str, Any], options: dict[str, Any]) -> DecodeCall:
    """The call with these arguments of `decode_mha`, arrays possibly only types.

    Raises:
      ValueError, NotImplementedError: as `decode_mha` would.
    """
    options = {**OPTIONS, **options}
    validate.flag("return_lse", options["return_lse"])
    configs = []
    # Numbers are looked at; what has a shape may be no more than a type.
    numbers = {name: x for name, x in arrays.items() if not hasattr(x, "shape")}

    def canonical(given: dict[str, Any]) -> dict[str, jax.Array]:
        every = dict.fromkeys(decode_call.OPERANDS) | numbers | given
        config, operands = decode_call.check_call(every, options)
        configs.append(config)
        return operands

    given = {name: x for name, x in arrays.items() if hasattr(x, "shape")}
    operands = jax.eval_shape(canonical, given)
    config = configs[0]
    return DecodeCall(config, {name: operands[name] for name in config.present})


def reasons(call: DecodeCall) -> dict[str, str | None]:
    """Why each implementation that may run the call cannot, or None."""
    known = {
        "cuda": decode_kernel.cuda_supports(call.config, call.operands),
        "xla": None,
    }
    return {name: known[name] for name in call.config.implementations}


def details(call: DecodeCall) -> dict[str, str]:
    """How the kernel would run a call that it supports."""
    text = decode_kernel.splits_text(call.config, call.operands)
    return {"cuda": f"{text}; gradients by jnp"}
