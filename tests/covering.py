"""Cases that cover every pair of values of any two factors: options, types, widths.

Lives here: the factors of `mha`, `mha_varlen` and `mha_qkvpacked`, which pairs do not
go together, and the greedy choice of cases. `covering_problems` makes problems of them.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

Factors = dict[str, tuple[Any, ...]]
Case = dict[str, Any]
Pair = frozenset[tuple[str, int]]

WIDTHS = (
    (64, 64),
    (128, 128),
    (96, 96),
    (80, 80),
    (40, 24),
    (33, 17),
    (256, 256),
    (192, 128),
)

KERNEL_FACTORS: Factors = {
    "kernels": ("by device", "sm80"),
    "form": ("mha", "packed", "varlen"),
    "dtype": ("bfloat16", "float16"),
    "precision": (None,),
    "widths": WIDTHS,
    "sizes": ((96, 96), (150, 170), (1, 300), (200, 70)),
    "heads": ((4, 4), (4, 2), (3, 1)),
    "place": (
        "anywhere",
        "causal",
        "causal top left",
        "window",
        "window causal",
        "window top left",
    ),
    "lengths": ("none", "query", "key", "both"),
    "segments": ("none", "sorted", "in any order"),
    "softcap": (None, 1.5),
    "sinks": ("none", "heads", "batch"),
    "bias": (
        "none",
        "slopes",
        "slopes of batch",
        "slopes with gradient",
        "full",
        "keys",
        "rows",
    ),
    "mask": ("none", "full", "rows"),
    "dropout": (0.0, 0.25),
    "deterministic": (False, True),
    "dlse": (False, True),
    "scale": (None, 0.2),
}
"""What the kernels of 16 bits take."""

F32_FACTORS: Factors = {
    **KERNEL_FACTORS,
    "dtype": ("float32",),
    "precision": (None, "highest", "tf32"),
    "widths": WIDTHS[:6],
}
"""What the kernels of float32 take."""

ALL_FACTORS: Factors = {
    **KERNEL_FACTORS,
    "dtype": ("bfloat16", "float16", "float32"),
    "precision": F32_FACTORS["precision"],
    "sizes": ((60, 60), (50, 90)),
}
"""All of it in any combination, and what jnp runs."""


def together(a: tuple[str, Any], b: tuple[str, Any]) -> bool:
    """Whether a value of a factor and one of another are in one call."""
    return _allows(a, b) and _allows(b, a)


def _allows(a: tuple[str, Any], b: tuple[str, Any]) -> bool:
    """Whether the first is no reason against the second."""
    other, value = b
    match a:
        case ("form", "varlen"):  # has no batch
            return value == "none" or (
                other != "lengths"
                and b not in (("sinks", "batch"), ("bias", "slopes of batch"))
            )
        case ("form", "packed"):  # one array of one length and width
            return other not in ("sizes", "widths") or value[0] == value[1]
        case ("precision", "highest" | "tf32"):
            return other != "dtype" or value == "float32"
    return True


def pairs(factors: Factors) -> set[Pair]:
    """All pairs that go together, each of two (factor, index of its value)."""
    found = set()
    for (f, fs), (g, gs) in itertools.combinations(factors.items(), 2):
        for (i, a), (j, b) in itertools.product(enumerate(fs), enumerate(gs)):
            if together((f, a), (g, b)):
                found.add(frozenset(((f, i), (g, j))))
    return found


def pairs_of(case: Case, factors: Factors) -> Iterator[Pair]:
    """The pairs that a case covers."""
    named = [(name, factors[name].index(value)) for name, value in case.items()]
    return map(frozenset, itertools.combinations(named, 2))


def array(factors: Factors, seed: int) -> list[Case]:
    """Cases that cover all pairs: each begins with a pair that none has covered yet.

    The other factors, in random order, take the value that covers most new pairs.
    """
    rng = random.Random(f"covering {seed}")
    possible = pairs(factors)
    left, cases = sorted(possible, key=sorted), []
    rng.shuffle(left)
    missing = set(left)
    for first in left:
        if first not in missing:
            continue
        chosen = dict(first)
        others = [name for name in factors if name not in chosen]
        rng.shuffle(others)
        for name in others:
            best: list[int] = []
            most = -1
            for i in range(len(factors[name])):
                new = [frozenset(((name, i), given)) for given in chosen.items()]
                if not possible.issuperset(new):
                    continue
                count = len(missing.intersection(new))
                if count > most:
                    best, most = [], count
                if count == most:
                    best.append(i)
            chosen[name] = rng.choice(best)
        case = {name: factors[name][chosen[name]] for name in factors}
        missing.difference_update(pairs_of(case, factors))
        cases.append(case)
    return cases


def several(factors: Factors, count: int) -> list[Case]:
    """`count` different cases, of as many arrays as that takes, the last one cut."""
    found: dict[tuple[Any, ...], Case] = {}
    for seed in itertools.count():
        for case in array(factors, seed):
            found.setdefault(tuple(case.values()), case)
        if len(found) >= count:
            return list(found.values())[:count]
    raise AssertionError


BATCHES = 24
ARRAYS = ((KERNEL_FACTORS, 960), (F32_FACTORS, 384), (ALL_FACTORS, 192))
"""Factors, and how many cases cover them."""


@functools.cache
def cases() -> tuple[Case, ...]:
    """Every case, in the order of `ARRAYS`."""
    return tuple(itertools.chain(*itertools.starmap(several, ARRAYS)))


def batch(number: int) -> Sequence[tuple[int, Case]]:
    """The cases of one of `BATCHES` programs, all for the same kernels, numbered.

    The first half of the programs is for the kernels that the device chooses.
    """
    half = BATCHES // 2
    wanted = KERNEL_FACTORS["kernels"][number // half]
    own = [(i, case) for i, case in enumerate(cases()) if case["kernels"] == wanted]
    return own[number % half :: half]
