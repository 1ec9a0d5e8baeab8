"""The forward kernel on 2,000 random problems against float64.

Cheap problems of many kinds: several can share a program, and none needs one of its own
to be compared with. `forward_test` has fewer and larger ones.
"""

import random
from typing import Any

import pytest
import specs
from gpu_helpers import assert_result, run_kernels

BATCHES, PROBLEMS = 100, 20

# Multiples of 8 are what the Hopper kernel takes.
COMMON_WIDTHS = (64, 64, 128, 128, 32, 80, 96, 192, 256)


def sizes(rng: random.Random) -> dict[str, int]:
    """Batch, lengths and heads of one of the kinds of problems."""
    kv_heads = rng.choice((1, 1, 2, 3))
    few = {"kv_heads": kv_heads, "heads": kv_heads * rng.choice((1, 2, 3, 4, 8))}
    match rng.choice(("square", "square", "keys", "keys", "tiles", "tiny", "blocks")):
        case "square":  # a few tiles of both
            return few | {
                "batch": rng.randint(1, 2),
                "query_length": rng.randint(1, 330),
                "key_length": rng.randint(1, 450),
            }
        case "keys":  # few queries, packed with their group; keys worth splitting
            return few | {
                "batch": rng.randint(1, 2),
                "query_length": rng.choice((1, 2, 5, 16, rng.randint(1, 40))),
                "key_length": rng.randint(300, 2500),
            }
        case "tiles":  # masked and clean tiles, several blocks of queries
            return {
                "batch": 1,
                "query_length": rng.randint(300, 900),
                "key_length": rng.randint(500, 1200),
                "kv_heads": 1,
                "heads": rng.randint(1, 2),
            }
        case "tiny":
            return few | {
                "batch": rng.randint(1, 4),
                "query_length": rng.randint(1, 17),
                "key_length": rng.randint(1, 140),
            }
        case _:  # more blocks than thread blocks
            return {
                "batch": rng.randint(6, 9),
                "query_length": rng.randint(1, 40),
                "key_length": rng.randint(1, 140),
                "kv_heads": 15,
                "heads": rng.choice((15, 30, 45)),
            }


def random_spec(seed: int) -> specs.Spec:
    """Any sizes, widths, dtype and mask."""
    rng = random.Random(f"cheap {seed}")
    size = sizes(rng)
    batch, rows, keys = size["batch"], size["query_length"], size["key_length"]
    widths = [rng.choice((*COMMON_WIDTHS, 8 * rng.randint(1, 32))) for _ in range(2)]
    if rng.random() < 0.6:
        widths[1] = widths[0]
    if rng.random() < 0.15:
        widths = [rng.randint(1, 256) for _ in widths]
    # Enough outputs that their largest error says something.
    while widths[1] * batch * rows * size["heads"] < 256:
        widths[1] = min(256, 2 * widths[1])
        size["heads"] += size["kv_heads"]
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["is_causal"] = True
    if rng.random() < 0.2:
        options["causal_alignment"] = "top_left"
    if rng.random() < 0.3:
        options["window_size"] = tuple(
            rng.choice((None, 0, rng.randint(0, 50), rng.randint(0, keys)))
            for _ in range(2)
        )
    for name, length in (("query_lengths", rows), ("key_lengths", keys)):
        if rng.random() < 0.25:
            options[name] = tuple(
                rng.choice((rng.randint(0, length + 5), length, 1))
                for _ in range(batch)
            )
    dtype = rng.choice(specs.DTYPES)
    return specs.Spec(
        **size, head_dim=widths[0], value_dim=widths[1], dtype=dtype, **options
    )


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_problems(batch: int) -> None:
    seeds = range(PROBLEMS * batch, PROBLEMS * (batch + 1))
    chosen = [random_spec(seed) for seed in seeds]
    problems = [
        (spec.arrays(seed), spec.options)
        for seed, spec in zip(seeds, chosen, strict=True)
    ]
    failures = []
    for spec, problem, result in zip(
        chosen, problems, run_kernels(problems), strict=True
    ):
        try:
            assert_result(result, problem)
        except AssertionError as error:
            failures.append(f"{spec}: {error}")
    assert not failures, "\n".join(failures)
