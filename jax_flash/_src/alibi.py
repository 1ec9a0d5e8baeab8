"""Linear biases by distance: how a call names them without a bias array.

Lives here: the type that `mha` takes as `bias`. The specification adds them in
`scores.logits`.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi:
    """A bias of `-slope * |p - s|` for the query aligned with key p, and key s.

    A pytree, so that it may be an argument of transformed functions.

    Attributes:
      slopes: floating [N], or [..., N] broadcastable to [*B, N].
    """

    slopes: Any


def alibi(slopes: Any) -> Alibi:
    """Attention with linear biases, for the argument `bias` of `mha`.

    Adds `-slopes[n] * |p - s|` to the logits of head n, where p is the key that the
    query is aligned with (as for causal masks and windows, by the lengths where given)
    and s the key. No array of biases is made. Differentiable in the slopes.

    Args:
      slopes: floating [N], or [..., N] broadcastable to [*B, N].

    Returns:
      A value for `bias`.

    Raises:
      ValueError: slopes is None. What else is wrong about them `mha` says.

    Reference: Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear
    Biases Enables Input Length Extrapolation", arXiv:2108.12409.
    """
    if slopes is None:
        raise ValueError("slopes must be an array, got None")
    return Alibi(slopes)


def slopes_of(bias: Alibi) -> Any:
    """The slopes of a bias that is given.

    A tree whose leaves were replaced may have None for them, which is not no bias.
    """
    if bias.slopes is None:
        raise ValueError("bias=alibi(slopes) must have slopes, got None")
    return bias.slopes
